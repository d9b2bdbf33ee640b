"""Loader throughput against a torchvision DataLoader that does the same work, on the same machine in the same run.

    python -m dalikd.tools.bench.loader --root PHOTOS          photos in class folders, 224-pixel training views
    python -m dalikd.tools.bench.loader --arrays true          32-pixel pictures in memory (random pixels)

Both sides end in normalised float32 batches. Rounds alternate, so that a noisy neighbour hits both; the median is
printed with the range. Warm-up rounds are left out; files come from a warm page cache.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalikd.kd.normalize import Normalized
from dalikd.pipelines.augment import DrawSpec, View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source, open_source
from dalikd.tools.cli import run_function
from dalikd.trainers.tracking import versions, write_json


def run(
    root: str | None = None,
    arrays: bool = False,
    batch_size: int = 0,
    workers: int = 2,
    threads: int = 2,
    rounds: int = 5,
    images: int = 0,
    json: Path | None = None,
) -> dict[str, Any]:
    """Measure images per second of the loader and of a torchvision DataLoader, alternately.

    Args:
        root: class folders of photos.
        arrays: measure 32-pixel pictures in memory instead.
        batch_size: default 50 for photos, 512 for arrays.
        workers: of the DataLoader.
        threads: of DALI.
        rounds: counted rounds, after one of warm-up.
        images: in a round; default 500 for photos, 40,000 for arrays.
        json: file for the results.
    """
    if arrays == (root is not None):
        raise ValueError("give either --root PHOTOS or --arrays true")
    size, batch_size, images = (
        (32, batch_size or 512, images or 40_000) if arrays else (224, batch_size or 50, images or 500)
    )
    source = _random_pictures() if arrays else open_source("imagefolder", root, "train", split=".")
    view = View(size, "pad_crop" if arrays else "random_resized_crop")
    loader = Loader(source, Sampler(len(source), batch_size), DrawSpec(view), threads=threads)
    normalize = Normalized(torch.nn.Identity(), source.mean, source.std).normalize
    sides: dict[str, Iterator[Any]] = {
        "dalikd": (normalize(loader.next().pixels) for _ in iter(int, 1)),
        "torchvision": _endless(_torchvision_loader(source, view, batch_size, workers)),
    }
    rates = _alternate(sides, rounds, -(-images // batch_size), batch_size)
    report = {
        "what": f"{size}-pixel training views, normalised float32, batch {batch_size}",
        "images_per_second": rates,
        "ratio": statistics.median(rates["dalikd"]) / statistics.median(rates["torchvision"]),
        "python_side_us_per_image": _python_side(loader),
        "threads": threads,
        "workers": workers,
        **versions(torch.device("cpu")),
    }
    _print(report)
    if json is not None:
        write_json(json, report)
    return report


def _alternate(sides: dict[str, Iterator[Any]], rounds: int, batches: int, batch_size: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, batches_of in sides.items():
            started = time.perf_counter()
            for _ in range(batches):
                next(batches_of)
            if number:  # the first round warms up
                rates[name].append(batches * batch_size / (time.perf_counter() - started))
    return rates


def _python_side(loader: Loader, batch_size: int = 256, repetitions: int = 40) -> float:
    """Microseconds an image that sampler, draws and the feeding callback take, at a batch of 256: the median."""
    sampler = Sampler(len(loader.source), min(batch_size, len(loader.source)))
    own = Loader(loader.source, sampler, loader.spec)
    sampler.order(0)
    return statistics.median(_timed(own.feed, index) for index in range(repetitions)) / sampler.batch_size * 1e6


def _timed(function: Callable[[int], Any], index: int) -> float:
    started = time.perf_counter()
    function(index)
    return time.perf_counter() - started


def _random_pictures(count: int = 50_000) -> Source:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return Source(
        name="random",
        split="train",
        classes=("0", "1"),
        labels=np.arange(count) % 2,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=32,
        arrays=pixels,
    )


def _torchvision_loader(source: Source, view: View, batch_size: int, workers: int):
    from torchvision import transforms

    crop = (
        transforms.RandomCrop(view.size, padding=view.padding)
        if view.crop == "pad_crop"
        else transforms.RandomResizedCrop(view.size)
    )
    steps = [
        crop,
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(source.mean, source.std),
    ]
    pictures = _Pictures(source, transforms.Compose(steps))
    return torch.utils.data.DataLoader(
        pictures, batch_size, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, source: Source, transform: Callable[[Any], torch.Tensor]) -> None:
        self._source, self._transform = source, transform

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        source = self._source
        if source.arrays is not None:
            picture = Image.fromarray(source.arrays[row])
        else:
            with Image.open(source.path(row)) as file:
                picture = file.convert("RGB")
        return self._transform(picture), int(source.labels[row])


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _print(report: dict[str, Any]) -> None:
    print(report["what"])
    for name, rates in report["images_per_second"].items():
        median, low, high = statistics.median(rates), min(rates), max(rates)
        print(f"  {name:<12}{median:10.0f} images/s   ({low:.0f} to {high:.0f}, {len(rates)} rounds)")
    print(
        f"  ratio {report['ratio']:.2f}; Python side of the loader {report['python_side_us_per_image']:.1f} µs an image"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("bench loader", run, argv)


if __name__ == "__main__":
    main()
