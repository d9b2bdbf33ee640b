"""A teacher cache is written, verified and read on a GPU."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dalikd.kd.backbones import create_model
from dalikd.tools import cache, distill

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.fixture
def options(tmp_path):
    """Two classes of noise, 128 training pictures, and a teacher."""
    random = np.random.default_rng(0)
    for split, count in (("train", 128), ("val", 16)):
        for number in range(count):
            path = tmp_path / "tree" / split / f"class{number % 2}" / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            low = 80 * (number % 2)
            Image.fromarray(random.integers(low, low + 120, (32, 32, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    torch.save(create_model("resnet8", 2).state_dict(), tmp_path / "teacher.pt")
    data = ["--data.root", str(tmp_path / "tree"), "--data.image_size", "32", "--device", DEVICE]
    return [*data, "--batch_size", "64", "--augmentation", "cutmixpick_teacher", "--epochs", "2"]


@pytest.mark.parametrize(("storage", "tolerance"), [("float32", 1e-3), ("float16", 1e-2), ("topk", 1e-2)])
def test_a_cache_teaches_as_its_teacher_does(options, tmp_path, storage, tolerance):
    """With all classes kept, topk is exact but for float16."""
    teacher = ["--teacher.name", "resnet8", "--teacher.weights", str(tmp_path / "teacher.pt")]
    folder = str(tmp_path / "cache")
    cache.main([*options, *teacher, "--storage", storage, "--k", "2", "--output", folder])
    cache.main(["--verify", folder, "--share", "1"])  # ends the process if it does not agree
    losses = []
    for name, taught_by in (("teacher", teacher), ("cached", ["--teacher.cache", folder])):
        run = tmp_path / name
        distill.main([*options, *taught_by, "--model", "resnet8", "--optimizer.lr", "0.01", "--output", str(run)])
        losses.append(json.loads((run / "results.json").read_text())["last"]["train"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
