"""The page of a report: one HTML file that needs nothing else, for screens, phones and paper."""

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from string import Template
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dalikd.kd.correlation import FEWEST_POINTS, correlate, intervals
from dalikd.trainers.report.compare import Setting, curves, figure
from dalikd.trainers.report.svg import Dot, Line, legend, line_plot, scatter
from dalikd.trainers.report.tables import (
    AUGMENTATION,
    Group,
    folded,
    grid,
    not_evaluated,
    ranking,
    runs_table,
    table,
    times,
    varies,
)
from dalikd.trainers.runs import Found, is_evaluated

__all__ = ["Samples", "embedded", "page"]

_MOST_LINES = 16  # in a plot
_LISTED = 5  # of what is left out
_OPEN = 2  # groups of curves that are not folded
_SMALL, _SHOWN = 112, 160  # sides of images in pixels, below and up to which they are shown as they are

_CSS = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1120px; padding: 16px; background: #fff; color: #1a1a1a;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 26px; line-height: 1.2; margin: 8px 0 }
h2 { font-size: 20px; margin: 36px 0 8px; padding-top: 10px; border-top: 1px solid #ccc }
h3 { font-size: 16px; margin: 20px 0 4px }
p { margin: 6px 0; max-width: 78ch; overflow-wrap: anywhere }
.note { color: #444; font-size: 14px }
.warning { border-left: 4px solid #D55E00; padding-left: 10px }
nav { font-size: 14px; margin: 8px 0 } nav a { margin-right: 14px; white-space: nowrap }
a { color: #005a8d }
.scroll { overflow-x: auto; margin: 8px 0 }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px 3px 0; text-align: left; vertical-align: middle; border-bottom: 1px solid #e4e4e4 }
th { border-bottom: 1px solid #777; font-weight: 600; vertical-align: bottom }
.n { text-align: right; white-space: nowrap } td:first-child { min-width: 1.5em }
td.name { min-width: 9em }
svg { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1a1a1a }
svg.plot { max-width: 100%; height: auto } svg.cell, svg.key { vertical-align: middle }
svg.plot .name { paint-order: stroke; stroke: #fff; stroke-width: 3px }
.plots { display: flex; flex-wrap: wrap; gap: 8px 16px }
figure { margin: 4px 0; max-width: 100%; break-inside: avoid }
figcaption { font-size: 13px; font-weight: 600 }
.legend { font-size: 14px; max-width: none } .legend span { display: inline-block; margin-right: 16px }
details { margin: 8px 0 } summary { cursor: pointer; padding: 3px 0; font-weight: 600; color: #005a8d }
.images { display: flex; flex-wrap: wrap; gap: 3px } .images img { width: 72px; height: 72px; image-rendering: auto }
.same { font-size: 13px; columns: 320px } .same div { overflow-wrap: anywhere; break-inside: avoid }
pre { font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere }
.key1, .key2 { display: inline-block; width: 14px; height: 10px; margin-right: 4px }
@media (max-width: 600px) { body { padding: 10px; font-size: 15px } h1 { font-size: 22px } }
@media print { body { max-width: none; font-size: 10.5pt } nav, summary::marker { display: none } a { color: inherit }
  h2, h3, figcaption { break-after: avoid } tr, figure { break-inside: avoid } .scroll { overflow: visible }
  table { font-size: 8.5pt } .plots figure { width: 47% } svg.plot { width: 100% }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$css</style>
</head>
<body>
<h1>$title</h1>
$top
<nav>$links</nav>
$sections
<p class="note">Made by dalikd report on $date. Sections that are closed are not printed: open those you want.</p>
</body>
</html>
""")


class Samples(NamedTuple):
    """Images of augmentations, uint8 [S, S, 3], by the augmentation's name, and what is to be said of them."""

    images: Mapping[str, Sequence[np.ndarray]]
    note: str


def page(title: str, found: Found, ranked: Sequence[Setting], teachers: Sequence[Setting], samples: Samples) -> str:
    """The page as text.

    Args:
        title: of the page.
        found: the runs and what lies beside them.
        ranked: what `compare_runs` makes of them.
        teachers: likewise.
        samples: images of the augmentations.
    """
    first = next(iter(ranked[0].parts), "")
    series = next((name for name in (AUGMENTATION, "method") if varies(ranked, name)), first)
    styles = {name: number for number, name in enumerate(dict.fromkeys(one.parts.get(series, "") for one in ranked))}
    groups, judged = _groups(ranked, series), [one for one in ranked if one.evaluated]
    results = ranking(judged) + grid(judged) + not_evaluated([one for one in ranked if not one.evaluated])
    sections = {
        "Ranking" if len(judged) > 1 else "Result": results,
        "T. stddev and students": _scatter(_groups(judged, series), series, styles),
        "Curves": _curves(groups, series, styles, teachers),
        "Where the time went": times(ranked, groups, teachers),
        "Runs": runs_table(ranked, teachers),
        "Samples": _samples(samples),
    }
    ids = {name: name.lower().replace(" ", "-").replace(".", "") for name in sections}
    return _PAGE.substitute(
        title=escape(title),
        css=_CSS,
        top=_top(found, ranked, teachers),
        links=" ".join(f'<a href="#{ids[name]}">{escape(name)}</a>' for name in sections),
        sections="\n".join(
            f'<section><h2 id="{ids[name]}">{escape(name)}</h2>{text}</section>' for name, text in sections.items()
        ),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _teacher_line(name: str, val: Mapping[str, Any]) -> str:
    return f"Teacher {name}: top1 {100 * val['top1']:.2f} %, loss {val['loss']:.4f} on {val.get('images', 0):,} images."


def _groups(settings: Sequence[Setting], series: str) -> list[Group]:
    found: dict[str, list[Setting]] = {}
    for setting in settings:
        name = " · ".join(value for key, value in setting.parts.items() if key != series and value)
        found.setdefault(name, []).append(setting)
    return [Group(name, inside) for name, inside in found.items()]


def _top(found: Found, ranked: Sequence[Setting], teachers: Sequence[Setting]) -> str:
    taught = [run.results for one in teachers for run in one.runs if is_evaluated(run.results)]
    lines = [_teacher_line(results["model"], results["last"]["val"]) for results in taught]
    lines += [_teacher_line(str(of["config"].get("model")), of) for of in found.evaluations.values()]
    seeds = sorted({run.results["seed"] for run in found.runs})
    sets = [(data.get("name"), data.get("train_images", "?")) for data in (run.results["data"] for run in found.runs)]
    images = [run.results["last"]["val"]["images"] for run in found.runs if is_evaluated(run.results)]
    counts = f"{len(found.runs)} runs in {len(ranked)} settings" if len(found.runs) > 1 else "One run"
    words = [
        f"{counts}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; "
        f"data {', '.join('{} ({} training images)'.format(*one) for one in dict.fromkeys(sets))}; "
        + (f"{images[0]:,} validation images." if images else "no labelled images to evaluate on."),
        *dict.fromkeys(lines),
    ]
    replaced = sum((run.results.get("replaced") or {}).get("val", 0) for run in found.runs)
    if replaced:
        words.append(f"{replaced} validation images of all runs could not be decoded; others stood in for them.")
    parts = [f"<p>{escape(' '.join(words))}</p>"]
    listed, more = found.left_out[:_LISTED], len(found.left_out) - _LISTED
    parts += [f'<p class="warning">Left out: {escape(one)}</p>' for one in listed]
    parts += [f'<p class="warning">Left out as well: {more} more, which the command printed.</p>'] if more > 0 else []
    return "".join(parts)


# ------------------------------------------------------------------------------------------------------- scatter


def _scatter(groups: Sequence[Group], series: str, styles: Mapping[str, int]) -> str:
    usable = [
        (group, [one for one in group.settings if one.stddev is not None and one.parts.get(AUGMENTATION, "")])
        for group in groups
    ]
    usable = [(group, inside) for group, inside in usable if len(inside) > 1]
    if series != AUGMENTATION or not usable:
        return (
            "<p>Not drawn: it needs several augmentations with a T. stddev, and students that were evaluated. Put what "
            "dalikd measure --json wrote into the folder of the runs, or name it with --measure.</p>"
        )
    single = len(usable) <= 2
    parts, rows = [], []
    for group, inside in usable:
        pictures = []
        for name, label, factor in (("loss", "test loss", 1), ("top1", "top1 (%)", 100)):
            found = [figure(one, name) for one in inside]
            dots = [
                Dot(
                    one.parts[AUGMENTATION], styles[one.parts[AUGMENTATION]], one.stddev["stddev"], factor * value.mean,
                    one.stddev["stderr"] or 0.0, *_spread(one, name, factor),
                )
                for one, value in zip(inside, found, strict=True)
                if one.stddev is not None
            ]  # fmt: skip
            size = (430, 330) if single else (340, 230)
            title = f"{group.name}: T. stddev and student {label}"
            plot = scatter(dots, ("T. stddev", f"student {label}"), title, named=single, size=size)
            pictures.append(f"<figure>{plot}</figure>")
            rows.append([escape(group.name or "all"), label, str(len(dots)), *_coefficients(dots)])
        drawn = f'<div class="plots">{"".join(pictures)}</div>'
        if single:
            parts.append((f"<h3>{escape(group.name)}</h3>" if group.name else "") + drawn)
        else:
            parts.append(folded(group.name, drawn, is_open=len(parts) < 2 * _OPEN))
    heads = ["runs", "student", "points", "Pearson", "Spearman", "Kendall"]
    names = {one.parts[AUGMENTATION]: styles[one.parts[AUGMENTATION]] for _, inside in usable for one in inside}
    note = (
        "A point is an augmentation: T. stddev with its standard error across, the mean over the seeds with the lowest "
        "and highest seed up and down. Coefficients with 95 % percentile bootstrap intervals (10,000 resamples of the "
        "points, none below 5) and p-values. If T. stddev predicts the student, that of the loss is near 1 and that of "
        "top1 near -1. Few points say little, and the groups share their augmentations: they are not independent."
    )
    return f'<p class="note">{escape(note)}</p>{table(heads, rows, 2)}{legend([*names.items()])}{"".join(parts)}'


def _spread(one: Setting, name: str, factor: float) -> tuple[float | None, float | None]:
    values = [factor * run.results["last"]["val"][name] for run in one.runs]
    return (min(values), max(values)) if len(values) > 1 else (None, None)


def _coefficients(dots: Sequence[Dot]) -> list[str]:
    x, y = [dot.x for dot in dots], [dot.y for dot in dots]
    if len(dots) < FEWEST_POINTS:
        return [f"{len(dots)} points are too few", "", ""]
    if min(x) == max(x) or min(y) == max(y):
        return ["all values are equal", "", ""]
    found, ends = correlate(x, y), intervals(x, y)
    cells = []
    for name, value in found._asdict().items():
        between = " ({:.2f} to {:.2f})".format(*ends[name]) if ends else ""
        p_value = "p < 0.001" if value.p_value < 0.001 else f"p = {value.p_value:.3f}"
        cells.append(f"{value.coefficient:.2f}{between} <small>{p_value}</small>".replace("-", "&minus;"))
    return cells


# ------------------------------------------------------------------------------------------------------- curves


def _curves(groups: Sequence[Group], series: str, styles: Mapping[str, int], teachers: Sequence[Setting]) -> str:
    parts = []
    alone = len(groups) == 1 and not groups[0].name
    for number, group in enumerate(
        [*groups, *(Group(f"teacher {one.runs[0].results['model']}", [one]) for one in teachers)]
    ):
        best = sorted(group.settings, key=lambda one: -figure(one, "top1").mean if one.evaluated else 0)[:_MOST_LINES]
        inside = [one for one in group.settings if one in best]
        names = [(one.parts.get(series) or one.name, styles.get(one.parts.get(series, ""), 0)) for one in inside]
        found = [curves(one) for one in inside]
        pictures, single = [], []
        for term in _ordered(found):
            lines = [Line(name, style, of[term]) for (name, style), of in zip(names, found, strict=True) if term in of]
            if all(len(line.points) == 1 for line in lines):
                single.append(term)
                continue
            plot = line_plot(lines, f"{term} over the epochs, {group.name}", "epoch")
            pictures.append(f"<figure><figcaption>{escape(term)}</figcaption>{plot}</figure>")
        note = f"Logged once, so that there is no curve: {', '.join(single)}." if single else ""
        if len(group.settings) > _MOST_LINES:
            note += f" The {_MOST_LINES} best of {len(group.settings)} are drawn."
        text = f'{legend(names)}<div class="plots">{"".join(pictures)}</div>'
        text += f'<p class="note">{escape(note)}</p>' if note else ""
        parts.append(text if alone and number == 0 else folded(group.name or "others", text, is_open=number < _OPEN))
    note = (
        "Mean over the seeds; the band goes from the lowest to the highest seed. train: mean over the steps since the "
        "point before, on augmented images where the method uses them; val: all validation images at an epoch's end. "
        "Train losses of different methods or weights are not on one scale. An upward axis is logarithmic where its "
        "values span more than a factor of 30."
    )
    return f'<p class="note">{escape(note)}</p>{"".join(parts)}'


def _ordered(found: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for of in found for name in of)
    first = [f"val {name}" for name in ("top1", "loss", "top5")] + ["train loss", "train top1", "train agreement"]
    return [name for name in first if name in names] + [name for name in names if name not in first]


def embedded(image: np.ndarray) -> str:
    """An image, uint8 [S, S, 3], as a page holds it: small ones as they are, larger ones as a JPEG of few pixels."""
    picture, file, small = Image.fromarray(image), io.BytesIO(), len(image) < _SMALL
    if len(image) > _SHOWN:
        picture = picture.resize((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    picture.save(file, "PNG") if small else picture.save(file, "JPEG", quality=92)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def _samples(samples: Samples) -> str:
    parts = [f'<p class="note">{escape(samples.note)}</p>']
    for name, images in samples.images.items():
        tags = "".join(
            f'<img alt="{escape(name)} {number}" src="{embedded(image)}">'
            for number, image in enumerate(images, start=1)
        )
        parts.append(f'<figure><figcaption>{escape(name)}</figcaption><div class="images">{tags}</div></figure>')
    return "".join(parts)
