"""dalikd against the published loop of CutMixPick, or of HSAKD, at equal work: a series of ablations.

What the published code of Wang et al. (NeurIPS 2022, arXiv 2012.02909) does in a step of N images: a DataLoader over
Pillow decodes and normalises. The student sees the N originals, then the teacher does. Two runs of CutMix, drawn on the
host, make a pool of 2 N candidates, which the teacher sees in a call of its own. The N of highest entropy are kept; the
teacher sees these again, then the student. The host reads each term of the loss before the backward pass. That makes
4 N teacher images a step. Left out is what the published code computes and never reads.

Where the loss is of turned images, the loop is that of Yang et al. (IJCAI 2021, arXiv 2107.13715). It turns normalised
images by a copy for each turn, and stacks these. The student sees all 4 N with its heads, then the teacher does. After
the optimizer's step the host reads each term of the loss, and hits are counted of every head: of its joint classes, and
of their sums over the turns.

The first variant is the published loop, written anew from its description. Every further one changes one thing more, up
to `dalikd distill`'s own step. Nets, loss, optimizer, batch size and precision are the same, and all train; where the
draws come along with the batch, with the same losses up to rounding. Before dalikd's own step the learning rate is
constant, as it is inside an epoch of the published loop.
"""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalikd.kd.backbones.layers import NetOutput, Normalized
from dalikd.kd.losses import DistillationLoss, MixedOutputs, StepOutputs
from dalikd.kd.mixing import Mixed
from dalikd.kd.picking import TEACHER_ENTROPY, entropy, pick_rows
from dalikd.kd.rotation import TURNS, class_logits, joint_labels, rotations
from dalikd.kd.teacher import Branch, Teacher, teacher_pass
from dalikd.pipelines.draw_spec import Batch
from dalikd.pipelines.loader import Loader
from dalikd.tools.bench.common import PublishedOptions, describe_run, teacher_net, training_loop
from dalikd.tools.bench.machine import cores, settle
from dalikd.tools.bench.record import Watch, alternate, begin, finish, ratio, summary, timed
from dalikd.tools.bench.sides import Job, cannot, torchvision_batches
from dalikd.tools.bench.step import step_flops
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.launch import autocast_type, start
from dalikd.trainers.loop import Loop, Meter
from dalikd.trainers.setup import open_run
from dalikd.trainers.tasks.distill import Distillation
from dalikd.trainers.teacher_step import Branches

_OWN = "dalikd distill's step"
#: A variant, and what the published loop does that it is the first to do without.
_CHANGES = {
    "dalikd's loader": "pil_loader",  # images come from a DataLoader over Pillow
    "no host waits": "host_waits",  # CutMix is drawn on the host, which reads each term of the loss in each step
    "picked logits gathered": "looks_again",  # the teacher sees the picks a second time
    "one teacher call": "separate_calls",  # the teacher sees originals and candidates in calls of their own
    "uint8 until the net": "float_images",  # images are normalised float32 from the loader on, and are mixed so
    "channels_last": "channels_first",  # images and weights lie in memory channel by channel
    "batch norms folded": "batch_norms",  # the teacher computes its batch norms
}
_TURNED_CHANGES = {name: _CHANGES[name] for name in ("dalikd's loader", "no host waits")}
_TURNED_CHANGES["turned by one gather"] = "stacked_turns"  # each turn is a copy, and their stack another
_TURNED_CHANGES |= {name: _CHANGES[name] for name in ("uint8 until the net", "channels_last", "batch norms folded")}

