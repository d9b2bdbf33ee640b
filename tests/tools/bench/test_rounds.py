from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalikd.kd.backbones import create_model
from dalikd.kd.checkpoints import load_weights
from dalikd.tools.bench import rounds
from dalikd.tools.cli import parse
from dalikd.trainers.launch import start
from dalikd.trainers.setup import build_distillation

CONV = 15 * 15 * 8 * 3 * 3 * 3  # multiplications of the small net's convolution, one image of 32 x 32 pixels
LINEAR = 8 * 3


@pytest.fixture
def make_loop(training: list[object], teacher: list[object]) -> Callable[..., Any]:
    def make(*more: object) -> Any:
        words = [*training, *teacher, "--augmentation", "cutmixpick_teacher", "--teacher.fold_bn", "false", *more]
        options, _ = parse("bench step", [str(word) for word in words])
        accelerator = start(options.device, options.precision)
        task, data = build_distillation(options, accelerator)
        return rounds.training_loop(task, data, options, accelerator)

    return make


@pytest.fixture
def loop(make_loop: Callable[..., Any]) -> Any:
    return make_loop()


@pytest.fixture
def slowed(monkeypatch) -> Callable[[Any], None]:
    """Time passes only where it is told to: 1 s in the loader, 2 s before the task, 4 s in it, 8 s in the optimizer."""
    clock = [0.0]
    monkeypatch.setattr(rounds, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def after(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            clock[0] += seconds
            return function(*arguments)

        return call

    def slow(loop: Any) -> None:
        monkeypatch.setattr(loop.loader, "next", after(loop.loader.next, 1))
        monkeypatch.setattr(loop.task, "prepare", after(loop.task.prepare, 2))
        monkeypatch.setattr(loop.model, "forward", after(loop.model.forward, 4))
        loop.optimizer.optimizer.register_step_post_hook(lambda *_: clock.__setitem__(0, clock[0] + 8))

    return slow


def test_a_round_times_the_steps_and_what_they_wait(loop, slowed):
    slowed(loop)
    found = rounds.step_round(loop, loop.loader.next, steps=3, warmup=2)
    assert (found.seconds, found.images, found.steps, found.waited) == (45, 48, [15, 15, 15], 3)
    assert found.rate == 48 / 45
    assert found.wait_share == 3 / 45
    assert found.memory > 1 << 20
    assert loop.progress.step == loop.loader.position == 5


def test_parts_of_a_step(loop, slowed):
    slowed(loop)
    found = rounds.parts_round(loop, steps=3, warmup=2)
    assert found == {"data": 1, "teacher": 2, "student": 4, "optimizer": 8}
    assert tuple(found) == rounds.PARTS
    assert loop.progress.step == 5


def test_parts_of_an_accumulated_step(make_loop, slowed):
    loop = make_loop("--accumulation", 2)
    slowed(loop)
    assert rounds.parts_round(loop, 2, 1) == {"data": 2, "teacher": 4, "student": 8, "optimizer": 8}


def test_measuring_leaves_the_loop_as_it_was(loop):
    loader, before = loop.loader, {**vars(loop.task), "_asked": True}  # the teacher, for the first time
    rounds.step_round(loop, rounds.replayed(rounds.keep_batches(loader, 1)), 1, 1)
    rounds.parts_round(loop, 1, 1)
    assert loop.loader is loader
    assert vars(loop.task) == before
    assert not loop.optimizer.optimizer._optimizer_step_pre_hooks


def test_a_failing_step_leaves_the_loop_as_it_was(loop):
    loader = loop.loader

    def fail() -> Any:
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        rounds.step_round(loop, fail, 1, 1)
    assert loop.loader is loader


def test_the_loader_alone_takes_the_batches_of_the_steps(make_loop, slowed):
    loop = make_loop("--accumulation", 2)
    slowed(loop)
    found = rounds.loader_round(loop, steps=3, warmup=2)
    assert (found.seconds, found.images, found.steps) == (6, 48, [2, 2, 2])
    assert loop.loader.position == 10
    assert loop.progress.step == 0


def test_kept_batches_are_the_next_ones_in_memory_of_their_own(loop, monkeypatch):
    given = []
    take = loop.loader.next
    monkeypatch.setattr(loop.loader, "next", lambda: given.append(take()) or given[-1])
    kept = rounds.keep_batches(loop.loader, 2)
    assert loop.loader.position == len(kept) == 2
    for batch, copy in zip(given, kept, strict=True):
        assert torch.equal(batch.images, copy.images)
        assert torch.equal(batch.ids, copy.ids)
        assert torch.equal(batch.mix[1].lam, copy.mix[1].lam)
        assert batch.images.data_ptr() != copy.images.data_ptr()
        assert batch.total == copy.total
    take_kept = rounds.replayed(kept)
    assert [take_kept() is batch for batch in (*kept, kept[0])] == [True] * 3


def test_operations_of_an_image(loop):
    """The teacher sees an original and its two candidates, the student trains on two images.

    Backward through a layer is two products of its size, but nobody asks for the gradient of pixels.
    """
    found = rounds.step_flops(loop, rounds.keep_batches(loop.loader, 1)[0])
    assert found == {"teacher": 2 * 3 * (CONV + LINEAR), "student": 2 * 2 * (2 * CONV + 3 * LINEAR)}
    assert all(parameter.grad is None for parameter in loop.model.parameters())


def test_a_teacher_without_weights_gets_the_same_fresh_ones_everywhere(training, tmp_path):
    options, _ = parse("bench step", [*map(str, training), "--teacher.name", "small"])
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(Path(rounds.with_weights(options, tmp_path / name).teacher.weights or ""))
    nets = [create_model("small", 3) for _ in paths]
    for net, path in zip(nets, paths, strict=True):
        load_weights(net, path)
    assert torch.equal(nets[0].conv.weight, nets[1].conv.weight)


def test_a_teacher_with_weights_keeps_them(training, teacher, tmp_path):
    options, _ = parse("bench step", [str(word) for word in (*training, *teacher)])
    assert rounds.with_weights(options, tmp_path) is options
    assert list(tmp_path.iterdir()) == []
