"""The loaders that `bench loader` compares. Each ends in the same thing: normalised batches on the device.

A side gives, batch after batch, normalised images [B, 3, S, S]; with an augmentation it gives the augmented images as
well, made from the same base view, since that is what distillation needs. No side meets the end of an epoch: every
order goes on for ever, so that a small data set is no disadvantage to a loader that starts anew with each epoch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dalikd.kd.normalize import Normalized
from dalikd.pipelines.draw_spec import Batch, DrawSpec, MixDraws, View, policy_name
from dalikd.pipelines.hardware import Decode, decoding_on
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.tools.bench.options import check_names
from dalikd.trainers.augmentation import AUGMENTATIONS, Augmenter, MixOptions

__all__ = ["BACKENDS", "Job", "Side", "cannot", "endless", "open_side", "pil_batches", "runnable"]

_PUBLISHED_GROUP = 64
_FETCHED_AHEAD = 2  # batches a DataLoader's worker makes in advance: torch's own default


@dataclass(frozen=True)
class Job:
    """The work that all sides do.

    Attributes:
        source: the pictures.
        view: how they are cut.
        augmentation: its name.
        batch_size: images of a batch.
        device: where batches end.
        dtype: of the normalised images.
        threads: DALI's CPU threads.
        workers: processes of a DataLoader.
        prefetch: batches that DALI makes ahead.
        hw_decoder_load: share of the pictures that a GPU's JPEG engine decodes; None: 1 where it has one.
        decode: windows or whole pictures on a GPU, as a Loader takes it.
        images: that a DataLoader gives before it starts anew, which costs it a pause: enough for all rounds.
    """

    source: Source
    view: View
    augmentation: str
    batch_size: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    threads: int = 1
    workers: int = 1
    prefetch: int = 2
    hw_decoder_load: float | None = None
    decode: Decode = "auto"
    images: int = 1_000_000


class Side(Protocol):
    """One of the loaders compared.

    Attributes:
        ahead: batches that may be ready before they are asked for.
    """

    ahead: int

    def next(self) -> tuple[Tensor, ...]:
        """Normalised images, and with an augmentation normalised augmented images, on the device."""
        ...

    def close(self) -> None:
        """End its threads and processes."""
        ...


class _Dalikd:
    """dalikd's loader: uint8 pixels, mixed on the device and normalised there in one pass."""

    def __init__(self, job: Job, decoded_on: torch.device) -> None:
        self._device, self._dtype = job.device, job.dtype
        self.ahead = job.prefetch + 1
        group = math.gcd(job.batch_size, _PUBLISHED_GROUP)
        self._augmenter = Augmenter(job.augmentation, MixOptions(mix_group=group), job.source, job.view, seed=0)
        self._loader = Loader(
            job.source,
            Sampler(len(job.source), job.batch_size, group=group),
            self._augmenter.draw_spec,
            device=decoded_on,
            threads=job.threads,
            prefetch=job.prefetch,
            hw_decoder_load=job.hw_decoder_load,
            decode=job.decode,
        )
        normalized = Normalized(torch.nn.Identity(), job.source.mean, job.source.std).to(job.device)
        self._normalize = normalized.normalize

    def next(self) -> tuple[Tensor, ...]:
        batch = _moved(self._loader.next(), self._device)
        mixed = self._augmenter.candidates(batch)
        pixels = (batch.pixels,) if mixed is None else (batch.pixels, mixed.images)
        return tuple(self._normalize(images).to(self._dtype) for images in pixels)

    def close(self) -> None:
        self._loader.close()


class _Decode:
    """The windows that dalikd's loader cuts, decoded by as many threads of DALI and dropped: nothing else is done."""

    def __init__(self, job: Job, decoded_on: torch.device) -> None:
        from dalikd.pipelines.graphs import build_graph

        self.ahead = job.prefetch + 1
        self._loader = Loader(job.source, Sampler(len(job.source), job.batch_size), DrawSpec(job.view))
        self._stream = torch.cuda.current_stream(decoded_on) if decoded_on.type == "cuda" else None
        self._graph: Any = build_graph(
            lambda info: self._loader.feed(info.iteration),
            replace(job.view, crop="window"),
            reader="files",
            batch_size=job.batch_size,
            threads=job.threads,
            device_id=(decoded_on.index or 0) if self._stream is not None else None,
            prefetch=job.prefetch,
            decoding=decoding_on(job.source, decoded_on, job.decode, job.hw_decoder_load),
        )

    def next(self) -> tuple[Tensor, ...]:
        self._graph.run() if self._stream is None else self._graph.run(self._stream)
        return ()

    def close(self) -> None:
        self._graph = None


