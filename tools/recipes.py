"""`dalikd recipes`: the configs that are installed with dalikd, by name."""

import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from dalikd.tools.cli import run_function
from dalikd.tools.signature import RECIPE_PREFIX, RECIPES
from dalikd.tools.summary import give_json


def recipes(pattern: str = "", json: Path | None = None) -> list[dict[str, str | list[str]]]:
    """List the recipes that --config takes by name, the commands that each is for, and the first line that says what it
    does. `dalikd recipes PATTERN` lists those whose name holds PATTERN.

    Args:
        pattern: a part of the name, or of the whole name with * in it, such as cifar100/*/vgg13_*.
        json: JSON file for the same, {"recipes": [{"name", "commands", "about", "file"}, …]}; - for stdout.
    """
    found: list[dict[str, str | list[str]]] = []
    for path in sorted(RECIPES.rglob("*.yaml")):
        name = path.relative_to(RECIPES).with_suffix("").as_posix()
        if not (fnmatch(name, pattern) if "*" in pattern else pattern in name):
            continue
        lines = [line for line in path.read_text("utf-8").splitlines() if line.startswith("# ")]
        about = next((line[2:] for line in lines[1:] if not line.startswith("#  ")), "")
        commands = re.findall(r"\bdalikd (\w+)", lines[0])
        commands += re.findall(r"^#   .*\bdalikd(?:\.tools\.| )(\w+) ", "\n".join(lines), re.MULTILINE)
        found.append(
            {"name": RECIPE_PREFIX + name, "commands": list(dict.fromkeys(commands)), "about": about, "file": str(path)}
        )
    if not found:
        raise ValueError(f"{pattern}: no recipe has such a name; `dalikd recipes` lists all of them")
    print("| --config | commands | about |\n|:--|:--|:--|")
    for recipe in found:
        print(f"| {recipe['name']} | {', '.join(recipe['commands'])} | {recipe['about']} |")
    give_json(json, {"recipes": found})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_function("recipes", recipes, ["--pattern", *words] if words and not words[0].startswith("-") else words)


if __name__ == "__main__":
    main()
