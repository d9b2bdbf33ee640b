import json
import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import SGD, Adagrad, AdamW
from tqdm import tqdm

from dalikd.kd.known_weights import file_sha256
from dalikd.kd.losses import KD
from dalikd.pipelines.loader import BadFileError
from dalikd.tools.cli import guarded
from dalikd.trainers.augmentation import MixOptions
from dalikd.trainers.checkpoint import read_state
from dalikd.trainers.evaluate import evaluate
from dalikd.trainers.loop import Loop, Meter, make_optimizer
from dalikd.trainers.options import ScheduleConfig
from dalikd.trainers.signals import Stopped
from dalikd.trainers.stopping import Interrupted, StopSignals
from dalikd.trainers.tasks.supervised import SupervisedInputs, TrainOptions

CONSTANT = ScheduleConfig("constant")


def _options(**options: Any) -> TrainOptions:
    return TrainOptions(**{"batch_size": 32, "mix": MixOptions(group=8), "epochs": 2, "schedule": CONSTANT, **options})


def _sgd(lr: float = 0.1, **settings: float) -> Callable[..., SGD]:
    return partial(SGD, lr=lr, **settings)


def _fill(module: torch.nn.Module) -> None:
    """Weights that depend on no random generator."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            waves = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (number + 1.7))
            parameter.copy_(0.3 * waves.reshape(parameter.shape) + (1.0 if parameter.dim() == 1 else 0.0))


def _weights(loop: Loop) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in loop.task.student.model.state_dict().items()}


def _log(loop: Loop) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (loop.folder.path / "log.jsonl").read_text().splitlines()]


def _losses(loop: Loop, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loop.step()
        losses.append(loop.meter.means()["loss"])
        loop.meter.reset()
    return losses


# ------------------------------------------------------------------------------------------------ the curve


# as this test prints them; they change only where the meaning of a run does
GOLDEN = {
    "train": [1.203792868479, 1.147324907083, 1.115657077512, 1.046060226108, 1.002150746776, 0.985036276018],
    "distill": [0.151578791202, 0.140203830711, 0.131751161341, 0.125593215891, 0.113896863356, 0.109903316972],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_loss_follows_the_recorded_curve_and_falls(make_loop, make_net, distill_options, kind):
    student, teacher = make_net().double(), make_net().double()
    _fill(student.model)
    _fill(teacher.model)
    teacher.model.fc.weight.data.mul_(-2)
    settings = {"schedule": CONSTANT, "optimizer": _sgd(0.05, momentum=0.9)}
    options = _options(augmentation="cutmix", **settings)
    if kind == "distill":
        options = distill_options(augmentation="cutmixpick_teacher", **settings)
    loop = make_loop(options=options, student=student, teacher=teacher)
    loop.model.train()
    losses = _losses(loop, 30)
    print(kind, losses)
    assert losses[:6] == pytest.approx(GOLDEN[kind], abs=1e-8)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_distillation_brings_the_student_to_the_teacher(make_loop, make_net, distill_options):
    options = distill_options(epochs=20, schedule=CONSTANT, loss=KD(ce_weight=0.0, kd_weight=1.0), optimizer=_sgd(0.05))
    student, teacher = make_net(0, norm=False), make_net(1, norm=False)
    loop = make_loop(options=options, student=student, teacher=teacher)
    losses = _losses(loop, 60)
    assert losses[-1] < 0.2 * losses[0]


# ------------------------------------------------------------------------------------------- a fixed student


class _Refuses(SGD):
    """An optimizer that must not step."""

    def step(self, *_: Any) -> None:
        raise AssertionError("a step of the optimizer")


@pytest.mark.parametrize("augmentation", ["identity", "cutmix", "cutmixpick_student"])
@pytest.mark.parametrize("no_decay_norms", [False, True])
def test_a_fixed_student_is_observed_and_stays(make_loop, make_net, distill_options, augmentation, no_decay_norms):
    student = make_net(2).requires_grad_(False)
    options = distill_options(
        augmentation=augmentation, clip_grad_norm=1.0, ema=0.5, accumulation=2, no_decay_norms=no_decay_norms,
        optimizer=partial(_Refuses, lr=0.1),
    )  # fmt: skip
    loop = make_loop(options=options, student=student)
    before, expected = _weights(loop), evaluate({"student": student}, loop.val_loader, loop.accelerator)["student"]
    results = loop.run()
    assert all(torch.equal(value, before[key]) for key, value in _weights(loop).items())  # running statistics too
    assert results["last"]["val"] == results["best"]["val"] == expected
    assert math.isfinite(results["last"]["train"]["loss"])
    assert {"t_stddev", "t_entropy"} <= results["last"].keys()
    assert results["steps"] == 6


def test_a_fixed_students_losses_are_those_of_eval_mode(make_loop, make_net, distill_options):
    student = make_net(2).requires_grad_(False)
    student.model.norm.running_mean.fill_(0.3)
    loop = make_loop(options=distill_options(log_every=1), student=student)
    inputs, fed = loop.task.prepare, []
    loop.task.prepare = lambda *of: fed.append(inputs(*of)) or fed[-1]
    loop.folder.start({}, None)
    loop.run()
    pixels, labels = fed[0].pixels, fed[0].labels
    assert not student.training
    expected = torch.nn.functional.cross_entropy(student(pixels), labels)
    assert _log(loop)[0]["train"]["ce"] == pytest.approx(expected.item(), rel=1e-6)


def test_a_loss_with_parameters_is_trained_beside_a_fixed_student(make_loop, make_net, distill_options):
    student = make_net(2).requires_grad_(False)
    loop = make_loop(options=distill_options(loss=_Scaled(), optimizer=_sgd(0.1)), student=student)
    before = _weights(loop)
    loop.run()
    assert all(torch.equal(value, before[key]) for key, value in _weights(loop).items())
    assert loop.task.loss.scale.item() < 1.0


class _Scaled(KD):
    """KD times a number that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, *arguments: Any) -> dict[str, torch.Tensor]:
        terms = super().forward(*arguments)
        return {**terms, "loss": terms["loss"] * self.scale}


