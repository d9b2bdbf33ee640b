"""Compiled runs agree with eager ones on a GPU, CUDA graphs included."""

import json

import pytest
import torch

from dalikd.kd.backbones import create_model
from dalikd.tools import distill, measure

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MODES = ["default", "reduce-overhead"]  # the second one replays CUDA graphs
# float32 by the same library in eager and compiled code: rounding, grown over 20 steps
TOLERANCE = 2e-3
# where the student chooses: one pick that rounding has turned is another image, and trains another student
TURNED = 5e-2


def _words(data, classes, folder):
    """A run's options, with a teacher whose batch norms do something."""
    torch.manual_seed(0)
    net = create_model("resnet8", classes)
    net.train()
    for _ in range(5):
        net(torch.randn(64, 3, 32, 32))
    torch.save(net.state_dict(), folder / "resnet8.pt")
    teacher = ("--teacher.name", "resnet8", "--teacher.weights", str(folder / "resnet8.pt"))
    return [*data, "--device", DEVICE, "--batch_size", "64", "--mix.group", "16", *teacher, "--model", "resnet8"]


@pytest.fixture
def common(cifar, tmp_path):
    return _words(cifar, 10, tmp_path)


def _distil(folder, common, augmentation, mode, *options):
    torch.compiler.reset()
    arguments = [
        *common, *("--augmentation", augmentation, "--compile", mode, "--output", str(folder)),
        *("--epochs", "4", "--log_every", "1", "--optimizer.lr", "0.02", "--schedule.name", "constant"), *options,
    ]  # fmt: skip
    distill.main(arguments)
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    return [entry["train"]["loss"] for entry in entries if "lr" in entry], results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("augmentation", "options"),
    [
        ("cutmixpick_teacher", []),
        ("cutmixpick_student", []),
        ("identity", []),
        ("mixup", ["--accumulation", "2", "--ema", "0.9", "--clip_grad_norm", "1", "--optimizer.fused", "true"]),
    ],
)
def test_compiled_distillation_gives_the_same_losses(common, tmp_path, augmentation, options, mode):
    eager, expected = _distil(tmp_path / "eager", common, augmentation, "off", *options)
    losses, found = _distil(tmp_path / "compiled", common, augmentation, mode, *options)
    tolerance = TURNED if augmentation == "cutmixpick_student" else TOLERANCE
    assert len(losses) == len(eager) == 20
    assert losses == pytest.approx(eager, rel=tolerance)
    assert eager[-1] < eager[0]
    assert found["last"]["val"]["loss"] == pytest.approx(expected["last"]["val"]["loss"], rel=10 * tolerance)
    # means over steps: a term that a CUDA graph overwrote in the next step would show here
    assert found["last"]["train"]["loss"] == pytest.approx(sum(losses[-5:]) / 5, rel=1e-6)
    assert found["last"]["t_entropy"] == pytest.approx(expected["last"]["t_entropy"], rel=tolerance)


@pytest.mark.usefixtures("needs_dali")
def test_cuda_graphs_are_recorded_while_dali_works(small_images, tmp_path):
    """DALI's threads call CUDA at any time, and must not spoil what is being recorded. A race: repeat it."""
    data = ("--data.root", str(small_images), "--data.train_split", ".", "--data.val_split", ".")
    words = _words([*data, "--data.image_size", "32", "--data.prefetch", "4"], 3, tmp_path)
    eager, _ = _distil(tmp_path / "eager", words, "cutmixpick_teacher", "off")
    losses, _ = _distil(tmp_path / "compiled", words, "cutmixpick_teacher", "reduce-overhead")
    assert len(losses) == 16
    assert losses == pytest.approx(eager, rel=TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
def test_bf16_compiles_too(common, tmp_path, mode):
    eager, _ = _distil(tmp_path / "eager", common, "cutmix", "off", "--precision", "bf16")
    losses, _ = _distil(tmp_path / "compiled", common, "cutmix", mode, "--precision", "bf16")
    assert losses == pytest.approx(eager, rel=5e-2)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_measuring_gives_the_same_figures(common, tmp_path, mode):
    """330 images in batches of 64: the last one is short."""
    found = {}
    for chosen in ("off", mode):
        file = tmp_path / f"{chosen}.json"
        names = ["--augmentation", "cutmixpick_teacher", "cutmixpick_student", "crop_flip"]
        passes = ["--epochs", "2", "--window", "64", "--compile", chosen, "--json", str(file)]
        measure.main([*common, *names, *passes])
        found[chosen] = json.loads(file.read_text())["results"]
    for compiled, eager in zip(found[mode], found["off"], strict=True):
        assert compiled["windows"] == eager["windows"] == 20
        tolerance = TURNED if compiled["augmentation"] == "cutmixpick_student" else TOLERANCE
        for key in ("stddev", "entropy"):
            assert compiled[key] == pytest.approx(eager[key], rel=tolerance), (compiled["augmentation"], key)
