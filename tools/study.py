"""`dalikd study`: does T. stddev predict the students? Everything that the answer needs, from one config."""

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
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
from dalikd.trainers.study.engines import check_slurm, local_places, longest_first, run_local, run_slurm, units
from dalikd.trainers.study.plan import Cell, Reading, Study
from dalikd.trainers.study.ready import COMMANDS, check_machine, make_ready, planned, shared_pass
from dalikd.trainers.study.report import print_plan, write_report
from dalikd.trainers.study.run import Queue, raise_failures, run_cells
from dalikd.trainers.study.state import check_config, keep_config, keep_work, read_result, read_work
from dalikd.trainers.study.status import print_status, study_status

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
    # beside --engine.partition and others, which --engine would replace
    argv = [re.sub(r"^--engine(?==|$)", "--engine.name", word) for word in argv]
    names, form = grammar("study").names, _form()
    own, shared, kept = [], [], {"pairs": [], "methods": {}, "engine": {}}
    for place, content in read_layers(argv, form, old_names=old_names):
        study = {name: content.pop(name) for name in names & content.keys()} | content.pop("study", {})
        # the parser would make objects of the classes in them
        if "pairs" in study:
            kept["pairs"] = _pairs(study.pop("pairs"), place, form, old_names=old_names)
        if "methods" in study:
            kept["methods"] = _methods(study.pop("methods"), place)
        if "engine" in study:  # its name and its options may stand in several places
            kept["engine"] = {**kept["engine"], **_engine(study.pop("engine"), place)}
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


def _engine(given: Any, place: str) -> dict[str, Any]:
    """What stands under `engine`: its name, its options, or both."""
    if isinstance(given, str):
        given = load_yaml(given, f"{place}: engine")[0] if given.startswith("{") else {"name": given}
    if not isinstance(given or {}, dict):
        raise ValueError(f"{place}: engine is {given!r}: give its name, or {{name: slurm, partition: gpu}}")
    # of the command line all words are text
    return {key: load_yaml(value, key)[0] if isinstance(value, str) else value for key, value in (given or {}).items()}


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


def run(study: Study, words: Sequence[str] = ()) -> dict[str, Any]:
    """Print the plan, write the report of what there is, or do this call's cells and then write the report.

    Args:
        study: made ready.
        words: that follow `dalikd study`; for an engine, which starts the same.

    Returns:
        the plan, or the content of results.json; of a study that is not complete what is missing.
    """
    check_config(study.folder, study.reading.config, study.reading.reread)
    options = study.reading.options
    if options.dry_run:
        return print_plan(study, partial(command_line, study))
    if options.report:
        if not study.folder.exists():
            raise ValueError(f"--report true: there is no study in {study.folder} yet; start it, or name its --output")
        return write_report(study)
    alike = shared_pass if options.share_teacher else lambda _: None
    engine = options.engine_name()
    work = {name: done.flops for name, done in study.work.items()}
    queue = Queue(
        longest_first(study.cells, work) if engine else study.cells,
        study.folder,
        study.shards,
        options.share()[0],
        alike,
        only=options.only or None,
        workers=options.workers or 1,
        engine=engine is not None,
    )
    if engine in (None, "worker"):
        accelerator = _begin(study)
        together = partial(_run_together, study, accelerator)
        run_cells(queue, partial(_run_cell, study), accelerator, options.poll_seconds, together)
        if not accelerator.is_main_process or (engine and not options.only):  # whoever waits for all workers ends it
            return {}
        return _end(study, queue)
    return _run_engine(study, queue, [*words, "--engine", "worker"], alike)


def _run_engine(study: Study, queue: Queue, words: list[str], alike: Callable[[Cell], str | None]) -> dict[str, Any]:
    """Let an engine start the runs. All that can be wrong before is found before. Returns as `run`, or the commands."""
    options = study.reading.options
    engine, given, begun = options.engine_name(), options.engine_options(), time.monotonic()
    train, _ = study.reading.read("train", {})
    if engine == "slurm":
        check_slurm(given)
    places = local_places(options.workers, on_cpu=train.device == "cpu") if engine == "local" else []
    queue.forget()
    if engine == "list":
        first = sorted(queue.left(), key=lambda cell: len(cell.needs) > 0)  # what waits for others occupies a place
        calls = [[cell.name for cell in unit] for unit in units(first, alike, given.get("parallel", 1))]
        commands = [shlex.join(["dalikd", "study", *words, "--only", *names]) for names in calls]
        print("\n".join(commands))
        return {"commands": commands}
    _keep(study)
    if engine == "local":
        words += ["--workers", str(len(places)), "--poll_seconds", str(min(2.0, options.poll_seconds))]
        if len(places) > 1 and train.data.threads is None:
            words += ["--data.threads", str(max(1, min(16, len(os.sched_getaffinity(0)) // len(places))))]
        restarts = run_local(queue, words, places)
        again = ", ".join(f"{count} after {cause}" for cause, count in sorted(restarts.items()))
    elif not run_slurm(queue, words, given, alike, options.poll_seconds):
        print("the jobs are in SLURM's hands: --status true shows how far they are, --report true writes the tables")
        return {"complete": False, "missing": queue.missing()}
    else:
        again = ""
    minutes = (time.monotonic() - begun) / 60
    done = len(queue.own) - len(queue.missing())
    print(f"\n{done} of {len(queue.own)} runs are done, {minutes:.1f} minutes" + (again and f"; restarts: {again}"))
    raise_failures(queue)
    return _end(study, queue)


def print_how_far(reading: Reading) -> dict[str, Any]:
    """Print what is done, running, waiting and failed, and return it; the data are not needed."""
    *_, folder, every, cells = planned(reading)
    if check_config(folder, reading.config, reading.reread) is None:
        raise ValueError(f"--status true: there is no study in {folder} yet; start it, or name its --output")
    names = {cell.name for cell in cells}
    status = study_status(folder, [cell for cell in every if cell.name in names], read_work(folder))
    print_status(folder, status)
    return status


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
        _keep(study)
    accelerator.wait_for_everyone()
    return accelerator


def _keep(study: Study) -> None:
    _check_images(study)
    keep_config(study.folder, study.reading.config, study.reading.reread)
    keep_work(study.folder, {name: done.flops for name, done in study.work.items()})


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


def _end(study: Study, queue: Queue) -> dict[str, Any]:
    if not (missing := queue.missing()):
        return write_report(study)
    print(f"\nthis shard is done; {len(missing)} of {len(study.cells)} runs are left to others: {missing[0]}, …")
    return {"complete": False, "missing": missing}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with guarded("study"):
        words = sys.argv[1:] if argv is None else argv
        reading = read_study(words)
        options = reading.options
        with json_asked(options.json):
            if options.status:
                found = print_how_far(reading)
            else:
                choose_threads()
                found = run(make_ready(reading), words)
            # a worker has been given the option too
            if os.environ.get("RANK", "0") == "0" and options.engine_name() != "worker":
                give_json(options.json, found)


if __name__ == "__main__":
    main()
