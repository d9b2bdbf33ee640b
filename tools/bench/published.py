"""dalikd against the published CutMixPick loop, at equal work: a series of ablations.

What the published code of Wang et al. (NeurIPS 2022, arXiv 2012.02909) does in a step of N images: a DataLoader over
Pillow decodes and normalises. The student sees the N originals, then the teacher does. Two runs of CutMix, drawn on the
host, make a pool of 2 N candidates, which the teacher sees in a call of its own. The N of highest entropy are kept; the
teacher sees these again, then the student. The host reads each term of the loss before the backward pass. That makes
4 N teacher images a step. Left out is what the published code computes and never reads: interpolated labels and logits.

The first variant is that loop, written anew from its description. Every further variant changes one thing and keeps
what those before it changed, up to `dalikd distill`'s own step. Nets, loss, optimizer, batch size and precision are the
same, and all train. From the third on, where the draws come along with the batch, all have the same losses up to
rounding. Up to dalikd's own step the learning rate is constant, as it is inside an epoch of the published loop.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalikd.kd.backbones.layers import NetOutput
from dalikd.kd.losses import DistillationLoss, MixedOutputs, StepOutputs
from dalikd.kd.mixing import Mixed
from dalikd.kd.normalize import Normalized
from dalikd.kd.picking import entropy, pick_rows
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.draw_spec import MixDraws
from dalikd.pipelines.loader import Loader
from dalikd.tools.bench.common import PublishedOptions, Seen, Training, ask_once, distillation_loop, open_training
from dalikd.tools.bench.machine import cores, settle
from dalikd.tools.bench.record import Record, alternate, begin, finish, ratio, summary, timed
from dalikd.tools.bench.sides import Job, cannot, endless, pil_batches
from dalikd.trainers.augmentation import Augmenter, Branches
from dalikd.trainers.launch import autocast_type, start
from dalikd.trainers.setup import Setup
from dalikd.trainers.tracking import Meter

__all__ = ["ABLATIONS", "AblatedLoop", "Ablation", "Costs", "Input", "Variant", "host_cutmix", "open_variants", "run"]

_TOP = 5  # the published loop counts the five best classes


@dataclass(frozen=True)
class Ablation:
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

#: The variants below `dalikd distill`'s own step, lowest first: each takes one more thing of it away.
ABLATIONS: dict[str, Ablation] = {_PUBLISHED: Ablation()}
for _name, _change in {
    "dalikd's loader": "pil_loader",
    _ASKED_AGAIN: "host_waits",
    _GATHERED: "looks_again",
    "one teacher call": "separate_calls",
    "uint8 until the net": "float_images",
    "channels_last": "channels_first",
    _FOLDED: "batch_norms",
}.items():
    ABLATIONS[_name] = replace(list(ABLATIONS.values())[-1], **{_change: False})


# -------------------------------------------------------------------------------------------------- the loop


class Input(NamedTuple):
    """A batch as a loop takes it."""

    images: Tensor  # [N, 3, S, S], normalised float or pixels
    labels: Tensor  # int64 [N]
    draws: Sequence[MixDraws] = ()  # of each CutMix run; none where the loop draws itself


def host_cutmix(images: Tensor, random: np.random.Generator) -> Mixed:
    """CutMix of float images [N, 3, S, S], N at least 2, as the published loop does it: one lam, box and order for the
    whole batch, drawn on the host; the order comes from torch's generator of the CPU."""

    def span(side: int) -> tuple[int, int]:
        """First and past-the-last pixel of a share of the side around a pixel, clipped."""
        half, center = int(side * share) // 2, int(random.integers(side))
        return max(center - half, 0), min(center + half, side)

    count, _, height, width = images.shape
    share = np.sqrt(1 - random.beta(1, 1))
    (top, bottom), (left, right) = span(height), span(width)
    own = torch.arange(count, device=images.device)
    partner = torch.randperm(count).to(images.device)
    while (partner == own).any():  # nobody is one's own partner; waits for the device, as published
        partner = torch.randperm(count).to(images.device)
    kept = torch.ones(height, width, dtype=images.dtype).to(images.device)
    kept[top:bottom, left:right] = 0
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return Mixed(images * kept + images[partner] * (1 - kept), partner, images.new_full((count,), lam))


