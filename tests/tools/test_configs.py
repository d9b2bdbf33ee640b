"""Every recipe parses for the commands it is for, names nets that exist, and says what it is."""

import math
import re
import shlex
from copy import deepcopy
from dataclasses import replace
from functools import cache
from inspect import isabstract
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from dalikd import configs
from dalikd.kd import losses
from dalikd.kd.backbones import create_model
from dalikd.kd.losses import DistillationLoss, LogitLoss
from dalikd.tools.cli import parse
from dalikd.tools.study import read_study
from dalikd.trainers.augmentation import PUBLISHED, augmentation_names
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop
from dalikd.trainers.setup import open_run
from dalikd.trainers.study.plan import Axes, plan
from dalikd.trainers.study.ready import chosen_pairs, read_pairs
from dalikd.trainers.tracking import RunFolder

FOLDER = Path(configs.__file__).parent
STUDIES = sorted(path for path in FOLDER.rglob("*.yaml") if path.stem.endswith("study"))
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path not in STUDIES)
_CRD = {"epochs": 240, "batch_size": 64, "schedule.milestones": [150, 180, 210], "schedule.gamma": 0.1}


def _name(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def _commands(path: Path) -> list[tuple[str, list[str]]]:
    """Command and arguments of each command line in the header, of `dalikd` itself or of a launcher."""
    pattern = re.compile(r"^#   (?:dalikd |.*-m dalikd\.tools\.)(\w+) +(.*)$", re.MULTILINE)
    lines = re.sub(r" \\\n#    ", "", path.read_text("utf-8"))  # one line each
    return [(command, shlex.split(arguments)) for command, arguments in pattern.findall(lines)]


def test_there_are_recipes():
    assert len(RECIPES) > 3
    assert len(STUDIES) > 3


@cache
def _parsed(command: str, path: Path, *words: str) -> tuple[Any, dict[str, Any]]:
    return parse(command, ["--config", str(path), *words])


def _options(command: str, path: Path, arguments: list[str]) -> Any:
    """Of a command line in a recipe's header."""
    _, _, *words = arguments
    return _parsed(command, path, *([] if words == ["--data.root", "DATA"] else words))[0]


@cache
def _there_is(net: str) -> None:
    with torch.device("meta"):
        create_model(net, 10)


PROBING = [path for path in RECIPES if "probe" in [command for command, _ in _commands(path)]]
DISTILLING = [path for path in RECIPES if "distill" in [command for command, _ in _commands(path)]]


@pytest.mark.parametrize("path", PROBING, ids=_name)
def test_a_recipe_of_a_probe_has_the_published_protocol(path):
    """Which is that of the defaults; the net is named with the command."""
    options, plain = _parsed("probe", path)
    assert (options.model, options.weights, options.run) == (None, None, None)
    defaults, ours = parse("probe", [])[1], ("optimizer", "schedule", "epochs", "batch_size", "augmentation", "knn")
    assert {name: plain[name] for name in ours} == {name: defaults[name] for name in ours}
    assert (options.data.image_size, options.data.crop) == (32, "random_resized_crop")
    assert len(options.mean) == len(options.std) == 3


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in PROBING], ids=_name)
def test_a_recipe_parses_for_every_command(path):
    measured = "measure" in [command for command, _ in _commands(path)]
    mutual = "mutual" in [command for command, _ in _commands(path)]
    commands = ["train", *["distill"] * (path in DISTILLING), *["measure", "evaluate"] * measured, *["mutual"] * mutual]
    parsed = {command: _parsed(command, path)[0] for command in commands}
    nets, names = [parsed["train"].model], [parsed["train"].augmentation]
    if path in DISTILLING:
        assert parsed["train"].data.name == parsed["distill"].data.name
        nets += [parsed["distill"].model, parsed["distill"].teacher.name]
        names.append(parsed["distill"].augmentation)
    if measured:
        assert parsed["distill"].teacher == parsed["measure"].teacher
        assert parsed["distill"].data.name == parsed["measure"].data.name
        names += parsed["measure"].augmentation
    assert augmentation_names(names)
    for options in (parsed[command] for command in ("train", "distill", "mutual") if command in parsed):
        parameter = torch.nn.Parameter(torch.zeros(1))
        assert options.optimizer([parameter]).param_groups[0]["lr"] > 0
    for name in nets:
        _there_is(name)