# --------------------------------------------------------------------------------------------- the optimizer


def test_the_learning_rate_is_that_of_the_step(make_loop):
    schedule = ScheduleConfig(milestones=[1, 2], gamma=0.1, warmup_epochs=1)
    options = _options(epochs=4, epoch_factor=1.5, schedule=schedule, optimizer=_sgd(0.6))
    loop = make_loop(options=options)
    assert loop.steps_per_epoch == 3
    assert loop.total_steps == 18  # 4 x 1.5 epochs
    rates = []
    for _ in range(12):
        loop.step()
        rates.append(loop.optimizer.param_groups[0]["lr"])
    # three steps of warm-up; milestones 1 and 2 move to 1.5 epochs (step 4) and 3 epochs (step 9)
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.06, 0.06, 0.06, 0.06, 0.06, 0.006, 0.006, 0.006])


def test_cosine_ends_with_the_stretched_training(make_loop):
    loop = make_loop(
        options=_options(epochs=2, epoch_factor=2.0, schedule=ScheduleConfig("cosine"), optimizer=_sgd(1.0))
    )
    assert loop.total_steps == 12
    for step in (0, 3, 6, 11):
        loop.progress.step = step
        loop.step()
        assert loop.optimizer.param_groups[0]["lr"] == pytest.approx((1 + math.cos(math.pi * step / 12)) / 2)


