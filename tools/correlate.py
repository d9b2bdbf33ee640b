"""`dalikd correlate`: does T. stddev predict the students' test loss?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalikd.kd.correlation import Correlation, correlate, read_points
from dalikd.kd.correlation import plot as draw_plot
from dalikd.tools.cli import run_function
from dalikd.tools.report import give_json
from dalikd.trainers.tracking import check_writable


def correlation_lines(result: Correlation) -> list[str]:
    """One line for each coefficient."""
    return [f"{name:<9}{value.coefficient:8.4f}   p = {value.p_value:.4g}" for name, value in result._asdict().items()]


def run(points: Path, plot: Path | None = None, json: Path | None = None, title: str = "") -> dict[str, Any]:
    """Correlate T. stddev with the students' test loss over augmentations: Pearson, Spearman, Kendall, with p-values.

    Args:
        points: JSON file {"points": [{"da": name, "t_stddev": number, "s_test_loss": number}, …]}.
        plot: PNG file for the scatter plot.
        json: JSON file for the coefficients, - for stdout, {"pearson": [coefficient, p], …}.
        title: of the plot.
    """
    if plot is not None:
        check_writable("--plot", plot)
    read = read_points(points)
    result = correlate([point.t_stddev for point in read], [point.s_test_loss for point in read])
    print("\n".join(correlation_lines(result)))
    content = {name: list(value) for name, value in result._asdict().items()}
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        draw_plot(read, result, plot, title)
        print(f"plot: {plot}")
    give_json(json, content)
    return content


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("correlate", run, argv, positional=True)


if __name__ == "__main__":
    main()
