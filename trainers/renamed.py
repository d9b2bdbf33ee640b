"""Options that an earlier version called otherwise: a file that it wrote goes on, a person is told the new name."""

from collections.abc import Container, Mapping
from typing import Any

__all__ = ["RENAMED", "new_name", "renamed", "take_old_names", "told"]

#: The dotted name that an option had, and the one that it has now. Where no single option has taken its place, a
#: sentence that says what has: it has spaces, and is always told. A list of numbers may have become an option each.
RENAMED: dict[str, str | tuple[str, ...]] = {
    **{name: f"mix.{name}" for name in ("mode", "alpha", "manifold_alpha", "cutout_side", "patch_side", "mask_cells")},
    **{name: f"mix.{name}" for name in ("mask_ratio", "randaugment_ops", "randaugment_magnitude", "n_pick")},
    "pick_temperature": "mix.pick_temperature",
    "mix_group": "mix.group",
    "mix_n_run": "mix.n_run",
    "ceiling": "mix.lam_max",
    "floor": "mix.lam_min",
    "fix_student": "freeze_student",
    "clip": "clip_grad_norm",
    "loss.lw_mix": ("loss.kd_share", "loss.ce_mix_share", "loss.kd_mix_share"),
}


def new_name(name: str) -> str:
    """What an option is called now; its own name where no single option has taken its place. Options of a class stand
    in init_args."""
    new = RENAMED.get(name.replace(".init_args.", "."), name)
    return name if isinstance(new, tuple) or " " in new else _placed(new, name)


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the present names of options, where some have the names of an earlier version."""
    found = {}
    for name, value in values.items():
        new = RENAMED.get(name.replace(".init_args.", "."))
        if isinstance(new, tuple):
            found |= {_placed(part, name): one for part, one in zip(new, value or (), strict=False)}
        else:
            found[new_name(name)] = value
    return found


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
            new, found[old] = RENAMED[old], told(old)
            parts, values = ((new,), [group[last]]) if isinstance(new, str) else (new, group[last])
            if (
                not any(" " in part for part in parts)
                and isinstance(values, list | tuple)
                and len(values) == len(parts)
            ):
                del group[last]
                for part, value in zip(parts, values, strict=True):
                    group, last = _group(content, _placed(part, name), make=True)
                    group[last] = value
            break
    return found


def told(old: str) -> str:
    """For a person: what an old name is now."""
    new = RENAMED[old]
    return new if isinstance(new, str) else f"{', '.join(new[:-1])} and {new[-1]}"


def _placed(new: str, old: str) -> str:
    """A new name, in init_args where the old one is."""
    return new.replace(".", ".init_args.", 1) if ".init_args." in old and ".init_args." not in new else new


def _group(content: dict[str, Any], name: str, *, make: bool = False) -> tuple[dict[str, Any], str]:
    """The group that an option stands in, empty where there is none, and its own name."""
    *heads, last = name.split(".")
    for head in heads:
        inner = content.setdefault(head, {}) if make else content.get(head)
        content = inner if isinstance(inner, dict) else {}
    return content, last
