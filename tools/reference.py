"""`python -m dalikd.tools.reference`: the page of every option of every command, docs/reference/commands.md."""

import importlib
import re
from argparse import SUPPRESS, Action
from collections.abc import Sequence
from contextlib import suppress
from inspect import isabstract
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from unittest.mock import patch

from jsonargparse import ArgumentParser  # pyright: ignore[reportPrivateImportUsage]

from dalikd.kd import losses
from dalikd.pipelines.files import read_text, write_atomically
from dalikd.tools.bench.commands import BENCHMARKS
from dalikd.tools.cli import build_parser, run_function
from dalikd.tools.main import COMMANDS

_ROOT = Path(__file__).parents[1]
_PAGE = _ROOT / "docs/reference/commands.md"
_HEAD = """# Every option of every command

<!-- Written by `python -m dalikd.tools.reference`: change the help texts in the code, and run it again. -->

`dalikd COMMAND --help` prints the same. In a config file an option has the same name without the dashes; one with a
dot, such as `--data.root`, is a line in a group: `data: {root: DATA}`. Groups that several commands have in common
stand [at the end](#common-groups), and so do [the options of each loss](#losses).
"""
_COMMON = """## Common groups

Equal in all the commands that are named.
"""
_LOSSES = """## Losses

What may be given as `--loss.OPTION` after `--loss NAME`. What each method is: `dalikd distill --loss.help NAME`.
"""
_TABLE = "| option | type | default | |\n|:--|:--|:--|:--|\n"


def write_reference(page: Path = _PAGE, check: bool = False) -> None:
    """Write the page of every option of every command.

    Args:
        page: Markdown file.
        check: change nothing, and fail if the page is not up to date.
    """
    text = reference()
    if not check:
        write_atomically(page, text.encode())
    elif not page.is_file() or read_text(page) != text:
        raise ValueError(f"{page} is not up to date: run python -m dalikd.tools.reference")


def reference() -> str:
    """The page as Markdown."""
    build_parser.cache_clear()  # one that was used before has other defaults
    commands = [name for name in COMMANDS if name != "bench"] + [f"bench {name}" for name in BENCHMARKS]
    parsers = {name: _parser(name) for name in commands}
    groups = {name: _groups(parser) for name, parser in parsers.items()}
    users: dict[tuple[str, str], list[str]] = {}
    for name, found in groups.items():
        for group in found.items():
            users.setdefault(group, []).append(name)
    common = {group: names for group, names in users.items() if len(names) > 1 and group[1].count("\n") > 3}
    # of equal titles, where a command has other options in the group, each has a number
    numbers = {group: [g for g in common if g[0] == group[0]].index(group) for group in common}
    anchors = {group: f"{group[0]} {numbers[group] + 1}" if numbers[group] else group[0] for group in common}
    parts = [_HEAD]
    for name, parser in parsers.items():
        description = " ".join((parser.description or "").split())
        parts.append(f"## dalikd {name}\n\n{description}\n")
        own = [group for group in groups[name].items() if group not in common]
        parts += [f"{f'{title}:' if len(own) > 1 else ''}\n\n{_TABLE}{rows}".lstrip() for title, rows in own]
        links = [
            f"[{anchors[group]}](#options-{_slug(anchors[group])})" for group in groups[name].items() if group in common
        ]
        parts += [f"Common groups: {', '.join(links)}.\n"] if links else []
    parts.append(_COMMON)
    for group, names in common.items():
        known = ", ".join(f"`{name}`" for name in names)
        parts.append(f"### Options: {anchors[group]}\n\nOf {known}.\n\n{_TABLE}{group[1]}")
    parts.append(_LOSSES)
    for name in losses.__all__:
        kind: Any = getattr(losses, name)
        if isinstance(kind, type) and issubclass(kind, losses.DistillationLoss) and not isabstract(kind):
            parser = ArgumentParser()
            parser.add_class_arguments(kind)
            (rows,) = _groups(parser).values()
            parts.append(f"### {name}\n\n{kind.paper}\n\n{_TABLE}{rows}")
    return "\n".join(parts)


def _slug(title: str) -> str:
    return re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))


def _parser(command: str) -> ArgumentParser:
    """The parser that a command makes for its help."""
    found: list[ArgumentParser] = []

    def take(parser: ArgumentParser, *_: Any) -> None:
        found.append(parser)
        raise SystemExit

    module, *words = command.split()
    with patch.object(ArgumentParser, "parse_args", take), suppress(SystemExit):
        importlib.import_module(f"dalikd.tools.{module}").main([*words, "--help"])
    return found[0]


def _groups(parser: ArgumentParser) -> dict[str, str]:
    """Rows of a table for each group of options, by its title; the general ones have the title "options"."""
    rows: dict[str, str] = {}
    for group in parser._action_groups:
        title = (group.title or "").partition(":")[0]
        title = title if len(title.split()) == 1 else "options"
        for action in group._group_actions:
            head, dot, _ = action.dest.partition(".")
            if not _is_about_help(action):
                rows[head if dot else title] = rows.get(head if dot else title, "") + _row(action)
    return rows


def _is_about_help(action: Action) -> bool:
    """Whether it prints something, or is the head of a group, which may be given as a whole."""
    names = {"_HelpAction", "_ActionPrintConfig", "_ActionHelpClassPath", "_ActionConfigLoad"}
    return type(action).__name__ in names


def _row(action: Action) -> str:
    hint: Any = getattr(action, "_typehint", action.type)
    name = next((word for word in action.option_strings if not word.endswith("+")), action.dest)
    default = "" if action.default in (None, SUPPRESS, {}, []) else str(action.default).replace(f"{_ROOT}/", "")
    default = default.lower() if isinstance(action.default, bool) else default.replace("'", "")
    default = {"dalikd.trainers.tasks.base._sgd": "torch.optim.SGD"}.get(default, default)
    cells = (f"`{name}`", _type(hint), f"`{default}`" if default else "", " ".join((action.help or "").split()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _type(hint: Any) -> str:
    """A type in words; choices of an option one by one."""
    arguments = [one for one in get_args(hint) if one is not type(None)]
    if get_origin(hint) is Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if hint is None:
        return "path"  # of --config
    if hint is Any or "Callable" in str(hint):
        return "class" if "Callable" in str(hint) else "any"
    if get_origin(hint) in (list, dict):
        return f"{get_origin(hint).__name__} of {' to '.join(map(_type, arguments))}"
    if arguments:  # a union
        return " or ".join(dict.fromkeys(filter(None, map(_type, arguments))))
    words = {
        "str": "text",
        "int": "whole number",
        "float": "number",
        "bool": "true or false",
        "FilePath": "path",
        "Path": "path",
    }
    return words.get(getattr(hint, "__name__", ""), "class" if "losses" in str(hint) else getattr(hint, "__name__", ""))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("reference", write_reference, argv)


if __name__ == "__main__":
    main()
