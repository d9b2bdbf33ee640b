"""Does T. stddev predict the student? Correlation of the two over augmentations, and the scatter plot of it.

Wang et al., "What Makes a 'Good' Data Augmentation in Knowledge Distillation", NeurIPS 2022, arXiv 2012.02909.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dalikd.pipelines.files import read_json, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

__all__ = ["Coefficient", "Correlation", "Point", "Spread", "correlate", "draw", "intervals", "plot", "read_points"]

FEWEST_POINTS = 3
#: for an interval: fewer points have too few different resamples
FEWEST_RESAMPLED = 5


class Coefficient(NamedTuple):
    """A correlation coefficient and its two-sided p-value."""

    coefficient: float
    p_value: float


class Correlation(NamedTuple):
    """Linear correlation, and two of ranks."""

    pearson: Coefficient
    spearman: Coefficient
    kendall: Coefficient


class Point(NamedTuple):
    """One augmentation: its T. stddev and the test loss of the student trained with it."""

    da: str
    t_stddev: float
    s_test_loss: float


class Spread(NamedTuple):
    """How sure a point's values are: half the length of its error bars, or None for no bar."""

    t_stddev: float | None = None
    s_test_loss: float | None = None


def correlate(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Pearson's, Spearman's and Kendall's (tau-b) coefficient of x and y, with p-values.

    Raises:
        ValueError: different lengths, fewer than 3 points, a value that is not finite, or all values of one side equal.
    """
    from scipy import stats

    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} values and y {len(y)}: give pairs")
    if len(x) < FEWEST_POINTS:
        raise ValueError(f"a correlation of {len(x)} points says nothing: give at least {FEWEST_POINTS}")
    for name, values in (("x", x), ("y", y)):
        _check_values(name, values)
    tests: tuple[Any, ...] = (stats.pearsonr(x, y), stats.spearmanr(x, y), stats.kendalltau(x, y))
    return Correlation(*(Coefficient(float(test[0]), float(test[1])) for test in tests))


def _check_values(name: str, values: Sequence[float]) -> None:
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"{name}[{index}] is {value}: give finite numbers")
    if min(values) == max(values):
        raise ValueError(f"every value of {name} is {values[0]}: a correlation needs values that differ")


def intervals(
    x: Sequence[float], y: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """How far each coefficient may be from that of more points of the kind: percentile bootstrap intervals.

    Points are drawn anew with replacement, as many as there are (Efron, "Bootstrap Methods: Another Look at the
    Jackknife", 1979). Resamples without a coefficient, in which all values of one side are equal, are left out. Not
    BCa: its acceleration does not exist where all points lie on one line or in one order, as few points often do.

    Args:
        x: of each point.
        y: of each point.
        confidence: share of the resamples' coefficients that an interval holds.
        resamples: how many.
        seed: of the draws; the same one gives the same intervals.

    Returns:
        lowest and highest value by the coefficient's name; nothing of fewer than 5 points.

    Raises:
        ValueError: as `correlate`; or the confidence lies not between 0 and 1.
    """
    import numpy as np

    correlate(x, y)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a share between 0 and 1, such as 0.95")
    if (count := len(x)) < FEWEST_RESAMPLED:
        return {}
    # how often each point is drawn, [resamples, points]: every coefficient is a function of it alone
    drawn = np.random.default_rng(seed).multinomial(count, [1 / count] * count, resamples).astype(float)
    sides = [np.asarray(side, float) for side in (x, y)]
    signs = [np.sign(side[:, None] - side) for side in sides]

    def pearson(a: Any, b: Any) -> Any:
        a, b = (side - (drawn * side).sum(-1, keepdims=True) / count for side in (a, b))
        return (drawn * a * b).sum(-1) / np.sqrt((drawn * a * a).sum(-1) * (drawn * b * b).sum(-1))

    def pairs(of_each: Any) -> Any:
        return ((drawn @ of_each) * drawn).sum(-1)

    ranks = [drawn @ (sign > 0).T + drawn @ (sign == 0).T / 2 for sign in signs]  # less a half, which all have
    with np.errstate(invalid="ignore", divide="ignore"):
        ties = np.sqrt(pairs(abs(signs[0])) * pairs(abs(signs[1])))
        found = (pearson(*(side[None] for side in sides)), pearson(*ranks), pairs(signs[0] * signs[1]) / ties)
    # a side whose values are all equal leaves rounding in the place of 0
    differ = np.logical_and(*(pairs(abs(sign)) > 0 for sign in signs))
    ends = ((1 - confidence) / 2, (1 + confidence) / 2)
    low_high = (np.quantile(np.clip(values[differ], -1, 1), ends).tolist() for values in found)
    return {name: (low, high) for name, (low, high) in zip(Correlation._fields, low_high, strict=True)}


def read_points(path: str | Path) -> list[Point]:
    """Read {"points": [{"da": name, "t_stddev": number, "s_test_loss": number}, ...]}; other keys are ignored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, no list of points, or a point with a missing or unusable value.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, give a JSON file of points")
    content = read_json(path)
    points = content.get("points") if isinstance(content, dict) else None
    if not isinstance(points, list):
        raise ValueError(f'{path}: no list "points", the file has to be {{"points": [{{"da": ...}}, ...]}}')
    return [_read_point(f"{path}: points[{index}]", point) for index, point in enumerate(points)]


def _read_point(place: str, point: Any) -> Point:
    if not isinstance(point, dict):
        raise ValueError(f"{place} is not an object: give da, t_stddev and s_test_loss")
    name = point.get("da")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place}: da is {name!r}, give the augmentation's name")
    return Point(name, _read_number(place, point, "t_stddev"), _read_number(place, point, "s_test_loss"))


def _read_number(place: str, point: dict[str, Any], key: str) -> float:
    if key not in point:
        raise ValueError(f"{place}: {key} is missing")
    value = point[key]
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{place}: {key} is {value!r:.40}, give a finite number")
        return float(value)
    except OverflowError:
        raise ValueError(f"{place}: {key} has too many digits, give a finite number") from None


def plot(
    points: Sequence[Point],
    correlation: Correlation,
    path: str | Path,
    title: str = "",
    spreads: Sequence[Spread] = (),
    label: str | None = None,
) -> None:
    """Draw a scatter plot of the points, T. stddev to the right and student test loss upwards, into a PNG file.

    Args:
        points: to be drawn.
        correlation: of them, which is written above.
        path: of the file.
        title: of the plot.
        spreads: error bars, one for each point, or none at all.
        label: of the axis upwards; default: of the test loss.

    Raises:
        ValueError: no points, or another number of error bars.
        NotADirectoryError: the folder of path does not exist.
    """
    path = Path(path)
    if not points:
        raise ValueError("there are no points to plot: give at least one")
    if len(spreads) not in (0, len(points)):
        raise ValueError(f"{len(points)} points and {len(spreads)} error bars: give one for each, or none")
    if not path.parent.is_dir():
        raise NotADirectoryError(f"{path.parent}: no such folder, make it first")
    figure = draw(points, correlation, title, spreads, label)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160))


