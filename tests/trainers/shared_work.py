"""What one process and several must agree on. Run by test_processes.py, by itself under torchrun: PROCESSES FILE."""

import importlib.util
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim import SGD

from dalikd.kd.backbones import create_model, factory
from dalikd.kd.losses import HSAKD, KD, LossContext, StepOutputs
from dalikd.pipelines.loader import BadFileError
from dalikd.trainers import measure, setup
from dalikd.trainers.augmentation import AUGMENTATIONS, MixOptions
from dalikd.trainers.checkpoint import read_state, save_state
from dalikd.trainers.evaluate import evaluate
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop
from dalikd.trainers.measure import MeasureOptions
from dalikd.trainers.models import TeacherConfig
from dalikd.trainers.stopping import Interrupted
from dalikd.trainers.tasks.distill import DistillOptions
from dalikd.trainers.tasks.probe import ProbeOptions
from dalikd.trainers.tasks.supervised import TrainOptions
from dalikd.trainers.tracking import RunFolder

# images, mode, picks of a mix group. With 90 images the second of two processes gets no rows of the last batch
SETTINGS = [(110, "per_sample", None), (90, "per_batch", 11)]
WITH_HEADS = (74, "per_sample", 11)  # likewise; of a teacher with auxiliary heads
POLICIES = ["autoaugment", "randaugment", "trivialaugment"]  # one suffices: graphs that take a second to build
MEASURED = [name for name in [*AUGMENTATIONS, "mixup+kld", "flip+dissimilarity"] if name not in POLICIES[1:]]
METRICS = ["probability_covariance", "cross_entropy_covariance"]


def _conftest() -> Any:
    specification = importlib.util.spec_from_file_location("trainers_helpers", Path(__file__).with_name("conftest.py"))
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


helpers = _conftest()


