"""`dalikd methods`: the distillation losses that there are."""

import re
from collections.abc import Sequence
from inspect import isabstract, signature
from pathlib import Path
from typing import Any

from dalikd import configs
from dalikd.kd import losses
from dalikd.kd.losses import DistillationLoss, Schedule
from dalikd.tools.cli import run_function
from dalikd.trainers.tracking import check_writable, write_json


def methods(json: Path | None = None) -> list[dict[str, Any]]:
    """List every distillation loss: its paper, what it takes beside logits and labels, its default weights, and the
    configs that use it.

    Args:
        json: JSON file for the same, {"methods": [{"name", "paper", "needs", "weights", "configs"}, …]}.
    """
    if json is not None:
        check_writable("--json", json)
    folder = Path(configs.__file__).parent
    texts = {path: re.sub("#.*", "", path.read_text("utf-8")) for path in sorted(folder.rglob("*.yaml"))}
    found: list[dict[str, Any]] = []
    print("| --loss | default weights | needs | configs | paper |\n|:--|:--|:--|:--|:--|")
    for name in losses.__all__:
        kind = getattr(losses, name)
        if not isinstance(kind, type) or not issubclass(kind, DistillationLoss) or isabstract(kind):
            continue
        needs = sorted(kind.needs) if isinstance(kind.needs, frozenset) else ["what its parts need"]
        options = signature(kind).parameters
        weights = {option: _plain(options[option].default) for option in options if option.endswith("weight")}
        users = [path.relative_to(folder) for path, text in texts.items() if re.search(rf"\.losses\.{name}\b", text)]
        files = [f"configs/{path.as_posix()}" for path in users]
        found.append({"name": name, "paper": kind.paper, "needs": needs, "weights": weights, "configs": files})
        words = ", ".join(map("{} {}".format, weights, weights.values()))
        folders = ", ".join(dict.fromkeys(file.rpartition("/")[0] for file in files))
        print(f"| {name} | {words} | {', '.join(needs)} | {folders} | {kind.paper} |")
    if json is not None:
        write_json(json, {"methods": found})
        print(f"written: {json}")
    return found


def _plain(weight: Any) -> Any:
    """A weight; of a schedule "value@epoch" for each of its points."""
    return " ".join(map("{1:g}@{0:g}".format, weight.epochs, weight.values)) if isinstance(weight, Schedule) else weight


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("methods", methods, argv)


if __name__ == "__main__":
    main()