@pytest.mark.parametrize("augmentation", ["identity", "cutmix"])
def test_accumulating_two_microbatches_equals_one_batch(make_loop, make_net, distill_options, augmentation):
    def run(accumulation: int) -> dict[str, torch.Tensor]:
        student, teacher = make_net(0, norm=False).double(), make_net(1).double()
        options = distill_options(
            accumulation=accumulation, augmentation=augmentation, optimizer=_sgd(0.1, momentum=0.9, weight_decay=1e-3)
        )
        loop = make_loop(str(accumulation), options=options, student=student, teacher=teacher)
        for _ in range(6):
            loop.step()
        return _weights(loop)

    one, two, four = run(1), run(2), run(4)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-12)
        torch.testing.assert_close(four[key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_clip_bounds_the_step(make_loop, clip):
    loop = make_loop(options=_options(clip_grad_norm=clip, optimizer=_sgd(1.0)))
    before = torch.cat([parameter.detach().flatten().clone() for parameter in loop.model.parameters()])
    loop.step()
    after = torch.cat([parameter.detach().flatten() for parameter in loop.model.parameters()])
    moved = (after - before).norm().item()
    if clip is None:
        assert moved > 0.01
    else:
        assert moved == pytest.approx(clip, rel=1e-2)


def test_no_decay_norms_spares_biases_and_norms(make_loop):
    loop = make_loop(options=_options(no_decay_norms=True, optimizer=partial(AdamW, lr=1e-3, weight_decay=0.1)))
    decayed, spared = loop.optimizer.param_groups
    assert isinstance(loop.optimizer.optimizer, AdamW)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    model = loop.task.student.model
    assert {id(value) for value in decayed["params"]} == {id(model.conv.weight), id(model.fc.weight)}
    others = (model.conv.bias, model.norm.weight, model.norm.bias, model.fc.bias)
    assert {id(value) for value in spared["params"]} == {id(value) for value in others}


def test_without_it_all_parameters_share_a_group(make_loop):
    (group,) = make_loop(options=_options(optimizer=_sgd(weight_decay=0.1))).optimizer.param_groups
    assert len(group["params"]) == 6
    assert group["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("device", "fused", "optimizer", "expected"),
    [("cuda", None, AdamW, True), ("cuda", False, SGD, False), ("cpu", None, SGD, None), ("cuda", None, Adagrad, None)],
)
def test_on_a_gpu_the_optimizer_is_fused_unless_it_is_told_otherwise(device, fused, optimizer, expected):
    factory = partial(optimizer, lr=0.1, fused=fused)
    made = make_optimizer(factory, [{"params": [torch.nn.Parameter(torch.zeros(2))]}], torch.device(device))
    assert made.param_groups[0]["fused"] is expected


def test_the_validation_pipeline_is_closed_after_an_evaluation_on_a_gpu(make_loop, monkeypatch):
    loop, closed = make_loop(), []
    loop.val_loader.close = lambda: closed.append(loop.accelerator.device.type)
    loop.end_epoch()
    val = loop.progress.last["val"]
    monkeypatch.setattr(type(loop.accelerator), "device", torch.device("cuda"))
    monkeypatch.setattr("dalikd.trainers.loop.evaluate", lambda *_, **__: {"student": val})
    monkeypatch.setattr("dalikd.trainers.loop.versions", lambda _: {})
    loop.end_epoch()
    assert closed == ["cuda"]


def test_the_moving_average_is_kept_evaluated_and_saved(make_loop):
    loop = make_loop(options=_options(ema=0.8, optimizer=_sgd()))
    expected: dict[str, torch.Tensor] = {}
    for step in range(4):
        loop.step()
        for key, value in loop.task.student.state_dict().items():
            first = step == 0 or not value.is_floating_point()
            expected[key] = value.clone() if first else 0.8 * expected[key] + 0.2 * value
    for key, value in loop.averages["student"].module.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)

    results = loop.run()
    assert results["evaluated"] == "ema.safetensors"
    last, names = loop.folder.path / "last", ("student.safetensors", "ema.safetensors")
    assert {path.name for path in last.iterdir()} == {"trainer.pt", *names}
    assert (last / "ema.safetensors").read_bytes() != (last / "student.safetensors").read_bytes()


# -------------------------------------------------------------------------------------------------- no waits


def _without_waits(loop: Loop, guard: Callable[[], Any]) -> None:
    loop.model.train()
    loop.step()  # the first one builds states
    # numpy's arrays become tensors in the loader, whose way to a GPU has a test of its own
    loop.loader.next = iter([loop.loader.next() for _ in range(2 * loop.options.accumulation)]).__next__
    with guard():
        loop.step()
        loop.step()


@pytest.mark.parametrize("augmentation", ["identity", "mixup", "cutout", "cutmixpick_teacher", "cutmixpick_student"])
def test_a_step_never_reads_from_the_device(make_loop, distill_options, no_sync, augmentation):
    options = distill_options(augmentation=augmentation, clip_grad_norm=1.0, ema=0.9, accumulation=2, optimizer=_sgd())
    _without_waits(make_loop(options=options), no_sync)


def test_a_supervised_step_never_reads_from_the_device(make_loop, no_sync):
    _without_waits(
        make_loop(options=_options(augmentation="cutmix", clip_grad_norm=1.0, ema=0.9, optimizer=_sgd())), no_sync
    )


def test_the_guard_sees_a_reading_step(make_loop, no_sync):
    loop = make_loop()
    loop.task.prepare = lambda batch, _: SupervisedInputs(batch.pixels, batch.labels + int(batch.labels.sum()) * 0)
    with pytest.raises(AssertionError, match="waits for the device"):
        _without_waits(loop, no_sync)


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", ["identity", "mixup", "cutout", "cutmixpick_teacher", "cutmixpick_student"])
def test_a_step_never_waits_for_a_gpu(make_cuda_loop, distill_options, sync_is_an_error, augmentation):
    options = distill_options(augmentation=augmentation, clip_grad_norm=1.0, ema=0.9, accumulation=2, optimizer=_sgd())
    loop = make_cuda_loop(options=options)
    loop.model.train()
    loop.step()
    sync_is_an_error()
    loop.step()
    loop.step()


# --------------------------------------------------------------------------------------------------- the run


def test_a_run_logs_evaluates_and_saves(make_loop):
    loop = make_loop(options=_options(epochs=3, eval_every=2, log_every=2, optimizer=_sgd(0.05)))
    loop.folder.start({"epochs": 3}, None)
    results = loop.run()
    assert (results["finished"], results["steps"], results["epochs"]) == (True, 9, 3.0)
    assert results["last"]["epoch"] == 3
    assert results["last"]["val"]["images"] == 41
    assert results["evaluated"] == "student.safetensors"
    log = _log(loop)
    assert [entry["step"] for entry in log if "lr" in entry] == [2, 3, 4, 6, 8, 9]  # and at each end of an epoch
    assert [entry["epoch"] for entry in log if "val" in entry] == [2, 3]  # every second epoch, and the last
    assert all(entry["images_per_second"] > 0 and 0 <= entry["data_wait_share"] <= 1 for entry in log if "lr" in entry)
    path = loop.folder.path
    assert json.loads((path / "results.json").read_text()) == results
    weights = {f"{name}/student.safetensors" for name in ("last", "best")}
    assert results["sha256"] == {name: file_sha256(path / name) for name in weights}
    assert {file.relative_to(path).as_posix() for file in path.glob("*/*.*") if file.parent.name != "tensorboard"} == {
        "last/trainer.pt",
        "last/trainer-previous.pt",
        "last/student.safetensors",
        "best/student.safetensors",
    }
    events = EventAccumulator(str(path / "tensorboard")).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps["train/loss"] == steps["epoch"] == [2, 3, 4, 6, 8, 9]  # one value a step, of an interval
    assert steps["epoch_train/loss"] == steps["val/loss"] == [6, 9]
    assert [entry["epoch_train"] for entry in log if "val" in entry][-1] == results["last"]["train"]


def test_the_terms_of_an_epoch_are_their_means(make_loop):
    loop = make_loop(options=_options(epochs=1, log_every=1, optimizer=_sgd(0.05)))
    loop.folder.start({}, None)
    results = loop.run()
    losses = [entry["train"]["loss"] for entry in _log(loop) if "lr" in entry]
    assert len(losses) == 3
    assert results["last"]["train"]["loss"] == pytest.approx(sum(losses) / 3)


def test_best_is_the_epoch_of_the_highest_accuracy_and_of_equal_ones_of_the_lowest_loss(make_loop, monkeypatch):
    figures = iter([(0.2, 0.1), (0.7, 1.0), (0.7, 0.9), (0.7, 0.9), (0.4, 0.1)])

    def evaluate(*_, **__):
        top1, loss = next(figures)
        return {"student": {"loss": loss, "top1": top1, "top5": 1.0, "images": 41, "replaced": 0}}

    monkeypatch.setattr("dalikd.trainers.loop.evaluate", evaluate)
    results = make_loop(options=_options(epochs=5)).run()
    assert (results["best"]["epoch"], results["last"]["epoch"]) == (3, 5)


def test_a_diverged_run_says_so(make_loop):
    loop = make_loop(options=_options(epochs=9, log_every=1, optimizer=_sgd(1e12)))
    loop.folder.start({}, None)
    with pytest.raises(ValueError, match=r"the loss is nan at step \d+: training has diverged; lower --optimizer.lr"):
        loop.run()


def _spoiled(loop: Loop, step: int, value: float = math.nan, *, rate: float | None = None) -> Loop:
    """A loop that has a weight of this value before a step, or does the step with another learning rate."""
    inputs = loop.task.prepare

    def spoiling(*of):
        if loop.progress.step == step and rate is None:
            loop.task.student.model.fc.weight.data[0, 0] = value
        elif loop.progress.step == step:
            loop.optimizer.param_groups[0]["lr"] = rate
        return inputs(*of)

    loop.task.prepare = spoiling
    loop.folder.start({}, None)
    return loop


def _are_finite(folder: Path) -> bool:
    """Whether all weights in a run's folder are, those of the state too."""
    files = [load_file(path) for path in folder.glob("*/*.safetensors")]
    files += [
        {key: value for key, value in read_state(path)["task"].items() if isinstance(value, torch.Tensor)}
        for path in folder.glob("*/trainer*.pt")
    ]
    return all(bool(torch.isfinite(value).all()) for weights in files for value in weights.values())


@pytest.mark.parametrize("kind", ["loss", "weights", "next"])
def test_nothing_that_is_not_finite_is_saved_and_the_first_such_step_is_kept(make_loop, kind):
    """A loss is not finite; a finite loss leaves weights that are not; or such that their logits are not. The log is
    read every 50 steps, the state is saved after each second one."""
    rate = {"loss": None, "weights": math.inf, "next": 1e38}[kind]
    options = _options(epochs=4, checkpoint_every=2, ema=0.5, optimizer=_sgd(0.05))
    loop = _spoiled(make_loop(options=options), 6 if kind == "loss" else 7, rate=rate)
    step = {"loss": 7, "weights": 8, "next": 9}[kind]
    words = {
        "loss": "the loss is nan",
        "weights": "student.model.conv.weight is not finite",
        "next": "what student gives",
    }
    go_on = f"go on from step 6 with --resume {loop.folder.path}; "
    match = rf"^{words[kind]}.* at step {step}: training has diverged; .* {go_on}"
    with pytest.raises(ValueError, match=match) as stop:
        loop.run()
    path = loop.folder.path / f"nan-step{step}.pt"
    assert str(stop.value).endswith(f"what the step needs to be run again is in {path}: dalikd replay {path}")
    assert read_state(loop.folder.state_file)["step"] == 6
    assert _are_finite(loop.folder.path)
    found = torch.load(path, weights_only=True)
    undisturbed = make_loop("undisturbed", options=options)
    undisturbed.model.train()
    for _ in range(min(step - 1, 7)):
        undisturbed.step()
    assert found["state"]["step"] == step - 1
    if kind != "next":  # before the step: bit for bit what was trained
        for key, value in undisturbed.task.student.state_dict().items():
            assert torch.equal(found["state"]["task"][f"student.{key}"], value)
        assert found["batches"][0]["ids"].tolist() == undisturbed.next_batches()[0].ids.tolist()
    assert found["batches"][0]["images"].dtype == torch.uint8


def test_a_run_that_has_saved_nothing_yet_is_trained_again_from_its_start(make_loop):
    loop = _spoiled(make_loop(options=_options(epochs=4, optimizer=_sgd(0.05))), 1)
    with pytest.raises(
        ValueError, match=r"the loss is nan at step 2: training has diverged; lower [^;]*warmup_epochs; "
    ):
        loop.run()
    assert torch.load(loop.folder.path / "nan-step2.pt", weights_only=True)["state"]["step"] == 1
    assert not list(loop.folder.path.glob("last/*"))


def test_after_many_steps_the_state_is_kept_as_it_was_saved(make_loop, monkeypatch):
    """It would take too long to train all of them again."""
    monkeypatch.setattr("dalikd.trainers.loop._TRAINED_AGAIN", 1)
    loop = _spoiled(make_loop(options=_options(epochs=4, optimizer=_sgd(0.05))), 4)
    with pytest.raises(ValueError, match=r"the loss is nan at step 6: .* go on from step 3 with"):
        loop.run()
    found = torch.load(loop.folder.path / "nan-step6.pt", weights_only=True)
    assert found["state"]["step"] == 3
    assert torch.isfinite(found["state"]["task"]["student.model.fc.weight"]).all()


def test_a_second_error_hides_no_divergence(make_loop, monkeypatch):
    loop = _spoiled(make_loop(options=_options(epochs=4)), 1)
    monkeypatch.setattr("dalikd.trainers.loop.write_atomically", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match=r"the loss is nan at step 2: .*could not be saved \(OSError: disk full\)"):
        loop.run()


def test_a_state_with_weights_that_are_not_finite_is_not_gone_on_with(make_loop):
    loop = make_loop()
    loop.run()
    state = read_state(loop.folder.state_file)
    state["task"]["student.model.norm.running_var"][1] = math.inf
    torch.save(state, loop.folder.state_file)
    with pytest.raises(
        ValueError, match=r"trainer.pt: student.model.norm.running_var is not finite: the run had diverged"
    ):
        make_loop().load()


def test_a_momentum_that_is_not_finite_is_not_saved(make_loop):
    """The weights are, still: the first step of a resumed run would end it."""
    loop = make_loop(options=_options(optimizer=_sgd(0.05, momentum=0.9)))
    loop.model.train()
    loop.step()
    loop.optimizer.state[loop.task.nets["student"].model.fc.weight]["momentum_buffer"][0, 0] = math.inf
    assert loop.wrong_weight() == "momentum_buffer of student.model.fc.weight is not finite"


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [("meter", None, "TypeError"), ("optimizer", {"state": {}}, "KeyError, 'param_groups'"), ("last", ..., "KeyError")],
)
def test_a_state_of_another_form_is_named(make_loop, part, value, words):
    loop = make_loop()
    loop.run()
    state = read_state(loop.folder.state_file)
    state[part] = value
    if value is ...:
        del state[part]
    torch.save(state, loop.folder.state_file)
    with pytest.raises(ValueError, match=rf"trainer.pt is not a state that this version of dalikd saves \({words}"):
        make_loop().load()


