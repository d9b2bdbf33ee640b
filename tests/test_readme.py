"""README, CONTRIBUTING and guides say what is true: their commands parse, their code runs, their paths exist."""

import json
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from dalikd.kd.losses import WeightedSum
from dalikd.tools.bench.commands import BENCHMARKS
from dalikd.tools.cli import parse
from dalikd.tools.layers import OPTIONS, options_class
from dalikd.tools.main import COMMANDS
from dalikd.tools.study import read_study
from dalikd.trainers.augmentation import AUGMENTATIONS

_ROOT = Path(__file__).parents[1]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")
_GUIDES = [*sorted((_ROOT / "docs/guides").glob("*.md")), _ROOT / "docs/benchmarks/README.md"]
_ALL = "\n".join([_README, *(path.read_text(encoding="utf-8") for path in _GUIDES)])
_TINY = ["--data.image_size=32", "--data.limit=64", "--data.val_limit=9", "--data.threads=1", "--device=cpu"]
_TINY_RUN = {
    "train": [*_TINY, "--model=resnet8", "--epochs=1"],
    "measure": [
        *_TINY,
        "--teacher.name=resnet8",
        "--epochs=3",
        "--window=32",
        "--augmentation",
        "identity",
        "flip",
        "cutmix",
    ],
    "distill": [*_TINY, "--teacher.name=resnet8", "--model=resnet8", "--epochs=1"],
    "evaluate": [*_TINY, "--model=resnet8"],
}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", _ALL, re.DOTALL | re.MULTILINE)


def _commands() -> list[tuple[str, list[str]]]:
    """Every command line of README and guides: the command's name and its arguments; in a loop, one round of it."""
    lines = [
        line.replace("$name", "cutmix") for block in _blocks("bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [command for line in words if (command := _command(line)) is not None]


def _command(words: list[str]) -> tuple[str, list[str]] | None:
    if words[:2] == ["dalikd", "bench"]:
        return f"bench {words[2]}", words[3:]
    if words[:1] == ["dalikd"]:
        return words[1], words[2:]
    if words[:1] in (["accelerate"], ["torchrun"]) or words[:2] == ["python", "-m"]:
        module = next(word for word in words if word.startswith("dalikd.tools."))
        return module.removeprefix("dalikd.tools."), words[words.index(module) + 1 :]
    return None


@pytest.fixture
def workplace(tmp_path: Path, small_images: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the README's names mean something: DATA, my.yaml, configs."""
    (tmp_path / "DATA").mkdir()
    for split in ("train", "val"):
        (tmp_path / "DATA" / split).symlink_to(small_images)
    (tmp_path / "configs").symlink_to(_ROOT / "configs")
    (tmp_path / "my.yaml").write_text(_blocks("yaml")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run_code(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def _python_block(word: str) -> str:
    (block,) = (block for block in _blocks("python") if word in block)
    return block


def test_the_two_commands_are_there_and_are_those_of_ci() -> None:
    start = "python3 -m venv .venv && . .venv/bin/activate && "
    first = [block.strip() for block in _blocks("bash")[:2]]
    assert first == [start + "pip install -e . && dalikd demo", start + "pip install -e '.[test]' && pytest"]
    script = (_ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    steps = first[1].removeprefix(start).split(" && ")
    assert [line for line in script if line in steps] == steps


@pytest.mark.parametrize(("command", "arguments"), _commands(), ids=lambda part: part if isinstance(part, str) else "")
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
    options = read_study(arguments).options if command == "study" else parse(command, arguments)[0]
    assert isinstance(options, options_class(command))


def test_losses_and_teachers_in_the_guides_parse(workplace: Path) -> None:
    blocks = [block for block in _blocks("yaml") if block.startswith("distill:")]
    found = []
    for block in blocks:
        (workplace / "part.yaml").write_text(block, encoding="utf-8")
        own = [] if "teachers:" in block else ["--config", "my.yaml"]
        options, _ = parse("distill", [*own, "--config", "part.yaml"])
        found.append(isinstance(options.loss, WeightedSum) or len(options.teachers) > 1)
    assert len(found) > 2
    assert all(found)


def test_every_command_is_shown() -> None:
    assert {name.split(" ")[0] for name, _ in _commands()} >= set(COMMANDS)


@pytest.mark.slow
def test_first_steps_run_from_training_to_correlation(workplace: Path) -> None:
    """The commands as they stand, on few images and with small nets; then the correlation after them."""
    steps = [name for name, _ in _commands()].index("train")
    for command, arguments in _commands()[steps : steps + 5]:
        extra = [] if "--resume" in arguments else _TINY_RUN[command]
        main = __import__(f"dalikd.tools.{command}", fromlist=["main"]).main
        main([*(argument.replace("resnet20", "resnet8") for argument in arguments), *extra])
    made = workplace / "runs/distill-imagefolder-resnet8"
    results = json.loads((made / "results.json").read_text(encoding="utf-8"))
    assert results["finished"]
    for number, name in enumerate(("identity", "flip", "cutmix")):
        results["augmentation"], results["last"]["val"]["loss"] = name, 1.0 + number
        folder = shutil.copytree(made, workplace / "runs/students" / name)
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")

    from dalikd.tools.correlate import main

    given = next(arguments for command, arguments in _commands() if command == "correlate")
    main(
        [path for word in given for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    )  # as a shell does
    assert json.loads((workplace / "out.json").read_text(encoding="utf-8")).keys() > {"pearson", "spearman", "kendall"}
    assert (workplace / "out.png").stat().st_size > 0


def test_loader_code_runs(workplace: Path) -> None:
    names = _run_code(_python_block("Loader("))
    assert names["images"].shape == (64, 3, 224, 224)
    assert 0 <= names["images"].min() < names["images"].max() <= 1
    assert names["loader"].position == 2 * (len(names["source"]) // 64)
    assert len(names["source"]) == 300
    assert workplace == Path.cwd()


def test_the_table_lists_all_augmentations() -> None:
    section = _ALL.partition("## The augmentations")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(AUGMENTATIONS)


def test_links_lead_somewhere() -> None:
    for path in (_ROOT / "README.md", _ROOT / "CONTRIBUTING.md", *_GUIDES):
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
        assert [link for link in links if not (path.parent / link).exists()] == [], path.name


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_paths_in_the_text_exist(document: str) -> None:
    text = (_ROOT / document).read_text(encoding="utf-8")
    rooms = "kd|pipelines|trainers|tools|configs|tests|docs|[.]ci|[.]typing"
    paths = set(re.findall(rf"(?<![\w/.])(?:{rooms})/[\w./-]*\w(?![\w./-]*<)", text))
    assert paths
    assert {path for path in paths if not (_ROOT / path).exists()} == set()
