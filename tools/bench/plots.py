"""The one plot of the benchmarks: horizontal bars, whiskers from the lowest to the highest repetition."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["bars"]

# Okabe and Ito's colours, which stay apart for the colour-blind; the first is ours
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def bars(
    path: Path,
    labels: Sequence[str],
    values: Sequence[Mapping[str, Any]],
    title: str,
    unit: str,
    series: Sequence[str] | None = None,
) -> None:
    """Draw one bar a row, top first, with its median written beside it.

    Args:
        path: PNG file.
        labels: one a row.
        values: `record.summary` of each row.
        title: of the plot.
        unit: of the axis.
        series: rows of one name share a colour; default, and where no two rows share a name: one colour.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(series or ()))
    shared = 0 < len(names) < len(labels)
    colors = [_COLORS[names.index(name) % len(_COLORS)] for name in series or ()] if shared else _COLORS[0]
    medians = [value["median"] for value in values]
    below = [value["median"] - value["low"] for value in values]
    above = [value["high"] - value["median"] for value in values]
    figure = Figure(figsize=(9, 1.5 + 0.36 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(labels))
    axes.barh(places, medians, height=0.72, color=colors)
    axes.errorbar(medians, places, xerr=(below, above), fmt="none", ecolor="#333333", elinewidth=1.2, capsize=3)
    _write_values(axes, values)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    # of the figure, not of the axes: these may be narrow beside long labels
    repetitions = values[0]["repetitions"]
    figure.supxlabel(f"{unit}  (median; whiskers: lowest and highest of {repetitions} repetitions)", fontsize=10)
    figure.suptitle(textwrap.fill(title, 110), x=0.01, ha="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _write_values(axes: Any, values: Sequence[Mapping[str, Any]]) -> None:
    """The medians, right of the whiskers, and room for them."""
    longest = max(value["high"] for value in values)
    for place, value in enumerate(values):
        median = value["median"]
        text = f"{median:,.0f}" if abs(median) >= 100 else f"{median:.3g}"
        axes.text(value["high"] + 0.01 * longest, place, text, va="center", fontsize=9)
    axes.set_xlim(0, 1.12 * longest)
