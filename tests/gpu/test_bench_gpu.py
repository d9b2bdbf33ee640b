"""A training step measured on a GPU: events, memory, and a step that never waits for the device."""

import pytest
import torch

from dalikd.tools.bench import common, step
from dalikd.tools.cli import parse
from dalikd.trainers.launch import start

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["arrays", "files"])
def made(request, cifar, small_images):
    """A loop and its options: two rounds of three steps, on images in memory, or decoded by DALI."""
    data = cifar
    if request.param == "files":
        request.getfixturevalue("needs_dali")
        data = [
            "--data.root",
            small_images,
            "--data.train_split",
            ".",
            "--data.val_split",
            ".",
            "--data.image_size",
            32,
        ]
    nets = (
        "--teacher.name",
        "resnet20",
        "--model",
        "resnet8",
        "--precision",
        "bf16",
        "--device",
        "cuda",
        "--compile",
        "off",
    )
    sizes = ("--batch_size", 64, "--augmentation", "cutmixpick_teacher", "--steps", 3, "--rounds", 2, "--warmup", 2)
    options, _ = parse("bench step", [str(word) for word in (*data, *nets, *sizes)])
    return common.open_loop(options, start(options.device, options.precision))[0], options


def test_all_sides_are_measured(made):
    _, rounds, parts, _ = step.measure(*made)
    for side in "abc":
        for one in rounds[side]:
            assert 0.5 * one.seconds < sum(one.steps) < 1.05 * one.seconds  # the clocks of device and host
            assert 0 <= one.waited < one.seconds
            assert one.memory > 1 << 20
    assert min(min(seconds.values()) for seconds in parts) > 0


def test_kept_batches_outlive_the_loaders_buffers(made):
    loop, _ = made
    kept = step.keep_batches(loop.loader, 2)
    before = [kept().images.clone() for _ in range(2)]
    for _ in range(6):
        loop.loader.next()
    torch.cuda.synchronize()
    assert all(torch.equal(kept().images, images) for images in before)


def test_measured_steps_do_not_wait_for_the_device(made):
    loop, _ = made
    loop.step()
    loop.step()
    kept, step_of_loop = step.keep_batches(loop.loader), loop.step

    def watched() -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step_of_loop()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    loop.step = watched
    assert step.step_round(loop, kept, 3, 2).seconds > 0
