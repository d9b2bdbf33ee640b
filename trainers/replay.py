"""`dalikd replay`: one training step out of a file, run again and watched."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from dalikd.kd.checkpoints import load_torch
from dalikd.pipelines.draw_spec import Batch, MixDraws
from dalikd.pipelines.files import write_atomically
from dalikd.pipelines.sources import Source
from dalikd.trainers.loop import Loop
from dalikd.trainers.setup import Setup
from dalikd.trainers.tasks.base import TrainingOptions
from dalikd.trainers.tracking import RunFolder

__all__ = ["read_step", "run_again", "unpack_files"]


def read_step(path: Path) -> dict[str, Any]:
    """Read what a run that diverged has written of a step; no code in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: a run that diverges writes nan-stepN.pt into its folder")
    try:
        with path.open("rb") as file:
            content = load_torch(file)
    except Exception as error:  # unpickling foreign bytes can raise anything
        raise ValueError(f"{path} is damaged, or no nan-stepN.pt of a run that has diverged") from error
    if not isinstance(content, dict) or not {"batches", "state", "options"} <= content.keys():
        raise ValueError(f"{path} holds no training step: give a nan-stepN.pt of a run that has diverged")
    return content


def unpack_files(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The run's options, flat, for one process; weights files that lie in the step's file are written to a folder.

    Args:
        content: as `read_step` gives it.
        folder: where to; the options name the files there.
    """
    places = {}
    for number, (name, content_of_file) in enumerate(content["files"].items()):
        places[name] = str(folder / str(number) / Path(name).name)  # the suffix says how a file is read
        write_atomically(Path(places[name]), content_of_file.numpy().tobytes(), sync=False)

    def moved(options: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: places.get(value, value) if name.split(".")[-1] == "weights" and isinstance(value, str) else value
            for name, value in options.items()
        }

    options = moved(content["options"])
    if options.get("teachers"):
        options["teachers"] = [moved(teacher) for teacher in options["teachers"]]
    return {**options, "compile": "off", "batch_size": options["batch_size"] // content["processes"]}


class _OneStep(Setup):
    """The data of one step: other images are not there."""

    def _check_class_order(self, *_: object) -> None:
        """The run has done it."""

    def _check_chance(self, *_: object) -> None:
        """The run has done it."""


class _NoLoader:
    """In the place of a loader, for batches that come from elsewhere."""

    wait_seconds = 0.0

    def __init__(self, source: Source, steps_per_epoch: int) -> None:
        self.source, self.sampler = source, SimpleNamespace(steps_per_epoch=steps_per_epoch)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go back to."""

    def check_images(self, state: dict[str, Any]) -> None:
        """Nothing to compare."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}


def run_again(content: Mapping[str, Any], options: TrainingOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Do the step once more, from the state before it, and watch every module and gradient.

    Args:
        content: as `read_step` gives it.
        options: of the run, as `unpack_files` gives them.
        accelerator: one process.

    Returns:
        "terms" of the step by their names; "forward", "gradients" and "weights": the first that is not finite, None
        where all are; and "finite", whether all was.

    Raises:
        ValueError, OSError: the run's nets cannot be built here.
    """
    given, device = content["source"], accelerator.device
    side, labels = given["image_size"], given["labels"].numpy()
    plain: dict[str, Any] = {name: given[name] for name in ("name", "split", "image_size")}
    plain |= {name: tuple(given[name]) for name in ("classes", "mean", "std")}
    images = np.broadcast_to(np.zeros((), np.uint8), (len(labels), side, side, 3))  # which nobody looks at
    source = Source(**plain, labels=labels, arrays=images, labelled=bool((labels >= 0).all()))
    source.__dict__["fingerprint"] = given["fingerprint"]  # of the run's own images
    task = options.build(_OneStep(options, accelerator, source, source))
    loader: Any = _NoLoader(source, content["steps_per_epoch"])
    loop = Loop(task, loader, loader, options, accelerator, RunFolder(Path(), writes=False), {})
    loop.take(content["state"])
    loop.model.train()
    loop.meter.reset()
    batches = [_batch(part, device) for part in content["batches"]]
    forward, backward = _Watch(), _Watch()
    prepare = task.prepare

    def watched(batch: Batch, epoch: float) -> Any:
        inputs = prepare(batch, epoch)
        forward.look("what the step is given", inputs)
        return inputs

    task.prepare = watched  # pyright: ignore[reportAttributeAccessIssue]
    for name, module in task.named_modules():
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: forward.look(name or "the task", output)
        )
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: backward.look(name, gradient))
    loop.step(batches)
    terms, weight = loop.meter.means(), loop.wrong_weight()
    first = {"forward": forward.first, "gradients": backward.first, "weights": weight or None}
    return {"terms": terms, **first, "finite": bool(all(map(np.isfinite, terms.values()))) and not any(first.values())}


class _Watch:
    """Remembers the first name whose tensors are not finite."""

    def __init__(self) -> None:
        self.first: str | None = None

    def look(self, name: str, value: Any) -> None:
        """Look at all tensors of a value; waits for the device."""
        if self.first is None:
            for place, tensor in _tensors(value):
                if not torch.isfinite(tensor).all():
                    self.first = f"{name}{place}"
                    return


def _tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested results, and where each lies."""
    if isinstance(value, Tensor):
        yield place, value
        return
    parts: Iterable[tuple[object, Any]] = ()
    if hasattr(value, "_asdict"):
        parts = value._asdict().items()
    elif isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    for name, part in parts:
        yield from _tensors(part, f"{place}.{name}")


def _batch(part: Mapping[str, Any], device: torch.device) -> Batch:
    def sent(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return Batch(
        sent(part["images"]),
        tuple(map(sent, part["augmented"])),
        sent(part["labels"]),
        sent(part["ids"]),
        tuple(MixDraws(**{name: sent(value) for name, value in draws.items()}) for draws in part["mix"]),
        len(part["labels"]),
        {name: sent(value) for name, value in part["extras"].items()},
    )
