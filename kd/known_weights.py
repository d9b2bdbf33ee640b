"""Published weight files that were looked at: their checksums, their nets, and how their images were normalised.

A file is known by its content, whatever it is called. The list holds only what was verified: the checksum by a copy of
the file or by the digits that its publisher put into its name, the net by its published code, the normalisation by the
published training script or log. Files whose checksum nobody published are known by the folders that their publisher
puts them in. Other files work as well; what they need is said by hand.

A file may be a member of a tar, `FILE.tar:MEMBER`, which is read without unpacking it. Of a file of several nets one is
meant by its name, `FILE:net1`.
"""

import hashlib
import re
import string
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import torch
from torch import nn

from dalikd.kd.backbones.layers import Normalisation

__all__ = [
    "KNOWN",
    "LAYOUTS",
    "NET_NAME",
    "KnownWeights",
    "check_sha256",
    "file_and_member",
    "file_and_net",
    "file_sha256",
    "identify",
    "open_weights",
    "published_classes",
    "weights_digest",
]

#: what nets that learned together are called in one file
NET_NAME = r"net\d+"
_FEWEST_DIGITS = 8  # of a checksum, as in published file names

_IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# not the deviation over all pixels, which a data set gives: the mean of the single images'
_CIFAR10 = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CIFAR100 = Normalisation((0.507, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761))

_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class KnownWeights:
    """A published file.

    Args:
        file: its published name.
        sha256: hexadecimal digits of its checksum: all 64, or the leading ones in its name; empty: nobody published it,
            and the file is known by its path.
        model: its net, as `create_model` names it.
        data: what it was trained on.
        normalisation: of the images it was trained on.
        top1: published accuracy on the test images, in percent, where it is known.
        publisher: where it comes from.
    """

    file: str
    sha256: str
    model: str
    data: str
    normalisation: Normalisation
    top1: float | None
    publisher: str

    def __str__(self) -> str:
        return f"{self.model}, trained on {self.data} ({self.publisher})"


def _option_a(depth: int, sha256: str, top1: float) -> KnownWeights:
    publisher = "https://github.com/akamaster/pytorch_resnet_cifar10"
    file, model = f"resnet{depth}-{sha256[:8]}.th", f"resnet{depth}_option_a"
    return KnownWeights(file, sha256, model, "CIFAR-10", _IMAGENET, top1, publisher)


def _cifar_models(classes: int, model: str, sha256: str, top1: float) -> KnownWeights:
    publisher = "https://github.com/chenyaofo/pytorch-cifar-models"
    file, normalisation = f"cifar{classes}_{model}-{sha256}.pt", _CIFAR10 if classes == 10 else _CIFAR100
    return KnownWeights(file, sha256, model, f"CIFAR-{classes}", normalisation, top1, publisher)


def _torchvision(model: str, sha256: str, top1: float) -> KnownWeights:
    publisher = "https://download.pytorch.org/models"
    return KnownWeights(f"{model}-{sha256}.pth", sha256, f"timm:{model}", "ImageNet", _IMAGENET, top1, publisher)


KNOWN = (
    _option_a(20, "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8", 91.73),
    _option_a(32, "d509ac18", 92.63),
    _option_a(44, "014dd654", 93.10),
    _option_a(56, "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367", 93.39),
    _option_a(110, "1d1ed7c2", 93.68),
    _cifar_models(10, "resnet20", "4118986f", 92.60),
    _cifar_models(10, "resnet32", "ef93fc4d", 93.53),
    _cifar_models(10, "resnet44", "2a3cabcb", 94.01),
    _cifar_models(10, "resnet56", "187c023a", 94.37),
    _cifar_models(100, "resnet20", "23dac2f1", 68.83),
    _cifar_models(100, "resnet32", "84213ce6", 70.16),
    _cifar_models(100, "resnet44", "ffe32858", 71.63),
    _cifar_models(100, "resnet56", "f2eff4c8", 72.63),
    _torchvision("resnet18", "f37072fd", 69.76),
    _torchvision("resnet34", "b627a593", 73.31),
    _torchvision("resnet50", "0676ba61", 76.13),
    _torchvision("resnet101", "63fe2227", 77.37),
    _torchvision("resnet152", "394f9c45", 78.31),
    _torchvision("wide_resnet50_2", "95faca4d", 78.47),
)


class Layout(NamedTuple):
    """Where a publisher puts files whose checksums are not known."""

    path: re.Pattern[str]  # its end, with the net's name as "model"
    data: str
    normalisation: Normalisation
    publisher: str