@pytest.mark.parametrize("path", DISTILLING, ids=_name)
def test_the_teacher_is_where_training_puts_it(path):
    trained, distilled = (_parsed(command, path)[0] for command in ("train", "distill"))
    if distilled.teacher.weights == "pretrained":
        return
    assert trained.model == distilled.teacher.name
    folder = trained.output or f"runs/train-{trained.data.name}-{trained.model}"
    assert distilled.teacher.weights == f"{folder}/last/student.safetensors"


@pytest.mark.parametrize("command", ["train", "distill"])
@pytest.mark.parametrize("path", [path for path in DISTILLING if "cifar100" in path.parts], ids=_name)
def test_the_recipes_of_cifar100_have_one_protocol(path, command):
    """Whether a recipe spells it out or leaves it to the defaults."""
    options, plain = _parsed(command, path)
    assert {name: attrgetter(name)(options) for name in _CRD} == _CRD
    slow = ("MobileNetV2", "mobilenetV2", "ShuffleV1", "ShuffleV2")
    rate = 0.01 if options.model.removesuffix("_aux") in slow else 0.05
    expected = {"lr": rate, "momentum": 0.9, "weight_decay": 0.0005}
    assert plain["optimizer"]["init_args"].items() >= expected.items()


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_a_recipe_says_what_it_is_for(path):
    header = [line for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert text.startswith("# For: dalikd ")
    assert "Hardware:" in text
    commands = _commands(path)
    assert commands
    assert all(arguments[:2] == ["--config", f"configs/{_name(path)}"] for _, arguments in commands)


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_the_commands_in_the_header_parse(path):
    for command, arguments in _commands(path):
        options = _options(command, path, arguments)
        probed = "run" if "--run" in arguments else "weights"
        net = {"train": "model", "mutual": "model", "probe": probed}.get(command, "teacher.name")
        assert attrgetter(net)(options)
        if command == "distill" and options.augmentation == "identity":
            # the comparison on augmented images would be that on the originals, over again
            losses = getattr(options.loss, "losses", [options.loss])
            assert all(loss.shares["kd_mix"] == 0 for loss in losses if isinstance(loss, LogitLoss))


METHODS = [
    name
    for name in losses.__all__
    if isinstance(kind := getattr(losses, name), type) and issubclass(kind, DistillationLoss) and not isabstract(kind)
]


def _few(options: Any, tree: Path, side: int = 32) -> Any:
    """The same on few and small images, on a CPU."""
    data = replace(options.data, name="imagefolder", root=str(tree), image_size=side, threads=1, val_limit=3)
    return replace(
        options, data=data, mix=replace(options.mix, group=8), batch_size=8, device="cpu", precision="fp32",
        compile="off",
    )  # fmt: skip


def _trains_two_steps(options: Any, folder: Path) -> None:
    setup = open_run(options, start("cpu", "fp32"))
    task = options.build(setup)
    loader = task.loader(setup)
    loop = Loop(task, loader, loader, options, setup.accelerator, RunFolder(folder, writes=False), {})
    loop.model.train()
    trained = torch.nn.ModuleDict(task.nets)
    before = [values.clone() for values in trained.parameters()]
    for _ in range(2):
        loop.step()
    loader.close()
    terms = loop.meter.means()
    assert all(map(math.isfinite, terms.values())), terms
    assert len(terms) > 2
    assert any((old != new).any() for old, new in zip(before, trained.parameters(), strict=True))


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.full] * (number % 4 > 0)) for number, name in enumerate(METHODS)]
)
def test_a_recipe_of_each_method_trains_two_steps(method, tree, tmp_path):
    """The first one that names it, on few and small images; of large nets smaller ones."""
    text = rf"class_path: dalikd\.kd\.losses\.{method}\b"
    path = min(
        (path for path in DISTILLING if re.search(text, path.read_text())),
        key=lambda path: ("imagenet" in path.parts, "ResNet50" in path.stem),
    )
    options, _ = _parsed("distill", path)
    large = options.teacher.name.startswith("timm:")
    name, side, args = ("timm:resnet18", 64, {"img_size": 64}) if large else (options.teacher.name, 32, {})
    torch.manual_seed(0)
    teacher = create_model(name, 3).train()
    for norm in teacher.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1.0  # what it sees once is what it has been trained with
    teacher(torch.randn(8, 3, side, side))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    asked = replace(options.teacher, name=name, weights=str(tmp_path / "teacher.pt"))
    options = replace(_few(options, tree, side), teacher=asked, loss=deepcopy(options.loss), model_args=args)
    _trains_two_steps(options, tmp_path)