class _DataLoader:
    """A torch DataLoader whose workers make normalised images."""

    def __init__(self, job: Job, batches: Any) -> None:
        self._device, self._dtype = job.device, job.dtype
        self.ahead = max(1, job.workers * _FETCHED_AHEAD) + 1
        self._batches: Iterator[Any] | None = endless(batches)

    def next(self) -> tuple[Tensor, ...]:
        assert self._batches is not None
        images, *augmented, _ = next(self._batches)
        # to the device first: .to(device, dtype) converts on the CPU
        return tuple(part.to(self._device, non_blocking=True).to(self._dtype) for part in (images, *augmented))

    def close(self) -> None:
        self._batches = None  # the last reference: its workers end


class _Pictures(torch.utils.data.Dataset):
    """The pictures of a source, one for each entry of `order`, through a transform.

    Args:
        source: the pictures.
        order: rows.
        read: source and row -> what the transform takes.
    """

    transform: Callable[[Any], Any]

    def __init__(self, source: Source, order: np.ndarray, read: Callable[[Source, int], Any]) -> None:
        self._source, self._order, self._read = source, order, read

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        row = int(self._order[index])
        images = self.transform(self._read(self._source, row))
        label = int(self._source.labels[row])
        return (*images, label) if isinstance(images, tuple) else (images, label)


class _Views:
    """The base view, and with an augmentation a second view made from it, both normalised."""

    def __init__(self, base: Callable[[Any], Any], augment: Callable[[Any], Any] | None, finish: Callable) -> None:
        self._base, self._augment, self._finish = base, augment, finish

    def __call__(self, picture: Any) -> Any:
        image = self._base(picture)
        if self._augment is None:
            return self._finish(image)
        return self._finish(image), self._finish(self._augment(image))


def _open_dalikd(job: Job) -> Side:
    return _Dalikd(job, torch.device("cpu"))


def _open_dalikd_mixed(job: Job) -> Side:
    return _Dalikd(job, job.device)


def _open_decode(job: Job) -> Side:
    return _Decode(job, torch.device("cpu"))


def _open_decode_mixed(job: Job) -> Side:
    return _Decode(job, job.device)


def _open_torchvision_pil(job: Job) -> Side:
    return _DataLoader(job, pil_batches(job))


def _open_torchvision_io(job: Job) -> Side:
    from torchvision.transforms import v2

    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(job.source.mean, job.source.std)]
    return _DataLoader(job, _torch_batches(job, _read_tensor, v2, v2.Compose(finish)))


def _open_timm(job: Job) -> Side:
    from timm.data.loader import create_loader

    on_gpu = job.device.type == "cuda"
    batches = create_loader(
        _Pictures(job.source, _order(job), _read_pil),  # type: ignore[arg-type] - it needs len, getitem and transform
        input_size=job.view.size,
        batch_size=job.batch_size,
        is_training=True,
        color_jitter=0.0,
        scale=job.view.scale,
        ratio=job.view.ratio,
        interpolation=job.view.interpolation,
        mean=job.source.mean,
        std=job.source.std,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
        use_prefetcher=on_gpu,
        pin_memory=on_gpu,
        device=job.device,
    )
    return _DataLoader(job, batches)


@dataclass(frozen=True)
class _Backend:
    """One row of the table: how to open it, and what it cannot do."""

    open: Callable[[Job], Side]
    needs_gpu: bool = False
    records: bool = False  # reads tars and TFRecords
    own_order: bool = False  # shuffles what it is given
    files_only: bool = False
    crops: frozenset[str] = frozenset({"random_resized_crop", "pad_crop"})
    augmentations: frozenset[str] = frozenset({"identity", "flip", "crop_flip", "autoaugment"})


_ALL_AUGMENTATIONS = frozenset(AUGMENTATIONS)
_WINDOWS = {"files_only": True, "crops": frozenset({"random_resized_crop"}), "augmentations": frozenset({"identity"})}

#: The loaders by name.
BACKENDS: dict[str, _Backend] = {
    "dalikd": _Backend(_open_dalikd, records=True, augmentations=_ALL_AUGMENTATIONS),
    "dalikd-mixed": _Backend(_open_dalikd_mixed, needs_gpu=True, records=True, augmentations=_ALL_AUGMENTATIONS),
    "torchvision-pil": _Backend(_open_torchvision_pil),
    "torchvision-io": _Backend(_open_torchvision_io),
    "timm": _Backend(
        _open_timm, own_order=True, crops=frozenset({"random_resized_crop"}), augmentations=frozenset({"identity"})
    ),
    "decode": _Backend(_open_decode, **_WINDOWS),
    "decode-mixed": _Backend(_open_decode_mixed, needs_gpu=True, **_WINDOWS),
}