#: The variants below `dalikd distill`'s own step, lowest first, by what each still does as the published loop.
ABLATIONS, TURNED_ABLATIONS = (
    {name: frozenset([*changes.values()][number:]) for number, name in enumerate(("published", *changes))}
    for changes in (_CHANGES, _TURNED_CHANGES)
)


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
    """Trains a student as the published loop does, or as far as `published` says."""

    published: frozenset[str]  # one of ABLATIONS, or of TURNED_ABLATIONS
    batches: Iterator[
        tuple[Tensor, Tensor, Any]
    ]  # images (normalised float, or pixels), labels, draws if there are any
    student: nn.Module  # takes what `batches` gives; it is trained in place
    teacher: Callable[[Tensor], Tensor]  # takes the same
    loss: DistillationLoss
    optimizer: torch.optim.Optimizer  # over the student's and the loss's parameters
    augmenter: Augmenter  # mixes where the draws come with the batch
    autocast: torch.dtype | None = None  # compute type of the student's mixed precision
    seed: int = 0  # of the draws made here
    meter: Meter = field(default_factory=Meter)  # of terms that stay on the device
    sums: dict[str, Any] = field(default_factory=dict)  # of those that the host reads, and of hits

    def __post_init__(self) -> None:
        self.student.train()
        self._random = np.random.default_rng(self.seed)

    def step(self) -> dict[str, Tensor]:
        """One optimizer step. Returns the terms of the loss."""
        images, labels, draws = next(self.batches)
        logits = self._answer(images)
        with torch.no_grad():
            of_teacher, picked, of_picked, rows = self._look(images, draws)
        answered, partner = self._answer(picked.images), labels[picked.partner]
        mixed = MixedOutputs(answered, of_picked, labels[rows], partner, picked.lam)
        ids, epoch = labels, torch.zeros((), device=labels.device)  # which the published losses do without
        terms = self.loss(StepOutputs(NetOutput(logits), NetOutput(of_teacher), labels, ids, epoch, mixed))
        self._count(terms, logits, labels)
        self.optimizer.zero_grad()
        terms["loss"].backward()
        self.optimizer.step()
        return terms

    def _answer(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.student(images)
        return logits.float() if self.autocast is not None else logits

    def _look(self, images: Tensor, draws: Any) -> tuple[Tensor, Mixed, Tensor, Tensor]:
        """The teacher's logits, the picks, its logits on them and their rows: in one call, or in two or three."""
        logits = self.teacher(images) if "separate_calls" in self.published else None
        if "host_waits" in self.published:
            runs, group = [host_cutmix(images, self._random) for _ in range(self.augmenter.runs)], len(images)
        else:
            runs, group = Branches([self.augmenter]).make(images, (), draws), self.augmenter.group
        if logits is None:
            branch = Branch(tuple(range(len(runs))), TEACHER_ENTROPY)
            asked = teacher_pass(self.teacher, images, runs, [branch], group=group)
            found = asked.branches[0]
            return asked.originals.logits, found.mixed, found.logits, found.rows
        pool = Mixed.join(runs)
        pool_logits = self.teacher(pool.images)
        picks = pick_rows(entropy(pool_logits).reshape(-1, len(images)), group)
        picked = pool.take(picks)
        again = self.teacher(picked.images) if "looks_again" in self.published else pool_logits[picks]
        return logits, picked, again, picks % len(images)

    def _count(self, terms: dict[str, Tensor], logits: Tensor, labels: Tensor, heads: tuple[Tensor, ...] = ()) -> None:
        """Add up the terms, and how many labels are the best class; as published, also among the five best, and of
        every head."""
        if "host_waits" not in self.published:
            self.meter.add({**terms, "top1": (logits.argmax(1) == labels).float().mean()})
            return
        # waits for the device, as published
        found: dict[str, Any] = {name: term.item() for name, term in terms.items()}
        scored = {"": (logits, labels)}
        for number, head in enumerate(heads, start=1):
            scored[f"head{number}_joint_"] = head, joint_labels(labels)
            scored[f"head{number}_class_"] = class_logits(head), labels.repeat_interleave(TURNS)
        for name, (rows, wanted) in scored.items():
            hits = (rows.detach().topk(min(5, rows.shape[1])).indices == wanted[:, None]).float().sum(0).cumsum(0)
            found |= {f"{name}top1": hits[0], f"{name}top5": hits[-1]}
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


class TurnedLoop(AblatedLoop):
    """The same for HSAKD's published loop."""

    teacher: Teacher

    def step(self) -> dict[str, Tensor]:
        """One optimizer step. Returns the terms of the loss."""
        images, labels, _ = next(self.batches)
        if "stacked_turns" in self.published:
            turned = torch.stack([torch.rot90(images, turn, (2, 3)) for turn in range(TURNS)], dim=1).flatten(0, 1)
        else:
            turned = rotations(images)
        self.optimizer.zero_grad()
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            student = _with_heads(self.student, turned)
        teacher = self.teacher(turned, net=partial(_with_heads, self.teacher.model))
        own, given = (net.map(lambda rows: rows[::TURNS]) for net in (student, teacher))
        one, epoch = (make((), device=labels.device) for make in (torch.ones, torch.zeros))
        mixed = MixedOutputs(own.logits, given.logits, labels, labels, one.expand(len(labels)))  # nothing is augmented
        terms = self.loss(StepOutputs(own, given, labels, labels, epoch, mixed, (student, teacher)))
        terms["loss"].backward()
        self.optimizer.step()
        self._count(terms, own.logits, labels, student.heads)
        return terms


def _with_heads(net: Any, images: Tensor) -> NetOutput:
    return net.outputs(images, heads=True) if isinstance(net, Normalized) else net.outputs(images)


def operators(variant: "Variant", images: Tensor, autocast: torch.dtype | None) -> dict[str, int]:
    """How many operators torch dispatches in a step on turned images, views left out: in the teacher's own forward, in
    the student's own forward and backward, in the optimizer's step, and in the rest. `images` are any normalised ones,
    in the memory format that the nets see."""
    loop, watch = variant.loop, Watch()
    student = loop.student if isinstance(loop, AblatedLoop) else loop.task.nets["student"]
    nets: Any = [net.model if isinstance(net, Normalized) else net for net in (variant.teacher.model, student)]
    with watch, watch.over([(loop.optimizer, "step", "optimizer")]):
        watch.of("rest", loop.step)()
        loop.optimizer.zero_grad()  # gradients that add up are operators more
        watch.of("teacher", variant.teacher)(images, net=nets[0].outputs)
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            found = watch.of("student", nets[1].outputs)(images)
        given = [found.logits, *found.heads]
        watch.of("student", torch.autograd.backward)(given, [torch.ones_like(one) for one in given])
    loop.optimizer.zero_grad()
    watch.operators["rest"] -= watch.operators["teacher"] + watch.operators["student"]
    return watch.operators


class Variant(NamedTuple):
    """A way to train that can be stepped."""

    loop: AblatedLoop | Loop
    teacher: Teacher
    ahead: int  # batches that may lie ready before a step
    compiled: bool = False

    def asked(self) -> list[int] | None:
        """Sizes of the batches that the teacher sees in a step; None where compiled code would not tell."""
        sizes: list[int] = []
        first = next(part for part in self.teacher.model.modules() if isinstance(part, nn.Conv2d | nn.Linear))
        hook = first.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        if not self.compiled:
            self.loop.step()
        hook.remove()
        return sizes or None


def open_variants(
    options: PublishedOptions, accelerator: Accelerator, record: Any = None
) -> tuple[dict[str, Variant], Loader]:
    """Every variant, lowest first, with nets of its own, and the loader that all but the first take turns at. Raises
    ValueError, OSError: options, data or nets that are not as they should be."""
    setup, device = open_run(options, accelerator), accelerator.device
    if record is not None:
        describe_run(record, options, setup, options.teacher.name, options.model)
    augmenter = setup.augmenter(options.augmentation)
    nets: Any = options.build_student(setup).to(device), teacher_net(options, setup).to(device)
    if not all(torch.equal(getattr(nets[0], name), getattr(nets[1], name)) for name in ("scale", "shift")):
        raise ValueError(
            f"{options.model} and {options.teacher.name} normalise by different means, and the published loop does it "
            "once for both: choose two timm models, or none"
        )
    loader, workers, size = setup.loader(augmenter.draw_spec), cores(), options.batch_size
    steps = (options.steps + max(2 * workers + 1, options.warmup)) * (options.rounds + 1) + 1
    # enough images for all rounds, without starting anew
    job = Job(setup.source, setup.view, size, device, workers=workers, images=steps * size)
    if reason := cannot("torchvision-pil", job):
        raise ValueError(f"--data.name {options.data.name}: the published loop's DataLoader lacks {reason}")
    autocast, ahead, variants = autocast_type(options.precision), options.data.prefetch + 1, {}
    nets[0].model.detach_heads = False  # heads teach the backbone, where there are any
    for name, published in (TURNED_ABLATIONS if options.turned else ABLATIONS).items():
        if not (published or options.teacher.fold_bn):  # batch norms that stay make no variant
            continue
        student, net = deepcopy(nets)
        # images that are normalised already do without the nets' own normalisation
        seen_by, trained = (net.model, student.model) if "float_images" in published else (net, student)
        teacher = Teacher(seen_by, device, autocast, fold_bn="batch_norms" not in published)
        layout = torch.contiguous_format if "channels_first" in published else torch.channels_last
        for one in (teacher.model, trained):
            one.to(memory_format=layout)
        loss = deepcopy(options.loss).to(device)
        optimizer: Any = options.optimizer([*trained.parameters(), *loss.parameters()])
        of_pil = "pil_loader" in published
        batches = _pil_batches(job, student) if of_pil else _batches(published, loader, student, layout)
        parts = trained, teacher, loss, optimizer, augmenter
        loop = (TurnedLoop if options.turned else AblatedLoop)(published, batches, *parts, autocast, options.seed)
        variants[name] = Variant(loop, teacher, 2 * workers + 1 if of_pil else ahead)
    plain = replace(options, metric=False)
    own = {_OWN: replace(plain, compile="off")}
    own |= {f"compiled, {options.compile}": plain} if options.compile != "off" else {}
    own |= {"T. stddev streamed too": options} if options.metric else {}
    for name, how in own.items():
        student, net = deepcopy(nets)
        teacher, classes = Teacher(net, device, autocast, fold_bn=options.teacher.fold_bn), len(setup.source.classes)
        given: Any = {"metric": how.metric, "compile_mode": how.compile}
        task = Distillation(student, teacher, deepcopy(options.loss), augmenter, accelerator, classes, **given)
        variants[name] = Variant(training_loop(task, loader, how, accelerator), teacher, ahead, how.compile != "off")
    return variants, loader


def _batches(published: frozenset[str], loader: Loader, student: Normalized, layout: torch.memory_format) -> Any:
    while True:
        batch = loader.next()
        pixels = batch.pixels.contiguous(memory_format=layout)
        yield student.normalize(pixels) if "float_images" in published else pixels, batch.labels, batch.mix


def _pil_batches(job: Job, student: Normalized) -> Any:
    for images, labels in chain.from_iterable(repeat(torchvision_batches(job, pil=True))):
        # to the device first: images.to(device, dtype) converts on the CPU
        yield images.to(job.device).to(student.scale.dtype), labels.to(job.device), ()


def run(options: PublishedOptions, config: dict[str, Any]) -> None:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    plain = {"accumulation": 1, "clip_grad_norm": None, "ema": 0.0, "joint_forward": False, "no_decay_norms": False}
    for name, value in plain.items():
        if getattr(options, name) != value:
            raise ValueError(
                f"--{name} {getattr(options, name)}: the published loop has no such thing, and the work must be "
                f"equal; give --{name} {json.dumps(value)}"
            )
    if options.precision == "fp16":
        raise ValueError("--precision fp16: no losses are scaled here; give fp32, tf32, bf16 or fp64")
    accelerator, plotted = start(options.device, options.precision), "images/s"
    record = begin("published", options, accelerator, config, labels=("rung", "loop"), plotted=plotted)
    record.title = f"dalikd against the published {'HSAKD' if options.turned else 'CutMixPick'} loop: "
    torch.backends.cudnn.benchmark = True  # as published, and for every variant
    variants, loader = open_variants(options, accelerator, record)
    record.warm_up = f"a round, and before each round {options.warmup} step(s), or as many as batches may lie ready."

    def rate(variant: Variant) -> float:
        for _ in range(max(variant.ahead, options.warmup)):  # what lies ready must not count
            variant.loop.step()
        seconds = timed(lambda: [variant.loop.step() for _ in range(options.steps)], accelerator.device)
        return options.steps * options.batch_size / seconds

    try:
        asked = {name: variant.asked() for name, variant in variants.items()}
        flops = step_flops(variants[_OWN].loop, loader.next())  # type: ignore[arg-type]
        notes = _operators_told(variants, loader.next(), options) if options.turned else []
        rates = alternate({name: partial(rate, variant) for name, variant in variants.items()}, options.rounds, settle)
    finally:
        loader.close()
    teacher, student = flops["teacher"] / 1e9 / (TURNS if options.turned else 3), flops["student"] / 1e9
    before = None
    for number, (name, values) in enumerate(rates.items(), start=1):
        sizes = asked[name]
        images = None if sizes is None else sum(sizes) / options.batch_size
        row = {"rung": number, "loop": name, plotted: summary(values)}
        row["to the published"] = None if before is None else ratio(values, rates["published"])
        row["to the rung before"] = None if before is None else ratio(values, rates[before])
        row |= {"teacher images an original": images, "teacher calls a step": None if sizes is None else len(sizes)}
        row["GFLOP an original"] = None if images is None else images * teacher + student
        record.rows.append(row)
        before = name
    spread = "{median:.3f} ({low:.3f} to {high:.3f})".format
    if not options.turned:
        gathered = spread(**ratio(rates["picked logits gathered"], rates["no host waits"]))
        ceiling = (4 * teacher + student) / (3 * teacher + student)
        notes.append(
            f"Logits of the picks gathered against asked for again, all else equal: {gathered}. If operations were "
            f"all, {ceiling:.3f}: (4 T + 2 S) / (3 T + 2 S), with T = {teacher:.4f} GFLOP an image (teacher's forward) "
            f"and S = {student / 2:.4f} (student's forward and backward)."
        )
    own = spread(**ratio(rates[_OWN], rates["published"]))
    record.notes = [*notes, f"dalikd distill's step against the published loop: {own}."]
    finish(record, options)


def _operators_told(variants: dict[str, Variant], batch: Batch, options: PublishedOptions) -> list[str]:
    own: Any = variants[_OWN].loop
    images = own.task.student.normalize(batch.pixels)
    notes = []
    for name, shown in {"published": images.contiguous(), _OWN: images}.items():
        count = operators(variants[name], shown, autocast_type(options.precision))
        parts = ", ".join(f"{count[part]} {part}" for part in ("teacher", "student", "optimizer", "rest"))
        notes.append(f"Operators that torch dispatches in a step, without views, {name}: {parts}.")
    return notes