def work(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """All results, on the main process as on every other; of four processes or more what they measure."""
    factory._BUILDERS["small"] = helpers.SmallNet
    folder.mkdir(exist_ok=True)
    measured = {setting: _measure(accelerator, folder, *setting) for setting in (*SETTINGS, WITH_HEADS)}
    if accelerator.num_processes > 2:
        return {"measured": measured}
    return {
        "measured": measured,
        "trained": {name: _train(accelerator, folder, name) for name in ("mixup", "cutmixpick_teacher", "turned")},
        "evaluated": _evaluate(accelerator, folder),
        "together": _learn_together(accelerator, folder),
        "probed": _probe(accelerator, folder),
        "batch_norm": _run_with_batch_norm(accelerator, folder),
        "fixed": _observe(accelerator, folder),
        "remembered": _remember(accelerator, folder),
        "stopped": {what: _stop(accelerator, folder, what) for what in STOPS},
    }


def _train(accelerator: Accelerator, folder: Path, augmentation: str) -> dict[str, Any]:
    """Six accumulated steps of distillation at float64, without batch statistics; "turned" with auxiliary heads, mixup
    with two teachers."""
    loss, nets = KD(), [helpers.net(0, norm=False).double(), helpers.net(1).double()]
    if augmentation == "turned":
        augmentation, loss = "cutmixpick_teacher", HSAKD(kd_mix_share=1.0)
        nets = [helpers.net_with_heads(seed).double() for seed in range(2)]
    options = DistillOptions(
        batch_size=32, mix=MixOptions(group=8), epochs=2, accumulation=2, augmentation=augmentation,
        clip_grad_norm=1.0, ema=0.5, loss=loss,
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
    )  # fmt: skip
    student, teacher = nets
    loop = helpers.loop(
        folder / type(loss).__name__ / augmentation, accelerator, options=options, student=student,
        teacher=[teacher, helpers.net(2).double()] if augmentation == "mixup" else teacher,
    )  # fmt: skip
    for metric in (loop.task.goodness, *loop.task.goodness_of_each):
        metric.window = 64
    for step in range(6):
        loop.step()
        if step == 2:
            loop.meter.share(accelerator)  # as a checkpoint does
    loop.meter.share(accelerator)
    weights = {key: value.detach().clone() for key, value in student.model.state_dict().items()}
    average = {key: value.clone() for key, value in loop.averages["student"].module.state_dict().items()}
    metrics = loop.task.metrics()
    for number, teacher in enumerate(metrics.pop("teachers", ())):
        metrics |= {f"{name}{number}": value for name, value in teacher.items() if name != "name"}
    return {"weights": weights, "average": average, "metrics": metrics, "terms": loop.meter.means()}


def _learn_together(accelerator: Accelerator, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Three steps of two nets with auxiliary heads at float64, without batch statistics: the weights of both."""
    options = TrainOptions(
        batch_size=32, mix=MixOptions(group=8), augmentation="mixup", optimizer=partial(SGD, lr=0.1, momentum=0.9)
    )
    student, peer = (helpers.net_with_heads(seed).double() for seed in range(2))
    loop = helpers.loop(folder / "together", accelerator, options=options, student=student, peer=peer)
    for _ in range(3):
        loop.step()
    return {
        name: {key: value.detach().clone() for key, value in net.model.state_dict().items()}
        for name, net in loop.task.nets.items()
    }


class _Seen(KD):
    """Remembers which rows this process has seen; no other process's memory takes its place."""

    local_buffers = ("rows",)

    def build(self, context: LossContext) -> None:
        self.register_buffer("rows", torch.zeros(context.images))

    def forward(self, outputs: StepOutputs) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self.rows[outputs.ids] += 1
        return super().forward(outputs)


def _remember(accelerator: Accelerator, folder: Path) -> list[list[float]]:
    """How often each process has seen each row, after an epoch; the running statistics are shared meanwhile."""
    options = DistillOptions(batch_size=32, mix=MixOptions(group=8), epochs=1, loss=_Seen())
    loop = helpers.loop(folder / "remembered", accelerator, options=options)
    for _ in range(3):
        loop.step()
    return gather_object([loop.task.loss.rows.tolist()])


def _measure(accelerator: Accelerator, folder: Path, images: int, mode: Any, picks: int | None) -> dict[str, Any]:
    """All augmentations in one pass; batches of 64 with mix groups of 16, the last of each short."""
    heads = (images, mode, picks) == WITH_HEADS
    teacher, weights = "resnet8_aux" if heads else "small", folder / f"teacher{images}.pt"
    if accelerator.is_main_process:
        torch.manual_seed(1)
        torch.save(create_model(teacher, 3).state_dict(), weights)
    accelerator.wait_for_everyone()
    names = MEASURED if picks is None else [name for name in MEASURED if name not in POLICIES]
    names = ["flip", "cutmixpick_student"] if heads else names
    setup.open_split = lambda *_: helpers.source(images)
    options = MeasureOptions(
        teacher=TeacherConfig(teacher, str(weights)), heads=heads, model="small", batch_size=64,
        mix=MixOptions(group=16, mode=mode, n_pick=picks), epochs=2,
        window=40, precision="fp64", augmentation=names, metrics=METRICS, per_class=True,
    )  # fmt: skip
    options.data.threads, options.data.crop, options.data.padding = 1, "pad_crop", 1
    results = measure.measure_all(options, accelerator)["results"]
    assert [result["augmentation"] for result in results] == names
    return {result.pop("augmentation"): result for result in results}


def _evaluate(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """101 images, and which of them each process has seen."""
    loop = helpers.loop(folder / "evaluate", accelerator, val=helpers.source(101))
    seen = gather_object([row for batch in loop.val_loader for row in batch.ids.tolist()])
    return {**evaluate({"student": loop.task.student}, loop.val_loader, accelerator)["student"], "seen": sorted(seen)}


def _probe(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """What neighbours among 101 images say of 101 others; and the classifier after six steps."""
    weights = folder / "probed.pt"
    if accelerator.is_main_process:
        torch.manual_seed(0)
        torch.save(create_model("resnet8", 7).state_dict(), weights)
    accelerator.wait_for_everyone()
    options = ProbeOptions(
        model="resnet8", weights=str(weights), batch_size=32, mix=MixOptions(group=8), knn=5, precision="fp64"
    )
    at = setup.Setup(options, accelerator, helpers.source(101), helpers.source(101, seed=1))
    task = options.build(at)
    loaders = task.loader(at), at.val_loader()
    loop = Loop(task, *loaders, options, accelerator, RunFolder(folder / "probe", accelerator.is_main_process), {})
    loop.model.train()
    for _ in range(6):
        loop.step()
    return {**task.metrics(), "weights": {key: value.clone() for key, value in task.student.model.state_dict().items()}}


def _run_with_batch_norm(accelerator: Accelerator, folder: Path) -> dict[str, float]:
    """A whole run of a net whose running statistics differ between processes: what its last evaluation said."""
    options = TrainOptions(batch_size=32, mix=MixOptions(group=8), epochs=2, ema=0.5)
    return helpers.loop(folder / "batch_norm", accelerator, options=options).run()["last"]["val"]


def _observe(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """A run with a fixed student: its last evaluation, the metric, and whether its weights stayed."""
    options = DistillOptions(
        batch_size=32, mix=MixOptions(group=8), epochs=1, accumulation=2, augmentation="cutmixpick_student"
    )
    student = helpers.net(0).double().requires_grad_(False)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    loop = helpers.loop(
        folder / "fixed", accelerator, options=options, student=student, teacher=helpers.net(1).double()
    )
    loop.task.goodness.window = 64
    last = loop.run()["last"]
    stayed = all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    return {"val": last["val"], "metrics": loop.task.metrics(), "stayed": stayed}


STOPS = ["signal to one", "signals a step apart", "bad file", "bad file to validate"]


def _stop(accelerator: Accelerator, folder: Path, what: str) -> list[tuple[str, int, int]]:
    """A run that is ended by what one process alone knows, while no step makes processes wait for each other: of each
    the error's text without the folder, the step that is saved, and how often the process wrote it. Then it goes on."""
    options = DistillOptions(
        batch_size=32, mix=MixOptions(group=8), epochs=5, log_every=100, eval_every=3, metric=False
    )
    last, path = accelerator.is_last_process, folder / what
    student = helpers.net(0).requires_grad_(False)
    loop = helpers.loop(path, accelerator, options=options, student=student)
    inputs, fetch, validate, writes = loop.task.prepare, loop.loader.next, loop.val_loader.next, []

    def interrupting(*of: Any) -> Any:
        time.sleep(0.02 * last)  # the others run ahead
        if loop.progress.step == (3 + last) and (last or what == "signals a step apart") and "signal" in what:
            os.kill(os.getpid(), signal.SIGTERM)
        return inputs(*of)

    def failing(next_batch: Any, when: bool) -> Any:
        if when and last:
            raise BadFileError("cannot decode a.jpg")
        return next_batch()

    loop.task.prepare = interrupting
    loop.loader.next = lambda: failing(fetch, what == "bad file" and loop.progress.step == 4)
    loop.val_loader.next = lambda: failing(validate, what == "bad file to validate")
    with mock.patch("dalikd.trainers.checkpoint.save_state", lambda *state: writes.append(save_state(*state))):
        try:
            loop.run()
        except (Interrupted, BadFileError) as stop:
            text = str(stop).replace(str(path), "FOLDER")
    accelerator.wait_for_everyone()
    found = gather_object([(text, read_state(loop.folder.state_file)["step"], len(writes))])
    resumed = helpers.loop(path, accelerator, options=options, student=student)
    resumed.load()
    assert resumed.run()["steps"] == 15
    return found


if __name__ == "__main__":
    processes, file = int(sys.argv[1]), Path(sys.argv[2])
    main_accelerator = start("cpu", "fp64")
    assert main_accelerator.num_processes == processes
    found = work(main_accelerator, file.with_suffix(""))
    if main_accelerator.is_main_process:
        torch.save(found, file)
    main_accelerator.end_training()
