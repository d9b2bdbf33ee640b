"""dalikd against the published CutMixPick loop, at equal work: a ladder that gives up one habit at a time.

What the published code of Wang et al. (NeurIPS 2022, arXiv 2012.02909) does in a step of N images: a DataLoader over
Pillow decodes and normalises. The student sees the N originals, then the teacher does. Two runs of CutMix, drawn on the
host, make a pool of 2 N candidates, which the teacher sees in a call of its own. The N of highest entropy are kept; the
teacher sees these again, then the student. The host reads each term of the loss before the backward pass. That makes
4 N teacher images a step. Left out is what the published code computes and never reads: interpolated labels and logits.

The first rung is that loop, written anew from its description. Every further rung changes one thing and keeps what the
rungs before it changed, up to `dalikd distill`'s own step. Nets, loss, optimizer, batch size and precision are the
same, and all train. From the third on, where the draws come along with the batch, all have the same losses up to
rounding. Up to dalikd's own step the learning rate is constant, as it is inside an epoch of the published loop.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalikd.kd.backbones.layers import NetOutput
from dalikd.kd.losses import DistillationLoss, MixedOutputs, StepOutputs
from dalikd.kd.mixing import MixDraws, Mixed
from dalikd.kd.picking import entropy, pick_rows
from dalikd.kd.teacher import Teacher
from dalikd.tools.bench.common import Nets, Seen, ask_once, distillation_loop, open_nets
from dalikd.tools.bench.machine import cores, settle
from dalikd.tools.bench.options import PublishedOptions
from dalikd.tools.bench.record import Record, alternate, begin, finish, ratio, summary, timed
from dalikd.tools.bench.sides import Job, cannot, endless, pil_batches
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.launch import autocast_type, start
from dalikd.trainers.setup import TrainingData
from dalikd.trainers.tracking import Meter

__all__ = ["RUNGS", "Costs", "HabitLoop", "Habits", "Input", "Rung", "host_cutmix", "open_ladder", "run"]

_TOP = 5  # the published loop counts the five best classes


@dataclass(frozen=True)
class Habits:
    """What a loop does as the published one does. All false: as dalikd does."""

    pil_loader: bool = True  # images come from a DataLoader over Pillow
    host_waits: bool = True  # CutMix is drawn on the host, which reads each term of the loss in each step
    looks_again: bool = True  # the teacher sees the picks a second time
    separate_calls: bool = True  # the teacher sees originals and candidates in calls of their own
    float_images: bool = True  # images are normalised float32 from the loader on, and are mixed so
    channels_first: bool = True  # images and weights lie in memory channel by channel
    batch_norms: bool = True  # the teacher computes its batch norms

    @property
    def memory_format(self) -> torch.memory_format:
        """How images and weights lie in memory."""
        return torch.contiguous_format if self.channels_first else torch.channels_last


_PUBLISHED, _ASKED_AGAIN, _GATHERED = "published", "no host waits", "picked logits gathered"
_FOLDED, _OWN, _RATE = "batch norms folded", "dalikd distill's step", "images/s"

#: The rungs below `dalikd distill`'s own step, lowest first: each gives up one more habit.
RUNGS: dict[str, Habits] = {_PUBLISHED: Habits()}
for _rung, _habit in {
    "dalikd's loader": "pil_loader",
    _ASKED_AGAIN: "host_waits",
    _GATHERED: "looks_again",
    "one teacher call": "separate_calls",
    "uint8 until the net": "float_images",
    "channels_last": "channels_first",
    _FOLDED: "batch_norms",
}.items():
    RUNGS[_rung] = replace(list(RUNGS.values())[-1], **{_habit: False})


# -------------------------------------------------------------------------------------------------- the loop


class Input(NamedTuple):
    """A batch as a loop takes it."""

    images: Tensor  # [N, 3, S, S], normalised float or pixels
    labels: Tensor  # int64 [N]
    draws: Sequence[MixDraws] = ()  # of each CutMix run; none where the loop draws itself


def host_cutmix(images: Tensor, random: np.random.Generator) -> Mixed:
    """CutMix as the published loop does it: one lam, box and order for the whole batch, drawn on the host.

    Args:
        images: float [N, 3, S, S], N at least 2.
        random: draws lam and the box; the order comes from torch's generator of the CPU.
    """
    count, _, height, width = images.shape
    share = np.sqrt(1 - random.beta(1, 1))
    top, bottom = _span(int(height * share), int(random.integers(height)), height)
    left, right = _span(int(width * share), int(random.integers(width)), width)
    own = torch.arange(count, device=images.device)
    partner = torch.randperm(count).to(images.device)
    while (partner == own).any():  # nobody is one's own partner; waits for the device, as published
        partner = torch.randperm(count).to(images.device)
    kept = torch.ones(height, width, dtype=images.dtype).to(images.device)
    kept[top:bottom, left:right] = 0
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return Mixed(images * kept + images[partner] * (1 - kept), partner, images.new_full((count,), lam))


def _span(length: int, center: int, side: int) -> tuple[int, int]:
    """First and past-the-last pixel of twice half a length around a pixel, clipped."""
    return max(center - length // 2, 0), min(center + length // 2, side)


@dataclass
class HabitLoop:
    """Trains a student as the published loop does, or with fewer of its habits."""

    habits: Habits
    batches: Callable[[], Input]  # gives the next batch, each time it is called
    student: nn.Module  # takes what `batches` gives; it is trained in place
    teacher: Callable[[Tensor], Tensor]  # takes the same
    loss: DistillationLoss
    optimizer: torch.optim.Optimizer  # over the student's and the loss's parameters
    augmenter: Augmenter  # mixes where the draws come with the batch
    autocast: torch.dtype | None = None  # compute type of the student's mixed precision
    seed: int = 0  # of the draws made here
    sums: dict[str, Any] = field(default_factory=dict)  # of the terms that the host reads
    meter: Meter = field(default_factory=Meter)  # of those that stay on the device

    def __post_init__(self) -> None:
        self.student.train()
        self._random = np.random.default_rng(self.seed)

    def step(self) -> dict[str, Tensor]:
        """One optimizer step. Returns the terms of the loss."""
        images, labels, draws = self.batches()
        logits = self._answer(images)
        seen = self._look(images, draws)
        picked_logits = self._answer(seen.images)
        mixed = MixedOutputs(picked_logits, seen.picked_logits, labels[seen.rows], labels[seen.partner], seen.lam)
        ids, epoch = labels, torch.zeros((), device=labels.device)  # which the published losses do without
        terms = self.loss(StepOutputs(NetOutput(logits), NetOutput(seen.logits), labels, ids, epoch, mixed))
        self._count(terms, logits, labels)
        self.optimizer.zero_grad()
        terms["loss"].backward()
        self.optimizer.step()
        return terms

    def _answer(self, images: Tensor) -> Tensor:
        """The student's logits."""
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.student(images)
        return logits.float() if self.autocast is not None else logits

    @torch.no_grad()
    def _look(self, images: Tensor, draws: Sequence[MixDraws]) -> Seen:
        """What the teacher sees and answers: in one call, or in the two or three of the published loop."""
        waits = self.habits.host_waits
        group = len(images) if waits else self.augmenter.group
        logits = self.teacher(images) if self.habits.separate_calls else None
        runs = [host_cutmix(images, self._random) for _ in range(self.augmenter.runs)] if waits else []
        pool = Mixed.join(runs) if waits else self.augmenter.mix(images, (), draws)
        assert pool is not None
        if logits is None:
            return ask_once(self.teacher, images, pool, group)
        pool_logits = self.teacher(pool.images)
        picks = pick_rows(entropy(pool_logits).reshape(-1, len(images)), group)
        picked = pool.images[picks]
        again = self.teacher(picked) if self.habits.looks_again else pool_logits[picks]
        return Seen(logits, picked, again, picks % len(images), pool.partner[picks], pool.lam[picks])

    def _count(self, terms: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        """Add up the terms, and how many labels are the best class (as published, also among the five best)."""
        if not self.habits.host_waits:
            self.meter.add({**terms, "top1": (logits.argmax(1) == labels).float().mean()})
            return
        read: dict[str, Any] = {
            name: term.item() * len(labels) for name, term in terms.items()
        }  # waits for the device, as published
        ranked = logits.detach().topk(min(_TOP, logits.shape[1]), dim=1).indices.t()
        hits = ranked.eq(labels.expand_as(ranked))
        for name, depth in (("top1", 1), ("top5", _TOP)):
            read[name] = hits[:depth].flatten().float().sum()
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in read.items()}