def test_the_recipe_of_nets_that_learn_together_trains_two_steps(tree, tmp_path):
    options, _ = _parsed("mutual", FOLDER / "hsakd/cifar100/mutual.yaml")
    _trains_two_steps(replace(_few(options, tree), model="resnet8_aux"), tmp_path)


# --------------------------------------------------------------------------------------------------------- HSAKD

HSAKD = [path for path in RECIPES if path.parent.parent.name == "hsakd"]
_CIFAR_PAIRS = (
    *("wrn_40_2 wrn_16_2", "wrn_40_2 wrn_40_1", "resnet56 resnet20", "resnet32x4 resnet8x4", "vgg13_bn mobilenetV2"),
    *("ResNet50 mobilenetV2", "wrn_40_2 ShuffleV1", "resnet32x4 ShuffleV2"),
)
_IMAGENET_PAIR = "resnet34_imagenet resnet18_imagenet"
_ONLINE = "wrn_40_2 wrn_40_1 resnet56 resnet32x4 vgg13_bn mobilenetV2 ShuffleV1 ShuffleV2 resnet18_imagenet"
#: what the published tables have a row or a column of: the command and its nets, and how the teacher has learned
_ROWS = {
    *(
        ("distill", *pair.split(), kind, 1.0)
        for pair in (*_CIFAR_PAIRS, _IMAGENET_PAIR)
        for kind in ("joint", "frozen")
    ),
    *(("distill", "resnet56", "resnet20", "joint", share) for share in (0.25, 0.5, 0.75)),
    *(("train", pair.split()[0], kind) for pair in (*_CIFAR_PAIRS, _IMAGENET_PAIR) for kind in ("joint", "frozen")),
    *(("train", pair.split()[1], "alone") for pair in (*_CIFAR_PAIRS, _IMAGENET_PAIR)),
    *(("mutual", net) for net in _ONLINE.split()),
}


def _row(path: Path, command: str, options: Any) -> tuple[Any, ...]:
    """What a command of a recipe trains, by the published settings; its nets by their names without heads."""
    large, net = "imagenet" in path.parts, options.model.removesuffix("_aux")
    frozen, rate = command == "train" and options.freeze_backbone, 0.05
    if net in ("mobilenetV2", "ShuffleV1", "ShuffleV2"):
        rate = 0.01
    group = options.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    settings = (group["lr"], group["nesterov"], group["weight_decay"], options.batch_size)
    assert settings == ((0.1, False, 1e-4, 256) if large else (rate, True, 5e-4, 64))
    length = (options.epochs, options.schedule.milestones)
    assert length == ((100, [30, 60, 90]) if large or frozen else (240, [150, 180, 210]))
    if command == "mutual":
        assert (options.temperature, options.model) == (3.0, f"{net}_aux")
        return command, net
    if command == "distill":
        assert (type(options.loss), options.loss.temperature, options.model) == (losses.HSAKD, 3.0, f"{net}_aux")
        teacher, weights = options.teacher.name.removesuffix("_aux"), options.teacher.weights
        (kind,) = (kind for kind in ("joint", "frozen") if weights.startswith(f"runs/hsakd/{kind}/{teacher}_aux/last/"))
        return command, teacher, net, kind, options.data.share
    kind = ("frozen" if frozen else "joint") if options.model.endswith("_aux") else "alone"
    assert kind == "alone" or options.output == f"runs/hsakd/{kind}/{net}_aux"  # where the students' recipes look
    assert (options.weights is not None) == frozen
    return command, net, kind


