"""Nets and optimizers are tried out at set-up, on two blank images and on a few of the data, before a folder exists."""

import os
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.checkpoints import Origin, read_origin
from dalikd.pipelines.datasets.classes import shorten
from dalikd.pipelines.sources import Source

__all__ = [
    "ask",
    "check_chance",
    "check_class_order",
    "check_finite",
    "knows_its_classes",
    "some_of_each",
    "try_net",
    "try_step",
    "try_training",
]

CHANCE_IMAGES = 256  # fewer tell nothing of a teacher
_BY_CHANCE = 0.01
_CLASSES = 10  # that are looked at
_FEWEST_IMAGES = 20
_SURE = 0.8  # mean of the largest probabilities
_PIXELS = 240 * 64 * 64  # of all images that are looked at, on a CPU: about a second


@torch.no_grad()
def try_net(answer: Callable[[Tensor], Tensor], who: str, size: int, classes: int, device: torch.device) -> None:
    """Ask a net about two blank images.

    Args:
        answer: pixels [B, 3, S, S] -> logits [B, C].
        who: the net, for messages.
        size: S.
        classes: C.
        device: of the images.

    Raises:
        ValueError: it cannot take images of that size, gives something else, or answers with NaN.
    """
    logits = ask(answer, _blank(size, device), who)
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{who} gives {found} for two images, not logits [2, {classes}]: leave its options out")
    check_finite(logits, who)


def check_finite(logits: Tensor, who: str) -> None:
    """Wait for a net's answers, and look for NaN.

    Raises:
        ValueError: there is one, or infinity.
    """
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"{who} answers with NaN or infinity: its weights are damaged, or --precision is too coarse for them"
        )


def try_training(
    student: Normalized,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    who: str,
    size: int,
    classes: int,
    accelerator: Accelerator,
) -> None:
    """Train a copy of a net for one step on two blank images; where nothing of it is trained, only ask it.

    Args:
        student: stays as it is, as do torch's random numbers.
        optimizer: of a net's parameters.
        who: the net, for messages.
        size: of the images, in pixels.
        classes: of the data.
        accelerator: gives device and precision.

    Raises:
        ValueError: as for `try_net`; or the optimizer cannot do a step as the training loop asks for it.
    """
    device = accelerator.device
    trains = any(values.requires_grad for values in student.parameters())
    copy = deepcopy(student).to(device, memory_format=torch.channels_last).train(trains)  # type: ignore[call-overload]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), accelerator.autocast():
        try_net(deepcopy(copy), who, size, classes, device)  # batch statistics of its own
        if not trains:
            return
        logits = copy(_blank(size, device))
        if logits.requires_grad:  # else auxiliary heads alone are trained
            functional.cross_entropy(logits.float(), torch.zeros(2, dtype=torch.int64, device=device)).backward()
    try_step(optimizer(copy))


def try_step(optimizer: torch.optim.Optimizer) -> None:
    """Do a step with what gradients there are.

    Raises:
        ValueError: it needs a closure, sparse gradients or something else that the training loop does not give.
    """
    try:
        optimizer.step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # optimizers raise what they like
        raise ValueError(
            f"--optimizer {type(optimizer).__name__} cannot do a step of its own on dense gradients "
            f"({_reason(error)}): take one that can, such as torch.optim.SGD or torch.optim.AdamW"
        ) from error