def test_in_fp16_steps_that_overflow_are_skipped_unless_all_of_them_do(make_loop, monkeypatch):
    loop, scale = make_loop(), [2.0**-14]
    scaler = SimpleNamespace(get_scale=lambda: scale[0], state_dict=dict)
    monkeypatch.setattr(loop.accelerator, "scaler", scaler)
    loop.folder.start({}, None)
    loop.meter.add({"loss": torch.tensor(math.nan), "top1": torch.tensor(0.5)})
    loop.save()
    loop._log_interval(tqdm(disable=True))
    assert _log(loop)[0]["train"] == {"loss": None, "top1": 0.5}
    scale[0] /= 2
    loop.alone = False
    with pytest.raises(
        ValueError, match="in fp16 gradients overflow even at a loss scale of 3e-05 at step 0: training has"
    ):
        loop.save()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(make_loop, number):
    loop = make_loop(options=_options(epochs=5))
    before, inputs, save = signal.getsignal(number), loop.task.prepare, loop.save

    def saving(**how: bool) -> None:
        if loop.progress.step == 5:
            os.kill(os.getpid(), number)  # as a launcher hands it on
        save(**how)

    def interrupting(*of):
        if loop.progress.step == 4:
            os.kill(os.getpid(), number)
        return inputs(*of)

    loop.task.prepare, loop.save = interrupting, saving
    message = f"stopped by signal {int(number)}; go on with --resume {loop.folder.path}"
    with pytest.raises(Interrupted, match=message) as stop:
        loop.run()
    assert stop.value.signal == number
    assert torch.load(loop.folder.state_file, weights_only=True)["step"] == 5
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("minutes", "saves"), [(0.0, []), (1000.0, []), (1e-9, [2, 4])])
def test_a_checkpoint_is_due_after_some_minutes(make_loop, minutes, saves):
    """With a log line, where the processes meet."""
    loop = make_loop(options=_options(epochs=2, log_every=2, checkpoint_minutes=minutes))
    saved, save = [], loop.write
    loop.write = lambda **how: (saved.append(loop.progress.step), save(**how))
    loop.run()
    assert saved == sorted([*saves, 3, 6])  # and after each epoch