# ------------------------------------------------------------------------------------------------ the ladder


class Rung(NamedTuple):
    """A way to train that can be stepped."""

    step: Callable[[], Any]
    teacher: Teacher
    ahead: int  # batches that may lie ready before a step
    compiled: bool = False


def open_ladder(options: PublishedOptions, data: TrainingData, nets: Nets, accelerator: Accelerator) -> dict[str, Rung]:
    """Every rung, lowest first, with nets of its own. All but the first take turns at one loader."""
    folds, plain = options.teacher.fold_bn, replace(options, metric=False)
    kept = {name: habits for name, habits in RUNGS.items() if folds or name != _FOLDED}
    rungs = {name: _habit_rung(habits, options, data, nets, accelerator.device) for name, habits in kept.items()}
    own = {_OWN: replace(plain, compile="off")}
    own |= {f"compiled, {options.compile}": plain} if options.compile != "off" else {}
    own |= {"T. stddev streamed too": options} if options.metric else {}
    for name, settings in own.items():
        teacher = Teacher(deepcopy(nets.teacher), accelerator.device, autocast_type(options.precision), fold_bn=folds)
        student = deepcopy(nets.student)
        loop = distillation_loop(student, teacher, data.augmenter, data.loader, settings, accelerator)
        rungs[name] = Rung(loop.step, teacher, options.data.prefetch + 1, settings.compile != "off")
    return rungs


