"""A training step measured on a GPU: events, memory, and a step that never waits for the device."""

import numpy as np
import pytest
import torch
from PIL import Image

from dalikd.tools.bench import rounds, step
from dalikd.tools.cli import parse
from dalikd.trainers.assembly import build_distillation
from dalikd.trainers.launch import start

pytestmark = pytest.mark.gpu


@pytest.fixture
def tree(tmp_path):
    """Two classes of 96 training pictures of 64 x 64 pixels, and 8 for validation."""
    random = np.random.default_rng(0)
    for split, count in (("train", 192), ("val", 8)):
        for number in range(count):
            path = tmp_path / "tree" / split / f"class{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return tmp_path / "tree"


@pytest.fixture
def made(tree, tmp_path):
    """A loop and its options: two rounds of three steps."""
    data = ("--data.root", tree, "--data.image_size", 64, "--batch_size", 64, "--augmentation", "cutmixpick_teacher")
    nets = ("--teacher.name", "resnet20", "--model", "resnet8", "--precision", "bf16", "--device", "cuda")
    words = (*data, *nets, "--steps", 3, "--rounds", 2, "--warmup", 2)
    options, _ = parse("bench step", [str(word) for word in words])
    options = rounds.with_weights(options, tmp_path)
    accelerator = start(options.device, options.precision)
    return rounds.training_loop(*build_distillation(options, accelerator), options, accelerator), options


def test_all_sides_are_measured(made):
    found = step.measure(*made)
    for side in "abc":
        for one in found.rounds[side]:
            assert 0.5 * one.seconds < sum(one.steps) < 1.05 * one.seconds  # the clocks of device and host
            assert 0 <= one.waited < one.seconds
            assert one.memory > 1 << 20
    assert min(min(seconds) for seconds in found.parts.values()) > 0


def test_kept_batches_outlive_the_loaders_buffers(made):
    loop, _ = made
    kept = rounds.keep_batches(loop.loader, 2)
    before = [batch.images.clone() for batch in kept]
    for _ in range(6):
        loop.loader.next()
    torch.cuda.synchronize()
    assert all(torch.equal(batch.images, images) for batch, images in zip(kept, before, strict=True))


def test_measured_steps_do_not_wait_for_the_device(made):
    loop, options = made
    rounds.warm_up(loop, options.warmup)
    kept, step_of_loop = rounds.replayed(rounds.keep_batches(loop.loader)), loop.step

    def watched() -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step_of_loop()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    loop.step = watched
    assert rounds.step_round(loop, kept, 3, 2).seconds > 0
