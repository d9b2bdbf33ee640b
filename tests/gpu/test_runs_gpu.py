"""Whole runs on a GPU in bf16."""

import json

import numpy as np
import pytest
from PIL import Image

from dalikd.tools import demo, distill, train

pytestmark = pytest.mark.gpu

CLASSES = ("n01443537", "n01629819", "n01641577")


@pytest.fixture
def tiny_imagenet(tmp_path):
    """Three classes of noise in the published layout."""
    root, random = tmp_path / "tiny-imagenet-200", np.random.default_rng(0)
    annotations = []
    for label, wnid in enumerate(CLASSES):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "val" / "images").mkdir(parents=True, exist_ok=True)
        for number in range(64):
            pixels = random.integers(60 * label, 60 * label + 80, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
        for _ in range(10):
            name = f"val_{len(annotations)}.JPEG"
            Image.fromarray(random.integers(60 * label, 60 * label + 80, (64, 64, 3), dtype=np.uint8)).save(
                root / "val" / "images" / name
            )
            annotations.append(f"{name}\t{wnid}\t0\t0\t63\t63")
    (root / "val" / "val_annotations.txt").write_text("\n".join(annotations) + "\n")
    return root


@pytest.mark.usefixtures("needs_dali")
def test_the_demo_runs_in_bf16(tmp_path):
    demo.main(
        [
            *("--output", str(tmp_path / "demo"), "--limit", "320", "--device", "cuda", "--precision", "bf16"),
            *("--augmentation", '["identity", "autoaugment", "cutmixpick_student"]'),
        ]
    )
    points = json.loads((tmp_path / "demo/points.json").read_text())["points"]
    assert [point["da"] for point in points] == ["identity", "autoaugment", "cutmixpick_student"]
    assert (tmp_path / "demo/scatter.png").stat().st_size > 10_000


@pytest.mark.usefixtures("needs_dali")
def test_tiny_imagenet_trains_and_distils_in_bf16(tiny_imagenet, tmp_path):
    common = [
        *("--data.name", "tinyimagenet", "--data.root", str(tiny_imagenet), "--device", "cuda", "--precision", "bf16"),
        *("--epochs", "4", "--optimizer.lr", "0.02", "--schedule.name", "cosine"),
    ]
    train.main([*common, "--model", "resnet20", "--output", str(tmp_path / "teacher")])
    weights = str(tmp_path / "teacher/last/student.safetensors")
    teacher = ["--teacher.name", "resnet20", "--teacher.weights", weights]
    more = ["--augmentation", "cutmixpick_teacher", "--output", str(tmp_path / "student")]
    distill.main([*common, "--model", "resnet8", *teacher, *more])
    results = json.loads((tmp_path / "student/results.json").read_text())
    assert results["finished"]
    assert results["precision"] == "bf16"
    assert results["last"]["train"]["loss"] < 50
    assert results["last"]["val"]["images"] == 30