def test_a_signal_in_the_last_step_is_obeyed_after_it(make_loop):
    """What the run is a part of ends."""
    loop = make_loop(options=_options(epochs=1))
    loop.task.metrics = lambda: os.kill(os.getpid(), signal.SIGINT) or {}
    with pytest.raises(Interrupted):
        loop.run()
    assert loop.progress.epochs == 1


def test_a_full_disk_does_not_hide_why_a_run_ends(make_loop, monkeypatch):
    loop = make_loop()

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    def fail() -> None:
        raise BadFileError("cannot decode a.jpg")

    loop.loader.next = fail
    monkeypatch.setattr("dalikd.trainers.checkpoint.save_state", full)
    with pytest.raises(
        BadFileError, match=r"a\.jpg; the state could not be saved \(OSError: No space left on device\)"
    ):
        loop.run()


LACKS = {
    "torch": (
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 1 has a total capacity of 139.80 GiB of which 1.20 "
            "GiB is free. Including non-PyTorch memory, this process has 138 GiB memory in use."
        ),
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 1 has a total capacity of 139.80 GiB of which 1.20 GiB "
        "is free: try --accumulation 2 or more, a smaller --batch_size, --precision bf16",
    ),
    "numpy": (
        MemoryError("Unable to allocate 2.00 GiB for an array"),
        "Unable to allocate 2.00 GiB for an array: try fewer --data.threads",
    ),
    "dali": (
        RuntimeError(
            "Critical error in pipeline:\nError in Mixed operator encountered:\n\nCan't allocate: CUDABadAlloc"
        ),
        "DALI ran out of memory (Can't allocate: CUDABadAlloc): try --data.prefetch 1",
    ),
}


