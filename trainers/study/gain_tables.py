"""Where a study's gains come from, to read, to compute with and to look at."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dalikd.trainers.study.gains import FACTORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_gains", "gains_csv", "gains_markdown"]

_CELL = ("method", "augmentation", "epoch_factor")
_COLORS = {"method": "#0072B2", "augmentation": "#E69F00", "length": "#009E73"}  # Okabe and Ito's: told apart by all
_HATCHES = {"method": "", "augmentation": "////", "length": "...."}  # and in print


def gains_markdown(gains: Sequence[Mapping[str, Any]], plot: str | None = None) -> str:
    """The section "Where the gains come from"; nothing where a study varies nothing.

    Args:
        gains: as `gains` gives them.
        plot: the path of the plot, if there is one.
    """
    split = [pair for pair in gains if pair["factors"]]
    if not split:
        return ""
    parts = ["## Where the gains come from", _head(split[0])]
    if plot is not None:
        parts.append(f"![Shares of the gain of each method]({plot})")
    for pair in split:
        parts.append(f"### Gains: {pair['teacher']} → {pair['student']}")
        if pair["reference"]["top1"]["mean"] is not None:
            parts.append(f"The reference has {100 * pair['reference']['top1']['mean']:.2f} % top1.")
        if len(pair["factors"]) > 1:
            parts.append(_means(pair))
        parts += [_cells(pair), *_rankings(pair), *_regression(pair)]
    return "\n\n".join(parts) + "\n"


def gains_csv(gains: Sequence[Mapping[str, Any]]) -> str:
    """One line for each method, augmentation and length of each pair; figures are shares of 1."""
    factors = gains[0]["factors"]
    figures = ["gain", *(f"gain_of_{factor}" for factor in factors)]
    columns = ["teacher", "student", *_CELL, "top1", "top1_stderr", "top1_seeds"]
    columns += [column for name in figures for column in (name, f"{name}_stderr")]
    columns.append("gain_seeds")
    if "method" in factors:
        columns += [
            f"beside{end}" for end in ("", "_stderr", "_low", "_high", "_p", "_p_holm", "_told_apart", "_seeds")
        ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for pair in gains:
        for cell in pair["cells"]:
            writer.writerow({**{name: pair[name] for name in ("teacher", "student")}, **_csv_row(cell)})
    return text.getvalue()


def _csv_row(cell: Mapping[str, Any]) -> dict[str, Any]:
    figures = {"top1": cell["top1"], "gain": cell["gain"], "beside": cell["beside"] or {}}
    figures |= {f"gain_of_{factor}": share for factor, share in cell["shares"].items()}
    row = {name: cell[name] for name in _CELL} | {"gain_seeds": cell["seeds"]}
    for name, figure in figures.items():
        row |= {name if end == "mean" else f"{name}_{end}": value for end, value in figure.items()}
    return row


# ---------------------------------------------------------------------------------------------------------- Markdown


def _head(pair: Mapping[str, Any]) -> str:
    base, factors = pair["reference"], pair["factors"]
    lines = [
        f"Gains in points of top1, last epoch, over the reference: {base['method']}, {base['augmentation']}, "
        f"x{base['epoch_factor']:g}. Each is taken seed by seed, since runs of one seed share their images and their "
        "order; then the mean ± standard error over the seeds."
    ]
    if len(factors) > 1:
        lines.append(
            f"A gain is split over {', '.join(factors[:-1])} and {factors[-1]}: each share is what changing this one "
            "thing adds, averaged over all orders in which they can be changed (Shapley). The reason: how much one "
            "adds depends on what was changed before it, and no order is the right one. The shares sum to the gain; "
            "what arises only together, the interaction, is shared equally between those it arises from. Seeds count "
            "whose runs between the reference and the row are all there."
        )
    if "method" in factors:
        lines.append(
            f"`over {base['method']}`: over the reference method at the same augmentation and length, which needs no "
            f"split. Told apart from 0 at {100 * pair['confidence']:g} %: by a paired t-test over the seeds, p "
            "corrected (Holm) for the number of methods at that augmentation and length."
        )
    if pair["seeds"] == 1:
        lines.append("**There is one seed: no figure has a standard error, and nothing can be told apart.**")
    return "\n".join(lines)


def _means(pair: Mapping[str, Any]) -> str:
    """Each method's shares over all of its cells, which is what the plot shows."""
    lines = ["Each share's mean over the augmentations and lengths at which it is changed, of the seeds that have all:"]
    lines += ["", *_table_head(["method", *(f"of the {factor}" for factor in pair["factors"])], left=1)]
    for one in pair["methods"]:
        lines.append(_line([one["method"], *(_points(one["shares"][factor]) for factor in pair["factors"])]))
    return "\n".join(lines)


