"""README, CONTRIBUTING and guides say what is true: their commands run or parse, their code runs, their links lead
somewhere. A block of commands after `<!-- needs SOMETHING -->` is parsed alone."""

import contextlib
import gc
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import dropwhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from dalikd.kd.backbones import create_model
from dalikd.kd.losses import WeightedSum
from dalikd.tools.bench.commands import BENCHMARKS
from dalikd.tools.cli import parse
from dalikd.tools.layers import OPTIONS, grammar, options_class
from dalikd.tools.main import COMMANDS
from dalikd.tools.study import read_study
from dalikd.trainers.augmentation import AUGMENTATIONS
from dalikd.trainers.checkpoint import save_weights

_ROOT = Path(__file__).parents[1]
_PAGES = {
    path.relative_to(_ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        _ROOT / "README.md",
        *sorted((_ROOT / "docs/guides").glob("*.md")),
        _ROOT / "docs/skill/SKILL.md",
        _ROOT / "docs/benchmarks/README.md",
    ]
}
#: what makes a command short; each command takes those that it knows
_SHORT = {"epochs": 1, "batch_size": 32, "mix.group": 32, "window": 32}
_SHORT |= {"data.image_size": 32, "data.threads": 1, "device": "cpu", "teacher.verify": "false"}
#: small nets in place of those in the text
_SMALL = {"resnet56": "resnet14", "resnet20": "resnet8"}
_LAUNCHERS = ("accelerate", "torchrun", "srun")


class Block(NamedTuple):
    """A fenced block of a page."""

    needs: str  # what a test has not
    language: str
    title: str  # the file that it is
    text: str


def _blocks(page: str, language: str = "") -> list[Block]:
    fence = r'^(?:<!-- needs ([^\n]*) -->\n)?```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```$'
    found = [Block(*groups) for groups in re.findall(fence, _PAGES[page], re.DOTALL | re.MULTILINE)]
    return [block for block in found if language in ("", block.language)]


def _lines(script: str) -> Iterator[list[str]]:
    """The words of a script's lines; of a loop the first three rounds, and commands joined by && one by one."""
    loop: list[str] = []
    names = [""]
    for line in script.replace("\\\n", " ").splitlines():
        if begun := re.fullmatch(r"for name in (.*); do", line):
            names = begun[1].split()[:3]
        elif line == "done":
            yield from (words for name in names for one in loop for words in _lines(one.replace("$name", name)))
            loop, names = [], [""]
        elif names != [""]:
            loop.append(line)
        else:
            yield from filter(None, (shlex.split(part, comments=True) for part in line.split("&&")))


def _command(words: list[str]) -> tuple[str, list[str]] | None:
    """The name of dalikd's command in a line, and its arguments."""
    end = min([words.index(mark) for mark in (">", "|") if mark in words], default=len(words))
    words = list(dropwhile(lambda word: re.match("[A-Z_]+=", word), words[:end]))
    if words[:2] == ["dalikd", "bench"]:
        return f"bench {words[2]}", words[3:]
    if words[:1] == ["dalikd"]:
        return words[1], words[2:]
    module = next((word for word in words if word.startswith("dalikd.tools.")), None)
    return None if module is None else (module.removeprefix("dalikd.tools."), words[words.index(module) + 1 :])


def _is_run(block: Block, words: list[str]) -> bool:
    return not (block.needs or block.title or words[0] in _LAUNCHERS)


def _commands(*, only_parsed: bool) -> list[tuple[str, list[str]]]:
    found = [
        _command(words)
        for page in _PAGES
        for block in _blocks(page, "bash")
        for words in _lines(block.text)
        if not (only_parsed and _is_run(block, words))
    ]
    return [command for command in found if command is not None]


