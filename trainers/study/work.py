"""How much a cell has to compute, before it does: images through each net."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dalikd.kd.backbones import create_model
from dalikd.kd.rotation import TURNS
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.evaluate import EvaluateOptions
from dalikd.trainers.measure import MeasureOptions
from dalikd.trainers.study.plan import Work
from dalikd.trainers.tasks.base import TrainingOptions
from dalikd.trainers.tasks.distill import DistillOptions
from dalikd.trainers.trial import ask

__all__ = ["Sizes", "forward_flops", "work"]

_BACKWARD = 2.0  # a backward pass costs about two forward passes


@dataclass(frozen=True)
class Sizes:
    """What the cost of a study depends on besides its options."""

    train_images: int
    val_images: int
    classes: int
    side: int  # of an image, in pixels


def work(options: Any, sizes: Sizes, augmenters: Sequence[Augmenter] = (), share: float = 1.0) -> Work:
    """What a call will compute.

    Args:
        options: of train, distill, measure or evaluate.
        sizes: of the data set.
        augmenters: of distill one, of measure those of one pass.
        share: of the teacher's work that is the call's, where several students learn from one pass.

    Raises:
        ValueError: an unknown net, or options that it does not take.
    """
    if isinstance(options, EvaluateOptions):
        done = Work(evaluated=_evaluated(options, sizes))
    elif isinstance(options, MeasureOptions):
        done = _measuring(options, sizes, augmenters)
    else:
        done = _training(options, sizes, augmenters)
        done = replace(done, asked=round(share * done.asked))
    return replace(done, flops=_flops(options, done, sizes, share))


def _flops(options: Any, done: Work, sizes: Sizes, share: float) -> float:
    total, backward = 0.0, 0.0 if getattr(options, "freeze_backbone", False) else _BACKWARD
    if options.model:
        net = options.model, options.model_args, sizes
        total += ((1 + backward) * done.trained + done.scored + done.evaluated) * forward_flops(*net)
        if _has_heads(options.model):
            total += ((1 + _BACKWARD) * done.turned + done.evaluated) * heads_flops(*net)
    if done.asked:
        teacher = options.teacher.name, options.teacher.args, sizes
        total += done.asked * forward_flops(*teacher) + (done.turned and share * done.turned * heads_flops(*teacher))
    return total


def _has_heads(name: str | None) -> bool:
    return name is not None and name.endswith("_aux")


def _evaluated(options: Any, sizes: Sizes) -> int:
    """Auxiliary heads are evaluated on all quarter turns."""
    return sizes.val_images * (TURNS if _has_heads(options.model) else 1)


def _measuring(options: MeasureOptions, sizes: Sizes, augmenters: Sequence[Augmenter]) -> Work:
    """The originals and equal images of several augmentations go through a net once, in all turns for its heads."""
    images, turns = options.epochs * sizes.train_images, TURNS if options.heads else 1
    asked = len({part for augmenter in augmenters if _teacher_sees_all(augmenter) for part in augmenter.parts})
    picked = sum(_share(augmenter) for augmenter in augmenters if not _teacher_sees_all(augmenter))
    scored = len({part for augmenter in augmenters if _student_scores(augmenter) for part in augmenter.parts})
    return Work(asked=round(images * turns * (1 + asked + picked)), scored=images * scored)


def _training(options: TrainingOptions, sizes: Sizes, augmenters: Sequence[Augmenter]) -> Work:
    epochs = round(options.epochs * options.epoch_factor)
    images = epochs * (sizes.train_images // options.batch_size * options.batch_size)  # the short last step is dropped
    evaluations = sum(epoch % options.eval_every == 0 or epoch == epochs for epoch in range(1, epochs + 1))
    evaluated = evaluations * _evaluated(options, sizes)
    if not isinstance(options, DistillOptions):
        turned = TURNS * images if _has_heads(options.model) else 0
        return Work(trained=turned or images, evaluated=evaluated, turned=turned)
    (augmenter,) = augmenters
    shown = _share(augmenter) if augmenter.makes_candidates else 0.0
    asked = augmenter.runs if _teacher_sees_all(augmenter) else shown
    scored = augmenter.runs if _student_scores(augmenter) else 0
    turned = TURNS * images if "turned" in options.loss.needs else 0
    trained, answered = (round((turned or images) + images * share) for share in (shown, asked))
    return Work(trained, answered, images * scored, evaluated, turned=turned)


def _teacher_sees_all(augmenter: Augmenter) -> bool:
    """Whether it sees all candidates, and not the picks alone."""
    return augmenter.criterion is None or augmenter.criterion.needs_teacher


def _student_scores(augmenter: Augmenter) -> bool:
    return augmenter.criterion is not None and augmenter.criterion.needs_student


def _share(augmenter: Augmenter) -> float:
    """Picks for each original."""
    return 1.0 if augmenter.n_pick is None else augmenter.n_pick / augmenter.group


def heads_flops(name: str, args: dict[str, Any], sizes: Sizes) -> float:
    """`forward_flops` of the auxiliary heads alone."""
    return forward_flops(name, args, sizes, heads=True) - forward_flops(name, args, sizes)


def forward_flops(name: str, args: dict[str, Any], sizes: Sizes, *, heads: bool = False) -> float:
    """Floating-point operations of a net for one image, without computing anything.

    Args:
        name: of the net.
        args: its options.
        sizes: of the images.
        heads: whether auxiliary heads are computed, where the net has any.

    Raises:
        ValueError: an unknown net, options that it does not take, or images.
    """
    key = (name, repr(args), sizes.classes, sizes.side, heads)
    if key not in _FLOPS:
        with torch.device("meta"):
            net = create_model(name, sizes.classes, **args).eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                ask(net if heads else getattr(net, "logits", net), torch.empty(1, 3, sizes.side, sizes.side), name)
        _FLOPS[key] = float(counter.get_total_flops())
    return _FLOPS[key]


_FLOPS: dict[tuple[str, str, int, int, bool], float] = {}
