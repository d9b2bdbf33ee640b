"""The page of all options: adding or removing one is a decision, and shows there."""

import pytest

from dalikd.tools.cli import build_parser
from dalikd.tools.layers import OPTIONS
from dalikd.tools.main import COMMANDS
from dalikd.tools.reference import _PAGE, write_reference


def test_the_page_is_up_to_date(tmp_path, monkeypatch):
    write_reference(check=True)
    monkeypatch.setattr("dalikd.tools.reference.reference", lambda: "new")
    (tmp_path / "page.md").write_text("old")
    with pytest.raises(ValueError, match=r"page.md is not up to date: run python -m dalikd.tools.reference"):
        write_reference(tmp_path / "page.md", check=True)
    write_reference(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == "new"


def test_every_option_of_every_command_stands_on_the_page():
    text = _PAGE.read_text(encoding="utf-8")
    parts = {part.partition("\n")[0].removeprefix("dalikd "): part for part in text.split("\n## ")}
    assert parts.keys() >= {*OPTIONS, *COMMANDS} - {"bench"}
    for command in OPTIONS:
        found = {name for action in build_parser(command)._actions for name in action.option_strings}
        names = {name for name in found if not name.endswith(("+", "help")) and name not in ("-h", "--print_config")}
        heads = {name.partition(".")[0] for name in names if "." in name}
        links = [part for part in text.split("\n### Options: ")[1:] if f"`{command}`" in part.partition("\n|")[0]]
        shown = parts[command] + "".join(links)
        assert [name for name in sorted(names - heads) if f"| `{name}` |" not in shown] == [], command
