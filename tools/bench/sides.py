"""The loaders that `bench loader` compares: endless batches of normalised images on the device.

With an augmentation a side gives the augmented images as well, made from the same base view, since that is what
distillation needs; torchvision knows flip, crop_flip and autoaugment, timm none. No side meets the end of an epoch, so
that a small data set is no disadvantage to a loader that starts anew with each epoch.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np
import torch

from dalikd.kd.backbones.layers import Normalized
from dalikd.pipelines.data import DataConfig
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.hardware import decoding_on
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.policies import policy_name
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.tools.bench.common import each_tensor, mixing
from dalikd.tools.bench.record import check_names
from dalikd.trainers.augmentation import AUGMENTATIONS, Augmenter
from dalikd.trainers.setup import reading
from dalikd.trainers.teacher_step import Branches

Batches = Generator[tuple[Any, ...], None, None]
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """The work that all sides do."""

    source: Source
    view: View
    batch_size: int
    device: torch.device  # where batches end
    data: DataConfig = field(default_factory=lambda: DataConfig(threads=1))  # how dalikd reads
    augmentation: str = "identity"
    dtype: torch.dtype = torch.float32  # of the normalised images
    workers: int = 1  # processes of a DataLoader
    images: int = 1_000_000  # that a DataLoader gives before it starts anew, which costs it a pause

    def loader(self, device: torch.device | None = None, augmenter: Augmenter | None = None) -> Loader:
        """dalikd's, of base views unless there is an augmenter."""
        spec = DrawSpec(self.view) if augmenter is None else augmenter.draw_spec
        sampler = Sampler(len(self.source), self.batch_size, group=1 if augmenter is None else augmenter.group)
        return Loader(self.source, sampler, spec, device=device or _CPU, **reading(self.data))


def _dalikd(job: Job, decoded_on: torch.device) -> Batches:
    """dalikd's loader: uint8 pixels, mixed on the device and normalised there in one pass."""
    augmenter = mixing(job.augmentation, job.source, job.view, job.batch_size)
    branches = Branches([augmenter])
    normalized = Normalized(torch.nn.Identity(), job.source.mean, job.source.std).to(job.device)

    def moved(part: torch.Tensor) -> torch.Tensor:
        return part.contiguous().pin_memory().to(job.device, non_blocking=True)

    with closing(job.loader(decoded_on, augmenter)) as loader:
        while True:
            batch = loader.next()
            if decoded_on.type != job.device.type:  # from pinned memory, without waiting
                batch = each_tensor(batch, moved)
            mixed = branches.candidates(batch)
            pixels = (batch.pixels,) if mixed is None else (batch.pixels, mixed.images)
            yield tuple(normalized.normalize(images).to(job.dtype) for images in pixels)


def _decode(job: Job, decoded_on: torch.device) -> Batches:
    """The windows that dalikd's loader cuts, decoded by as many threads of DALI: nothing else is done."""
    from dalikd.pipelines.graphs import build_graph

    loader, on_gpu = job.loader(), decoded_on.type == "cuda"
    decoding = decoding_on(job.source, decoded_on, job.data.decode, job.data.hw_decoder_load)
    sizes: Any = {"batch_size": job.batch_size, "threads": job.data.threads or 1, "prefetch": job.data.prefetch}
    where = {"reader": "files", "device_id": (decoded_on.index or 0) if on_gpu else None, "decoding": decoding}
    view = replace(job.view, crop="window")
    graph: Any = build_graph(lambda info: loader.feed(info.iteration), view, **where, **sizes)
    stream = (torch.cuda.current_stream(decoded_on),) if on_gpu else ()
    while True:
        yield graph.run(*stream)


def _on_device(job: Job, batches: Any) -> Batches:
    for *views, _ in chain.from_iterable(repeat(batches)):  # .to(device, dtype) converts on the CPU
        yield tuple(images.to(job.device, non_blocking=True).to(job.dtype) for images in views)