def runnable(wanted: Sequence[str], device: torch.device) -> list[str]:
    """Check the names of loaders; "all" stands for those that run on this device.

    Raises:
        ValueError: a name is unknown, or its loader cannot run here.
    """
    here = [name for name, backend in BACKENDS.items() if device.type == "cuda" or not backend.needs_gpu]
    named = [name for entry in wanted for name in (here if entry == "all" else [entry])]
    for name in check_names("--backends", named, BACKENDS):
        if name not in here:
            raise ValueError(f"--backends {name} needs a GPU and batches end on the CPU: there are {', '.join(here)}")
    return list(dict.fromkeys(named))


def cannot(name: str, job: Job, cache: str = "warm") -> str | None:
    """What a loader lacks for a job, or None."""
    backend = BACKENDS[name]
    if job.source.shards is not None and not backend.records:
        return "a reader of tars and TFRecords"
    if job.source.files is None and backend.files_only:
        return "files"
    if cache == "cold" and backend.own_order:
        return "an order that meets no picture twice (cold page cache)"
    if job.view.crop not in backend.crops:
        return job.view.crop
    return None if job.augmentation in backend.augmentations else job.augmentation


def open_side(name: str, job: Job) -> Side:
    """Start a loader."""
    return BACKENDS[name].open(job)


# ---------------------------------------------------------------------------------------------- torchvision


def pil_batches(job: Job) -> Any:
    """The DataLoader over Pillow: normalised images, with an augmentation augmented ones, and labels, on the host."""
    from torchvision import transforms

    finish = [transforms.ToTensor(), transforms.Normalize(job.source.mean, job.source.std)]
    return _torch_batches(job, _read_pil, transforms, transforms.Compose(finish))


def _torch_batches(job: Job, read: Callable[[Source, int], Any], module: Any, finish: Callable) -> Any:
    """A DataLoader over torchvision's transforms.

    Args:
        job: the work.
        read: decodes a picture.
        module: torchvision.transforms or its v2: their classes have the same names.
        finish: makes normalised float images.
    """
    pictures = _Pictures(job.source, _order(job), read)
    pictures.transform = _Views(_base_view(job.view, module), _augmentation(job, module), finish)
    return torch.utils.data.DataLoader(
        pictures,
        job.batch_size,
        num_workers=job.workers,
        drop_last=True,
        persistent_workers=job.workers > 0,
        pin_memory=job.device.type == "cuda",
    )


def _base_view(view: View, module: Any) -> Callable[[Any], Any]:
    resize = {"interpolation": module.InterpolationMode[view.interpolation.upper()], "antialias": True}
    if view.crop == "random_resized_crop":
        crop = [module.RandomResizedCrop(view.size, view.scale, view.ratio, **resize)]
    else:
        crop = [module.Resize(view.size, **resize), module.CenterCrop(view.size), _pad_crop(view, module)]
    return module.Compose([*crop, module.RandomHorizontalFlip()])


def _augmentation(job: Job, module: Any) -> Callable[[Any], Any] | None:
    view = job.view
    if job.augmentation == "identity":
        return None
    if job.augmentation == "autoaugment":
        return module.AutoAugment(module.AutoAugmentPolicy(policy_name(view.size)))
    flip = module.RandomHorizontalFlip()
    return flip if job.augmentation == "flip" else module.Compose([_pad_crop(view, module), flip])


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


def _order(job: Job) -> np.ndarray:
    """Epoch after epoch, each in an order of its own: int64 rows."""
    random = np.random.default_rng(0)
    epochs = -(-max(job.images, job.batch_size) // len(job.source))
    return np.concatenate([random.permutation(len(job.source)) for _ in range(epochs)])


def endless(batches: Any) -> Iterator[Any]:
    """Batches of a DataLoader, epoch after epoch."""
    while True:
        yield from batches


def _moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on another device: from pinned memory, without waiting."""
    if batch.images.device.type == device.type:
        return batch

    def move(tensor: Tensor) -> Tensor:
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)

    def moved_draws(draws: MixDraws) -> MixDraws:
        return draws._replace(**{name: move(part) for name, part in draws._asdict().items() if part is not None})

    return replace(
        batch,
        images=move(batch.images),
        augmented=tuple(map(move, batch.augmented)),
        labels=move(batch.labels),
        ids=move(batch.ids),
        mix=tuple(map(moved_draws, batch.mix)),
    )