def _habit_rung(
    habits: Habits, options: PublishedOptions, data: TrainingData, nets: Nets, device: torch.device
) -> Rung:
    student, teacher_net, autocast = deepcopy(nets.student), deepcopy(nets.teacher), autocast_type(options.precision)
    # images that are normalised already do without the nets' own normalisation
    seen_by, trained = (teacher_net.model, student.model) if habits.float_images else (teacher_net, student)
    teacher = Teacher(seen_by, device, autocast, fold_bn=not habits.batch_norms)
    for net in (teacher.model, trained):
        net.to(memory_format=habits.memory_format)  # type: ignore[call-overload]

    def following() -> Input:
        batch = data.loader.next()
        pixels = batch.pixels.contiguous(memory_format=habits.memory_format)
        return Input(student.normalize(pixels) if habits.float_images else pixels, batch.labels, batch.mix)

    batches, ahead = following, options.data.prefetch + 1
    if habits.pil_loader:
        batches, ahead = _pil_batches(options, data, student.scale)
    loss = deepcopy(options.loss).to(device)
    optimizer: Any = options.optimizer([*trained.parameters(), *loss.parameters()])
    loop = HabitLoop(habits, batches, trained, teacher, loss, optimizer, data.augmenter, autocast, options.seed)
    return Rung(loop.step, teacher, ahead)


def _pil_batches(options: PublishedOptions, data: TrainingData, like: Tensor) -> tuple[Callable[[], Input], int]:
    """What gives the batches of the DataLoader, in the type and on the device of a tensor, and how many lie ready."""
    workers = cores()
    ahead = workers * 2 + 1  # torch's workers fetch two batches each
    steps = (options.steps + max(ahead, options.warmup)) * (options.rounds + 1) + 1
    images = steps * options.batch_size
    job = Job(data.train, data.view, "identity", options.batch_size, like.device, workers=workers, images=images)
    if reason := cannot("torchvision-pil", job):
        raise ValueError(f"--data.name {options.data.name}: the published loop's DataLoader {reason}; name a folder")
    batches = endless(pil_batches(job))

    def following() -> Input:
        images, labels = next(batches)
        # to the device first: images.to(like) converts on the CPU
        return Input(images.to(like.device).to(like.dtype), labels.to(like.device))

    return following, ahead


# ----------------------------------------------------------------------------------------------- the numbers


class Costs(NamedTuple):
    """Floating-point operations an image, of convolutions and matrix products; a multiply-add is two."""

    teacher: float  # a forward
    student: float  # a forward and a backward

    def of_step(self, teacher_images: float) -> float:
        """For each original: so many teacher images; the student sees the original and a pick."""
        return teacher_images * self.teacher + 2 * self.student

    @property
    def reuse_ceiling(self) -> float:
        """How much faster a step would be with 3 N instead of 4 N teacher images, if operations were all."""
        return self.of_step(4) / self.of_step(3)


def costs(nets: Nets, size: int) -> Costs:
    """Those of images of so many pixels a side."""
    device = nets.student.scale.device
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device)  # batch norms train on no single image
    student, teacher = deepcopy(nets.student).train(), deepcopy(nets.teacher).eval()
    with FlopCounterMode(display=False) as looked, torch.no_grad():
        teacher(pixels)
    with FlopCounterMode(display=False) as learned:
        student(pixels).sum().backward()
    return Costs(looked.get_total_flops() / len(pixels), learned.get_total_flops() / len(pixels))