def _cells(pair: Mapping[str, Any]) -> str:
    """The most accurate first."""
    factors, reference = pair["factors"], pair["reference"]["method"]
    several = len(factors) > 1
    heads = [*factors, "top1 %", *(["gain", *(f"of the {factor}" for factor in factors)] if several else [])]
    if "method" in factors:
        heads += [f"over {reference}", "p, Holm", "told apart"]
    elif not several:
        heads.append("gain")
    lines = _table_head([*heads, "seeds"], left=len(factors))
    for cell in sorted(pair["cells"], key=lambda cell: -(cell["top1"]["mean"] or 0.0)):
        names = {"method": cell["method"], "augmentation": cell["augmentation"], "length": f"x{cell['epoch_factor']:g}"}
        top1 = cell["top1"]["mean"]
        cells = [*(names[factor] for factor in factors), "" if top1 is None else f"{100 * top1:.2f}"]
        if several:
            cells += [_points(cell["gain"]), *(_share(cell, factor, pair) for factor in factors)]
        if "method" in factors:
            cells += _beside(cell["beside"])
        elif not several:
            cells.append(_points(cell["gain"]))
        lines.append(_line([*cells, str(cell["seeds"])]))
    return "\n".join(lines)


def _share(cell: Mapping[str, Any], factor: str, pair: Mapping[str, Any]) -> str:
    """Nothing where the factor is as in the reference."""
    key = _CELL[FACTORS.index(factor)]
    return "" if cell[key] == pair["reference"][key] else _points(cell["shares"][factor])


def _beside(found: Mapping[str, Any] | None) -> list[str]:
    if found is None or found["mean"] is None:
        return ["", "", ""]
    return [_points(found), _p_value(found["p_holm"]), "yes" if found["told_apart"] else "no"]


def _rankings(pair: Mapping[str, Any]) -> list[str]:
    """Which neighbours are not told apart, in chains."""
    rankings = [ranking for ranking in pair["rankings"] if len(ranking["methods"]) > 1]
    missed = [ranking for ranking in rankings if ranking["not_told_apart"]]
    if not rankings:
        return []
    what = "eighbours in the ranking by mean top1 (paired by seed, Holm over the neighbours)"
    if not missed:
        return [f"N{what} are all told apart."]
    if all(len(ranking["not_told_apart"]) == len(ranking["methods"]) - 1 for ranking in rankings):
        return [f"No n{what} are told apart."]
    chains = [f"{_where(ranking, pair)}{', '.join(_chains(ranking['not_told_apart']))}" for ranking in missed]
    return [f"N{what} that are **not** told apart: {'; '.join(chains)}."]


def _where(ranking: Mapping[str, Any], pair: Mapping[str, Any]) -> str:
    names = {"augmentation": ranking["augmentation"], "length": f"x{ranking['epoch_factor']:g}"}
    where = " ".join(names[factor] for factor in pair["factors"] if factor in names)
    return f"at {where} " if where else ""


def _chains(pairs: Sequence[Sequence[str]]) -> list[str]:
    """a / b / c for a / b and b / c."""
    chains: list[list[str]] = []
    for a, b in pairs:
        if chains and chains[-1][-1] == a:
            chains[-1].append(b)
        else:
            chains.append([a, b])
    return [" / ".join(chain) for chain in chains]