@dataclass
class AblatedLoop:
    """Trains a student as the published loop does, or with fewer of its ablation."""

    ablation: Ablation
    batches: Iterator[Input]
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
        images, labels, draws = next(self.batches)
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
        mixed = self.autocast is not None
        with torch.autocast(images.device.type, self.autocast, enabled=mixed):
            logits = self.student(images)
        return logits.float() if mixed else logits

    @torch.no_grad()
    def _look(self, images: Tensor, draws: Sequence[MixDraws]) -> Seen:
        """What the teacher sees and answers: in one call, or in the two or three of the published loop."""
        waits = self.ablation.host_waits
        group = len(images) if waits else self.augmenter.group
        logits = self.teacher(images) if self.ablation.separate_calls else None
        if waits:
            runs = [host_cutmix(images, self._random) for _ in range(self.augmenter.runs)]
        else:
            runs = Branches([self.augmenter]).make(images, (), draws)
        if logits is None:
            return ask_once(self.teacher, images, runs, group)
        pool = Mixed.join(runs)
        pool_logits = self.teacher(pool.images)
        picks = pick_rows(entropy(pool_logits).reshape(-1, len(images)), group)
        picked = pool.images[picks]
        again = self.teacher(picked) if self.ablation.looks_again else pool_logits[picks]
        return Seen(logits, picked, again, picks % len(images), pool.partner[picks], pool.lam[picks])

    def _count(self, terms: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        """Add up the terms, and how many labels are the best class (as published, also among the five best)."""
        if not self.ablation.host_waits:
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


# ------------------------------------------------------------------------------------------------ the variants


class Variant(NamedTuple):
    """A way to train that can be stepped."""

    step: Callable[[], Any]
    teacher: Teacher
    ahead: int  # batches that may lie ready before a step
    compiled: bool = False


def open_variants(options: PublishedOptions, opened: Training, accelerator: Accelerator) -> dict[str, Variant]:
    """Every variant, lowest first, with nets of its own. All but the first take turns at one loader."""
    folds, autocast, ahead = options.teacher.fold_bn, autocast_type(options.precision), options.data.prefetch + 1
    variants = {}
    for name, ablation in ABLATIONS.items():
        if not folds and name == _FOLDED:
            continue
        student, net = deepcopy((opened.student, opened.teacher))
        # images that are normalised already do without the nets' own normalisation
        seen_by, trained = (net.model, student.model) if ablation.float_images else (net, student)
        teacher = Teacher(seen_by, accelerator.device, autocast, fold_bn=not ablation.batch_norms)
        for one in (teacher.model, trained):
            one.to(memory_format=ablation.memory_format)  # type: ignore[call-overload]
        loss = deepcopy(options.loss).to(accelerator.device)
        optimizer: Any = options.optimizer([*trained.parameters(), *loss.parameters()])
        job = _pil_job(options, opened.setup) if ablation.pil_loader else None
        batches = _batches(ablation, opened.loader, student) if job is None else _pil_batches(job, student.scale)
        loop = AblatedLoop(
            ablation, batches, trained, teacher, loss, optimizer, opened.augmenter, autocast, options.seed
        )
        variants[name] = Variant(loop.step, teacher, ahead if job is None else 2 * job.workers + 1)
    plain = replace(options, metric=False)
    own = {_OWN: replace(plain, compile="off")}
    own |= {f"compiled, {options.compile}": plain} if options.compile != "off" else {}
    own |= {"T. stddev streamed too": options} if options.metric else {}
    for name, settings in own.items():
        student, net = deepcopy((opened.student, opened.teacher))
        teacher = Teacher(net, accelerator.device, autocast, fold_bn=folds)
        loop = distillation_loop(student, teacher, opened.augmenter, opened.loader, settings, accelerator)
        variants[name] = Variant(loop.step, teacher, ahead, settings.compile != "off")
    return variants


def _batches(ablation: Ablation, loader: Loader, student: Normalized) -> Iterator[Input]:
    while True:
        batch = loader.next()
        pixels = batch.pixels.contiguous(memory_format=ablation.memory_format)
        yield Input(student.normalize(pixels) if ablation.float_images else pixels, batch.labels, batch.mix)


def _pil_job(options: PublishedOptions, setup: Setup) -> Job:
    """What the DataLoader does: enough for all rounds, without starting anew."""
    workers = cores()
    steps = (options.steps + max(2 * workers + 1, options.warmup)) * (options.rounds + 1) + 1
    images = steps * options.batch_size
    device = setup.accelerator.device
    job = Job(setup.source, setup.view, "identity", options.batch_size, device, workers=workers, images=images)
    if reason := cannot("torchvision-pil", job):
        raise ValueError(f"--data.name {options.data.name}: the published loop's DataLoader {reason}; name a folder")
    return job


def _pil_batches(job: Job, like: Tensor) -> Iterator[Input]:
    for images, labels in endless(pil_batches(job)):
        # to the device first: images.to(like) converts on the CPU
        yield Input(images.to(like.device).to(like.dtype), labels.to(like.device))


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


def costs(opened: Training, size: int) -> Costs:
    """Those of images of so many pixels a side."""
    student, teacher = deepcopy((opened.student, opened.teacher))
    # two images: batch norms train on no single one
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=student.scale.device)
    with FlopCounterMode(display=False) as looked, torch.no_grad():
        teacher.eval()(pixels)
    with FlopCounterMode(display=False) as learned:
        student.train()(pixels).sum().backward()
    return Costs(looked.get_total_flops() / 2, learned.get_total_flops() / 2)