def run(options: PublishedOptions, config: dict[str, Any]) -> Record:
    """Time the ladder, print it, write it, and return the record.

    Raises:
        ValueError, OSError: options that the published loop has not, or data and nets that are not as they should be;
            nothing has run then.
    """
    _check(options)
    accelerator = start(options.device, options.precision)
    record = begin("published", options, accelerator, config)
    nets, data = open_nets(options, accelerator)
    if not (
        torch.equal(nets.student.scale, nets.teacher.scale) and torch.equal(nets.student.shift, nets.teacher.shift)
    ):
        raise ValueError(
            f"{options.model} and {options.teacher.name} normalise by different means, and the published loop does it "
            "once for both: choose two timm models, or none"
        )
    torch.backends.cudnn.benchmark = True  # as published, and for every rung
    rungs = open_ladder(options, data, nets, accelerator)

    def rate(rung: Rung) -> float:
        for _ in range(max(rung.ahead, options.warmup)):  # what lies ready must not count
            rung.step()
        seconds = timed(lambda: [rung.step() for _ in range(options.steps)], accelerator.device)
        return options.steps * options.batch_size / seconds

    try:
        counts = {name: count_teacher(rung) for name, rung in rungs.items()}
        timers = {name: lambda rung=rung: rate(rung) for name, rung in rungs.items()}
        rates = alternate(timers, options.rounds, settle)
    finally:
        data.loader.close()
    size, resident, operations = data.view.size, options.data.resident, costs(nets, data.view.size)
    record.title = (
        f"dalikd against the published CutMixPick loop: {options.teacher.name} to {options.model}, {size} pixels, "
        f"batch {options.batch_size}, {options.precision}{', resident' if resident else ''}"
    )
    record.warm_up = (
        f"a round, and before each round {options.warmup} step(s), or as many as batches may lie ready (up to "
        f"{max(rung.ahead for rung in rungs.values())})."
    )
    record.page_cache = "warm; the first round reads." if data.train.files is not None else "no files."
    settings = {options.compile: options.compile != "off", "resident": resident}
    names = (str(name).replace(":", "-").replace("_", "-") for name in (options.teacher.name, options.model))
    given = (name for name, is_given in settings.items() if is_given)
    record.variant = "-".join((*names, str(size), options.precision, *given))
    record.labels, record.plotted = ("rung", "loop"), _RATE
    record.rows = _rows(rates, counts, operations, options.batch_size)
    record.notes = _notes(rates, operations)
    return finish(record, options)


def count_teacher(rung: Rung) -> list[int] | None:
    """Sizes of the batches that the teacher sees in a step; None where compiled code would not tell."""
    if rung.compiled:
        return None
    sizes: list[int] = []
    hook = rung.teacher.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    rung.step()
    hook.remove()
    return sizes


def _rows(
    rates: Mapping[str, list[float]], counts: Mapping[str, list[int] | None], operations: Costs, batch_size: int
) -> list[dict[str, Any]]:
    rows, before = [], None
    for number, (name, values) in enumerate(rates.items(), start=1):
        sizes = counts[name]
        seen = None if sizes is None else sum(sizes) / batch_size
        row = {
            "rung": number,
            "loop": name,
            _RATE: summary(values),
            "to the published": None if before is None else ratio(values, rates[_PUBLISHED]),
            "to the rung before": None if before is None else ratio(values, rates[before]),
            "teacher images an original": seen,
            "teacher calls a step": None if sizes is None else len(sizes),
            "GFLOP an original": None if seen is None else operations.of_step(seen) / 1e9,
        }
        rows.append(row)
        before = name
    return rows


def _notes(rates: Mapping[str, list[float]], operations: Costs) -> list[str]:
    found = {"reuse": ratio(rates[_GATHERED], rates[_ASKED_AGAIN]), "whole": ratio(rates[_OWN], rates[_PUBLISHED])}
    spread = {name: "{median:.3f} ({low:.3f} to {high:.3f})".format(**values) for name, values in found.items()}
    return [
        f"Logits of the picks gathered against asked for again, all else equal: {spread['reuse']}. If operations were "
        f"all, {operations.reuse_ceiling:.3f}: (4 T + 2 S) / (3 T + 2 S), with T = {operations.teacher / 1e9:.4f} "
        f"GFLOP an image (teacher's forward) and S = {operations.student / 1e9:.4f} (student's forward and backward).",
        f"dalikd distill's step against the published loop: {spread['whole']}.",
    ]


def _check(options: PublishedOptions) -> None:
    plain = {"accumulation": 1, "clip": None, "ema": 0.0, "joint_forward": False, "no_decay_norms": False}
    for name, value in plain.items():
        if getattr(options, name) != value:
            raise ValueError(
                f"--{name} {getattr(options, name)}: the published loop has no such thing, and the work must be "
                f"equal; give --{name} {json.dumps(value)}"
            )
    if options.precision == "fp16":
        raise ValueError("--precision fp16: the ladder scales no losses; give fp32, tf32, bf16 or fp64")
