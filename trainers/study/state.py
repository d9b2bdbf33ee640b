"""What is done of a study, from its folder alone, so that a kill at any moment loses at most the work since a save."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from dalikd.pipelines.files import read_json, read_yaml, remove_litter, write_atomically
from dalikd.pipelines.lock import only_writer, take_lock
from dalikd.trainers.runs import check_result
from dalikd.trainers.study.plan import Cell
from dalikd.trainers.tracking import LOCK, RunFolder, check_writable

__all__ = [
    "Record",
    "check_config",
    "clear_unsaved",
    "generations",
    "is_done",
    "keep_config",
    "keep_work",
    "lock_path",
    "read_plans",
    "read_record",
    "read_result",
    "read_work",
    "write_record",
]

_CONFIG = "config.yaml"
_PLANS = "plans.yaml"
#: of the study's options, what may be added to a study that has begun
_GROWING = ("pairs", "augmentation", "methods", "seeds", "epoch_factor")
#: how and where a call runs, not what comes out: shards may differ in it
_FREE = {"device", "log_every", "data.root", "data.threads", "data.prefetch", "data.hw_decoder_load", "data.decode"} | {
    *("data.endpoint", "data.in_flight", "data.cache", "data.cache_size")
}


def read_result(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a cell that is done, with all that is read of it, or None.

    Raises:
        ValueError: its file cannot be read, or lacks something.
    """
    path = folder / cell.result
    try:
        result = read_json(path) if path.exists() else {"finished": False}
        if not isinstance(result, dict):
            raise ValueError("not an object")
        whole = result.get("finished", True)
        return check_result(path, result, "run" if cell.is_run else cell.command) if whole else None
    except ValueError as error:
        raise ValueError(f"{path} is not a result ({error}): delete it, and it is made again") from None


def is_done(folder: Path, cell: Cell) -> bool:
    """Whether a cell's result is there, and of a whole run."""
    return read_result(folder, cell) is not None


def clear_unsaved(folder: Path, cell: Cell) -> Path | None:
    """The run folder that a cell goes on with, or None: what an interrupted run left without a state is removed."""
    run = folder / cell.name
    if not cell.is_run or not run.exists():
        return None
    if RunFolder(run, writes=False).has_state():
        return run
    with only_writer(run / LOCK, f"the run folder {run}"):
        shutil.rmtree(run)
    return None


def lock_path(folder: Path, name: str) -> Path:
    """What is locked for a cell: outside of the run folder, which is removed and made anew while the lock is held."""
    return folder / ".locks" / f"{name}.lock"


@dataclass(frozen=True)
class Record:
    """What is known of a cell besides its result; written by whoever holds its lock.

    Attributes:
        state: running, done, failed (by a mistake that would come again), or left: to be gone on with.
        seconds: of work so far, of all calls.
        crashes: how often its process has ended without a word, or by a fault.
        error: the last line of what failed or crashed.
        who: works on it, or has done so last; in words.
        at: when this was written, as ISO 8601; for people.
    """

    state: Literal["running", "done", "failed", "left"] = "left"
    seconds: float = 0.0
    crashes: int = 0
    error: str = ""
    who: str = ""
    at: str = ""


def read_record(folder: Path, name: str) -> Record:
    """Of a cell; of one that nobody has begun, and where it cannot be read, an empty one."""
    try:
        return Record(**read_json(lock_path(folder, name).with_suffix(".state")))
    except (OSError, ValueError, TypeError):
        return Record()


def write_record(folder: Path, name: str, record: Record) -> None:
    """Of a cell that this call has locked."""
    content = asdict(replace(record, at=f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}"))
    with contextlib.suppress(OSError):  # a full disk: the run itself fails by it, and tells so
        write_atomically(lock_path(folder, name).with_suffix(".state"), json.dumps(content).encode(), sync=False)


def keep_work(folder: Path, work: Mapping[str, float]) -> None:
    """Write down what each cell computes, for those that ask how long a study will take, without its data."""
    path = folder / ".locks" / "work"
    content = json.dumps(dict(work)).encode()
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content, sync=False)


def read_work(folder: Path) -> dict[str, float]:
    """Floating-point operations of each cell, as far as they were written down."""
    path = folder / ".locks" / "work"
    return read_json(path) if path.is_file() else {}


# ------------------------------------------------------------------------------------------- the config, and growth


def _read(path: Path) -> Any:
    return read_yaml(path)


def check_config(
    folder: Path, config: dict[str, Any], reread: Callable[[Path], dict[str, Any]] = _read
) -> dict[str, Any] | None:
    """Refuse a folder that holds something else, or a study with another config. Pairs, augmentations, methods, seeds
    and lengths may be more than before.

    Args:
        folder: of the study.
        config: of the study.
        reread: gives the config that a file keeps, in the form that `config` has.

    Returns:
        what is more than before, by the options' names; None: there is no study yet.

    Raises:
        ValueError: names the first difference and the fix.
    """
    path = folder / _CONFIG
    check_writable("--output", path)
    if not path.exists():
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ValueError(f"--output {folder} holds other files and is not touched: name another folder")
        return None
    kept = _read(path)
    if not isinstance(kept, dict) or "study" not in kept:
        raise ValueError(f"--output {folder} holds something else than a study: name another folder")
    if kept == config:
        return {}
    kept = reread(path)  # takes a second
    added = {name: _added(kept["study"].get(name), config["study"].get(name), name) for name in _GROWING}
    added = {name: values for name, values in added.items() if values}
    grown = {**kept, "study": {**kept["study"], **{name: config["study"][name] for name in added}}}
    if (difference := first_difference(grown, config)) is not None:
        name, old, new = difference
        more = " or more" if name.removeprefix("study.").partition(".")[0] in _GROWING else ""
        raise ValueError(
            f"--output {folder} holds a study with {name}: {old}, now it is {new}: "
            f"give the same{more}, or name a new folder with --output"
        )
    return added


