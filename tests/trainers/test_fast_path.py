"""Folded norms and compiled regions train as the plain path does, and the plain path as a loop written out by hand.

Each run is 50 steps of distillation by cutmixpick_teacher from one seed, on images of 32 pixels in batches of 64.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.mixing import cutmix
from dalikd.trainers.augmentation import MixOptions
from dalikd.trainers.evaluate import evaluate
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop
from dalikd.trainers.models import TeacherConfig
from dalikd.trainers.options import ScheduleConfig
from dalikd.trainers.tasks.supervised import TrainOptions

STEPS, BATCH, GROUP, CLASSES = 50, 64, 16, 5
UNFOLDED = TeacherConfig(fold_bn=False)
OPTIMIZER = partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)

# largest difference of any of the 50 losses, relative to the loss. It is rounding alone: in float64 nearly nothing; in
# float32 it grows with the steps, and may turn a pick between two candidates of almost the same entropy
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def nets(make_net) -> Callable[[torch.dtype], dict[str, Normalized]]:
    """A student and a teacher whose batch norms do something, always the same."""

    def make(dtype: torch.dtype) -> dict[str, Normalized]:
        student, teacher = make_net(0, num_classes=CLASSES), make_net(1, num_classes=CLASSES)
        norm = teacher.model.norm
        for values, low, high in (
            (norm.running_mean, -0.3, 0.3), (norm.running_var, 0.3, 2), (norm.weight, 1, 4), (norm.bias, -0.5, 0.5),
        ):  # fmt: skip
            values.data.uniform_(low, high, generator=torch.Generator().manual_seed(2))
        return {"student": student.to(dtype), "teacher": teacher.to(dtype)}

    return make


@pytest.fixture
def make(make_loop, make_source, distill_options, nets) -> Callable[..., Loop]:
    """The run, with its nets and options changed as asked."""

    def make_run(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Loop:
        settings = {
            "batch_size": BATCH, "mix": MixOptions(group=GROUP), "augmentation": "cutmixpick_teacher", "epochs": 5,
            "schedule": ScheduleConfig("constant"), "optimizer": OPTIMIZER, **options,
        }  # fmt: skip
        train, val = (make_source(count, classes=CLASSES, side=32, seed=seed) for count, seed in ((640, 0), (90, 1)))
        loop = make_loop(name, options=distill_options(**settings), train=train, val=val, **nets(dtype))
        loop.model.train()
        return loop

    return make_run


def _losses(loop: Loop, steps: int = STEPS) -> Tensor:
    losses = []
    for _ in range(steps):
        loop.step()
        losses.append(loop.meter.means()["loss"])
        loop.meter.reset()
    return torch.tensor(losses, dtype=torch.float64)


def _assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.isfinite().all()
    assert ((found - expected).abs() / expected).max() <= tolerance


# ------------------------------------------------------------------------------------------------ the plain path


def _pick(pool_logits: Tensor) -> Tensor:
    """Of each group's pool (its images in both runs) the half with the highest entropy, in the pool's order."""
    probabilities = pool_logits.softmax(dim=1)
    entropies, picks = -(probabilities * probabilities.log()).sum(dim=1), []
    for first in range(0, BATCH, GROUP):
        pool = [run * BATCH + first + place for run in range(2) for place in range(GROUP)]
        best = set(sorted(pool, key=lambda row: entropies[row].item())[GROUP:])
        picks += [row for row in pool if row in best]
    return torch.tensor(picks)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    target = F.log_softmax(teacher / 4, dim=1)
    return 16 * F.kl_div(F.log_softmax(student / 4, dim=1), target, reduction="batchmean", log_target=True)


def _written_out(loop: Loop, student: Normalized, teacher: Normalized) -> Tensor:
    """The same training, step by step: the teacher is asked about originals, each run and the picks one by one."""
    # to the last bit: sums over pixels depend on their order in memory
    student, teacher = (net.to(memory_format=torch.channels_last) for net in (student.train(), teacher.eval()))
    optimizer, losses = OPTIMIZER(student.parameters()), []
    for _ in range(STEPS):
        batch = loop.loader.next()
        pixels = batch.pixels
        with torch.no_grad():
            candidates = torch.cat([cutmix(pixels, draws).images for draws in batch.mix])
            mixed = candidates[_pick(torch.cat([teacher(run) for run in candidates.chunk(2)]))]
            logits, mixed_logits = teacher(pixels), teacher(mixed)
        outputs, mixed_outputs = student(pixels), student(mixed)
        own, of_mixed = _kl(outputs, logits), _kl(mixed_outputs, mixed_logits)
        loss = torch.stack((0.1 * F.cross_entropy(outputs, batch.labels), 0.9 * own, 0.9 * of_mixed)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


# oneDNN computes each image by itself, so that float32 is the same to the last bit; the plain float64 kernels do not
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0), (torch.float64, 1e-12)], ids=str)
def test_the_plain_path_is_a_loop_written_out(make, nets, dtype, tolerance):
    """One call of the teacher over everything equals four, and gathered logits equal computed ones."""
    expected = _written_out(make("by_hand", teacher=UNFOLDED), **nets(dtype))
    _assert_close(_losses(make("loop", dtype, teacher=UNFOLDED)), expected, tolerance)
    assert expected[-5:].mean() < 0.9 * expected[:5].mean()


# ---------------------------------------------------------------------------------------------------- faster


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_folding_changes_no_loss(make, dtype):
    plain, folded = make("plain", dtype, teacher=UNFOLDED), make("folded", dtype)
    assert (plain.task.teacher.folded, folded.task.teacher.folded) == (0, 1)
    _assert_close(_losses(folded), _losses(plain), TOLERANCE[dtype])


def _compiled_graphs() -> dict[str, int]:
    """What dynamo compiled since the last reset, and where it gave up."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "recompiled": sum(counters["recompiles"].values()),
    }


