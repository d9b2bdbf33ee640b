"""Tables of a report: the ranking, methods by augmentations, times, and the runs."""

import json
from collections.abc import Sequence
from html import escape
from statistics import mean
from typing import NamedTuple

from dalikd.trainers.report.compare import Figure, Setting, figure, seconds_of, trained
from dalikd.trainers.report.svg import bar, interval
from dalikd.trainers.runs import FIGURES, Run, is_evaluated, options_of

__all__ = [
    "AUGMENTATION",
    "Group",
    "folded",
    "grid",
    "not_evaluated",
    "ranking",
    "runs_table",
    "table",
    "times",
    "varies",
]

#: the part of a setting that T. stddev is of
AUGMENTATION = "augmentation"
_SHOWN = 30  # rows of a table that is not folded


class Group(NamedTuple):
    """Settings that differ in the augmentation alone, or in what stands for it."""

    name: str
    settings: list[Setting]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """A table of cells that are HTML already; those after the first `names` are numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ['class="name"' if index < names else 'class="n"' for index in range(len(cells))]
        return "<tr>" + "".join(f"<{tag} {k}>{c}</{tag}>" for c, k in zip(cells, kinds, strict=True)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(heads, "th")}</thead><tbody>{body}</tbody></table></div>'


def folded(title: str, text: str, *, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{text}</details>"


def varies(settings: Sequence[Setting], name: str) -> bool:
    return len({setting.parts.get(name) for setting in settings if setting.parts.get(name)}) > 1


# ------------------------------------------------------------------------------------------------------- ranking


def ranking(ranked: Sequence[Setting]) -> str:
    if not ranked:
        return ""
    rows = [(one, figure(one, "top1"), figure(one, "loss")) for one in ranked]
    rows.sort(key=lambda row: (-row[1].mean, row[2].mean))
    by_loss = {id(row[0]): place for place, row in enumerate(sorted(rows, key=lambda row: row[2].mean), start=1)}
    shown = [figure_ for row in rows for figure_ in row[1:2]]
    ends = [value for one in shown for value in (one.mean, one.low, one.high) if value is not None]
    scale = (min(ends), max(ends))
    measured = any(one.stddev for one in ranked)
    heads = ["setting", "top1 %, last", "", "loss, last", "by loss", "top1 %, best", "seeds"]
    heads += ["T. stddev"] if measured else []
    cells = []
    for place, (one, top1, loss) in enumerate(rows, start=1):
        best = mean(run.results["best"]["val"]["top1"] for run in one.runs)
        line = [
            f"{place}. {escape(one.name)}",
            _with_interval(top1, 100, 2),
            interval(top1.mean, top1.low, top1.high, scale),
            _with_interval(loss, 1, 4),
            str(by_loss[id(one)]),
            f"{100 * best:.2f}",
            str(len(one.runs)),
        ]
        cells.append(line + ([_stddev(one)] if measured else []))
    text = table(heads, cells[:_SHOWN])
    if len(cells) > _SHOWN:
        text += folded(f"the other {len(cells) - _SHOWN} of {len(cells)}", table(heads, cells[_SHOWN:]))
    return f'<p class="note">{_explain_ranking(rows, measured=measured)}</p>{text}'


def not_evaluated(settings: Sequence[Setting]) -> str:
    """Settings without labelled images to evaluate on; empty: there are none."""
    if not settings:
        return ""
    heads = ["setting", "agreement %, last", "training loss, last", "seeds"]
    heads += ["T. stddev"] * any(one.stddev for one in settings)
    rows = []
    for one in settings:
        agreement, loss = trained(one, "agreement"), trained(one, "loss")
        shown = ["" if agreement is None else f"{100 * agreement:.2f}", "" if loss is None else f"{loss:.4f}"]
        rows.append([escape(one.name), *shown, str(len(one.runs)), _stddev(one)][: len(heads)])
    note = (
        "There were no labelled images to evaluate these on, so they have no place in a ranking. Agreement: the share "
        "of the training images to which student and teacher give the same class, which is how well one imitates the "
        "other and not how often it is right. Training losses of different augmentations, methods or weights are not "
        "on one scale."
    )
    return f'<h3>Not evaluated</h3><p class="note">{escape(note)}</p>{table(heads, rows)}'


def _with_interval(found: Figure, factor: float, digits: int) -> str:
    text = f"{factor * found.mean:.{digits}f}"
    if found.low is None or found.high is None:
        return text
    return f"{text} <small>({factor * found.low:.{digits}f} to {factor * found.high:.{digits}f})</small>"


def _stddev(one: Setting) -> str:
    if one.stddev is None:
        return ""
    error = one.stddev["stderr"]
    return f"{one.stddev['stddev']:.5f}" + ("" if error is None else f" <small>± {error:.5f}</small>")


def _explain_ranking(rows: Sequence[tuple[Setting, Figure, Figure]], *, measured: bool) -> str:
    kinds = {top1.kind for _, top1, _ in rows}
    first = "The highest top1 of the last epoch comes first; the column by loss gives the place by loss."
    words = [first] if len(rows) > 1 else []
    if "seeds" in kinds:
        words.append(
            "In brackets: the 95 % interval of the mean, Student's t over a setting's seeds (two or three give wide "
            "ones). Settings whose intervals overlap are not told apart by them; runs of one seed share images and "
            "order, so that a paired comparison, as in a study's gains, tells more."
        )
    if "images" in kinds:
        words.append(
            "In brackets, where a setting has one seed: the 95 % interval of its accuracy by the number of validation "
            "images alone (Wilson). What another seed would change is not in it, and a loss has none."
        )
    words.append("The best epoch is chosen by these images themselves, which flatters it: compare by the last.")
    if measured:
        words.append("T. stddev ± its standard error over windows; the lower, the better the students should be.")
        if any(one.stddev and one.stddev["from"] == "while training" for one, _, _ in rows):
            words.append("Where no measurement lies beside the runs it is what they had while training.")
    return escape(" ".join(words))


def grid(ranked: Sequence[Setting]) -> str:
    """Methods by augmentations, where both vary: a table for all else that varies."""
    if not (varies(ranked, "method") and varies(ranked, AUGMENTATION)):
        return ""
    tables: dict[str, dict[tuple[str, str], float]] = {}
    for one in ranked:
        other = " · ".join(value for key, value in one.parts.items() if key not in ("method", AUGMENTATION) and value)
        if not one.parts[AUGMENTATION]:
            continue  # trained on labels alone
        key = one.parts["method"], one.parts[AUGMENTATION]
        tables.setdefault(other, {})[key] = 100 * figure(one, "top1").mean
    parts = [
        "<h3>Methods by augmentations</h3>",
        '<p class="note">top1 % of the last epoch, mean over the seeds; the darker the cell, the higher. The last '
        "column is the mean of the row.</p>",
    ]
    for other, cells in tables.items():
        columns = list(dict.fromkeys(name for _, name in cells))
        low, high = min(cells.values()), max(cells.values())
        rows = []
        for method in dict.fromkeys(name for name, _ in cells):
            values = [cells.get((method, column)) for column in columns]
            known = [value for value in values if value is not None]
            rows.append((mean(known), [escape(method), *(_shaded(v, low, high) for v in values), f"{mean(known):.2f}"]))
        rows.sort(key=lambda row: -row[0])
        heads = ["method", *map(escape, columns), "mean"]
        parts.append((f"<h3>{escape(other)}</h3>" if other else "") + table(heads, [row for _, row in rows]))
    return "".join(parts)


def _shaded(value: float | None, low: float, high: float) -> str:
    if value is None:
        return ""
    share = (value - low) / (high - low) if high > low else 0.0
    red, green, blue = (round(255 - share * (255 - end)) for end in (135, 196, 232))
    return f'<span style="background:rgb({red},{green},{blue});padding:2px 6px">{value:.2f}</span>'


# --------------------------------------------------------------------------------------------------- time, runs


def times(ranked: Sequence[Setting], groups: Sequence[Group], teachers: Sequence[Setting]) -> str:
    rows, missing = [], 0
    listed = [(one.name, one.runs) for one in ranked]
    if len(listed) > _SHOWN:
        listed = [(group.name, [run for one in group.settings for run in one.runs]) for group in groups]
    for name, runs in [*listed, *((f"teacher {one.runs[0].results['model']}", one.runs) for one in teachers)]:
        known = [seconds for run in runs if (seconds := seconds_of(run)) is not None]
        missing += len(runs) - len(known)
        if known:
            total, waited, asked = (mean(values) for values in zip(*known, strict=True))
            share, teacher = waited / total, asked / total
            picture = bar([(share, "#D55E00"), (teacher, "#0072B2"), (1 - share - teacher, "#56B4E9")])
            steps = mean(run.results.get("steps") or 0 for run in runs) * runs[0].results["batch_size"]
            speed = f"{steps / total:,.0f}" if steps else ""
            rows.append(
                [
                    *(escape(name or "all"), _duration(total), speed, f"{100 * share:.1f} %"),
                    *(f"{100 * teacher:.1f} %" if teacher else "", picture, str(len(known))),
                ]
            )
    note = (
        "Wall time of the training steps of a run, mean over the runs: the part that waited for data, the "
        "teacher's (mixing, its pass, picking), and the rest, in which the student computes. Logs hold no time of "
        "evaluation and checkpoints, and those of earlier versions none of the teacher. Runs that were done together "
        "with others on one teacher pass count the steps of all of them, and the first of them the pass."
    )
    note += f" {missing} runs have logged no times." if missing else ""
    keys = (
        '<p class="note"><span class="key1" style="background:#D55E00"></span>waiting for data &nbsp; '
        '<span class="key1" style="background:#0072B2"></span>teacher &nbsp; '
        '<span class="key2" style="background:#56B4E9"></span>student</p>'
    )
    heads = ["runs", "time a run", "images/s", "waiting", "teacher", "", "runs counted"]
    return f'<p class="note">{escape(note)}</p>' + (keys + table(heads, rows) if rows else "")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def runs_table(ranked: Sequence[Setting], teachers: Sequence[Setting]) -> str:
    """What differs between the runs, and what does not."""
    runs = [(one, run) for one in ranked for run in one.runs]
    names = list(ranked[0].parts)
    figures = [(name, "last") for name in FIGURES] + [("top1", "best")]
    heads = ["folder", *map(escape, names), "seed", *(f"{name}, {when}" for name, when in figures)]
    rows = [
        [
            f"<small>{escape(str(run.folder))}</small>",
            *(escape(one.parts.get(name, "teacher" if number >= len(runs) else "")) for name in names),
            str(run.results["seed"]),
            *(_plain(run, name, when) for name, when in figures),
        ]
        for number, (one, run) in enumerate([*runs, *((one, run) for one in teachers for run in one.runs)])
    ]
    listed = table(heads, rows, 1 + len(names))
    options = [options_of(run) for _, run in runs]
    same = {key: value for key, value in options[0].items() if all(other.get(key, ...) == value for other in options)}
    shown = "".join(f"<div>{escape(key)}: {escape(json.dumps(value))}</div>" for key, value in same.items())
    losses = {
        one.parts["method"]: run.config["loss"] for one, run in runs if "method" in one.parts and run.config.get("loss")
    }
    text = listed if len(rows) <= _SHOWN else folded(f"all {len(rows)} runs", listed)
    if losses:
        lines = "\n".join(f"{name}: {json.dumps(loss)}" for name, loss in losses.items())
        text += folded("losses of the methods", f"<pre>{escape(lines)}</pre>")
    common = "options that all runs have in common" if len(rows) > 1 else "options"
    text += folded(common, f'<div class="same">{shown}</div>')
    note = "What differs between the runs, and their figures: the loss, and top1 and top5 in %."
    return (f'<p class="note">{note}</p>' if len(rows) > 1 else "") + text


def _plain(run: Run, name: str, when: str) -> str:
    if not is_evaluated(run.results):
        return ""
    value = run.results[when]["val"][name]
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.2f}"
