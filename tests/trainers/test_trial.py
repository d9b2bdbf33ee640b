"""What does not fit is one line before a folder exists."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from dalikd.kd.backbones import create_model
from dalikd.pipelines.data import DataConfig
from dalikd.tools import distill, evaluate, measure, train
from dalikd.trainers.checkpoint import save_weights
from dalikd.trainers.options import RunOptions
from dalikd.trainers.setup import Setup
from dalikd.trainers.trial import check_chance, try_net, try_training

CPU = torch.device("cpu")

# ----------------------------------------------------------------------------------------- the order of classes


def _answer(order: list[int], wrong: float = 0.0, sure: float = 9.0):
    """Tells tinted images apart by their red; `order` is the logit of each class, a share of the answers is random,
    `sure` is how far the largest logit is above the others."""
    random = np.random.default_rng(0)

    def answer(pixels: Tensor) -> Tensor:
        red = pixels[:, 0].float().mean((1, 2)) - pixels[:, 1].float().mean((1, 2))
        label = (red / 100 * (len(order) - 1)).round().clamp(0, len(order) - 1).long()
        answered = torch.tensor(order)[label]
        noise = torch.from_numpy(random.integers(0, len(order), len(answered)))
        answered = torch.where(torch.from_numpy(random.random(len(answered)) < wrong), noise, answered)
        return sure * torch.nn.functional.one_hot(answered, len(order))

    return answer


def _check(source, answer, weights: str | None = "published.pt") -> None:
    options, here = RunOptions(data=DataConfig(threads=1)), SimpleNamespace(device=CPU)
    setup = Setup(options, here, source, source)  # type: ignore[arg-type]
    setup._check_class_order(answer, "the teacher", weights)


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [1, 2, 3, 0], [3, 2, 1, 0]])
def test_a_net_that_knows_the_classes_in_another_order_is_refused(make_source, order):
    """Whether all classes are named wrongly, or some: half of them right is less than it could be."""
    source = make_source(96, classes=4, side=24)
    if order == [1, 0, 2, 3]:
        _check(source, _answer(order))  # right for half of them: it may be as good as it is
        return
    with pytest.raises(ValueError, match="if its classes came in another order: it answers class0 ") as error:
        _check(source, _answer(order, wrong=0.2))
    assert f"class0 (class 0) as {order[0]}, class1 (class 1) as {order[1]}, " in str(error.value)
    assert "The data's classes are class0, class1, class2, class3. Name the class folders" in str(error.value)


PASSING = {
    "good": _answer([0, 1, 2, 3], 0.3),
    "constant": _answer([2, 2, 2, 2]),
    "by chance": _answer([3, 2, 1, 0], 1.0),
    "untrained": _answer([3, 2, 1, 0], sure=1.0),
}


@pytest.mark.parametrize("name", PASSING)
def test_good_constant_and_untrained_nets_pass(make_source, capsys, name):
    """That one is sure of answers that are right by chance alone is said."""
    _check(make_source(96, classes=4, side=24), PASSING[name])
    said = "no more than by chance, and is sure of its answers: is it for the data's classes, class0, class1"
    assert (said in capsys.readouterr().err) == (name in ("constant", "by chance"))


def test_few_images_and_weights_of_this_project_say_nothing(make_source, tmp_path):
    """Nineteen images may be right by chance; weights that hold their classes were compared before."""
    _check(make_source(19, classes=4, side=24), _answer([3, 2, 1, 0]))
    path = tmp_path / "student.safetensors"
    save_weights(path, torch.nn.Linear(2, 4), None, ["a", "b", "c", "d"])
    source = make_source(96, classes=4, side=24)
    _check(source, _answer([3, 2, 1, 0]), str(path))
    save_weights(path, torch.nn.Linear(2, 4))  # of a version that did not write them
    with pytest.raises(ValueError, match="came in another order"):
        _check(source, _answer([3, 2, 1, 0]), str(path))


# ---------------------------------------------------------------------------------------------------- chance


@pytest.mark.parametrize(
    ("classes", "images", "right", "stops"),
    [
        (10, 256, 25, True),
        (10, 256, 37, True),  # 37 right ones or more come by chance in 1.3 % of all cases
        (10, 256, 38, False),  # 0.8 %
        (1000, 256, 0, True),
        (1000, 256, 2, True),
        (1000, 256, 3, False),
        (2, 256, 120, True),
        (2, 256, 150, False),
        (10, 255, 0, False),  # too few to tell
        (1, 256, 0, False),
    ],
)
def test_a_teacher_that_is_right_by_chance_is_refused(make_source, classes, images, right, stops):
    source = make_source(max(images, classes), classes=classes, side=2)
    labels = np.arange(images) % classes
    answers = np.where(np.arange(images) < right, labels, labels + 1)
    if not stops:
        check_chance(answers, labels, "the teacher x", source)
        return
    with pytest.raises(
        ValueError, match=f"the teacher x gives the right class for {right} of 256 validation images, no"
    ):
        check_chance(answers, labels, "the teacher x", source)


def test_a_setup_asks_its_teacher_about_images_of_the_whole_split(make_source, monkeypatch):
    """Sorted by class, as folders are."""
    source, asked = make_source(600, classes=4, side=24), []
    source = source.take(np.argsort(source.labels, kind="stable"))
    options, here = RunOptions(data=DataConfig(threads=1)), SimpleNamespace(device=CPU)
    setup = Setup(options, here, source, source)  # type: ignore[arg-type]
    setup._check_chance(_answer([0, 1, 2, 3], 0.5), "the teacher")
    monkeypatch.setattr("dalikd.trainers.setup.check_chance", lambda _, labels, *__: asked.append(labels))
    setup._check_chance(_answer([0, 1, 2, 3]), "the teacher")
    assert np.bincount(asked[0]).tolist() == [64] * 4


# ------------------------------------------------------------------------------------------------ blank images


def test_a_net_that_answers_nan_or_something_else_is_named(make_net):
    net = make_net().eval()
    try_net(net, "the teacher x", 24, 3, CPU)
    with pytest.raises(ValueError, match=r"the teacher x gives \[2, 3\] for two images, not logits \[2, 4\]"):
        try_net(net, "the teacher x", 24, 4, CPU)
    with pytest.raises(ValueError, match="the teacher x gives tuple for two images"):
        try_net(lambda pixels: (net(pixels),), "the teacher x", 24, 3, CPU)
    with pytest.raises(ValueError, match=r"the teacher x cannot take images of 1 x 1 pixels \(Calculated padded"):
        try_net(net, "the teacher x", 1, 3, CPU)
    net.model.fc.bias.data[1] = float("nan")
    with pytest.raises(ValueError, match="the teacher x answers with NaN or infinity: its weights are damaged"):
        try_net(net, "the teacher x", 24, 3, CPU)


def test_a_trial_changes_nothing(make_net, accelerator):
    net = make_net(dropout=0.5)
    before, state = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
    try_training(net, lambda copy: torch.optim.SGD(copy.parameters(), 1.0), "--model x", 24, 3, accelerator)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(values.grad is None for values in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training


# ----------------------------------------------------------------------------------------------- the commands


VIT = "timm:vit_tiny_patch16_224"
COMMANDS = {
    "train vit": f"--model {VIT} cannot take images of 32 x 32 pixels (Input height (32) doesn't match model",
    "distill vit": f"the teacher {VIT} cannot take images of 32 x 32 pixels",
    "train num_classes": "small: num_classes is no option to give: it follows from the data's classes; leave it out",
    "train in_chans": "timm:resnet18: in_chans is no option to give: images have three channels; leave it out",
    "train LBFGS": "--optimizer LBFGS cannot do a step of its own on dense gradients (",
    "train SparseAdam": "--optimizer SparseAdam cannot do a step of its own on dense gradients (SparseAdam does not",
    "train nan": "nan.pt: conv.weight holds NaN: the run that wrote it has diverged, or the file is damaged",
    "distill nan": "teacher small: nan.pt: conv.weight holds NaN",
    "measure nan": "teacher small: nan.pt: conv.weight holds NaN",
    "evaluate nan": "nan.pt: conv.weight holds NaN",
}


@pytest.mark.parametrize("case", COMMANDS)
def test_what_does_not_fit_is_one_line_before_a_folder_exists(tree, tmp_path, capsys, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(create_model(VIT, 3, depth=1).state_dict(), "vit.pt")
    damaged = create_model("small", 3)
    damaged.conv.weight.data[0, 0, 0, 0] = float("nan")
    torch.save(damaged.state_dict(), "nan.pt")
    name, what = case.split()
    own = {
        "vit": ["--model", VIT, "--model_args.depth", "1"],
        "num_classes": ["--model_args.num_classes", "7"],
        "in_chans": ["--model", "timm:resnet18", "--model_args.in_chans", "1"],
        "LBFGS": ["--optimizer", "torch.optim.LBFGS"],
        "SparseAdam": ["--optimizer", "torch.optim.SparseAdam"],
    }.get(what, [])
    teacher = {"vit": (VIT, "vit.pt", "--teacher.args.depth", "1"), "nan": ("small", "nan.pt")}.get(what, ("small", ""))
    common = ["--data.root", str(tree), "--data.image_size", "32", "--data.threads", "1", "--device", "cpu"]
    common += ["--batch_size", "32"] + ([] if name == "evaluate" else ["--mix.group", "8", "--epochs", "1"])
    if name in ("distill", "measure"):
        common += ["--teacher.name", teacher[0], "--teacher.weights", *teacher[1:]]
    if name == "evaluate" or case == "train nan":
        common += ["--weights", "nan.pt"]
    command = {"train": train, "distill": distill, "measure": measure, "evaluate": evaluate}[name]
    model = ["--model", "small"] if name != "measure" else ["--augmentation", "flip"]
    with pytest.raises(SystemExit) as stop:
        command.main([*common, *model, *own])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert COMMANDS[case] in error
    assert sorted((path.name for path in Path.cwd().iterdir()), reverse=True) == ["vit.pt", "nan.pt"]
