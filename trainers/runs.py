"""Finished runs, read back: what train, distill, measure and evaluate have written, checked before anything is made of
it."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dalikd.pipelines.files import LARGEST_TEXT, parse_json, read_json, read_text, read_yaml
from dalikd.pipelines.sources import why_fingerprints_differ

__all__ = [
    "FIGURES",
    "Found",
    "Run",
    "check_comparable",
    "check_images",
    "check_result",
    "differences",
    "find_runs",
    "is_evaluated",
    "measured_for",
    "options_of",
    "read_measurement",
    "read_run",
    "read_run_files",
    "teacher_of",
]

#: what every evaluation gives
FIGURES = ("loss", "top1", "top5")
_NUMBER, _TEXT, _GROUP, _LIST = "a number", "a text", "a group", "a list"
_ANY = {"versions": _GROUP}
#: what a run has besides that was evaluated, and so what is read of any but one without labelled images
_EVALUATED = {f"{when}.val.{name}": _NUMBER for when in ("last", "best") for name in FIGURES}
_EVALUATED |= {"best.epoch": _NUMBER, "fingerprint.val": _TEXT}
#: what is read of a result of each kind, by its dotted name
_NEEDED = {
    "run": _ANY | {"last.epoch": _NUMBER, "epochs": _NUMBER, "fingerprint.train": _TEXT},
    "measure": _ANY
    | {"results": _LIST, "fingerprint": _TEXT, "mode": _TEXT, "precision": _TEXT, "confidence": _NUMBER}
    | dict.fromkeys(("mix_group", "window", "epochs", "seed"), _NUMBER)
    | dict.fromkeys(("separation", "stopped"), f"{_GROUP} or null"),
    "evaluate": _ANY | {"fingerprint": _TEXT} | dict.fromkeys(FIGURES, _NUMBER),
}
_ROW = {"augmentation": _TEXT, "windows": _NUMBER, "images": _NUMBER, "entropy": f"{_NUMBER} or null"}
_ROW |= {"stddev": f"{_NUMBER} or null", "stderr": f"{_NUMBER} or null"}
#: what a run's folder has besides, for those who compare runs of any command
_OF_A_RUN = {"command": _TEXT, "model": _TEXT, "seed": _NUMBER, "batch_size": _NUMBER, "data": _GROUP}

#: what says, besides the seed where images are chosen, which images a split has
_CHOICE = ("name", "classes", "class_seed")
_PARTS = {"train": ("limit", "share"), "val": ("val_limit",)}
#: options that change where and how a run works and what it writes, not what is trained; files are known by content
_FREE = (
    *("seed", "output", "device", "log_every", "checkpoint_every", "checkpoint_minutes", "eval_every", "compile"),
    *("accumulation", "metric", "entropy_log_every", "students", "run", "weights"),
    *("data.root", "data.val_root", "data.threads", "data.prefetch", "data.hw_decoder_load", "data.decode"),
    *("data.resident", "data.bad_files", "data.bad_files_limit", "data.max_pixels", "data.download"),
    *("teacher.weights", "teacher.sha256", "teacher.cache", "teacher.verify", "teacher.fold_bn"),
)
#: values with which an option does nothing that an earlier version did not have
_UNUSED = (None, False, 0, 1.0, "", {}, [])
_TOGETHER = "students.yaml"  # in a folder of runs that were done together, which is none itself
_DEEPEST = 8  # folders in folders; a study's students lie 6 below it
_MOST_FOLDERS = 100_000


class Run(NamedTuple):
    """A finished run.

    Attributes:
        folder: where it lies, as it was named.
        config: its options, as config.yaml keeps them.
        results: the content of results.json.
        log: the lines of log.jsonl.
        method: its name in a study of methods; empty: it has none.
    """

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]
    log: list[dict[str, Any]]
    method: str = ""


class Found(NamedTuple):
    """What lies in folders.

    Attributes:
        runs: the finished ones.
        measurements: what `dalikd measure --json` wrote beside them, by file.
        evaluations: what `dalikd evaluate --json` wrote beside them, by file.
        left_out: what is not read and why, in words.
    """

    runs: list[Run]
    measurements: dict[Path, dict[str, Any]]
    evaluations: dict[Path, dict[str, Any]]
    left_out: list[str]


class _Unfinished(ValueError):
    """A run that has not come to its end."""


# ------------------------------------------------------------------------------------------------------- reading


def check_result(path: Path, content: Any, kind: str) -> dict[str, Any]:
    """Check that a result holds what is read of it.

    Args:
        path: its file, for messages.
        content: of the file.
        kind: run, measure or evaluate.

    Raises:
        ValueError: something is missing, or is of another type; names file and place.
    """
    _need(path, content, _NEEDED[kind] | (_EVALUATED if kind == "run" and is_evaluated(content) else {}))
    if kind == "measure" and not content["results"]:
        raise ValueError(f"{path}: results is empty")
    for number, row in enumerate(content["results"] if kind == "measure" else ()):
        _need(path, row, _ROW, f"results[{number}].")
    return content


def is_evaluated(results: Any) -> bool:
    """Whether a run's results are those of a net that was evaluated; without labelled images none is."""
    last = results.get("last") if isinstance(results, Mapping) else None
    return not (isinstance(last, Mapping) and "val" in last and last["val"] is None)


