"""The loaders that `bench loader` compares: endless batches of normalised images on the device.

With an augmentation a side gives the augmented images as well, made from the same base view, since that is what
distillation needs. No side meets the end of an epoch, so that a small data set is no disadvantage to a loader that
starts anew with each epoch.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dalikd.kd.normalize import Normalized
from dalikd.pipelines.draw_spec import DrawSpec, View, policy_name
from dalikd.pipelines.hardware import Decode, decoding_on
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.tools.bench.images import each_tensor, mixing
from dalikd.tools.bench.record import check_names
from dalikd.trainers.augmentation import AUGMENTATIONS

__all__ = ["BACKENDS", "Job", "Side", "cannot", "endless", "open_side", "pil_batches", "runnable"]

Batches = Generator[tuple[Any, ...], None, None]


@dataclass(frozen=True)
class Job:
    """The work that all sides do."""

    source: Source
    view: View
    augmentation: str
    batch_size: int
    device: torch.device  # where batches end
    dtype: torch.dtype = torch.float32  # of the normalised images
    threads: int = 1  # of DALI
    workers: int = 1  # processes of a DataLoader
    prefetch: int = 2  # batches that DALI makes ahead
    hw_decoder_load: float | None = None
    decode: Decode = "auto"
    images: int = 1_000_000  # that a DataLoader gives before it starts anew, which costs it a pause

    @property
    def made(self) -> dict[str, Any]:
        """How DALI makes them."""
        options = {"threads": self.threads, "prefetch": self.prefetch, "decode": self.decode}
        return {**options, "hw_decoder_load": self.hw_decoder_load}


class Side(NamedTuple):
    """A loader that runs."""

    batches: Batches  # closing them ends its threads and processes
    ahead: int  # batches that may be ready before they are asked for


def _dalikd(job: Job, decoded_on: torch.device) -> Batches:
    """dalikd's loader: uint8 pixels, mixed on the device and normalised there in one pass."""
    augmenter = mixing(job.augmentation, job.source, job.view, job.batch_size)
    sampler = Sampler(len(job.source), job.batch_size, group=augmenter.group)
    normalized = Normalized(torch.nn.Identity(), job.source.mean, job.source.std).to(job.device)
    with closing(Loader(job.source, sampler, augmenter.draw_spec, device=decoded_on, **job.made)) as loader:
        while True:
            batch = loader.next()
            if decoded_on.type != job.device.type:  # from pinned memory, without waiting
                batch = each_tensor(
                    batch, lambda part: part.contiguous().pin_memory().to(job.device, non_blocking=True)
                )
            mixed = augmenter.candidates(batch)
            pixels = (batch.pixels,) if mixed is None else (batch.pixels, mixed.images)
            yield tuple(normalized.normalize(images).to(job.dtype) for images in pixels)


def _decode(job: Job, decoded_on: torch.device) -> Batches:
    """The windows that dalikd's loader cuts, decoded by as many threads of DALI: nothing else is done."""
    from dalikd.pipelines.graphs import build_graph

    loader = Loader(job.source, Sampler(len(job.source), job.batch_size), DrawSpec(job.view))
    on_gpu = decoded_on.type == "cuda"
    graph: Any = build_graph(
        lambda info: loader.feed(info.iteration),
        replace(job.view, crop="window"),
        reader="files",
        batch_size=job.batch_size,
        threads=job.threads,
        device_id=(decoded_on.index or 0) if on_gpu else None,
        prefetch=job.prefetch,
        decoding=decoding_on(job.source, decoded_on, job.decode, job.hw_decoder_load),
    )
    stream = (torch.cuda.current_stream(decoded_on),) if on_gpu else ()
    while True:
        yield graph.run(*stream)


def _on_device(job: Job, batches: Any) -> Batches:
    """Batches of a torch DataLoader whose workers make normalised images."""
    for images, *augmented, _ in endless(batches):
        # to the device first: .to(device, dtype) converts on the CPU
        yield tuple(part.to(job.device, non_blocking=True).to(job.dtype) for part in (images, *augmented))


