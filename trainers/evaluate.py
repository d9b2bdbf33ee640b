"""Loss and accuracy on every image exactly once, over any number of processes."""

from typing import cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

from dalikd.pipelines.loader import Loader
from dalikd.trainers.progress import progress

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, accelerator: Accelerator, label: str = "evaluate") -> dict[str, float]:
    """Evaluate a net that takes pixels.

    Args:
        model: in any mode; it is evaluated in eval mode and left as it was.
        loader: over each row once (drop_last=False).
        accelerator: whose processes share the work.
        label: of the progress bar.

    Returns:
        "loss" (cross-entropy, mean over all images), "top1" and "top5" (shares of 1), "images".
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for batch in progress(accelerator, label, loader, leave=False):
        if len(batch):
            with accelerator.autocast():
                logits = model(batch.pixels)
            sums += _sums(logits, batch.labels)
    total = cast(torch.Tensor, accelerator.reduce(sums))
    model.train(training)
    loss, top1, top5, images = total.tolist()  # waits for the device, once
    return {"loss": loss / images, "top1": top1 / images, "top5": top5 / images, "images": int(images)}


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = functional.cross_entropy(logits.double(), labels, reduction="sum")
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    count = torch.full((), len(labels), dtype=torch.float64, device=logits.device)
    return torch.stack((losses, best[:, 0].sum().double(), best.sum().double(), count))