def _need(path: Path, content: Any, fields: Mapping[str, str], prefix: str = "") -> None:
    for name, kind in fields.items():
        value: Any = content
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"{path}: {prefix}{name} is missing")
            value = value[key]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        types = {_NUMBER: number, _TEXT: isinstance(value, str), _GROUP: isinstance(value, dict)}
        types[_LIST] = isinstance(value, list)
        wanted, _, null = kind.partition(" or ")
        if not (types[wanted] or (null and value is None)):
            raise ValueError(f"{path}: {prefix}{name} is {value!r:.40}, not {kind}")


def read_run_files(folder: Path, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.yaml and results.json of a run hold; {} where there is no results.json yet.

    Args:
        folder: of the run.
        what: the folder, for messages.

    Raises:
        ValueError: it is no run folder, or of no net, or damaged.
        OSError: a file cannot be read.
    """
    config, results = folder / "config.yaml", folder / "results.json"
    if not config.is_file():
        raise ValueError(f"{what} is no run folder ({config} is missing): name one")
    options = read_yaml(config)
    if not isinstance(options, dict) or not options.get("model"):
        raise ValueError(f"{what}: {config} names no model; name the folder of a run that trains a net")
    found = read_json(results) if results.is_file() else {}
    if not isinstance(found, dict) or not isinstance(options.get("model_args") or {}, dict):
        raise ValueError(f"{what}: {results} or config.yaml is damaged: name another run folder")
    return options, found


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds something else, is not finished, or is damaged; names the file and the fix.
    """
    path, log_file, log = folder / "results.json", folder / "log.jsonl", []
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; name a run folder")
    config, results = read_run_files(folder, str(folder))
    finished = results.get("finished", bool(results))  # earlier versions do not say
    try:
        if finished:
            check_result(path, results, "run")
            _need(path, results, _OF_A_RUN | ({"last.val.images": _NUMBER} if is_evaluated(results) else {}))
            lines = enumerate(read_text(log_file, 16 * LARGEST_TEXT).splitlines(), start=1)
            log = [_line(f"{log_file} line {number}", line) for number, line in lines]
    except ValueError as error:
        raise ValueError(f"{error}: the run is damaged or of another version; leave it out, or run it anew") from None
    if not finished:
        done = f", {results['steps']} steps are done" if isinstance(results.get("steps"), int) else ""
        raise _Unfinished(
            f"{folder} is not finished{done}: go on with it by dalikd {results.get('command', 'COMMAND')} --resume "
            f"{folder}, or leave it out"
        )
    return Run(folder, config, results, log)


def _line(place: str, text: str) -> dict[str, Any]:
    line = parse_json(text, place)
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise ValueError(f"{place} has no step")
    return line


def read_measurement(path: Path) -> dict[str, Any]:
    """Read what `dalikd measure --json` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name what dalikd measure --json FILE wrote")
    try:
        return check_result(path, read_json(path), "measure")
    except ValueError as error:
        raise ValueError(f"{error}: name what dalikd measure --json FILE wrote") from None


def find_runs(places: Sequence[Path]) -> Found:
    """Read run folders, and those that lie in studies or other folders, with what was measured beside them.

    A run that is named by itself has to be finished; those that are found in a folder are left out where they are not.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: as `read_run`; or a folder holds no finished run.
    """
    found, seen = Found([], {}, {}, []), set[Path]()
    for place in places:
        if not place.is_dir():
            raise FileNotFoundError(f"{place}: no such folder; name a run folder, a study, or a folder of runs")
        folders, before = _run_folders(place), len(found.runs)
        methods = {} if folders == [place] else _methods_of_study(place)
        for folder in folders:
            if folder.resolve() in seen:
                continue
            try:
                run = read_run(folder)
            except _Unfinished as error:
                if folder == place:
                    raise
                found.left_out.append(str(error))
                continue
            seen.add(folder.resolve())
            named = folder.parent.name if folder.relative_to(place).parts[:1] == ("distill",) else ""
            found.runs.append(run._replace(method=named if named in methods else ""))
        if folders != [place]:
            _read_beside(place, found)
        if len(found.runs) == before and not seen.intersection(folder.resolve() for folder in folders):
            there = f", {len(folders)} that are not: {found.left_out[-1]}" if folders else ""
            raise ValueError(f"{place} holds no finished run{there}; name a run folder, a study, or a folder of runs")
    return found


def _run_folders(place: Path) -> list[Path]:
    """The folder itself, if it is a run's, or those below it."""
    found, waiting, visited = list[Path](), [(place, 0)], 0
    while waiting:
        folder, depth = waiting.pop()
        visited += 1
        if visited > _MOST_FOLDERS:
            raise ValueError(f"{place} holds more than {_MOST_FOLDERS:,} folders: name those of the runs")
        there = {name for name in ("config.yaml", "log.jsonl", "last", _TOGETHER) if (folder / name).exists()}
        if "config.yaml" in there and there & {"log.jsonl", "last"} and _TOGETHER not in there:
            found.append(folder)
        elif depth < _DEEPEST:
            inner = (entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_dir())
            waiting += [(entry, depth + 1) for entry in inner]
    return sorted(found)


def _methods_of_study(place: Path) -> Mapping[str, Any]:
    path = place / "config.yaml"
    content = read_yaml(path) if path.is_file() else None
    study = content.get("study") if isinstance(content, dict) else None
    methods = study.get("methods") if isinstance(study, dict) else None
    return methods if isinstance(methods, dict) else {}


def _read_beside(place: Path, found: Found) -> None:
    """Measurements and evaluations among the JSON files of a folder, and of a study's folders for them."""
    for path in sorted(path for below in ("", "measure", "teachers") for path in (place / below).glob("*.json")):
        if path == place / "results.json":  # a study's own, made of the others
            continue
        try:
            content = read_json(path)
        except ValueError as error:
            found.left_out.append(str(error))
            continue
        rows = content.get("results") if isinstance(content, dict) else None
        if isinstance(rows, list) and rows and isinstance(rows[0], dict) and "stddev" in rows[0]:
            found.measurements[path] = read_measurement(path)
        elif isinstance(content, dict) and {*FIGURES, "config", "fingerprint"} <= content.keys():
            found.evaluations[path] = check_result(path, content, "evaluate")


# ----------------------------------------------------------------------------------------------------- comparing


def teacher_of(result: Mapping[str, Any]) -> str | None:
    """What tells a run's or a measurement's teacher from others: its weights; None: it has none, or several."""
    teacher = result.get("teacher")
    if not isinstance(teacher, dict):
        return None
    return f"{teacher.get('name')} {str(teacher.get('sha256') or teacher.get('weights'))[:12]}"


def options_of(run: Run) -> dict[str, Any]:
    """The options by their dotted names that make a run what it is, beside its seed."""
    flat = _flat(run.config)
    kept = {
        name: value
        for name, value in flat.items()
        if not any(name == free or name.startswith(f"{free}.") for free in _FREE)
    }
    several = run.results.get("teachers") or []
    teacher = teacher_of(run.results) or ", ".join(str(teacher_of({"teacher": one})) for one in several)
    return {**kept, "command": run.results["command"], "teacher": teacher}


def measured_for(run: Run, measurement: Mapping[str, Any]) -> str | None:
    """Why a measurement is not of a run's teacher and augmentation; None: it is."""
    teacher, own = teacher_of(measurement), teacher_of(run.results)
    if teacher is None or teacher != own:
        return f"T. stddev was measured with the teacher {teacher}, and {run.folder} has {own or 'none, or several'}"
    measured, mix = measurement.get("mix") or {}, run.config.get("mix") or {}
    for name in measured:
        if mix.get(name, measured[name]) != measured[name]:
            return f"T. stddev was measured with --mix.{name} {measured[name]}, and {run.folder} has {mix[name]}"
    return None


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The options, by their dotted names, that are not the same in all runs, and the value of each run; None where a
    run, of an earlier version or another command, does not know one. Seeds, places and how fast a run works are none.
    """
    all_options = [options_of(run) for run in runs]
    names, found = dict.fromkeys(name for options in all_options for name in options), {}
    for name in names:
        known = [options[name] for options in all_options if name in options]
        one = len({json.dumps(value, sort_keys=True) for value in known}) == 1
        if not one or (len(known) < len(runs) and known[0] not in _UNUSED):
            found[name] = [options.get(name) for options in all_options]
    return found


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        inner = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def check_comparable(runs: Sequence[Run], varied: Iterable[str] = ("augmentation",)) -> None:
    """Check that runs have been done alike, on the same images.

    Args:
        runs: to be compared.
        varied: options, or groups of them, in which they may differ, beside the seed.

    Raises:
        ValueError: names the first option that differs, and a run with each of its values.
    """
    check_images({str(run.folder): run.results for run in runs}, "these runs")
    for name, values in differences(runs).items():
        if name.partition(".")[0] in varied:
            continue
        groups: dict[str, list[str]] = {}
        for run, value in zip(runs, values, strict=True):
            groups.setdefault("left out" if value is None else str(value), []).append(str(run.folder))
        found = "; ".join(f"{value:.60} in {_listed(names, 1)}" for value, names in groups.items())
        raise ValueError(f"these runs cannot be compared, {name} differs: {found}: leave out those of one side")


def check_images(results: Mapping[str, dict[str, Any] | None], whose: str = "the runs of this study") -> None:
    """Check that runs which ask for the same images have the same ones, wherever these lie on their machines.

    Args:
        results: of runs, by their names; None where there is none.
        whose: they are, for messages.

    Raises:
        ValueError: names runs that have others.
    """
    seen: dict[str, dict[str, list[str]]] = {}
    there = {name: result for name, result in results.items() if result is not None}
    for name, result in there.items():
        for split, fingerprint in _fingerprints_of(result).items():
            seen.setdefault(_asked_for(result, split), {}).setdefault(fingerprint, []).append(name)
    for by_fingerprint in seen.values():
        if len(by_fingerprint) > 1:
            found = "; ".join(f"{fingerprint}: {_listed(names)}" for fingerprint, names in by_fingerprint.items())
            shortest, *_, longest = sorted(by_fingerprint, key=len)
            raise ValueError(
                f"{whose} have different images, by the data's fingerprints {found}: name the same data "
                "on every machine with --data.root, and delete the results of other data "
                f"({why_fingerprints_differ(shortest, longest)})"
            )


def _asked_for(result: dict[str, Any], split: str) -> str:
    """The images that a run asks for, by its options; where they are a share, the seed chooses it."""
    config = result.get("config", result)
    data = config.get("data", {})
    part = {key: data[key] for key in _PARTS[split] if data.get(key) not in (None, 1.0)}  # a share of 1: all
    choice = {key: data.get(key) for key in (*_CHOICE, f"{split}_split")}
    return json.dumps([split, choice, part, config.get("seed") if part else None])


def _fingerprints_of(result: dict[str, Any]) -> dict[str, str]:
    """Of the images that a run read, by their split; measuring reads the training images, evaluating the others."""
    fingerprint = result["fingerprint"]
    if isinstance(fingerprint, dict):
        return {split: digest for split, digest in fingerprint.items() if digest is not None}
    return {"train" if "results" in result else "val": fingerprint}


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