@pytest.mark.parametrize("who", LACKS)
def test_a_lack_of_memory_is_said_in_a_line_and_the_state_is_saved(make_loop, capsys, who):
    loop, (error, line) = make_loop(), LACKS[who]

    def run_out(*_: Any) -> None:
        raise error

    loop.step()
    loop.task.prepare = run_out
    with pytest.raises(SystemExit), guarded("train"):
        loop.run()
    said = capsys.readouterr().err
    assert said.startswith(f"dalikd train: error: {line}")
    assert said.endswith(f"; the state is saved, go on with --resume {loop.folder.path}\n")
    assert said.count("\n") == 1
    assert torch.load(loop.folder.state_file, weights_only=True)["step"] == 1


def test_other_faults_of_a_gpu_go_up_as_they_are(make_loop):
    loop = make_loop()
    loop.task.prepare = _illegal_access
    with pytest.raises(RuntimeError, match="an illegal memory access"), guarded("train"):
        loop.run()
    assert not loop.folder.state_file.exists()


def _illegal_access(*_: Any) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_second_signal_stops_at_once(accelerator, monkeypatch):
    """Not one that a launcher hands on within two seconds of the terminal's own."""
    now = [100.0]
    monkeypatch.setattr("dalikd.trainers.signals.time.monotonic", lambda: now[0])
    with StopSignals(accelerator) as signals:
        for later in (0.0, 1.9):
            now[0] = 100.0 + later
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="signal 2"):
            signals.together(lambda: None)
        now[0] = 102.1
        with pytest.raises(Stopped, match="stopped by signal 15 "):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


