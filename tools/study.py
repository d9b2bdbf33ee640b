"""`dalikd study`: does T. stddev predict the students? Everything that the answer needs, from one config."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dalikd.pipelines.files import load_yaml
from dalikd.tools import choose_threads
from dalikd.tools.classes import import_words
from dalikd.tools.cli import build_parser, guarded, resolve
from dalikd.tools.distill import distill
from dalikd.tools.evaluate import evaluate_net
from dalikd.tools.layers import Grammar, Layer, grammar, nested, read_layers
from dalikd.tools.measure import measure
from dalikd.tools.signature import expand_paths
from dalikd.tools.summary import give_json, json_asked
from dalikd.tools.train import train
from dalikd.trainers.augmentation import augmentation_names
from dalikd.trainers.launch import start
from dalikd.trainers.renamed import take_old_names
from dalikd.trainers.run import Planned, run_students
from dalikd.trainers.runs import check_images
from dalikd.trainers.study.plan import Cell, Reading, Study
from dalikd.trainers.study.ready import COMMANDS, check_machine, make_ready, shared_pass
from dalikd.trainers.study.report import print_plan, write_report
from dalikd.trainers.study.run import Queue, run_cells
from dalikd.trainers.study.state import check_config, keep_config, read_result

_FUNCTIONS = {"train": train, "evaluate": evaluate_net, "measure": measure, "distill": distill}
#: options that no layer of a study may have, in any section, and where they stand instead
_ELSEWHERE = {
    **dict.fromkeys(("model", "model_args", "weights", "students"), "nets are named in `pairs`"),
    **{f"teacher.{name}": "teachers stand in `pairs`" for name in ("name", "weights", "args", "sha256", "cache")},
    **dict.fromkeys(("output", "json", "resume", "overwrite"), "it has a folder, --output"),
    "restarts": "the same command goes on with it",
}


# ------------------------------------------------------------------------------------------------------- reading


def read_study(argv: Sequence[str], *, old_names: bool = False) -> Reading:
    """Read config files and arguments, later ones winning. Options of the cells may be among the arguments.

    Args:
        argv: the arguments.
        old_names: whether config files may have old names of options.

    Raises:
        ValueError: an unknown key, a wrong value.
        FileNotFoundError: no such config file.
    """
    if any(word in ("-h", "--help") or word.startswith("--print_config") for word in argv):
        build_parser("study").parse_args(["--help"])
    names, form = grammar("study").names, _form()
    own, shared, kept = [], [], {"pairs": [], "methods": {}}
    for place, content in read_layers(argv, form, old_names=old_names):
        study = {name: content.pop(name) for name in names & content.keys()} | content.pop("study", {})
        # the parser would make objects of the classes in them
        if "pairs" in study:
            kept["pairs"] = _pairs(study.pop("pairs"), place, form, old_names=old_names)
        if "methods" in study:
            kept["methods"] = _methods(study.pop("methods"), place)
        own.append(Layer(place, {"study": study}))
        shared.append(Layer(place, content))
        _check_shared(shared[-1])
    options, _ = resolve("study", own)
    return Reading(
        replace(options, **kept, augmentation=augmentation_names(options.augmentation)),
        {command: _beyond(resolve(command, shared)[1], _defaults(command)) for command in COMMANDS},
        lambda command, settings: resolve(command, [*shared, Layer("", nested(settings))]),
        lambda path: read_study(["--config", str(path)], old_names=True).config,
        any("train" in layer.content for layer in shared),
    )


def _form() -> Grammar:
    """Options of the study, of its cells, and of the cells of one command after its name."""
    types: dict[str, Any] = {}
    for command in COMMANDS:
        types |= grammar(command).types
        types |= {f"{command}.{name}": hint for name, hint in grammar(command).types.items()}
    own = grammar("study")
    return Grammar("study", types | dict(own.types), own.lists, line="command line")


def _pairs(given: Any, place: str, form: Grammar, *, old_names: bool) -> list[dict[str, Any]]:
    """What stands under `pairs`; its entries are checked by `read_pairs`."""
    pairs = load_yaml(given, f"{place}: pairs")[0] if isinstance(given, str) else given
    if not isinstance(pairs, list):
        raise ValueError(f"{place}: pairs is {pairs!r}: give a list of {{teacher: NET, student: NET}}")
    for index, pair in enumerate(pairs):
        for role, net in pair.items() if isinstance(pair, dict) else ():
            if isinstance(net, dict):
                for old, new in take_old_names(net, form.types).items():
                    if not old_names or " " in new:
                        raise ValueError(f"{place}: pairs[{index}].{role}.{old} is now {new}")
                expand_paths(net, form.types, place=f"{place}: pairs[{index}].{role}.")
    return pairs


def _methods(given: Any, place: str) -> dict[str, Any]:
    """What stands under `methods`; its options are checked with those of the cells."""
    methods = load_yaml(given, f"{place}: methods")[0] if isinstance(given, str) else given
    if not isinstance(methods, dict):
        raise ValueError(f"{place}: methods is {methods!r}: give {{NAME: {{loss: CLASS}}}}")
    return methods


def _check_shared(layer: Layer) -> None:
    for section in ("", *COMMANDS):
        content, place = layer.content.get(section, {}) if section else layer.content, f"{section}." if section else ""
        named = {"augmentation": "name them under `study:`"} if section in ("measure", "distill") else {}
        for name, instead in {**_ELSEWHERE, **named}.items():
            head, _, inner = name.partition(".")
            group = content.get(head) or {}
            if (inner and inner in group) or (not inner and head in content):
                raise ValueError(f"{layer.place}: {place}{name} is no option of a study: {instead}")


@cache
def _defaults(command: str) -> dict[str, Any]:
    """The options of a command without a word, as plain values."""
    return resolve(command, [])[1]


def _beyond(given: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Options that are not as they would be without a word; a class stays whole."""
    return {
        name: _beyond(value, default[name])
        if isinstance(value, dict) and isinstance(default.get(name), dict) and "class_path" not in value
        else value
        for name, value in given.items()
        if name not in default or value != default[name]
    }