_CRD_CIFAR100 = Normalisation((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_CRD_TEACHERS = "resnet56|resnet110|resnet32x4|wrn_40_2|vgg13|ResNet50"

LAYOUTS = (
    Layout(
        re.compile(rf"(?<![^/])cifar_teachers/(?P<model>{_CRD_TEACHERS})_vanilla/ckpt_epoch_240\.pth$"),
        *("CIFAR-100", _CRD_CIFAR100, "https://github.com/megvii-research/mdistiller"),
    ),
    Layout(
        re.compile(rf"(?<![^/])(?P<model>{_CRD_TEACHERS})_vanilla/ckpt_epoch_240\.pth$"),
        *("CIFAR-100", _CRD_CIFAR100, "https://github.com/HobbitLong/RepDistiller"),
    ),
    Layout(
        re.compile(
            r"(?<![^/])train_\w+_cifar_(?:tarch_\w+_)?arch_(?P<model>\w+)_dataset_cifar100_seed\d+/\w+\.pth\.tar$"
        ),
        *("CIFAR-100", _CRD_CIFAR100, "https://github.com/winycg/HSAKD"),
    ),
)


def published_classes(data: str) -> tuple[str, ...] | None:
    """The classes of a published data set in the order of its labels: names, for ImageNet WordNet ids; None: not known.

    Args:
        data: as `KnownWeights.data` says it.
    """
    if data == "ImageNet":
        from timm.data.imagenet_info import ImageNetInfo

        return tuple(ImageNetInfo("imagenet-1k").label_names())
    names = {"CIFAR-10": _CIFAR10_CLASSES, "CIFAR-100": _CIFAR100_CLASSES}.get(data)
    return None if names is None else tuple(names.split())


def identify(path: str | Path) -> KnownWeights | None:
    """The known file that a file is, by its content, or else by the folders it lies in; None for any other.

    Raises:
        ValueError: it has the name of a known file and another content.
    """
    path = file_and_net(path)[0]
    digest = file_sha256(path)
    for known in KNOWN:
        if digest.startswith(known.sha256):
            return known
        if path.name == known.file:
            raise ValueError(
                f"{path} is a damaged download: its SHA-256 begins with {digest[:8]}, that of the published file with "
                f"{known.sha256[:8]}; fetch it again from {known.publisher}, or rename it if it is a file of your own"
            )
    place = path.absolute().as_posix().replace(".tar:", "/")  # a tar is named as the folder in it
    for layout in LAYOUTS:
        if found := layout.path.search(place):
            return KnownWeights(found[0], "", found["model"], layout.data, layout.normalisation, None, layout.publisher)
    return None


def check_sha256(path: str | Path, sha256: str) -> None:
    """Check a file against a checksum.

    Args:
        path: the file.
        sha256: hexadecimal digits, all 64 or the leading ones, at least 8.

    Raises:
        ValueError: it is another or a damaged file, or `sha256` is no checksum.
    """
    expected = sha256.strip().lower()
    if not _FEWEST_DIGITS <= len(expected) <= 64 or not set(expected) <= set(string.hexdigits):
        raise ValueError(f'"{sha256}" is no SHA-256: give its 64 hexadecimal digits, or at least the first 8')
    digest = file_sha256(path)
    if not digest.startswith(expected):
        raise ValueError(f"{path} is damaged or another file: its SHA-256 is {digest}, not {expected}")


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits. A file that has not changed is read once."""
    state = file_and_member(path)[0].stat()
    return _sha256(Path(path).absolute(), state.st_size, state.st_mtime_ns, state.st_ino)


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed: int, inode: int) -> str:  # noqa: ARG001
    with open_weights(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


def file_and_member(path: str | Path) -> tuple[Path, str]:
    """The file on the disk, and which member of it is meant where it is a tar; empty: the file itself."""
    path = file_and_net(path)[0]
    tar, _, member = str(path).partition(".tar:")
    return (Path(f"{tar}.tar"), member) if member and not Path(path).exists() else (path, "")


def file_and_net(path: str | Path) -> tuple[Path, str]:
    """The path of a file, and which of several nets in it is meant, as in FILE:net1; empty: the only one."""
    file, _, net = str(path).rpartition(":")
    chosen = re.fullmatch(NET_NAME, net) and not Path(path).exists()
    return (Path(file), net) if chosen else (Path(path), "")


@contextmanager
def open_weights(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file, or a member of a tar by its path in there or the end of it. Links in a tar are not followed.

    Raises:
        OSError: it cannot be read.
        ValueError: the tar is damaged, or has no such file, or several; lists those that it has.
    """
    file, name = file_and_member(path)
    if not name:
        with file.open("rb") as opened:
            yield opened
        return
    try:
        archive = tarfile.open(file, "r:")  # noqa: SIM115 - a compressed one could unpack to any size
        members = {member.name: member for member in _checked(archive, file.stat().st_size) if member.isreg()}
    except (tarfile.TarError, ValueError, OverflowError, EOFError, MemoryError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} is damaged or not a tar: {reason}") from error
    with archive:
        found = [member for each, member in members.items() if each == name or each.endswith(f"/{name}")]
        content = archive.extractfile(found[0]) if len(found) == 1 else None
        if content is None:
            raise ValueError(
                f"{file} has {len(found) or 'no'} files {name}: give one of {', '.join(sorted(members)) or 'none'}"
            )
        yield content  # pyright: ignore[reportReturnType]


def _checked(archive: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar of so many bytes.

    Raises:
        ValueError: one does not lie in it, or its name or link leads out of the folder that it would be unpacked to.
    """
    for member in archive:
        if member.size < 0 or (member.isreg() and member.offset_data + member.size > size) or member.issparse():
            raise ValueError(f"{member.name[:80]!r} is not all in it")
        target = PurePosixPath(member.name).parent / member.linkname if member.issym() else member.linkname
        for path in map(PurePosixPath, (member.name, target)):
            depths = accumulate(-1 if part == ".." else 1 for part in path.parts)
            if path.is_absolute() or "\0" in str(path) or min(depths, default=0) < 0:
                raise ValueError(f"{member.name[:80]!r} leads out of the folder that it is unpacked to")
        yield member


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of a SHA-256 over names, types, shapes and values of a net's state, as it was loaded.

    Counters of batches are left out: files of the same weights may lack them.
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