def _added(old: Any, new: Any, name: str) -> Any:
    """What is there besides all that was there; nothing where that is changed, or some of it is gone."""
    if name == "methods":  # without names at first: its students would have to be made again
        kept = old and isinstance(new, dict) and all(new.get(key) == value for key, value in old.items())
        return {key: value for key, value in new.items() if key not in old} if kept else {}
    if not (isinstance(old, list) and isinstance(new, list) and all(value in new for value in old)):
        return []
    if name in ("seeds", "epoch_factor") and old[:1] != new[:1]:  # the student that scores candidates has the first
        return []
    return [value for value in new if value not in old]


def read_plans(folder: Path) -> list[dict[str, Any]]:
    """Of a study that has grown, what it was at first and after each growth: "date", and of its options "study" those
    that may grow. Of any other study nothing.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / _PLANS
    plans = read_yaml(path) if path.exists() else []
    whole = isinstance(plans, list) and all(isinstance(plan, dict) and "study" in plan for plan in plans)
    if not whole or not all(tuple(plan["study"]) == _GROWING for plan in plans):
        raise ValueError(f"{path} is damaged: it does not list plans; name a new folder with --output")
    return plans


def generations(folder: Path, augmentation: Sequence[str]) -> list[list[str]]:
    """Augmentations by the plan that has brought them, the first plan's first: each measurement is of those of one.

    Args:
        folder: of the study.
        augmentation: all of them; what no plan has yet comes last.

    Raises:
        ValueError: a file of the study cannot be read.
    """
    plans: list[Any] = read_plans(folder)
    if not plans and (folder / _CONFIG).is_file() and isinstance(kept := read_yaml(folder / _CONFIG), dict):
        plans = [kept] if isinstance(kept.get("study"), dict) else []
    found, known = list[list[str]](), set[str]()
    for names in (*(plan["study"].get("augmentation") or [] for plan in plans), augmentation):
        if set(names) <= set(augmentation):  # else it was planned and never begun, or `check_config` refuses it
            found.append([name for name in names if name not in known])
            known.update(names)
    return [names for names in found if names]


def keep_config(folder: Path, config: dict[str, Any], reread: Callable[[Path], dict[str, Any]] = _read) -> None:
    """Write the study's config, unless it is there; of several that start at once the first wins, and all compare. One
    that is more than the one that is there takes its place, and both stand in plans.yaml.

    Args: as `check_config`.

    Raises:
        ValueError: the folder holds another study.
    """
    path, text = folder / _CONFIG, yaml.safe_dump(config, sort_keys=False).encode()
    added = check_config(folder, config, reread)
    if added is None:
        try:
            write_atomically(path, text, replace=False)
        except FileExistsError:  # another was quicker
            added = check_config(folder, config, reread)
    if added:
        while (lock := take_lock(lock_path(folder, "config"))) is None:
            time.sleep(0.1)
        try:
            if check_config(folder, config, reread):  # else another has written it since
                _keep_plan(folder, reread(path), config)
                write_atomically(path, text)
        finally:
            lock.close()
    for place in (folder, folder / "plots"):
        remove_litter(place)


def _keep_plan(folder: Path, kept: dict[str, Any], config: dict[str, Any]) -> None:
    """Written before the config: what a kill between the two leaves is dropped by the next plan."""
    before, after = ({name: content["study"][name] for name in _GROWING} for content in (kept, config))
    plans = read_plans(folder)
    while plans and plans[-1]["study"] != before:
        plans.pop()
    if not plans:
        begun = datetime.fromtimestamp((folder / _CONFIG).stat().st_mtime)
        plans = [{"date": f"{begun:%Y-%m-%d}", "study": before}]
    plans.append({"date": f"{datetime.now():%Y-%m-%d}", "study": after})
    write_atomically(folder / _PLANS, yaml.safe_dump(plans, sort_keys=False).encode())


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, str, str] | None:
    """The first option, by its dotted name, in which two configs differ, and both its values."""
    left, right = _leaves(old), _leaves(new)
    for name in [*left, *(name for name in right if name not in left)]:
        if _without_section(name) not in _FREE and left.get(name, _NOTHING) != right.get(name, _NOTHING):
            return name, _shown(left.get(name, _NOTHING)), _shown(right.get(name, _NOTHING))
    return None


_NOTHING = object()


def _shown(value: Any) -> str:
    return "left out" if value is _NOTHING else json.dumps(value)


def _leaves(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _without_section(name: str) -> str:
    head, _, rest = name.partition(".")
    return rest if head in ("train", "distill", "measure", "evaluate") else name
