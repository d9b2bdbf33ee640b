"""What is known of each data set by its name: normalisation, sizes, the published cutout side, where to get it.

What follows from the image's side alone stands elsewhere: the crop's padding and the side that evaluation resizes to
in `data.py`, the AutoAugment policy in `policies.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

__all__ = ["DATASET_INFO", "DatasetInfo", "Finding", "Statistics", "cutout_side", "default_statistics"]

Color = tuple[float, float, float]


class Statistics(NamedTuple):
    """Per-channel `mean` and `std` of pixels scaled to 0..1 (RGB), and the usual `image_size` (side in pixels)."""

    mean: Color
    std: Color
    image_size: int


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """One row of the table.

    Attributes:
        mean: that the published recipes subtract, per channel, of pixels scaled to 0..1 (RGB).
        std: that they divide by.
        image_size: the usual side in pixels.
        cutout_side: of the published cutout square at that side, in pixels; None: a quarter of it.
        classes: how many there are as published; None: any number.
        images: how many there are as published, by split; empty: any number.
        a_class: fewest and most of one class as published, by split; empty: any number.
        downloadable: torchvision can fetch it.
        origin: where else to get it and how it must lie in its root; empty: it is the user's own.
    """

    mean: Color
    std: Color
    image_size: int
    cutout_side: int | None = None
    classes: int | None = None
    images: Mapping[str, int] = field(default_factory=dict)
    a_class: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    downloadable: bool = False
    origin: str = ""


def default_statistics(name: str) -> Statistics:
    """Usual mean, std and side of a data set by its name.

    Raises:
        ValueError: a name without statistics of its own; shards hold those of what they were made of.
    """
    if name not in DATASET_INFO:
        raise ValueError(f"data set {name!r} has no statistics of its own: give one of {', '.join(DATASET_INFO)}")
    info = DATASET_INFO[name]
    return Statistics(info.mean, info.std, info.image_size)


def cutout_side(name: str, size: int) -> int:
    """Side of cutout's square in pixels.

    Args:
        name: the data set's. Where nothing is published about it, a quarter of the image's side.
        size: the images' side in pixels. At another one than the data set's own, the published square in proportion.
    """
    info = DATASET_INFO.get(name)
    if info is None or info.cutout_side is None:
        return max(1, size // 4)
    return max(1, round(info.cutout_side * size / info.image_size))


class Finding(NamedTuple):
    """Whether a file or split at `place` is as published; `detail` says what was found."""

    place: str
    state: Literal["whole", "damaged", "missing", "different"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.state}{f' ({self.detail})' if self.detail else ''}"


# Not the data's own, but what ImageNet models have been trained with ever since.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)
_IMAGENET_ORIGIN = (
    "register at https://image-net.org, fetch ILSVRC 2012, and put the images into "
    "ROOT/train/<wnid>/*.JPEG and ROOT/val/<wnid>/*.JPEG"
)

# Cutout sides: 8 for CIFAR-100, 16 for Tiny-ImageNet and 56 at 224 pixels are those of Wang et al. (NeurIPS 2022), all
# a quarter of the side; 16, 20 and 32 those of the Cutout paper (DeVries and Taylor, 2017) for CIFAR-10, SVHN, STL-10.
DATASET_INFO: Mapping[str, DatasetInfo] = MappingProxyType(
    {
        "imagefolder": DatasetInfo(mean=_IMAGENET_MEAN, std=_IMAGENET_STD, image_size=224),
        "images": DatasetInfo(mean=_IMAGENET_MEAN, std=_IMAGENET_STD, image_size=224),
        "imagenet": DatasetInfo(
            mean=_IMAGENET_MEAN,
            std=_IMAGENET_STD,
            image_size=224,
            cutout_side=56,
            classes=1000,
            images={"train": 1_281_167, "val": 50_000},
            a_class={"train": (732, 1300), "val": (50, 50)},
            origin=_IMAGENET_ORIGIN,
        ),
        # A hundred classes of ImageNet; how many images depends on which.
        "imagenet100": DatasetInfo(
            mean=_IMAGENET_MEAN,
            std=_IMAGENET_STD,
            image_size=224,
            cutout_side=56,
            a_class={"train": (732, 1300), "val": (50, 50)},
            origin=_IMAGENET_ORIGIN,
        ),
        # Its own mean and std differ; the published recipes take ImageNet's.
        "tinyimagenet": DatasetInfo(
            mean=_IMAGENET_MEAN,
            std=_IMAGENET_STD,
            image_size=64,
            cutout_side=16,
            classes=200,
            images={"train": 100_000, "val": 10_000},
            a_class={"train": (500, 500), "val": (50, 50)},
            origin=(
                "fetch http://cs231n.stanford.edu/tiny-imagenet-200.zip, unpack it, and give the folder "
                "tiny-imagenet-200 as --data.root; it holds train/<wnid>/images/*.JPEG, val/images/*.JPEG and "
                "val/val_annotations.txt"
            ),
        ),
        # Over all pixels of the 50,000 training images, as most published CIFAR-10 recipes use them.
        "cifar10": DatasetInfo(
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            image_size=32,
            cutout_side=16,
            classes=10,
            images={"train": 50_000, "test": 10_000},
            downloadable=True,
        ),
        # The same computation; the values of the CRD protocol (Tian et al., ICLR 2020).
        "cifar100": DatasetInfo(
            mean=(0.5071, 0.4867, 0.4408),
            std=(0.2675, 0.2565, 0.2761),
            image_size=32,
            cutout_side=8,
            classes=100,
            images={"train": 50_000, "test": 10_000},
            downloadable=True,
        ),
        # What published distillation code divides by. The training images' own values are often given as
        # mean (0.4377, 0.4438, 0.4728), std (0.1980, 0.2010, 0.1970).
        "svhn": DatasetInfo(
            mean=_HALF,
            std=_HALF,
            image_size=32,
            cutout_side=20,
            classes=10,
            images={"train": 73_257, "test": 26_032, "extra": 531_131},
            downloadable=True,
        ),
        # What published transfer experiments divide by. The training images' own values are often given as
        # mean (0.4467, 0.4398, 0.4066), std (0.2603, 0.2566, 0.2713).
        "stl10": DatasetInfo(
            mean=_HALF,
            std=_HALF,
            image_size=96,
            cutout_side=32,
            classes=10,
            images={"train": 5_000, "test": 8_000},
            downloadable=True,
        ),
        # Over all pixels of the 1,347 training JPEGs; grey, so the channels are equal.
        "digits": DatasetInfo(mean=(0.3092, 0.3092, 0.3092), std=(0.3479, 0.3479, 0.3479), image_size=32, classes=10),
    }
)