def endless(batches: Any) -> Generator[Any, None, None]:
    """Batches of a DataLoader, epoch after epoch."""
    while True:
        yield from batches


# ------------------------------------------------------------------------------------------ the other loaders


class _Images(torch.utils.data.Dataset):
    """The images of a job through a transform, epoch after epoch, each in an order of its own."""

    transform: Callable[[Any], Any]

    def __init__(self, job: Job, read: Callable[[Source, int], Any]) -> None:
        self._source, self._read = job.source, read
        random, size = np.random.default_rng(0), len(job.source)
        epochs = -(-max(job.images, job.batch_size) // size)
        self._order = np.concatenate([random.permutation(size) for _ in range(epochs)])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        row = int(self._order[index])
        images = self.transform(self._read(self._source, row))
        return (*(images if isinstance(images, tuple) else (images,)), int(self._source.labels[row]))


def pil_batches(job: Job) -> Any:
    """The DataLoader over Pillow: normalised images, with an augmentation augmented ones, and labels, on the host."""
    from torchvision import transforms

    return _torchvision(job, _read_pil, transforms, transforms.ToTensor())


def _io_batches(job: Job) -> Any:
    """The DataLoader over torchvision.io: tensors from the file on."""
    from torchvision.transforms import v2

    return _torchvision(job, _read_tensor, v2, v2.ToDtype(torch.float32, scale=True))


def _torchvision(job: Job, read: Callable[[Source, int], Any], module: Any, to_float: Any) -> Any:
    """A DataLoader over torchvision.transforms or its v2, whose classes have the same names."""
    finish = module.Compose([to_float, module.Normalize(job.source.mean, job.source.std)])
    base, augment = _base_view(job.view, module), _augmentation(job, module)

    def views(image: Any) -> Any:
        """The base view, and with an augmentation a second view made from it."""
        image = base(image)
        return finish(image) if augment is None else (finish(image), finish(augment(image)))

    images = _Images(job, read)
    images.transform = views
    return torch.utils.data.DataLoader(
        images,
        job.batch_size,
        num_workers=job.workers,
        drop_last=True,
        persistent_workers=job.workers > 0,
        pin_memory=job.device.type == "cuda",
    )


def _timm_batches(job: Job) -> Any:
    from timm.data.loader import create_loader

    view, on_gpu = job.view, job.device.type == "cuda"
    looks = {"input_size": view.size, "scale": view.scale, "ratio": view.ratio, "interpolation": view.interpolation}
    moved = {"use_prefetcher": on_gpu, "pin_memory": on_gpu, "device": job.device}
    workers = {"num_workers": job.workers, "persistent_workers": job.workers > 0}
    return create_loader(
        _Images(job, _read_pil),  # type: ignore[arg-type] - it needs len, getitem and transform
        batch_size=job.batch_size,
        is_training=True,
        color_jitter=0.0,
        mean=job.source.mean,
        std=job.source.std,
        **looks,
        **moved,
        **workers,
    )


def _base_view(view: View, module: Any) -> Callable[[Any], Any]:
    resize = {"interpolation": module.InterpolationMode[view.interpolation.upper()], "antialias": True}
    if view.crop == "random_resized_crop":
        crop = [module.RandomResizedCrop(view.size, view.scale, view.ratio, **resize)]
    else:
        crop = [module.Resize(view.size, **resize), module.CenterCrop(view.size), _pad_crop(view, module)]
    return module.Compose([*crop, module.RandomHorizontalFlip()])


def _augmentation(job: Job, module: Any) -> Callable[[Any], Any] | None:
    if job.augmentation == "identity":
        return None
    if job.augmentation == "autoaugment":
        return module.AutoAugment(module.AutoAugmentPolicy(policy_name(job.view.size)))
    crop = [_pad_crop(job.view, module)] if job.augmentation == "crop_flip" else []
    return module.Compose([*crop, module.RandomHorizontalFlip()])


def _pad_crop(view: View, module: Any) -> Callable[[Any], Any]:
    mode = {"zero": "constant", "reflect": "reflect"}[view.border]
    return module.RandomCrop(view.size, padding=view.padding, padding_mode=mode)


def _read_pil(source: Source, row: int) -> Any:
    from PIL import Image

    if source.arrays is not None:
        return Image.fromarray(source.arrays[row])
    with Image.open(source.path(row)) as file:
        return file.convert("RGB")


def _read_tensor(source: Source, row: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image, read_file

    if source.arrays is not None:
        return torch.from_numpy(source.arrays[row]).permute(2, 0, 1)
    return decode_image(read_file(source.path(row)), ImageReadMode.RGB)


# -------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class _Backend:
    """A loader: how to open it, and what it cannot do."""

    open: Callable[[Job], Batches]
    needs_gpu: bool = False
    dali: bool = False
    shards: bool = False  # reads tars and TFRecords
    own_order: bool = False  # shuffles what it is given
    files_only: bool = False
    crops: frozenset[str] = frozenset({"random_resized_crop", "pad_crop"})
    augmentations: frozenset[str] = frozenset({"identity", "flip", "crop_flip", "autoaugment"})


_RESIZED, _PLAIN = frozenset({"random_resized_crop"}), frozenset({"identity"})
_OURS = {"dali": True, "shards": True, "augmentations": frozenset(AUGMENTATIONS)}
_WINDOWS = {"dali": True, "files_only": True, "crops": _RESIZED, "augmentations": _PLAIN}
_CPU = torch.device("cpu")

#: The loaders by name.
BACKENDS: dict[str, _Backend] = {
    "dalikd": _Backend(lambda job: _dalikd(job, _CPU), **_OURS),
    "dalikd-mixed": _Backend(lambda job: _dalikd(job, job.device), needs_gpu=True, **_OURS),
    "torchvision-pil": _Backend(lambda job: _on_device(job, pil_batches(job))),
    "torchvision-io": _Backend(lambda job: _on_device(job, _io_batches(job))),
    "timm": _Backend(
        lambda job: _on_device(job, _timm_batches(job)), own_order=True, crops=_RESIZED, augmentations=_PLAIN
    ),
    "decode": _Backend(lambda job: _decode(job, _CPU), **_WINDOWS),
    "decode-mixed": _Backend(lambda job: _decode(job, job.device), needs_gpu=True, **_WINDOWS),
}


def open_side(name: str, job: Job) -> Side:
    """A loader; DALI's starts with its first batch."""
    backend = BACKENDS[name]
    return Side(backend.open(job), 1 + (job.prefetch if backend.dali else max(1, 2 * job.workers)))


def runnable(wanted: Sequence[str], device: torch.device) -> list[str]:
    """The names of loaders, checked; "all" stands for those that run on this device. Raises ValueError for others."""
    here = [name for name, backend in BACKENDS.items() if device.type == "cuda" or not backend.needs_gpu]
    named = [name for entry in wanted for name in (here if entry == "all" else [entry])]
    for name in check_names("--backends", named, BACKENDS):
        if name not in here:
            raise ValueError(f"--backends {name} needs a GPU and batches end on the CPU: there are {', '.join(here)}")
    return list(dict.fromkeys(named))


def cannot(name: str, job: Job, cache: str = "warm") -> str | None:
    """What a loader lacks for a job, or None."""
    backend = BACKENDS[name]
    if job.source.shards is not None and not backend.shards:
        return "a reader of tars and TFRecords"
    if job.source.files is None and backend.files_only:
        return "files"
    if cache == "cold" and backend.own_order:
        return "an order that meets no image twice (cold page cache)"
    if job.view.crop not in backend.crops:
        return job.view.crop
    return None if job.augmentation in backend.augmentations else job.augmentation
