"""What makes a resumed run the same run: what must be as it was, and what may change and is said."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalikd.trainers.renamed import renamed

__all__ = ["check_same_run", "identity"]

#: options, and groups of them, that change where and how fast a run works, or name files whose content is compared
_FREE = (
    *("device", "output", "log_every", "trackers", "checkpoint_every", "checkpoint_minutes", "accumulation", "compile"),
    *("weights", "reinit", "run"),
    *("teacher.name", "teacher.args", "teacher.weights", "teacher.cache", "teacher.sha256", "teacher.fold_bn"),
    *("teacher.mean", "teacher.std", "teacher.verify", "teachers"),
    *("data.name", "data.root", "data.train_split", "data.val_split", "data.val_root", "data.classes", "data.download"),
    *("data.threads", "data.prefetch", "data.hw_decoder_load", "data.decode", "data.resident", "data.bad_files"),
    *("data.bad_files_limit", "data.max_pixels", "data.endpoint", "data.in_flight", "data.cache", "data.cache_size"),
)
#: those that change how it goes on, not what it is
_SAID = (
    *("epochs", "epoch_factor", "schedule", "optimizer", "clip_grad_norm", "eval_every", "precision", "sync_bn"),
    *("metric", "entropy_log_every"),
)
#: where an option that an earlier version did not have does nothing, if that is not 0, false or nothing
_UNUSED = {"data.share": 1.0}


def identity(command: str, config: Mapping[str, Any], told: Mapping[str, Any], **contents: Any) -> dict[str, Any]:
    """What is saved of a run to compare a resumed one with.

    Args:
        command: of the run.
        config: its options as plain values.
        told: what may change and is said, by what it is called in messages.
        contents: of the files that options name, as digests, by what they are called in messages.
    """
    return {"options": {"command": command, **_flat(config)}, "told": dict(told), "contents": contents}


def check_same_run(saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> list[str]:
    """Compare a run with the one that is to be resumed.

    Args:
        saved: the identity of the run in the folder.
        own: that of the run that is to go on with it.
        folder: for messages.

    Returns:
        what goes on otherwise than before, an option each, in words.

    Raises:
        ValueError: it is another run: its options or the content of its files differ.
    """
    refused, said = [], []
    before, now = renamed(saved.get("options", {})), own["options"]
    # an option that a version did not have yet is not compared where it does nothing: nested ones that were not given
    # are None, and what a class could not do yet was off
    groups = {name.partition(".")[0] for name in before} & {name.partition(".")[0] for name in now}
    for name in sorted(before.keys() | now.keys()):
        was, value = before.get(name), now.get(name)
        if (
            was == value
            or (name not in before and (not value or value == _UNUSED.get(name)))
            or name.partition(".")[0] not in groups
            or _is_in(name, _FREE)
        ):
            continue
        change = f"--{name.replace('.init_args.', '.')} was {was}, now it is {value}"
        if name == "command":
            change = f"it is of dalikd {was}, not {value}"
        (said if _is_in(name, _SAID) else refused).append(change)
    contents = saved.get("contents", {})
    refused += [
        f"{name.replace('_', ' ')}: others than before ({contents[name]}, now {value})"
        for name, value in own["contents"].items()
        if contents.get(name, value) != value
    ]
    told = saved.get("told", {})
    said += [
        f"{name} {value}, before {told[name]}"
        for name, value in own.get("told", {}).items()
        if told.get(name, value) != value
    ]
    if refused:
        raise ValueError(
            f"--resume {folder} would be another run: {'; '.join(refused)}. Leave that as it was, or start a new run "
            "with an --output of its own"
        )
    return said


def _is_in(name: str, options: tuple[str, ...]) -> bool:
    return any(name == option or name.startswith(f"{option}.") for option in options)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return flat