@pytest.fixture
def workplace(tmp_path: Path, small_images: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which a page's names mean something: DATA with 66 and 12 images, my.yaml, configs."""
    for split, images in (("train", range(22)), ("val", range(22, 26))):
        for name in (path.name for path in small_images.iterdir()):
            (tmp_path / "DATA" / split / name).mkdir(parents=True)
            for number in images:
                shutil.copy(small_images / name / f"{number:03d}.jpg", tmp_path / "DATA" / split / name)
    (tmp_path / "UNLABELLED").symlink_to(tmp_path / "DATA/train")
    (tmp_path / "configs").symlink_to(_ROOT / "configs")
    (tmp_path / "my.yaml").write_text(_small(_blocks("README.md", "yaml")[0].text), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = dict(AUGMENTATIONS)  # a page adds one
    gc.freeze()  # what commands have imported since the tests were found
    yield tmp_path
    for name in AUGMENTATIONS.keys() - known:
        del AUGMENTATIONS[name]


def _small(text: str) -> str:
    for large, small in _SMALL.items():
        text = text.replace(large, small)
    return text


def _run(words: list[str]) -> None:
    """A line of a page, made short, in this process."""
    words = [_small(word) for word in words]
    target, words = (words[-1], words[:-2]) if ">" in words else (None, words)
    command, out = _command(words), io.StringIO()
    if command is None:
        assert words[0] == "python", f"{words}: mark the block as <!-- needs ... --> if a test cannot run it"
        runpy.run_path(words[1], run_name="__main__")
        return
    name, arguments = command
    arguments = [
        path for word in arguments for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
    ]
    if "my.yaml" in arguments and name != "train" and not Path("runs/teacher").exists():
        Path("runs/teacher/last").mkdir(parents=True)
        teacher = create_model("resnet14", 3)
        save_weights(Path("runs/teacher/last/student.safetensors"), teacher, class_names=["ant", "bee", "cat"])
    short: list[str] = []
    if name in OPTIONS and name != "study" and not {"--resume", "--verify"} & {*arguments}:
        short = [f"--{option}={value}" for option, value in _SHORT.items() if option in grammar(name).types]
    try:
        with contextlib.redirect_stdout(out) if target else contextlib.nullcontext():
            importlib.import_module(f"dalikd.tools.{name}").main([*arguments, *short])
    except SystemExit as stop:
        if stop.code:
            raise AssertionError(words) from stop
    if target:
        Path(target).write_text(out.getvalue(), encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in _PAGES if any(not block.needs for block in _blocks(page, "bash"))])
def test_a_page_runs(page: str, workplace: Path) -> None:
    """Its files are written, its commands and its code run, in their order."""
    names: dict[str, Any] = {}
    for block in _blocks(page):
        if block.title:
            (workplace / block.title).write_text(_small(block.text), encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        elif block.language == "bash":
            for words in _lines(block.text):
                if _is_run(block, words):
                    _run(words)
    if page == "README.md":
        results = Path("runs/distill-imagefolder-resnet8/results.json")
        assert json.loads(results.read_text(encoding="utf-8"))["finished"]
    if page == "docs/guides/augmentations.md":
        assert json.loads(Path("out.json").read_text()).keys() > {"pearson", "spearman", "kendall"}
        assert Path("out.png").stat().st_size > 0


def test_the_loader_s_code_runs(workplace: Path) -> None:
    names: dict[str, Any] = {}
    (block,) = _blocks("docs/guides/loader.md", "python")
    exec(compile(block.text, "loader.md", "exec"), names)
    assert names["images"].shape == (64, 3, 224, 224)
    assert 0 <= names["images"].min() < names["images"].max() <= 1
    assert names["loader"].position == 2 * (len(names["source"]) // 64)
    assert len(names["source"]) == 66
    assert workplace == Path.cwd()


@pytest.mark.parametrize(
    ("command", "arguments"), _commands(only_parsed=True), ids=lambda part: part if isinstance(part, str) else ""
)
def test_command_lines_parse(command: str, arguments: list[str], workplace: Path) -> None:
    if command.startswith("bench "):
        assert command.removeprefix("bench ") in BENCHMARKS
    if command not in OPTIONS:
        command = command.split(" ")[0]
        assert find_spec(f"dalikd.tools.{command.replace(' ', '.').replace('-', '_')}") is not None
        return
    for option in {"--resume", "--verify"} & set(arguments):  # a config in this folder is read
        folder = workplace / arguments[arguments.index(option) + 1]
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(
            yaml.safe_dump(parse(command, ["--config", "my.yaml"])[1]), encoding="utf-8"
        )
    for block in (block for page in _PAGES for block in _blocks(page, "yaml") if block.title != "my.yaml"):
        if block.title in arguments:
            (workplace / block.title).write_text(block.text, encoding="utf-8")
    options = read_study(arguments).options if command == "study" else parse(command, arguments)[0]
    assert isinstance(options, options_class(command))


def test_losses_and_teachers_in_the_guides_parse(workplace: Path) -> None:
    blocks = [block.text for page in _PAGES for block in _blocks(page, "yaml") if block.text.startswith("distill:")]
    found = []
    for block in blocks:
        (workplace / "part.yaml").write_text(block, encoding="utf-8")
        own = [] if "teachers:" in block else ["--config", "my.yaml"]
        options, _ = parse("distill", [*own, "--config", "part.yaml"])
        found.append(isinstance(options.loss, WeightedSum) or len(options.teachers) > 1)
    assert len(found) > 2
    assert all(found)


def test_every_command_is_shown() -> None:
    assert {name.split(" ")[0] for name, _ in _commands(only_parsed=False)} >= set(COMMANDS)


def test_the_two_commands_are_there_and_are_those_of_ci() -> None:
    start = "python3 -m venv .venv && . .venv/bin/activate && "
    first = [block.text.strip() for block in _blocks("README.md", "bash")[:2]]
    assert first == [start + "pip install -e . && dalikd demo", start + "pip install -e '.[test]' && pytest"]
    script = (_ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    steps = first[1].removeprefix(start).split(" && ")
    assert [line for line in script if line in steps] == steps


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len(_PAGES["README.md"]) <= 9000


def test_the_table_lists_all_augmentations() -> None:
    section = _PAGES["docs/guides/augmentations.md"].partition("## The augmentations")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(AUGMENTATIONS)


# -------------------------------------------------------------------------------------------------------- links

_DOCUMENTS = [*sorted(_ROOT.glob("*.md")), _ROOT / "llms.txt", *sorted((_ROOT / "docs").rglob("*.md"))]


def _anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", _DOCUMENTS, ids=lambda path: path.relative_to(_ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if ":" in target:
            continue
        file = path.parent / target if target else path
        assert file.exists(), link
        assert not anchor or anchor in _anchors(file), link


def test_every_guide_stands_in_the_site_s_index_and_in_llms_txt() -> None:
    for document, folder in (("docs/index.md", _ROOT / "docs"), ("llms.txt", _ROOT)):
        text = (_ROOT / document).read_text(encoding="utf-8")
        guides = [path.relative_to(folder).as_posix() for path in sorted((_ROOT / "docs/guides").glob("*.md"))]
        assert [guide for guide in guides if f"]({guide})" not in text] == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_paths_in_the_text_exist(document: str) -> None:
    text = (_ROOT / document).read_text(encoding="utf-8")
    rooms = "kd|pipelines|trainers|tools|configs|tests|docs|[.]ci|[.]typing"
    paths = set(re.findall(rf"(?<![\w/.])(?:{rooms})/[\w./-]*\w(?![\w./-]*<)", text))
    assert paths
    assert {path for path in paths if not (_ROOT / path).exists()} == set()
