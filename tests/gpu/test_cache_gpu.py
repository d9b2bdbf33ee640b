"""A teacher cache is written, verified and read on a GPU."""

import json

import pytest
import torch

from dalikd.kd.backbones import create_model
from dalikd.tools import cache, distill

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.fixture
def options(cifar):
    """Steps of two mix groups, so that cache --verify, which asks for one at a time, asks in other batches."""
    sizes = ["--batch_size", "128", "--mix.group", "64", "--epochs", "2", "--compile", "off"]
    return [*cifar, "--device", DEVICE, *sizes, "--augmentation", "cutmixpick_teacher"]


@pytest.mark.parametrize(("storage", "tolerance"), [("float32", 1e-3), ("float16", 1e-2), ("topk", 1e-2)])
def test_a_cache_teaches_as_its_teacher_does(options, tmp_path, storage, tolerance):
    """With all classes kept, topk is exact but for float16."""
    torch.manual_seed(0)
    torch.save(create_model("resnet8", 10).state_dict(), tmp_path / "teacher.pt")
    teacher = ["--teacher.name", "resnet8", "--teacher.weights", str(tmp_path / "teacher.pt")]
    folder = str(tmp_path / "cache")
    cache.main([*options, *teacher, "--storage", storage, "--k", "10", "--output", folder])
    cache.main(["--verify", folder, "--share", "1"])  # ends the process if it does not agree
    losses = []
    for name, taught_by in (("teacher", teacher), ("cached", ["--teacher.cache", folder])):
        run = tmp_path / name
        distill.main([*options, *taught_by, "--model", "resnet8", "--optimizer.lr", "0.01", "--output", str(run)])
        losses.append(json.loads((run / "results.json").read_text())["last"]["train"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