def test_hsakds_recipes_are_every_row_of_its_tables_each_in_a_folder_of_its_own():
    folders: dict[str, tuple[Any, ...]] = {}
    for path in HSAKD:
        for command, arguments in _commands(path):
            options = _options(command, path, arguments)
            row = _row(path, command, options)
            folder = options.output or f"{command}-{options.data.name}-{options.model}"
            assert folders.setdefault(folder, row) == row  # a teacher serves several pairs
    assert {*folders.values()} == _ROWS


# ------------------------------------------------------------------------------------------------------- studies

SMALL_IMAGES = [FOLDER / name / "study.yaml" for name in ("cifar100", "tinyimagenet")]  # of many pairs each


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=_name(path), marks=[pytest.mark.full] * (path in SMALL_IMAGES)) for path in STUDIES]
)
def test_every_run_of_a_study_parses(path):
    options, _, read, _, trains = read_study(["--config", str(path)])
    published = read("train", {})[1]["optimizer"]["init_args"]["lr"]
    pairs = read_pairs(options, trains)
    axes = Axes(
        dict.fromkeys(augmentation_names(options.augmentation), False), (options.seeds[0],), (*options.epoch_factor,)
    )
    cells = plan(pairs, axes, Path("runs/study"))
    kinds = {(cell.command, cell.settings.get("model"), cell.settings.get("teacher.name")): cell for cell in cells}
    for cell in kinds.values():
        parsed, _ = read(cell.command, cell.options(Path("runs/study")))
        with torch.device("meta"):
            create_model(parsed.model or parsed.teacher.name, 10)
        if cell.is_run:
            rate = parsed.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]
            slow = parsed.model in ("MobileNetV2", "ShuffleV1", "ShuffleV2")
            assert rate == (0.01 if slow else published)


@pytest.mark.parametrize("path", STUDIES, ids=_name)
def test_a_study_says_what_it_is_for(path):
    text = path.read_text("utf-8")
    assert text.startswith("# For: dalikd study")
    assert "Hardware:" in text
    assert "Expected time:" in text
    commands = _commands(path)
    assert {command for command, _ in commands} == {"study"}
    for _, arguments in commands:
        assert arguments[1] == f"configs/{_name(path)}"
        study = read_study(["--config", str(path), *arguments[2:]])
        assert chosen_pairs(read_pairs(study.options, study.trains_teachers), study.options.pair)


@pytest.mark.parametrize("name", ["cifar100", "tinyimagenet"])
def test_the_studies_of_small_images_have_the_published_pairs(name):
    options, shared, read, _, trains = read_study(["--config", str(FOLDER / name / "study.yaml")])
    pairs = [(pair.teacher.name, pair.student.name) for pair in read_pairs(options, trains)]
    assert pairs == [
        *(("wrn_40_2", "wrn_16_2"), ("resnet56", "resnet20"), ("resnet32x4", "resnet8x4"), ("vgg13", "vgg8")),
        *(("vgg13", "MobileNetV2"), ("ResNet50", "vgg8"), ("resnet56", "ShuffleV2"), ("wrn_40_2", "vgg8")),
        ("resnet32x4", "ShuffleV2"),
    ]
    assert augmentation_names(options.augmentation) == list(PUBLISHED)
    assert (options.seeds, options.epoch_factor) == ([0, 1, 2], [1.0, 4.0 if name == "cifar100" else 2.0])
    assert {shared[command]["mix"]["mode"] for command in ("train", "measure", "distill")} == {"per_batch"}
    assert [read(command, {})[0].epochs for command in ("train", "distill", "measure")] == [240, 240, 10]
