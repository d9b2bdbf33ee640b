"""Loss and accuracy on every image exactly once, over any number of processes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.backbones.auxiliary import AuxiliaryNet
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.rotation import TURNS, class_logits, joint_labels, rotations
from dalikd.pipelines.data import FilePath
from dalikd.pipelines.doctor import printable
from dalikd.pipelines.draw_spec import Batch
from dalikd.pipelines.loader import BadFileError, Loader
from dalikd.trainers.options import RunOptions
from dalikd.trainers.progress import progress
from dalikd.trainers.stopping import StopSignals

__all__ = ["EvaluateOptions", "accuracy_sums", "evaluate", "net_sums", "replaced_files"]


@dataclass
class EvaluateOptions(RunOptions):
    """Evaluate a net on the validation split: every image exactly once.

    Args:
        model: its architecture.
        model_args: options of that architecture.
        weights: its weights: a file, or "pretrained" for timm's own.
        mean: that its images are normalised by: three numbers, of pixels scaled to 0..1; default: as its weights were
            trained, where they or dalikd's list of published files say it, else as the data set is.
        std: as mean; give both or none.
        json: file the results are written to, - for stdout.
    """

    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: FilePath | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    json: FilePath | None = None


@torch.no_grad()
def evaluate(
    nets: Mapping[str, nn.Module],
    loader: Loader,
    accelerator: Accelerator,
    count: Callable[[Any, Batch], dict[str, Tensor]] | None = None,
    label: str = "evaluate",
    stops: StopSignals | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate nets that take pixels, in one pass over the images.

    Args:
        nets: by name, in any mode; they are evaluated in eval mode, and every part of them is left in its own.
        loader: over each row once (drop_last=False).
        accelerator: whose processes share the work.
        count: sums of a net over a batch's images, float64 scalars by name, "images" among them; default:
            `net_sums`.
        label: of the progress bar.
        stops: of a run that a signal may stop between any two batches.

    Returns:
        for each net the sums over "images", which by default are "loss" (cross-entropy), "top1" and "top5" (shares of
        1); "images", and how many of these were "replaced" by others because they cannot be decoded.

    Raises:
        BadFileError: an image cannot be decoded by one of the processes; on all of them.
        Interrupted: one of them had a signal.
    """
    modes = {module: module.training for net in nets.values() for module in net.modules()}
    for net in nets.values():
        net.eval()
    sums: dict[tuple[str, str], Tensor] = {}  # of each net, by the figures' names
    bad: BadFileError | None = None
    try:
        batches = loader if stops is None else stops.each(loader)
        for batch in progress(accelerator, label, batches, total=len(loader), leave=False):
            for name, net in nets.items() if len(batch) else ():
                with accelerator.autocast():
                    found = (count or net_sums)(net, batch)
                sums |= {
                    (name, figure): sums.get((name, figure), 0) + value.double() for figure, value in found.items()
                }
    except BadFileError as error:
        bad = error
    finally:
        for module, training in modes.items():
            module.training = training
    # nobody waits below for one that has failed, and one that had no images knows the figures too
    met = gather_object([(bad, list(sums))]) if accelerator.num_processes > 1 else [(bad, list(sums))]
    if first := bad or next((error for error, _ in met if error), None):
        raise first
    keys = next(keys for _, keys in met if keys)
    nothing = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    total = cast(Tensor, accelerator.reduce(torch.stack([sums.get(key, nothing) for key in keys])))
    values = dict(zip(keys, total.tolist(), strict=True))  # waits for the device, once
    replaced = len(replaced_files((loader,), accelerator))
    return {
        name: {
            **{
                figure: value / values[name, "images"]
                for (of, figure), value in values.items()
                if of == name and figure != "images"
            },
            "images": int(values[name, "images"]),
            "replaced": replaced,
        }
        for name in nets
    }


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


def net_sums(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """`accuracy_sums` of a net's logits; of one with auxiliary heads also how many images each of them gets right.

    A head sees every image in its four quarter turns, and counts a quarter for each turn: "head1_joint" where class and
    turn are right, "head1_class" where the class is, whose four joint logits are summed. Heads are numbered from the
    shallowest on (Yang et al., IJCAI 2021, arXiv 2107.13715).

    Args:
        net: takes pixels.
        batch: on its device.
    """
    if not (isinstance(net, Normalized) and isinstance(net.model, AuxiliaryNet)):
        return accuracy_sums(net(batch.pixels), batch.labels)
    found = net.outputs(rotations(batch.pixels), heads=True)
    sums, joint = accuracy_sums(found.logits[::TURNS], batch.labels), joint_labels(batch.labels)
    for number, head in enumerate(found.heads, start=1):
        scores = {"joint": (head, joint), "class": (class_logits(head), joint // TURNS)}
        for kind, (logits, wanted) in scores.items():
            sums[f"head{number}_{kind}"] = (logits.argmax(1) == wanted).sum().double() / TURNS
    return sums


def accuracy_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropies ("loss"), "top1", "top5" and "images" of a batch, summed, float64.

    Args:
        logits: [B, C].
        labels: int64 [B].
    """
    losses = functional.cross_entropy(logits.double(), labels, reduction="sum")
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    images = torch.full((), len(labels), dtype=torch.float64, device=logits.device)
    return {"loss": losses, "top1": best[:, 0].sum().double(), "top5": best.sum().double(), "images": images}