def test_dropout_is_a_function_of_the_step(make_loop, make_net):
    """What a net draws depends on seed and step, and not on what was drawn before."""

    def run(disturb: bool, seed: int = 0) -> dict[str, torch.Tensor]:
        loop = make_loop(f"{disturb}{seed}", options=_options(seed=seed), student=make_net(dropout=0.5))
        for _ in range(3):
            if disturb:
                torch.rand(7)
            loop.step()
        return _weights(loop)

    calm, disturbed = run(False), run(True)
    assert all(torch.equal(value, disturbed[key]) for key, value in calm.items())


def test_the_state_is_the_same_file_until_the_next_is_whole(make_loop, monkeypatch):
    loop = make_loop()
    loop.step()
    loop.save()
    kept = loop.folder.state_file.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("dalikd.trainers.checkpoint.torch.save", fail)
    with pytest.raises(OSError, match="disk full"):
        loop.save()
    assert loop.folder.state_file.read_bytes() == kept
    assert isinstance(loop.folder.path, Path)


# ------------------------------------------------------------------------------------------------------------ the meter


def test_a_meter_averages_on_the_device(no_sync):
    meter = Meter()
    with no_sync():
        for value in (torch.ones(()), torch.full((), 4.0)):
            meter.add({"loss": value, "ce": 2 * value})
    assert meter.means() == {"loss": 2.5, "ce": 5.0}
    meter.reset()
    assert meter.means() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_meter_keeps_no_tensor_of_the_step(dtype):
    """A replayed CUDA graph writes the next step's terms into the same memory."""
    meter, loss = Meter(), torch.tensor(1.0, dtype=dtype)
    for value in (1.0, 5.0):
        loss.fill_(value)
        meter.add({"loss": loss})
    loss.fill_(100.0)
    assert meter.means() == {"loss": 3.0}


def test_a_meter_resumes():
    meter, other = Meter(), Meter()
    meter.add({"loss": torch.full((), 0.1)})
    other.load_state_dict(meter.state_dict(), torch.device("cpu"))
    for one in (meter, other):
        one.add({"loss": torch.full((), 0.7)})
    assert meter.means() == other.means() == {"loss": pytest.approx(0.4)}