def _regression(pair: Mapping[str, Any]) -> list[str]:
    found = pair["regression"]
    if found is None:
        return []
    if not found["rows"]:
        count = found["augmentations"]
        return [f"No regression of the gains on T. stddev: it is known of {count} augmentation(s), it takes three."]
    lines = [
        "Gain on T. stddev of the augmentation, a point for each cell, with an intercept for each method and length. "
        "Slope: points of top1 for 0.01 of T. stddev. Cells of one augmentation share its T. stddev, so that p over "
        "several of them takes for independent what is not; *averaged* has one point an augmentation, over the methods "
        "and lengths that have all of them.",
        "",
        *_table_head(["method", "slope", "partial correlation", "p", "n"], left=1),
    ]
    for row in found["rows"]:
        partial = "" if row["partial"] is None else f"{row['partial']:.3f}"
        # a share of top1 for 1 of T. stddev is as many points for 0.01
        slope = _signed(row["slope"], row["stderr"])
        lines.append(_line([row["method"], slope, partial, _p_value(row["p"]), str(row["n"])]))
    return ["\n".join(lines)]


def _points(figure: Mapping[str, Any]) -> str:
    center, stderr = figure["mean"], figure["stderr"]
    return _signed(center and 100 * center, stderr and 100 * stderr)


def _signed(center: float | None, stderr: float | None) -> str:
    return ("" if center is None else f"{center:+.2f}") + ("" if stderr is None else f" ± {stderr:.2f}")


def _p_value(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table_head(heads: Sequence[str], left: int) -> list[str]:
    return [_line(heads), "|" + ":--|" * left + "--:|" * (len(heads) - left)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# -------------------------------------------------------------------------------------------------------------- plot


def draw_gains(gains: Sequence[Mapping[str, Any]]) -> "Figure":
    """Bars of each method's mean shares, a panel for each pair; whiskers: standard errors over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    base, factors = gains[0]["reference"], gains[0]["factors"]
    heights = [0.5 + len(pair["methods"]) * (0.14 + 0.16 * len(factors)) for pair in gains]
    figure = Figure(figsize=(7.2, 0.9 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)  # draws in memory, whatever backend the process uses
    panels = figure.subplots(len(gains), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, pair in zip(panels, gains, strict=True):
        _draw_pair(axes, pair)
    whiskers = "; whiskers: standard error over the seeds" if gains[0]["seeds"] > 1 else ""
    # of the figure, not of the axes: these may be narrow beside long labels
    figure.supxlabel(
        f"Points of top1 over {base['method']}, {base['augmentation']}, x{base['epoch_factor']:g}{whiskers}", fontsize=9
    )
    if len(factors) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(factors), frameon=False)
    return figure


def _draw_pair(axes: "Axes", pair: Mapping[str, Any]) -> None:
    """Methods from the highest share of the method down; what there is none of is not drawn."""
    reference = pair["reference"]["method"]
    methods = sorted(pair["methods"], key=lambda one: _place(one, reference))
    height = 0.8 / len(pair["factors"])
    for number, factor in enumerate(pair["factors"]):
        shares = [one["shares"][factor] for one in methods]
        axes.barh(
            [place + (number + 0.5) * height - 0.4 for place in range(len(methods))],
            [math.nan if share["mean"] is None else 100 * share["mean"] for share in shares],
            height,
            xerr=[math.nan if share["stderr"] is None else 100 * share["stderr"] for share in shares],
            label=f"of the {factor}",
            color=_COLORS[factor],
            hatch=_HATCHES[factor],
            edgecolor="white",
            linewidth=0.6,
            error_kw={"ecolor": "0.2", "elinewidth": 1.0, "capsize": 2.5},
        )
    names = [f"{one['method']}{' (reference)' if one['method'] == reference else ''}" for one in methods]
    axes.set_yticks(range(len(methods)), names)
    axes.set_ylim(len(methods) - 0.45, -0.55)
    axes.set_title(f"{pair['teacher']} → {pair['student']}", fontsize=10)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _place(one: Mapping[str, Any], reference: str) -> tuple[bool, float]:
    share = one["shares"]["method"]["mean"]
    return share is None and one["method"] != reference, -(share or 0.0)
