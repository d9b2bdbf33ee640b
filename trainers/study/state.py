"""What is done of a study, from its folder alone, so that a kill at any moment loses at most the work since a save."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dalikd.pipelines.files import read_json, read_yaml, remove_litter, write_atomically
from dalikd.pipelines.lock import only_writer
from dalikd.trainers.study.plan import Cell
from dalikd.trainers.tracking import LOCK, RunFolder, check_writable

__all__ = ["clear_unsaved", "is_done", "keep_config", "read_result"]

_CONFIG = "config.yaml"
#: how and where a call runs, not what comes out: shards may differ in it
_FREE = {"device", "log_every", "data.root", "data.threads", "data.prefetch", "data.hw_decoder_load", "data.decode"} | {
    *("data.endpoint", "data.in_flight", "data.cache", "data.cache_size")
}


def read_result(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a cell that is done, or None.

    Raises:
        ValueError: its file cannot be read.
    """
    path = folder / cell.result
    if not path.exists():
        return None
    try:
        result = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a result ({error}): delete it, and it is made again") from None
    if not isinstance(result, dict):
        raise ValueError(f"{path} is not a result: delete it, and it is made again")
    return result if result.get("finished", True) else None


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


def _read(path: Path) -> Any:
    return read_yaml(path)


def check_config(folder: Path, config: dict[str, Any], reread: Callable[[Path], dict[str, Any]] = _read) -> None:
    """Refuse a folder that holds something else, or a study with another config.

    Args:
        folder: of the study.
        config: of the study.
        reread: gives the config that a file keeps, in the form that `config` has.

    Raises:
        ValueError: names the first difference and the fix.
    """
    path = folder / _CONFIG
    check_writable("--output", path)
    if not path.exists():
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ValueError(f"--output {folder} holds other files and is not touched: name another folder")
        return
    kept = _read(path)
    if not isinstance(kept, dict) or "study" not in kept:
        raise ValueError(f"--output {folder} holds something else than a study: name another folder")
    difference = None if kept == config else first_difference(reread(path), config)  # reading it anew takes a second
    if difference is not None:
        name, old, new = difference
        raise ValueError(
            f"--output {folder} holds a study with {name}: {old}, now it is {new}: "
            "give the same, or name a new folder with --output"
        )


def keep_config(folder: Path, config: dict[str, Any], reread: Callable[[Path], dict[str, Any]] = _read) -> None:
    """Write the study's config, unless it is there; of several that start at once the first wins, and all compare.

    Args: as `check_config`.

    Raises:
        ValueError: the folder holds another study.
    """
    check_config(folder, config, reread)
    path = folder / _CONFIG
    if path.exists():
        check_config(folder, config, reread)  # another may have written it since
        return
    try:
        write_atomically(path, yaml.safe_dump(config, sort_keys=False).encode(), replace=False)
    except FileExistsError:  # another was quicker
        check_config(folder, config, reread)
    for place in (folder, folder / "plots"):
        remove_litter(place)


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