@pytest.fixture
def compiled_graphs() -> Callable[[], dict[str, int]]:
    torch._dynamo.utils.counters.clear()
    return _compiled_graphs


@pytest.mark.slow
def test_compiling_changes_no_loss(make, compiled_graphs):
    """The compiler's own code, in float32; in float64 below, where it is a matter of rounding alone, the graphs."""
    plain = _losses(make("plain", torch.float32, teacher=UNFOLDED))
    compiled = make("compiled", torch.float32, compile="default")
    _assert_close(_losses(compiled), plain, TOLERANCE[torch.float32])
    assert compiled_graphs() == {"graphs": 2, "breaks": 0, "recompiled": 0}  # the teacher's pass, and the task


# what the runs differ in besides their speed: every kind of pass, and all that stands around a step
SETTINGS = {
    "identity": {"augmentation": "identity"},
    "flip": {"augmentation": "flip"},
    "cutmixpick_student": {"augmentation": "cutmixpick_student"},
    "all": {"augmentation": "mixup", "accumulation": 2, "ema": 0.9, "clip_grad_norm": 1.0, "joint_forward": True},
}


def _evaluated(loop: Loop) -> dict[str, float]:
    net = loop.averages["student"].module if loop.averages else loop.task.student
    return evaluate({"net": net}, loop.val_loader, loop.accelerator)["net"]


@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize("setting", SETTINGS)
def test_whatever_is_trained_can_be_compiled(make, compiled_graphs, setting):
    options = SETTINGS[setting]
    plain, compiled = make("plain", **options), make("compiled", compile="default", **options)
    assert compiled.task.state_dict().keys() == plain.task.state_dict().keys()
    assert list(compiled.state_dict()["task"]) == list(plain.state_dict()["task"])
    _assert_close(_losses(compiled, 8), _losses(plain, 8), 1e-8)  # mixup's pixels are float32 in any case
    graphs = {"graphs": 2 + (setting == "cutmixpick_student"), "breaks": 0, "recompiled": 0}  # its scores too
    assert compiled_graphs() == graphs
    found, expected = (_evaluated(loop) for loop in (compiled, plain))  # eager: compiles nothing, spoils nothing
    assert found == pytest.approx(expected, rel=1e-8)
    _assert_close(_losses(compiled, 2), _losses(plain, 2), 1e-8)
    assert compiled_graphs() == graphs


@pytest.mark.usefixtures("graphs_alone")
def test_mixed_precision_compiles_without_a_break(make_source, nets, make_loop, distill_options, compiled_graphs):
    """bfloat16 rounds to 3 digits, and compiled code rounds less often."""
    losses = {}
    for mode in ("off", "default"):
        options = distill_options(
            batch_size=BATCH, mix=MixOptions(group=GROUP), augmentation="cutmix", optimizer=OPTIMIZER, compile=mode
        )
        train = make_source(640, classes=CLASSES, side=32)
        run = make_loop(mode, start("cpu", "bf16"), options=options, train=train, **nets(torch.float32))
        run.task.train()
        losses[mode] = _losses(run, 10)
    _assert_close(losses["default"], losses["off"], 2e-2)
    assert compiled_graphs() == {"graphs": 2, "breaks": 0, "recompiled": 0}


@pytest.mark.usefixtures("graphs_alone")
def test_a_compiled_run_is_resumed_exactly(make):
    options = {"compile": "default", "ema": 0.5, "epochs": 1}
    whole = make("whole", **options)
    whole.folder.start({}, None)
    expected = whole.run()
    assert expected["compile"] == "default"

    stopped = make("stopped", **options)
    stopped.folder.start({}, None)
    _losses(stopped, 4)
    stopped.save()
    resumed = make("stopped", **options)
    resumed.load()
    found = resumed.run()
    assert found["steps"] == expected["steps"] == 10
    assert found["last"]["val"] == expected["last"]["val"]
    states = (run.task.student.model.state_dict() for run in (resumed, whole))
    for (key, value), (_, same) in zip(*(state.items() for state in states), strict=True):
        assert torch.equal(value, same), key


@pytest.mark.usefixtures("graphs_alone")
def test_supervised_training_can_be_compiled(make_loop, compiled_graphs):
    losses = {}
    for mode in ("off", "default"):
        options = TrainOptions(
            batch_size=32, mix=MixOptions(group=8), augmentation="mixup", optimizer=OPTIMIZER, compile=mode
        )
        run = make_loop(mode, options=options)
        run.task.train()
        losses[mode] = _losses(run, 6)
    _assert_close(losses["default"], losses["off"], 1e-4)
    assert compiled_graphs() == {"graphs": 1, "breaks": 0, "recompiled": 0}


# ------------------------------------------------------------------------------------------------- the optimizer


def test_a_fused_optimizer_changes_no_loss(make):
    fused = partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    _assert_close(_losses(make("fused", optimizer=fused), 20), _losses(make("plain"), 20), 1e-10)


# ------------------------------------------------------------------------------------------------------- errors


def test_compiling_without_a_compiler_is_refused(make, monkeypatch):
    monkeypatch.setattr("dalikd.trainers.launch.shutil.which", lambda _: None)
    with pytest.raises(ValueError, match=r"--compile default needs a C\+\+ compiler and there is none: install g\+\+"):
        make("run", compile="default")
