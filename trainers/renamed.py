"""Options that an earlier version called otherwise: a file that it wrote goes on, a person is told the new name."""

from collections.abc import Container, Mapping
from typing import Any

__all__ = ["RENAMED", "new_name", "renamed", "take_old_names"]

#: The dotted name that an option had, and the one that it has now. Where no single option has taken its place, a
#: sentence that says what has: it has spaces, and is always told.
RENAMED: dict[str, str] = {
    **{name: f"mix.{name}" for name in ("mode", "alpha", "manifold_alpha", "cutout_side", "patch_side", "mask_cells")},
    **{name: f"mix.{name}" for name in ("mask_ratio", "randaugment_ops", "randaugment_magnitude", "n_pick")},
    "pick_temperature": "mix.pick_temperature",
    "mix_group": "mix.group",
    "mix_n_run": "mix.n_run",
    "ceiling": "mix.lam_max",
    "floor": "mix.lam_min",
    "fix_student": "freeze_student",
    "clip": "clip_grad_norm",
}


def new_name(name: str) -> str:
    """What an option is called now; its own name where that has not changed. Options of a class stand in init_args."""
    new = RENAMED.get(name.replace(".init_args.", "."), name)
    if " " in new:
        return name
    return new.replace(".", ".init_args.", 1) if ".init_args." in name and new != name else new


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the present names of options, where some have the names of an earlier version."""
    return {new_name(name): value for name, value in values.items()}


def take_old_names(content: dict[str, Any], known: Container[str]) -> dict[str, str]:
    """Give options that have an old name their new one, in place.

    Args:
        content: options by name; groups are nested, and options of a class stand in its `init_args`.
        known: dotted names that options have now.

    Returns:
        the new name of each old one that was there; where that is a sentence, the option is left as it is.
    """
    found = {}
    for old in [old for old in RENAMED if old not in known]:
        for name in (old, old.replace(".", ".init_args.", 1)):
            group, last = _group(content, name)
            if last not in group:
                continue
            found[old] = new = RENAMED[old]
            if " " not in new:
                value = group.pop(last)
                group, last = _group(content, new if name == old else new.replace(".", ".init_args.", 1), make=True)
                group[last] = value
            break
    return found


def _group(content: dict[str, Any], name: str, *, make: bool = False) -> tuple[dict[str, Any], str]:
    """The group that an option stands in, empty where there is none, and its own name."""
    *heads, last = name.split(".")
    for head in heads:
        inner = content.setdefault(head, {}) if make else content.get(head)
        content = inner if isinstance(inner, dict) else {}
    return content, last