def check_class_order(
    answer: Callable[[Tensor], Tensor],
    who: str,
    weights: str | None,
    source: Source,
    pixels: Tensor,
    labels: np.ndarray,
) -> None:
    """Check that weights which do not say their classes are for those of the data, in their order.

    A net that was trained on these classes in another order tells them apart and names them wrongly. So up to ten
    classes are looked at, and how many images are right is compared with how many would be if the logits had the
    order that fits best.

    Args:
        answer: pixels [B, 3, S, S] -> logits [B, C].
        who: the net, for messages.
        weights: its file, "pretrained", or None; files of this project know their classes.
        source: the data set.
        pixels: some images of it [B, 3, S, S], of `some_of_each` class, as a net has seen them in training.
        labels: theirs, int64 [B].

    Raises:
        ValueError: the net fits another order at least twice as well; it lists the classes. A net that is no better
            than chance in any order, and sure of it, is only told of: it may be one that has not been trained.
    """
    origin = read_origin(weights) if weights is not None and Path(weights).is_file() else Origin()
    with torch.no_grad():
        sure, best_logit = answer(pixels).softmax(1).max(1)
    answers, confidence = best_logit.cpu().numpy(), float(sure.mean())
    seen = np.unique(labels)
    if len(labels) < max(_FEWEST_IMAGES, 4 * len(seen)) or len(seen) < 2:
        return
    counts = np.zeros((len(seen), len(source.classes)), np.int64)
    np.add.at(counts, (np.searchsorted(seen, labels), answers), 1)
    from scipy.optimize import linear_sum_assignment  # scipy takes a second and more to import

    _, fitting = linear_sum_assignment(counts, maximize=True)
    right, best = (answers == labels).mean(), counts[np.arange(len(seen)), fitting].sum() / len(labels)
    theirs = f"; those of the weights are {shorten(origin.class_names, 20)}" if origin.class_names else ""
    # an untrained net may tell two or three classes apart as well, but is not sure of it
    if best < 0.5 + 0.9 / len(seen) or right >= best / 2 or confidence < 0.7 * best:
        if confidence <= _SURE or os.environ.get("RANK", "0") != "0":
            return
        from scipy.stats import binom

        if right <= binom.ppf(0.95, len(labels), 1 / len(source.classes)) / len(labels):
            print(
                f"dalikd: {who} gives the right class for {100 * right:.0f} % of {len(labels)} images, no more than by "
                f"chance, and is sure of its answers: is it for the data's classes, {shorten(source.classes, 20)}"
                f"{theirs}?",
                file=sys.stderr,
            )
        return
    listed = [f"{source.classes[label]} (class {label}) as {other}" for label, other in zip(seen, fitting, strict=True)]
    raise ValueError(
        f"{who} gives the right class for {100 * right:.0f} % of {len(labels)} images, and would for {100 * best:.0f} "
        f"% if its classes came in another order: it answers {shorten(listed, _CLASSES)}. The data's classes are "
        f"{shorten(source.classes, 20)}{theirs}. Name the class folders so that they come in the order of the weights"
    )


def check_chance(answers: np.ndarray, labels: np.ndarray, who: str, source: Source) -> None:
    """Check that a teacher is right more often than by chance.

    Args:
        answers: the classes that it gives for images, int64 [B].
        labels: theirs, int64 [B].
        who: the net, for messages.
        source: the data set.

    Raises:
        ValueError: so many right ones or more come by chance in one of a hundred cases at least. Of fewer than 256
            images nothing is said.
    """
    classes, right = len(source.classes), int((answers == labels).sum())
    if len(labels) < CHANCE_IMAGES or classes < 2:
        return
    from scipy.stats import binom  # scipy takes a second and more to import

    if binom.sf(right - 1, len(labels), 1 / classes) > _BY_CHANCE:
        raise ValueError(
            f"{who} gives the right class for {right} of {len(labels)} validation images, no more than by chance (1 in "
            f"{classes}): its weights may be of another net or for other classes, its classes in another order than "
            f"{shorten(source.classes)}, or its images normalised otherwise (--teacher.mean and --teacher.std); to go "
            "on with it all the same give --teacher.verify false"
        )


def knows_its_classes(weights: str | None) -> bool:
    """Whether there is nothing to check: no weights, or a file of this project, which names its classes."""
    if weights is None:
        return True
    origin = read_origin(weights) if Path(weights).is_file() else Origin()
    return origin.class_names is not None and not origin.published


def some_of_each(source: Source, size: int, device: torch.device) -> Source:
    """A few images of up to ten classes; of containers, which are shuffled, all: the first batch is looked at."""
    if source.shards is not None:
        return source
    most = _PIXELS // max(size, 64) ** 2 if device.type == "cpu" else 256
    classes = np.unique(source.labels)
    classes = classes[np.linspace(0, len(classes) - 1, min(_CLASSES, len(classes))).astype(int)]
    rows = []
    for label in classes:
        own = np.flatnonzero(source.labels == label)
        count = min(len(own), max(4, most // len(classes)))
        rows.append(own[np.linspace(0, len(own) - 1, count).astype(int)])
    return source.take(np.concatenate(rows))


def _blank(size: int, device: torch.device) -> Tensor:
    return torch.zeros(2, size, size, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)


def ask(answer: Callable[[Tensor], Tensor], pixels: Tensor, who: str) -> Tensor:
    """What a net answers.

    Raises:
        ValueError: it cannot take images of that size.
    """
    try:
        return answer(pixels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # nets raise what they like
        size = pixels.shape[-1]
        raise ValueError(
            f"{who} cannot take images of {size} x {size} pixels ({_reason(error)}): set --data.image_size, or the "
            "net's own option, such as img_size of timm's transformers"
        ) from error


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
