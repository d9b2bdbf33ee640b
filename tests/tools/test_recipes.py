"""The recipes are found by name, wherever one is."""

import json
import re

import pytest

from dalikd.tools.cli import parse
from dalikd.tools.signature import RECIPES, expand_path
from dalikd.tools.study import read_study


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_recipe_stands_in_the_table_and_its_name_leads_to_it(command, tmp_path):
    ended = command("recipes", "--json", "out.json")
    found = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["recipes"]}
    assert {expand_path("--config", name) for name in found} == {str(path) for path in RECIPES.rglob("*.yaml")}
    assert [row["name"] for row in found.values() if not (row["commands"] and row["about"])] == []
    lines = re.findall(r"^\| (dalikd:\S+) \| ", ended.out, re.MULTILINE)
    assert lines == list(found)
    row = found["dalikd:cifar100/kd/vgg13_vgg8"]
    assert row["commands"] == ["distill", "train", "measure"]
    assert row["about"].startswith("Knowledge distillation vgg13 -> vgg8 on CIFAR-100")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["kd/vgg13"], ["dalikd:cifar100/kd/vgg13_vgg8", "dalikd:tinyimagenet/kd/vgg13_vgg8"]),
        (["cifar100/*/wrn*"], ["dalikd:cifar100/kd/wrn_40_2_wrn_16_2"]),
    ],
)
def test_a_pattern_chooses_and_json_is_printed(words, names, command):
    ended = command("recipes", *words, "--json", "-")
    assert [row["name"] for row in json.loads(ended.out)["recipes"]] == names


def test_a_recipe_and_the_files_it_names_are_read_from_anywhere():
    options, _ = parse("distill", ["--config", "dalikd:cifar100/kd/vgg13_vgg8", "--data.root", "DATA"])
    assert (options.model, options.teacher.name) == ("vgg8", "vgg13")
    study = read_study(["--config", "dalikd:imagenet100/study.yaml"])
    assert study.shared["distill"]["data"]["classes"] == str(RECIPES / "imagenet100/classes.txt")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("distill", ["--config", "dalikd:cifar100/kd/vgg13_vgg9"]),
        ("evaluate", ["--data.classes", "dalikd:imagenet100/klasses.txt"]),
        ("recipes", ["vgg13_vgg9"]),
    ],
)
def test_a_wrong_name_is_one_line(name, words, command):
    ended = command(name, *words)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert "`dalikd recipes` lists" in ended.err
    near = {"distill": "did you mean dalikd:cifar100/kd/vgg13_vgg8, ", "evaluate": "dalikd:imagenet100/classes.txt"}
    assert near.get(name, "no recipe has such a name") in ended.err
