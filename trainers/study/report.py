"""What a study prints and writes: its plan before, its tables and plots after."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, BinaryIO

from dalikd.kd.correlation import Coefficient, Correlation, draw
from dalikd.pipelines.files import write_atomically
from dalikd.trainers.study.gain_tables import draw_gains, gains_csv, gains_markdown
from dalikd.trainers.study.gains import gains
from dalikd.trainers.study.plan import Cell, Study, Work, plan
from dalikd.trainers.study.results import collect, points_of
from dalikd.trainers.study.state import is_done, read_plans
from dalikd.trainers.study.tables import csv_table, markdown, plans_markdown
from dalikd.trainers.tracking import write_json

__all__ = ["print_plan", "write_report"]


def print_plan(study: Study, command_line: Callable[[Cell], str]) -> dict[str, Any]:
    """Print every run with its command, what is done of them, and what is left to compute.

    Args:
        study: what is planned.
        command_line: gives the one that does the same as a cell.

    Returns:
        "folder", and "runs": "name", "command", "done" and "shard" of each.
    """
    left = [cell for cell in study.cells if not is_done(study.folder, cell)]
    print(_where_options_stand(study), end="")
    count = study.reading.options.share()[1]
    for cell in study.cells:
        shard = f", shard {study.shards[cell.name]}/{count}" if count > 1 else ""
        print(f"# {cell.name}{'' if cell in left else ', done'}{shard}\n{command_line(cell)}")
    heads = ["left to do", "runs", "trained", "teacher", "scored", "evaluated", "PFLOP"]
    lines = ["", "Images through each net (trained: forward and backward; PFLOP: 10^15 floating-point operations).", ""]
    lines += [_line(heads), "|:--|" + "--:|" * (len(heads) - 1)]
    for command in ("train", "evaluate", "measure", "distill"):
        lines.append(_total(study, command, (cell for cell in left if cell.command == command)))
    lines.append(_total(study, "all", left))
    for shard in range(1, count + 1) if count > 1 else ():
        lines.append(_total(study, f"shard {shard}/{count}", (c for c in left if study.shards[c.name] == shard)))
    print("\n".join(lines))
    print(f"\n{len(study.cells) - len(left)} of {len(study.cells)} runs are done. The folder is {study.folder}.")
    runs = [
        {"name": c.name, "command": command_line(c), "done": c not in left, "shard": study.shards[c.name]}
        for c in study.cells
    ]
    return {"folder": str(study.folder), "runs": runs}


def write_report(study: Study) -> dict[str, Any]:
    """Write table.md, table.csv, plots/ and results.json from what there is, and say what is missing; of a study of
    methods gains.csv and plots/gains.png too.

    Returns:
        the content of results.json.
    """
    results = collect(study.pairs, study.axes, study.every, study.folder, study.reading.config)
    drawn = [group for group in results["groups"] if group["correlation"] is not None]
    plots = {
        id(group): f"plots/{group['teacher']}_{group['student']}-"
        + "-".join([f"x{group['epoch_factor']:g}", *filter(None, [group["method"]])])
        + ".png"
        for group in drawn
    }
    for group in drawn:
        write_atomically(study.folder / plots[id(group)], lambda file, group=group: _draw(group, file))
    by_number = {number: plots[id(group)] for number, group in enumerate(results["groups"]) if id(group) in plots}
    text = markdown(
        results, f"{'T. stddev and students' if study.axes.stddev else 'Students'}: {study.folder.name}", by_number
    )
    if plans := _plans(study):
        results["plans"] = plans
        text += f"\n{plans_markdown(plans)}"
    results["gains"] = _gains(study, results["groups"])
    section = _write_gains(study, results["gains"])
    text += section and f"\n{section}"
    write_atomically(study.folder / "table.md", text.encode())
    write_atomically(study.folder / "table.csv", csv_table(results).encode())
    write_json(study.folder / "results.json", results)
    written = f"table.md, table.csv, {'gains.csv, ' if section else ''}results.json and plots/"
    print(f"\n{text}\nwritten: {study.folder}/{written}")
    return results


def _plans(study: Study) -> list[dict[str, Any]]:
    """Of a study that has grown what came when: "date", "added" (by the options' names) and the names of "runs"."""
    found, seen = list[dict[str, Any]](), set[str]()
    before: dict[str, Any] = {}
    for kept in read_plans(study.folder):
        now, axes = kept["study"], study.axes
        axes = replace(
            axes,
            augmentations={name: scored for name, scored in axes.augmentations.items() if name in now["augmentation"]},
            seeds=tuple(now["seeds"]),
            factors=tuple(now["epoch_factor"]),
            methods={name: options for name, options in axes.methods.items() if not name or name in now["methods"]},
            generations=[names for names in axes.measured() if set(names) <= set(now["augmentation"])],
        )
        entries = zip(study.pairs, study.reading.options.pairs, strict=True)
        names = {
            cell.name for cell in plan([pair for pair, given in entries if given in now["pairs"]], axes, study.folder)
        }
        added = {key: [value for value in now[key] if value not in before.get(key, ())] for key in now if before}
        found.append({"date": kept["date"], "added": added, "runs": sorted(names - seen)})
        seen, before = seen | names, now
    return found


def _gains(study: Study, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """None in a study without methods."""
    options, (measured, _) = study.reading.options, study.reading.read("measure", {})
    return gains(groups, options.reference, measured.confidence) if options.methods else []


def _write_gains(study: Study, found: list[dict[str, Any]]) -> str:
    """Write gains.csv, and the plot where there is anything to draw; return the section of table.md."""
    if not any(pair["factors"] for pair in found):
        return ""
    write_atomically(study.folder / "gains.csv", gains_csv(found).encode())
    plot = "plots/gains.png" if any(cell["seeds"] for pair in found for cell in pair["cells"]) else None
    if plot is not None:
        figure = draw_gains(found)
        write_atomically(study.folder / plot, lambda file: figure.savefig(file, format="png", dpi=160))
    return gains_markdown(found, plot)


def _where_options_stand(study: Study) -> str:
    """What is to be known about the config that the commands read; nothing where they run here as they are."""
    if not study.kept.exists():
        return f"# The commands read {study.kept}, which the study writes when it starts: it is not there yet.\n"
    kept, here = (
        config["train"].get("data", {}).get("root")
        for config in (study.reading.reread(study.kept), study.reading.config)
    )
    return "" if here == kept else f"# The commands read data from {kept}: add --data.root {here} on this machine.\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _total(study: Study, name: str, cells: Iterable[Cell]) -> str:
    works = [study.work[cell.name] for cell in cells]
    total = sum(works, Work())
    images = (total.trained, total.asked, total.scored, total.evaluated)
    return _line([name, str(len(works)), *(f"{count:,}" for count in images), f"{total.flops / 1e15:,.3g}"])


def _draw(group: dict[str, Any], file: BinaryIO) -> None:
    points, spreads = points_of(group)
    found = Correlation(*(Coefficient(*value) for value in group["correlation"].values()))
    unit = "epoch" if group["epochs"] == 1 else "epochs"
    named = ", ".join([f"{group['epochs']:g} {unit}", *filter(None, [group["method"]])])
    title = f"{group['teacher']} → {group['student']}, {named}"
    draw(points, found, title, spreads).savefig(file, format="png", dpi=160)
