"""Every recipe parses for the commands it is for, names nets that exist, and says what it is."""

import re
from pathlib import Path

import pytest
import torch

from dalikd import configs
from dalikd.kd.backbones import create_model
from dalikd.tools.cli import parse
from dalikd.trainers.augmentation import augmentation_names

FOLDER = Path(configs.__file__).parent
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def _name(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def _commands(path: Path) -> list[tuple[str, list[str]]]:
    """Command and arguments of each command line in the header, of `dalikd` itself or of a launcher."""
    pattern = re.compile(r"^#   (?:dalikd |.*-m dalikd\.tools\.)(\w+) +(.*)$", re.MULTILINE)
    return [(command, arguments.split()) for command, arguments in pattern.findall(path.read_text("utf-8"))]


def test_there_are_recipes():
    assert len(RECIPES) > 3


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_a_recipe_parses_for_every_command(path):
    parsed = {
        command: parse(command, ["--config", str(path)])[0] for command in ("train", "distill", "measure", "evaluate")
    }
    trained, distilled, measured = parsed["train"], parsed["distill"], parsed["measure"]
    assert distilled.teacher == measured.teacher
    if distilled.teacher.weights != "pretrained":
        assert trained.model == distilled.teacher.name  # train makes the teacher
    assert augmentation_names([trained.augmentation, distilled.augmentation, *measured.augmentation])
    assert trained.data.name == distilled.data.name == measured.data.name
    for options in (trained, distilled):
        parameter = torch.nn.Parameter(torch.zeros(1))
        assert options.optimizer([parameter]).param_groups[0]["lr"] > 0
    with torch.device("meta"):
        for name in (distilled.model, distilled.teacher.name):
            create_model(name, 10)


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_the_teacher_is_where_training_puts_it(path):
    trained, distilled = (parse(command, ["--config", str(path)])[0] for command in ("train", "distill"))
    if distilled.teacher.weights == "pretrained":
        return
    folder = trained.output or f"runs/train-{trained.data.name}-{trained.model}"
    assert distilled.teacher.weights == f"{folder}/last/student.safetensors"


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_a_recipe_says_what_it_is_for(path):
    header = [line for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert text.startswith("# For: dalikd ")
    assert "Hardware:" in text
    commands = _commands(path)
    assert "distill" in [command for command, _ in commands]
    assert all(f"configs/{_name(path)}" in arguments for _, arguments in commands)


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_the_commands_in_the_header_parse(path, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    for command, arguments in _commands(path):
        options, _ = parse(command, arguments)
        assert options.teacher.name if command != "train" else options.model
