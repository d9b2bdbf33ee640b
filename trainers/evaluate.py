"""Loss and accuracy on every image exactly once, over any number of processes."""

from collections.abc import Sequence
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn import functional

from dalikd.pipelines.doctor import printable
from dalikd.pipelines.loader import BadFileError, Loader
from dalikd.trainers.progress import progress

__all__ = ["evaluate", "replaced_files"]


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, accelerator: Accelerator, label: str = "evaluate") -> dict[str, float]:
    """Evaluate a net that takes pixels.

    Args:
        model: in any mode; it is evaluated in eval mode and left as it was.
        loader: over each row once (drop_last=False).
        accelerator: whose processes share the work.
        label: of the progress bar.

    Returns:
        "loss" (cross-entropy, mean over all images), "top1" and "top5" (shares of 1), "images", and how many of these
        were "replaced" by others because they cannot be decoded.

    Raises:
        BadFileError: an image cannot be decoded by one of the processes; on all of them.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    bad: BadFileError | None = None
    try:
        for batch in progress(accelerator, label, loader, leave=False):
            if len(batch):
                with accelerator.autocast():
                    logits = model(batch.pixels)
                sums += _sums(logits, batch.labels)
    except BadFileError as error:
        bad = error
    # nobody waits below for one that has failed
    met = gather_object([bad]) if accelerator.num_processes > 1 else [bad]
    if first := bad or next(filter(None, met), None):
        raise first
    total = cast(torch.Tensor, accelerator.reduce(sums))
    model.train(training)
    loss, top1, top5, images = total.tolist()  # waits for the device, once
    replaced = len(replaced_files((loader,), accelerator))
    means = {"loss": loss / images, "top1": top1 / images, "top5": top5 / images}
    return {**means, "images": int(images), "replaced": replaced}


def replaced_files(loaders: Sequence[Loader], accelerator: Accelerator) -> dict[str, str]:
    """The files that no process can decode, and the one used in the place of each, as they are printed.

    Every process must call it; each knows afterwards what all have found, and its loaders' states hold it.
    """
    found: dict[str, str] = {}
    for loader in loaders:
        damaged, replaced = list(loader.damaged), list(loader.replaced)
        if accelerator.num_processes > 1:
            damaged, replaced = gather_object(damaged), gather_object(replaced)
        loader.note_damaged(damaged)
        loader.replace(replaced)
        path = loader.source.path
        found |= {printable(path(row)): printable(path(other)) for row, other in sorted(loader.replaced.items())}
    return found


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = functional.cross_entropy(logits.double(), labels, reduction="sum")
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    count = torch.full((), len(labels), dtype=torch.float64, device=logits.device)
    return torch.stack((losses, best[:, 0].sum().double(), best.sum().double(), count))
