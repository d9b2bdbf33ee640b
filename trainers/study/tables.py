"""A study's results as tables: Markdown to read, CSV to compute with."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["csv_table", "markdown", "plans_markdown"]

_COEFFICIENTS = ("pearson", "spearman", "kendall")
_FIGURES = ("loss", "top1", "top5")
_SHOWN_MISSING = 10


def markdown(results: dict[str, Any], title: str, plots: dict[int, str]) -> str:
    """All tables of a study.

    Args:
        results: as `collect` gives them.
        title: of the page.
        plots: the scatter plot's path for some groups, by their number.
    """
    study = results["config"]["study"]
    parts = [f"# {title}", *_gaps(results), _explanation(results)]
    if study["stddev"]:
        parts.append(_correlations(results))
    if study["methods"]:
        parts += _methods(results["groups"])
    for number, group in enumerate(results["groups"] if study["stddev"] or not study["methods"] else []):
        parts += [f"## {_name(group)}", _group_table(group)]
        if number in plots:
            parts.append(f"![T. stddev and student test loss of {_name(group)}]({plots[number]})")
    return "\n\n".join(parts) + "\n"


def plans_markdown(plans: Sequence[Mapping[str, Any]]) -> str:
    """Which runs came when, of a study that has grown.

    Args:
        plans: "date", "added" and "runs" of each, as results.json has them.
    """
    lines = ["## When the runs came", "", _line(["plan", "date", "what came", "runs"]), "|--:|:--|:--|--:|"]
    for number, plan in enumerate(plans, start=1):
        added = [f"{name}: {', '.join(map(_added, values))}" for name, values in plan["added"].items() if values]
        lines.append(_line([str(number), plan["date"], "; ".join(added), str(len(plan["runs"]))]))
    lines += ["", "What came later was measured by itself: its T. stddev stands in a ranking of its own."]
    return "\n".join(lines) + "\n"


def _added(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    nets = (value["teacher"], value["student"])
    return "/".join(net if isinstance(net, str) else net.get("label", net["name"]) for net in nets)


def csv_table(results: dict[str, Any]) -> str:
    """One line for each teacher, student alone and augmentation of each group."""
    statistics = [f"{name}_{when}" for when in ("last", "best") for name in _FIGURES]
    columns = [
        "teacher",
        "student",
        "epoch_factor",
        "method",
        "epochs",
        "row",
        "t_stddev",
        "t_stderr",
        "t_windows",
        "t_entropy",
    ]
    columns += ["seeds", *(f"{name}_{kind}" for name in statistics for kind in ("mean", "std"))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for group in results["groups"]:
        common = {key: group[key] for key in ("teacher", "student", "epoch_factor", "method", "epochs")}
        for row in _csv_rows(group):
            writer.writerow({**common, **{key: value for key, value in row.items() if value is not None}})
    return text.getvalue()


def _csv_rows(group: dict[str, Any]) -> list[dict[str, Any]]:
    teacher = group["teacher_alone"] or {}
    rows = [{"row": "teacher", **{f"{name}_last_mean": value for name, value in teacher.items()}}]
    for row in (group["student_alone"], *group["augmentations"]):
        name = row.get("augmentation", "student alone")
        line = {"row": name, "seeds": len(row["runs"]), **{key: row[key] for key in row if key.startswith("t_")}}
        for when in ("last", "best"):
            for figure, value in (row[when] or {}).items():
                line |= {f"{figure}_{when}_{kind}": value[kind] for kind in ("mean", "std")}
        rows.append(line)
    return rows


def _gaps(results: dict[str, Any]) -> list[str]:
    missing = results["missing"]
    if not missing:
        return []
    names = ", ".join(f"`{name}`" for name in missing[:_SHOWN_MISSING])
    more = ", …" if len(missing) > _SHOWN_MISSING else ""
    return [f"**Not complete: {len(missing)} runs are missing:** {names}{more}"]


def _explanation(results: dict[str, Any]) -> str:
    study, measured = results["config"]["study"], results["measured"]
    seeds = ", ".join(str(seed) for seed in study["seeds"])
    lines = []
    if measured:
        lines += [_passed(measured), *_separations(measured["measurements"])]
    spread = "mean ± standard deviation over the seeds" if len(study["seeds"]) > 1 else "the seed"
    lines.append(
        f"Students: {spread} {seeds}, on all validation images. `last` is the last epoch. `best` is the epoch with the "
        "highest top1 on these images themselves, which flatters it: compare by `last`."
    )
    if headed := [name for name, settings in study["methods"].items() if settings.get("heads")]:
        lines.append(
            f"Students of {', '.join(headed)} are trained with auxiliary heads; the figures are of their own logits."
        )
    if study["stddev"]:
        lines.append(
            "Bars in the plots: the standard error of T. stddev across, the spread over the seeds up and down."
        )
    return "\n".join(lines)


def _passed(measured: dict[str, Any]) -> str:
    images = sorted({measurement["images"] for measurement in measured["measurements"]})
    passed = f"{images[0]:,}" if len(images) == 1 else f"{images[0]:,} to {images[-1]:,}"
    return (
        f"T. stddev ± standard error: windows of {measured['window']} teacher outputs, after {passed} original images, "
        f"{measured['mode']}, mix group {measured['mix_group']}; lower is better."
    )


def _separations(measurements: Sequence[dict[str, Any]]) -> list[str]:
    """Which neighbours in the rankings are not told apart; nothing where none were compared."""
    compared = [measurement for measurement in measurements if measurement["not_told_apart"] is not None]
    if not compared:
        return []
    pairs = {one["cell"]: ", ".join(f"{a} / {b}" for a, b in one["not_told_apart"]) for one in compared}
    missed = "; ".join(f"{names} (`{cell}`)" for cell, names in pairs.items() if names)
    level = f"at {100 * compared[0]['confidence']:g} % confidence"
    if not missed:
        return [f"All neighbours in each measurement's ranking by T. stddev are told apart {level}."]
    return [f"Neighbours in a measurement's ranking by T. stddev that are not told apart {level}: {missed}."]


def _correlations(results: dict[str, Any]) -> str:
    lines = ["## Does T. stddev predict the student?", ""]
    lines += [
        "Correlation of T. stddev with the students' test loss (last epoch) over the augmentations, p in brackets."
    ]
    lines += ["", "| teacher / student | epochs | points | Pearson | Spearman | Kendall |", "|:--|--:|--:|--:|--:|--:|"]
    for group in results["groups"]:
        found = group["correlation"]
        cells = (
            [f"{found[name][0]:.3f} ({_p_value(found[name][1])})" for name in _COEFFICIENTS]
            if found
            else [group["no_correlation"], "", ""]
        )
        points = sum(row["t_stddev"] is not None and row["last"] is not None for row in group["augmentations"])
        pair = f"{group['teacher']} / {group['student']}" + (f", {group['method']}" if group["method"] else "")
        lines.append(_line([pair, _epochs(group), str(points), *cells]))
    return "\n".join(lines)


def _methods(groups: list[dict[str, Any]]) -> list[str]:
    """A table of each pair at each length, the method with the highest top1 in the last epoch first."""
    parts, heads = [], ["method", "augmentation", "loss, last", "top1 %, last", "loss, best", "top1 %, best", "runs"]
    pairs = {(group["teacher"], group["student"], group["epoch_factor"]): group for group in groups}
    for pair, first in pairs.items():
        mine = [group for group in groups if (group["teacher"], group["student"], group["epoch_factor"]) == pair]
        rows = [(group["method"], row) for group in mine for row in group["augmentations"]]
        rows.sort(key=lambda found: -found[1]["last"]["top1"]["mean"] if found[1]["last"] else 0.0)
        teacher = first["teacher_alone"]
        figures = [f"{teacher['loss']:.4f}", f"{100 * teacher['top1']:.2f}"] if teacher else ["", ""]
        lines = [_line(heads), "|:--|:--|" + "--:|" * (len(heads) - 2), _line(["*teacher*", "", *figures, "", "", ""])]
        lines.append(_line(["*student alone*", "", *_student_cells(first["student_alone"])]))
        lines += [_line([method, row["augmentation"], *_student_cells(row)]) for method, row in rows]
        parts += [f"## Methods: {_name({**first, 'method': ''})}", "\n".join(lines)]
    return parts


def _group_table(group: dict[str, Any]) -> str:
    """Teacher and student alone, then the augmentations, the lowest T. stddev first."""
    heads = ["augmentation", "T. stddev", "windows", "loss, last", "top1 %, last", "loss, best", "top1 %, best", "runs"]
    teacher = group["teacher_alone"]
    figures = [f"{teacher['loss']:.4f}", f"{100 * teacher['top1']:.2f}"] if teacher else ["", ""]
    lines = [_line(heads), "|:--|" + "--:|" * (len(heads) - 1), _line(["*teacher*", "", "", *figures, "", "", ""])]
    lines.append(_line(["*student alone*", "", "", *_student_cells(group["student_alone"])]))
    rows = sorted(group["augmentations"], key=lambda row: (row["t_stddev"] is None, row["t_stddev"]))
    for row in rows:
        measured = [_plus_minus(row["t_stddev"], row["t_stderr"], 6), str(row["t_windows"] or "")]
        lines.append(_line([row["augmentation"], *measured, *_student_cells(row)]))
    return "\n".join(lines)


def _student_cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for when in ("last", "best"):
        found = row[when]
        if found is None:
            cells += ["", ""]
            continue
        loss, top1 = found["loss"], found["top1"]
        cells.append(_plus_minus(loss["mean"], loss["std"], 4))
        cells.append(_plus_minus(100 * top1["mean"], None if top1["std"] is None else 100 * top1["std"], 2))
    return [*cells, str(len(row["runs"]))]


def _name(group: dict[str, Any]) -> str:
    method = f", {group['method']}" if group["method"] else ""
    return f"{group['teacher']} → {group['student']}{method}, epochs: {_epochs(group)}"


def _epochs(group: dict[str, Any]) -> str:
    factor = f"x{group['epoch_factor']:g}"
    return factor if group["epochs"] is None else f"{group['epochs']:g} ({factor})"


def _plus_minus(value: float | None, spread: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