# ------------------------------------------------------------------------------------------------------- running


def run(study: Study) -> dict[str, Any]:
    """Print the plan, write the report of what there is, or do this shard's cells and then write the report.

    Returns:
        the plan, or the content of results.json; of a shard whose study is not complete what is missing.
    """
    check_config(study.folder, study.reading.config, study.reading.reread)
    if study.reading.options.dry_run:
        return print_plan(study, partial(command_line, study))
    if study.reading.options.report:
        if not study.folder.exists():
            raise ValueError(f"--report true: there is no study in {study.folder} yet; start it, or name its --output")
        return write_report(study)
    accelerator = _begin(study)
    options = study.reading.options
    alike = shared_pass if options.share_teacher else lambda _: None
    queue = Queue(study.cells, study.folder, study.shards, options.share()[0], alike)
    together = partial(_run_together, study, accelerator)
    run_cells(queue, partial(_run_cell, study), accelerator, options.poll_seconds, together)
    return _end(study, queue, accelerator)


def command_line(study: Study, cell: Cell) -> str:
    """What does the same as a cell, in a process of its own."""
    given = cell.options(study.folder).items()
    words = [
        word for name, value in given for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]
    return shlex.join(["dalikd", cell.command, *import_words(), "--config", str(study.kept), *words])


def _begin(study: Study) -> Accelerator:
    check_machine(study.kinds)
    options, _ = study.reading.read("train", {})
    accelerator = start(options.device, options.precision)
    if accelerator.is_main_process:
        _check_images(study)
        keep_config(study.folder, study.reading.config, study.reading.reread)
    accelerator.wait_for_everyone()
    return accelerator


def _check_images(study: Study) -> None:
    """This machine has the images that the runs which are done have had."""
    done = {cell.name: read_result(study.folder, cell) for cell in study.every}
    if any(done.values()):
        read = enumerate(study.images, start=1)
        here = {f"data {number} of this machine ({data['data']['root']})": data for number, data in read}
        check_images({**done, **here})


def _run_together(study: Study, accelerator: Accelerator, step: Sequence[tuple[Cell, Path | None]]) -> None:
    run_students({cell.name: Planned(*_options(study, cell, resumed)) for cell, resumed in step}, accelerator)


def _options(study: Study, cell: Cell, resumed: Path | None) -> tuple[Any, dict[str, Any]]:
    """Of a cell's call, and the same as plain values."""
    options, config = study.reading.read(cell.command, cell.options(study.folder))
    if resumed is not None:
        # not --resume, which would read the config.yaml that a kill may have cut off
        options = replace(options, resume=str(resumed))
    return options, config


def _run_cell(study: Study, cell: Cell, resumed: Path | None) -> None:
    options, config = _options(study, cell, resumed)
    _FUNCTIONS[cell.command](options, config)
    if cell.command == "measure":
        (study.folder / cell.checkpoint).unlink(missing_ok=True)


def _end(study: Study, queue: Queue, accelerator: Accelerator) -> dict[str, Any]:
    if not accelerator.is_main_process:
        return {}
    if not (missing := queue.missing()):
        return write_report(study)
    print(f"\nthis shard is done; {len(missing)} of {len(study.cells)} runs are left to others: {missing[0]}, …")
    return {"complete": False, "missing": missing}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with guarded("study"):
        reading = read_study(sys.argv[1:] if argv is None else argv)
        with json_asked(reading.options.json):
            choose_threads()
            found = run(make_ready(reading))
            if os.environ.get("RANK", "0") == "0":
                give_json(reading.options.json, found)


if __name__ == "__main__":
    main()