class _Images(torch.utils.data.Dataset):
    """The images of a job through a transform, epoch after epoch, each in an order of its own."""

    def __init__(self, job: Job, pil: bool = True, transform: Any = None) -> None:
        self.source, self.pil, self.transform = job.source, pil, transform
        random, size = np.random.default_rng(0), len(job.source)
        epochs = -(-max(job.images, job.batch_size) // size)
        self.order = np.concatenate([random.permutation(size) for _ in range(epochs)])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        row = int(self.order[index])
        views = self.transform(self._read(row))
        return (*(views if isinstance(views, tuple) else (views,)), int(self.source.labels[row]))

    def _read(self, row: int) -> Any:
        from PIL import Image
        from torchvision.io import ImageReadMode, decode_image, read_file

        if self.source.arrays is not None:
            pixels = self.source.arrays[row]
            return Image.fromarray(pixels) if self.pil else torch.from_numpy(pixels).permute(2, 0, 1)
        if not self.pil:
            return decode_image(read_file(self.source.path(row)), ImageReadMode.RGB)
        with Image.open(self.source.path(row)) as file:
            return file.convert("RGB")


def torchvision_batches(job: Job, *, pil: bool) -> Any:
    """A DataLoader over Pillow, or over tensors from the file on: normalised images, with an augmentation
    those made from the same base view too, and labels, on the host."""
    from torchvision import transforms
    from torchvision.transforms import v2

    view, module = job.view, transforms if pil else v2  # whose classes have the same names
    resize: Any = {"interpolation": module.InterpolationMode[view.interpolation.upper()], "antialias": True}
    border: Any = {"zero": "constant", "reflect": "reflect"}[view.border]
    pad_crop, flip = (
        module.RandomCrop(view.size, padding=view.padding, padding_mode=border),
        module.RandomHorizontalFlip(),
    )
    crop: Any = [module.Resize(view.size, **resize), module.CenterCrop(view.size), pad_crop]
    if view.crop == "random_resized_crop":
        crop = [module.RandomResizedCrop(view.size, view.scale, view.ratio, **resize)]
    more: Any = {"identity": [], "flip": [flip], "crop_flip": [pad_crop, flip]}.get(job.augmentation)
    if more is None:
        more = [module.AutoAugment(module.AutoAugmentPolicy(policy_name(view.size)))]
    to_float = transforms.ToTensor() if pil else v2.ToDtype(torch.float32, scale=True)
    base, augment = module.Compose([*crop, flip]), module.Compose(more) if more else None
    finish = module.Compose([to_float, module.Normalize(job.source.mean, job.source.std)])

    def views(image: Any) -> Any:
        image = base(image)
        return finish(image) if augment is None else (finish(image), finish(augment(image)))

    images, pinned = _Images(job, pil, views), job.device.type == "cuda"
    workers: Any = {"num_workers": job.workers, "persistent_workers": job.workers > 0}
    return torch.utils.data.DataLoader(images, job.batch_size, drop_last=True, pin_memory=pinned, **workers)


def _timm_batches(job: Job) -> Any:
    from timm.data.loader import create_loader

    images: Any = _Images(job)
    view, on_gpu = job.view, job.device.type == "cuda"
    looks: Any = {"input_size": view.size, "scale": view.scale, "ratio": view.ratio, "mean": job.source.mean}
    looks |= {"interpolation": view.interpolation, "std": job.source.std, "color_jitter": 0.0, "is_training": True}
    moved: Any = {"use_prefetcher": on_gpu, "pin_memory": on_gpu, "device": job.device, "num_workers": job.workers}
    return create_loader(images, batch_size=job.batch_size, persistent_workers=job.workers > 0, **looks, **moved)


class Side(NamedTuple):
    """A loader that runs."""

    batches: Batches  # closing them ends its threads and processes
    ahead: int  # batches that may be ready before they are asked for


class _Backend(NamedTuple):
    """A loader: how to open it, and what it can do."""

    open: Callable[[Job], Batches]
    can: Collection[str]
    dali: bool = False
    needs_gpu: bool = False


_ALL = {*AUGMENTATIONS, "files", "objects", "resident", "webdataset", "tfrecord", "random_resized_crop", "pad_crop"}
_TIMM = {"identity", "files", "resident", "random_resized_crop"}
_TORCHVISION = {*_TIMM, "pad_crop", "flip", "crop_flip", "autoaugment"}
_WINDOWS = {"identity", "files", "random_resized_crop"}

#: The loaders by name.
BACKENDS: dict[str, _Backend] = {
    "dalikd": _Backend(lambda job: _dalikd(job, _CPU), _ALL, dali=True),
    "dalikd-mixed": _Backend(lambda job: _dalikd(job, job.device), _ALL, dali=True, needs_gpu=True),
    "torchvision-pil": _Backend(lambda job: _on_device(job, torchvision_batches(job, pil=True)), _TORCHVISION),
    "torchvision-io": _Backend(lambda job: _on_device(job, torchvision_batches(job, pil=False)), _TORCHVISION),
    "timm": _Backend(lambda job: _on_device(job, _timm_batches(job)), _TIMM),
    "decode": _Backend(lambda job: _decode(job, _CPU), _WINDOWS, dali=True),
    "decode-mixed": _Backend(lambda job: _decode(job, job.device), _WINDOWS, dali=True, needs_gpu=True),
}


def open_side(name: str, job: Job) -> Side:
    """A loader; DALI's starts with its first batch."""
    backend = BACKENDS[name]
    return Side(backend.open(job), 1 + (job.data.prefetch if backend.dali else max(1, 2 * job.workers)))


def runnable(wanted: Sequence[str], device: torch.device) -> list[str]:
    """The names of loaders, checked; "all" stands for those that run on this device. Raises ValueError for others."""
    here = [name for name, backend in BACKENDS.items() if device.type == "cuda" or not backend.needs_gpu]
    named = [name for entry in wanted for name in (here if entry == "all" else [entry])]
    for name in check_names("--backends", named, BACKENDS):
        if name not in here:
            raise ValueError(f"--backends {name} needs a GPU and batches end on the CPU: there are {', '.join(here)}")
    return list(dict.fromkeys(named))


def store_of(source: Source) -> str:
    """Where a source's images are: files, objects, resident, webdataset, tfrecord."""
    if source.store is not None:
        return "objects"
    if source.files is not None:
        return "files"
    return "resident" if source.shards is None else source.shards.manifest.format


def cannot(name: str, job: Job) -> str | None:
    """What a loader lacks for a job, or None."""
    wanted = store_of(job.source), job.view.crop, job.augmentation
    return next((word for word in wanted if word not in BACKENDS[name].can), None)
