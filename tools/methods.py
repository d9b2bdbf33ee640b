"""`dalikd methods`: the distillation losses that there are."""

import re
from collections.abc import Sequence
from inspect import Parameter, isabstract, signature
from pathlib import Path
from typing import Any

from dalikd.kd import losses
from dalikd.kd.losses import DistillationLoss, Schedule, WeightedSum
from dalikd.tools.cli import run_function
from dalikd.tools.summary import give_json


def methods(json: Path | None = None) -> list[dict[str, Any]]:
    """List every distillation loss: default weights, what it takes beside logits and labels, configs, and its paper.

    Args:
        json: JSON file for the same, - for stdout, {"methods": [{"name", "paper", "needs", "weights", "configs"}, …]}.
    """
    root = Path(__file__).parents[1]
    paths = sorted((root / "configs").rglob("*.yaml"))
    texts = {path.relative_to(root).as_posix(): re.sub("#.*", "", path.read_text("utf-8")) for path in paths}
    found: list[dict[str, Any]] = []
    print("| --loss | default weights | needs | configs | paper |\n|:--|:--|:--|:--|:--|")
    for name, kind in ((name, getattr(losses, name)) for name in losses.__all__):
        if not isinstance(kind, type) or not issubclass(kind, DistillationLoss) or isabstract(kind):
            continue
        made: Any = None if kind is WeightedSum else kind()
        needs = ["what its parts need"] if made is None else sorted(made.needs)
        options: dict[str, Parameter] = {}
        for one in kind.__mro__:
            options = {**signature(one).parameters, **options}
            if "**" not in str(signature(one)):  # else it takes what the class above it takes
                break
        weights = {
            option: _plain(getattr(made, option, options[option].default))
            for option in options
            if option.endswith("weight")
        }
        files = [file for file, text in texts.items() if re.search(rf"\.losses\.{name}\b", text)]
        found.append({"name": name, "paper": kind.paper, "needs": needs, "weights": weights, "configs": files})
        words = map("{} {}".format, weights, weights.values())
        cells = map(", ".join, (words, needs, dict.fromkeys(file.rpartition("/")[0] for file in files)))
        print(f"| {name} | {' | '.join(cells)} | {kind.paper} |")
    give_json(json, {"methods": found})
    return found


def _plain(weight: Any) -> Any:
    """A weight; of a schedule "value@epoch" for each of its points."""
    return " ".join(map("{1:g}@{0:g}".format, weight.epochs, weight.values)) if isinstance(weight, Schedule) else weight


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("methods", methods, argv)


if __name__ == "__main__":
    main()