def draw(
    points: Sequence[Point],
    correlation: Correlation,
    title: str = "",
    spreads: Sequence[Spread] = (),
    label: str | None = None,
) -> "Figure":
    """Return the figure that `plot` saves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # draws in memory, whatever backend the process uses
    axes = figure.subplots()
    axes.set(xlabel="T. stddev", ylabel=label or "Student test loss")
    axes.set_title(title, pad=24)
    axes.margins(0.12)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for index, point in enumerate(points):
        x, y, color = point.t_stddev, point.s_test_loss, f"C{index % 10}"
        if spreads:
            across, up = spreads[index]
            axes.errorbar(x, y, yerr=up, xerr=across, fmt="none", ecolor=color, elinewidth=1.0, alpha=0.35, zorder=2)
        axes.scatter(x, y, s=52, color=color, edgecolors="white", alpha=0.9, zorder=3)
    _write_coefficients(axes, correlation)
    figure.canvas.draw()  # fixes the layout: labels are placed in pixels
    figure.set_layout_engine("none")
    _place_labels(axes, points, spreads)
    return figure


def _write_coefficients(axes: "Axes", correlation: Correlation) -> None:
    """Write the coefficients between title and axes, where no point can lie."""
    parts = [f"{name.capitalize()} {_format(value)}" for name, value in correlation._asdict().items()]
    axes.annotate(
        "     ".join(parts),
        (0.5, 1.02),
        xycoords="axes fraction",
        horizontalalignment="center",
        verticalalignment="bottom",
        fontsize=8.5,
        color="0.25",
    )


def _format(value: Coefficient) -> str:
    p_value = "p < 0.0001" if value.p_value < 0.0001 else f"p = {value.p_value:.4f}"
    return f"{value.coefficient:.4f} ({p_value})"


def _place_labels(axes: "Axes", points: Sequence[Point], spreads: Sequence[Spread]) -> None:
    """Write every name beside its point, where it covers least of the points, their bars and the names before it."""
    taken = [
        box
        for index, point in enumerate(points)
        for box in _boxes(axes, point, spreads[index] if spreads else Spread())
    ]
    for index, point in enumerate(points):
        candidates = [_label(axes, point, f"C{index % 10}", *place) for place in _label_places()]
        costs = [_cost(label.get_window_extent(), taken, axes.bbox) for label in candidates]
        best = candidates[costs.index(min(costs))]
        for label in candidates:
            if label is not best:
                label.remove()
        taken.append(best.get_window_extent())


def _boxes(axes: "Axes", point: Point, spread: Spread) -> list["Bbox"]:
    """Pixels that a point and its error bars take."""
    from matplotlib.transforms import Bbox

    x, y = point.t_stddev, point.s_test_loss
    across, up = spread.t_stddev or 0.0, spread.s_test_loss or 0.0
    left, bottom = axes.transData.transform((x - across, y - up))
    right, top = axes.transData.transform((x + across, y + up))
    middle_x, middle_y = axes.transData.transform((x, y))
    boxes = [Bbox.from_bounds(middle_x - 5, middle_y - 5, 10, 10)]
    boxes += [Bbox.from_extents(left, middle_y - 1, right, middle_y + 1)] if across else []
    return boxes + ([Bbox.from_extents(middle_x - 1, bottom, middle_x + 1, top)] if up else [])


def _label_places() -> list[tuple[float, float, str, str]]:
    """Offsets in points and alignments, the preferred first."""
    places = []
    for distance in (7.0, 14.0, 22.0):
        near = distance * 0.7
        places += [(distance, 0.0, "left", "center"), (-distance, 0.0, "right", "center")]
        places += [(0.0, distance, "center", "bottom"), (0.0, -distance, "center", "top")]
        places += [(near, near, "left", "bottom"), (near, -near, "left", "top")]
        places += [(-near, near, "right", "bottom"), (-near, -near, "right", "top")]
    return places


def _label(axes: "Axes", point: Point, color: str, right: float, up: float, horizontal: Any, vertical: Any) -> Any:
    from matplotlib.colors import to_rgb

    return axes.annotate(
        point.da,
        (point.t_stddev, point.s_test_loss),
        xytext=(right, up),
        textcoords="offset points",
        horizontalalignment=horizontal,
        verticalalignment=vertical,
        fontsize=9,
        color=tuple(0.8 * part for part in to_rgb(color)),  # a little darker than its point: text is thin
    )


def _cost(label: "Bbox", taken: Sequence["Bbox"], inside: "Bbox") -> float:
    """Square pixels of `label` that cover something or stick out of the axes."""
    from matplotlib.transforms import Bbox

    overlaps = (Bbox.intersection(label, other) for other in taken)
    covered = sum(overlap.width * overlap.height for overlap in overlaps if overlap is not None)
    shown = Bbox.intersection(label, inside)
    area = label.width * label.height
    return covered + area - (shown.width * shown.height if shown is not None else 0.0)