def count_teacher(variant: Variant) -> list[int] | None:
    """Sizes of the batches that the teacher sees in a step; None where compiled code would not tell."""
    if variant.compiled:
        return None
    sizes: list[int] = []
    hook = variant.teacher.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    variant.step()
    hook.remove()
    return sizes


def run(options: PublishedOptions, config: dict[str, Any]) -> Record:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    check_plain(options)
    accelerator = start(options.device, options.precision)
    record = begin("published", options, accelerator, config)
    opened = open_training(options, accelerator)
    student, teacher, setup = opened[:3]
    if not (torch.equal(student.scale, teacher.scale) and torch.equal(student.shift, teacher.shift)):
        raise ValueError(
            f"{options.model} and {options.teacher.name} normalise by different means, and the published loop does it "
            "once for both: choose two timm models, or none"
        )
    torch.backends.cudnn.benchmark = True  # as published, and for every variant
    variants = open_variants(options, opened, accelerator)

    def rate(variant: Variant) -> float:
        for _ in range(max(variant.ahead, options.warmup)):  # what lies ready must not count
            variant.step()
        seconds = timed(lambda: [variant.step() for _ in range(options.steps)], accelerator.device)
        return options.steps * options.batch_size / seconds

    try:
        counts = {name: count_teacher(variant) for name, variant in variants.items()}
        rates = alternate({name: partial(rate, variant) for name, variant in variants.items()}, options.rounds, settle)
    finally:
        opened.loader.close()
    size, operations, ahead = (
        setup.view.size,
        costs(opened, setup.view.size),
        max(variant.ahead for variant in variants.values()),
    )
    settings = {options.compile: options.compile != "off", "resident": options.data.resident}
    names = (str(name).replace(":", "-").replace("_", "-") for name in (options.teacher.name, options.model))
    given = [name for name, is_given in settings.items() if is_given]
    record.variant = "-".join((*names, str(size), options.precision, *given))
    record.title = (
        f"dalikd against the published CutMixPick loop: {options.teacher.name} to {options.model}, {size} pixels, "
        f"batch {options.batch_size}, {', '.join([options.precision, *given])}"
    )
    record.warm_up = (
        f"a round, and before each round {options.warmup} step(s), or as many as batches may lie ready (up to {ahead})."
    )
    record.page_cache = "warm; the first round reads." if setup.source.files is not None else "no files."
    record.labels, record.plotted = ("rung", "loop"), _RATE
    before = None
    for number, (name, values) in enumerate(rates.items(), start=1):
        sizes = counts[name]
        seen = None if sizes is None else sum(sizes) / options.batch_size
        row = {"rung": number, "loop": name, _RATE: summary(values)}
        row["to the published"] = None if before is None else ratio(values, rates[_PUBLISHED])
        row["to the rung before"] = None if before is None else ratio(values, rates[before])
        row |= {"teacher images an original": seen, "teacher calls a step": None if sizes is None else len(sizes)}
        row["GFLOP an original"] = None if seen is None else operations.of_step(seen) / 1e9
        record.rows.append(row)
        before = name
    spread = "{median:.3f} ({low:.3f} to {high:.3f})".format
    gathered = spread(**ratio(rates[_GATHERED], rates[_ASKED_AGAIN]))
    record.notes = [
        f"Logits of the picks gathered against asked for again, all else equal: {gathered}. If operations were all, "
        f"{operations.reuse_ceiling:.3f}: (4 T + 2 S) / (3 T + 2 S), with T = {operations.teacher / 1e9:.4f} GFLOP an "
        f"image (teacher's forward) and S = {operations.student / 1e9:.4f} (student's forward and backward).",
        f"dalikd distill's step against the published loop: {spread(**ratio(rates[_OWN], rates[_PUBLISHED]))}.",
    ]
    return finish(record, options)


def check_plain(options: PublishedOptions) -> None:
    """Raises ValueError for what the published loop has not."""
    plain = {"accumulation": 1, "clip_grad_norm": None, "ema": 0.0, "joint_forward": False, "no_decay_norms": False}
    for name, value in plain.items():
        if getattr(options, name) != value:
            raise ValueError(
                f"--{name} {getattr(options, name)}: the published loop has no such thing, and the work must be "
                f"equal; give --{name} {json.dumps(value)}"
            )
    if options.precision == "fp16":
        raise ValueError("--precision fp16: no losses are scaled here; give fp32, tf32, bf16 or fp64")
