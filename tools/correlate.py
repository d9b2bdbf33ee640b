"""`dalikd correlate`: does T. stddev predict the students' test loss?"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple

from dalikd.kd.correlation import Correlation, Point, Spread, correlate, intervals, read_points
from dalikd.kd.correlation import plot as draw_plot
from dalikd.pipelines.data import FilePath
from dalikd.tools.cli import run_function
from dalikd.tools.summary import give_json
from dalikd.trainers.augmentation import picks_by_student
from dalikd.trainers.runs import (
    Run,
    check_comparable,
    check_images,
    find_runs,
    is_evaluated,
    measured_for,
    read_measurement,
)
from dalikd.trainers.tracking import check_writable


def correlation_lines(result: Correlation, found: dict[str, tuple[float, float]], confidence: float) -> list[str]:
    """One line for each coefficient, with its interval where there is one."""
    level = f"{100 * confidence:g} % interval"
    return [
        f"{name:<9}{value.coefficient:8.4f}   p = {value.p_value:.4g}"
        + ("   {} {:.4f} to {:.4f}".format(level, *found[name]) if found else "")
        for name, value in result._asdict().items()
    ]


def points_of_runs(
    runs: Sequence[Run], measured: Sequence[Path], value: Literal["loss", "accuracy"], epoch: Literal["last", "best"]
) -> tuple[list[Point], list[Spread]]:
    """A point for each augmentation, the mean over its seeds, and its error bars: the standard error of T. stddev and
    the standard deviation over the seeds.

    Raises:
        ValueError: the runs cannot be compared with each other, or not with what was measured.
    """
    if bare := next((run.folder for run in runs if not is_evaluated(run.results)), None):
        raise ValueError(
            f"{bare} was not evaluated, it had no labelled images: leave it out, or distil it with --data.val_root and "
            "a folder of them"
        )
    check_comparable(runs)
    rows = _rows(runs, measured)
    by_name: dict[str, dict[Any, Run]] = {}
    for run in runs:
        name = str(run.results.get("augmentation"))
        _check_measured(run, name, rows)
        other = by_name.setdefault(name, {}).setdefault(run.results["seed"], run)
        if other is not run:
            raise ValueError(f"{other.folder} and {run.folder} are both {name} with the same seed: leave one out")
    points, spreads = [], []
    for name, seeds in by_name.items():
        row = rows[name].row
        vals = [run.results[epoch]["val"] for run in seeds.values()]
        found = [val["loss"] if value == "loss" else 100 * val["top1"] for val in vals]
        points.append(Point(name, row["stddev"], mean(found)))
        spreads.append(Spread(row["stderr"], stdev(found) if len(found) > 1 else None))
    return points, spreads


class _Measured(NamedTuple):
    path: Path
    report: dict[str, Any]
    row: dict[str, Any]  # of one augmentation


def _rows(runs: Sequence[Run], measured: Sequence[Path]) -> dict[str, _Measured]:
    rows: dict[str, _Measured] = {}
    for path in measured:
        report = read_measurement(path)
        check_images({str(path): report, **{str(run.folder): run.results for run in runs}}, "measurement and runs")
        for row in report["results"]:
            if (name := row["augmentation"]) in rows:
                raise ValueError(f"{name} was measured in {rows[name].path} and in {path}: name one of them")
            if row["stddev"] is None:
                raise ValueError(f"{path}: {name} has too few windows for a T. stddev: measure more --epochs")
            rows[name] = _Measured(path, report, row)
    return rows


def _check_measured(run: Run, name: str, rows: dict[str, _Measured]) -> None:
    """Raises ValueError: the run's augmentation was not measured, or otherwise than the run has it."""
    if name not in rows:
        files = ", ".join(dict.fromkeys(str(one.path) for one in rows.values()))
        raise ValueError(f"{files}: no T. stddev of {name}, which {run.folder} has: measure it, or leave the run out")
    path, report, _ = rows[name]
    fault, scorer = measured_for(run, report), report.get("student")
    if not fault and picks_by_student(name) and scorer != run.results["model"]:
        fault = f"{name} was picked by the student {scorer}, and {run.folder} trains {run.results['model']}"
    if fault:
        raise ValueError(f"{path}: {fault}: measure what the runs do")


def run(
    files: list[FilePath],
    measure: list[FilePath] | None = None,
    value: Literal["loss", "accuracy"] = "loss",
    epoch: Literal["last", "best"] = "last",
    confidence: float = 0.95,
    plot: Path | None = None,
    json: Path | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Correlate T. stddev with the students' test loss over augmentations: Pearson, Spearman, Kendall, with p-values
    and percentile bootstrap intervals.

    Args:
        files: with --measure run folders of `dalikd distill`, or folders that hold them, such as runs/students/*; they
            differ in augmentation and seed alone. Without it a JSON file {"points": [{"da": name, "t_stddev": number,
            "s_test_loss": number}, …]}.
        measure: what `dalikd measure --json FILE` wrote, of the runs' teacher; may be repeated.
        value: loss, or accuracy (top1), of the runs' students; the mean over the seeds of each augmentation.
        epoch: last, or best: the one with the highest top1 on the validation images themselves, which flatters it.
        confidence: of the intervals.
        plot: PNG file for the scatter plot.
        json: JSON file for the coefficients, - for stdout: {"pearson": [coefficient, p], …} and "intervals",
            {"pearson": [low, high], …}.
        title: of the plot.
    """
    if plot is not None:
        check_writable("--plot", plot)
    read, spreads = _read([*map(Path, files)], [*map(Path, measure or [])], value, epoch)
    x, y = [point.t_stddev for point in read], [point.s_test_loss for point in read]
    result, found = correlate(x, y), intervals(x, y, confidence)
    print("\n".join(correlation_lines(result, found, confidence)))
    if found:
        print(f"intervals: percentile bootstrap over the {len(read)} points, 10,000 resamples")
    else:
        print(f"no intervals: {len(read)} points are too few to be drawn anew, give at least 5")
    content: dict[str, Any] = {name: list(value) for name, value in result._asdict().items()}
    content |= {"intervals": {name: list(ends) for name, ends in found.items()}, "confidence": confidence}
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        draw_plot(read, result, plot, title, spreads, "Student top1 (%)" if value == "accuracy" else None)
        print(f"plot: {plot}")
    give_json(json, content)
    return content


def _read(
    files: Sequence[Path], measured: Sequence[Path], value: Literal["loss", "accuracy"], epoch: Literal["last", "best"]
) -> tuple[list[Point], list[Spread]]:
    if not measured:
        if len(files) != 1 or files[0].is_dir():
            raise ValueError(
                "run folders need --measure FILE, which dalikd measure --json FILE wrote; without it name one JSON "
                "file of points"
            )
        if (value, epoch) != ("loss", "last"):
            raise ValueError("--value and --epoch choose out of run folders: give these with --measure FILE")
        return read_points(files[0]), []
    found = find_runs(files)
    print("".join(f"left out: {words}\n" for words in found.left_out), end="")
    points, spreads = points_of_runs(found.runs, measured, value, epoch)
    seeds = sorted({run.results["seed"] for run in found.runs})
    print(
        f"{len(points)} augmentations, {len(found.runs)} runs, seeds {', '.join(map(str, seeds))}: T. stddev and the "
        f"students' {value} of the {epoch} epoch, mean over the seeds"
    )
    return points, spreads


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("correlate", run, argv, lists=("files", "measure"), positional=True)


if __name__ == "__main__":
    main()
