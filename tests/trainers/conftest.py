"""Small images, nets and loops for the trainers' tests."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from dalikd.kd.backbones import create_model, factory
from dalikd.kd.backbones.auxiliary import AuxiliaryNet
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.losses import KD
from dalikd.kd.teacher import Teacher, Teachers
from dalikd.pipelines.data import DataConfig
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.trainers.augmentation import Augmenter, MixOptions
from dalikd.trainers.launch import Precision, autocast_type, start
from dalikd.trainers.loop import Loop
from dalikd.trainers.tasks.base import TrainingOptions
from dalikd.trainers.tasks.distill import Distillation, DistillOptions
from dalikd.trainers.tasks.mutual import HsakdMutual
from dalikd.trainers.tasks.supervised import HsakdTeacher, Supervised, TrainOptions
from dalikd.trainers.tracking import RunFolder

HALF = (0.5, 0.5, 0.5)


class SmallNet(nn.Module):
    """A convolution or two, with or without batch normalisation, dropout too."""

    def __init__(self, num_classes: int = 3, norm: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(32, num_classes)

    def stage_modules(self) -> list[nn.Module]:
        return [self.conv, self.norm, self.dropout]

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.adaptive_avg_pool2d(self.norm(self.conv(images)).relu(), 2)
        return self.fc(self.dropout(features.flatten(1)))


def net(seed: int = 0, **options: Any) -> Normalized:
    torch.manual_seed(seed)
    return Normalized(SmallNet(**options), HALF, HALF)


def net_with_heads(seed: int = 0) -> Normalized:
    """A resnet8_aux without batch statistics."""
    torch.manual_seed(seed)
    model = create_model("resnet8_aux", 3)
    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return Normalized(model, HALF, HALF)


def tinted_images(count: int, classes: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, S, S, 3] noise, brighter in one part of the channels for each class; int64 labels [N]."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = random.integers(0, 120, (count, side, side, 3), dtype=np.uint8)
    tint = np.linspace(0, 100, classes)[labels]
    images[..., 0] += tint[:, None, None].astype(np.uint8)
    return images, labels


def source(count: int = 96, classes: int = 3, side: int = 12, seed: int = 0) -> Source:
    images, labels = tinted_images(count, classes, side, seed)
    names = tuple(f"class{number}" for number in range(classes))
    return Source(
        name="tinted",
        split="train",
        classes=names,
        labels=labels,
        mean=HALF,
        std=HALF,
        image_size=side,
        arrays=images,
    )


def loop(
    path: Path,
    accelerator: Accelerator,
    *,
    options: TrainingOptions | None = None,
    student: Normalized | None = None,
    peer: Normalized | None = None,
    teacher: Normalized | Sequence[Normalized] | None = None,
    train: Source | None = None,
    val: Source | None = None,
) -> Loop:
    """A loop over images in memory: supervised, or distillation where the options say so."""
    options = options or TrainOptions(batch_size=32, mix=MixOptions(group=8), epochs=2)
    train, val = train or source(), val or source(41, seed=1)
    student = student or net()
    view = View(train.image_size, "pad_crop", padding=1)
    augmenter = Augmenter(options.augmentation, options.mix, train, view, options.seed)
    world, rank = accelerator.num_processes, accelerator.process_index
    sampler = Sampler(
        len(train), options.batch_size, options.seed, world=world, rank=rank, accumulation=options.accumulation,
        group=options.mix.group,
    )  # fmt: skip
    whole = Sampler(len(val), world * 16, shuffle=False, drop_last=False, world=world, rank=rank)
    same = DrawSpec(View(val.image_size, "center_crop", resize=val.image_size))
    if isinstance(options, DistillOptions):
        autocast = autocast_type(accelerator.mixed_precision)
        nets = [teacher or net(1)] if not isinstance(teacher, Sequence) else teacher
        asked = [Teacher(one, accelerator.device, autocast, fold_bn=options.teacher.fold_bn) for one in nets]
        by_entropy, names = options.teacher_ensemble == "entropy", [f"net{number}" for number in range(len(nets))]
        several = Teachers(asked, names, options.teacher_weights, by_entropy=by_entropy)
        seen_by = several if isinstance(teacher, Sequence) else asked[0]
        task: Any = Distillation(
            student, seen_by, options.loss, augmenter, accelerator, len(train.classes), metric=options.metric,
            joint_forward=options.joint_forward, compile_mode=options.compile, side=train.image_size,
            labels=train.labels, batch=sampler.microbatch,
        )  # fmt: skip
    else:
        task = (HsakdTeacher if isinstance(student.model, AuxiliaryNet) else Supervised)(student, augmenter)
        if peer is not None:
            task = HsakdMutual([student, peer], augmenter)
    loaders = (
        Loader(train, sampler, augmenter.draw_spec, device=accelerator.device),
        Loader(val, whole, same, device=accelerator.device),
    )
    return Loop(task, *loaders, options, accelerator, RunFolder(path, accelerator.is_main_process), {})


@pytest.fixture(scope="module", autouse=True)
def small_model() -> Iterator[None]:
    """Lets commands that run in this process build the net by the name "small", in this folder's tests alone."""
    factory._BUILDERS["small"] = SmallNet
    yield
    factory._BUILDERS.pop("small", None)


@pytest.fixture
def accelerator() -> Accelerator:
    return start("cpu", "fp32")


@pytest.fixture
def make_net() -> Callable[..., Normalized]:
    return net


@pytest.fixture
def make_net_with_heads() -> Callable[..., Normalized]:
    return net_with_heads


@pytest.fixture
def make_source() -> Callable[..., Source]:
    return source


@pytest.fixture
def make_loop(tmp_path: Path, accelerator: Accelerator) -> Callable[..., Loop]:
    """Loops on the CPU, each in a folder of its own."""

    def make(name: str = "run", on: Accelerator = accelerator, **parts: Any) -> Loop:
        return loop(tmp_path / name, on, **parts)

    return make


@pytest.fixture
def make_cuda_loop(tmp_path: Path) -> Callable[..., Loop]:
    def make(name: str = "run", precision: Precision = "fp32", **parts: Any) -> Loop:
        return loop(tmp_path / name, start("cuda", precision), **parts)

    return make


@pytest.fixture
def graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile makes its graphs, forward and backward, and runs them operation by operation: no C++ is compiled,
    which would take most of a test's time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of 32x32 JPEGs: three tinted classes, 150 training and 51 validation images."""
    root = tmp_path_factory.mktemp("tinted")
    for split, count, seed in (("train", 150, 0), ("val", 51, 1)):
        images, labels = tinted_images(count, 3, 32, seed)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / split / f"class{label}" / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, quality=95)
    return root


@pytest.fixture
def data(tree: Path) -> DataConfig:
    return DataConfig(root=str(tree), image_size=32, threads=1)


@pytest.fixture
def distill_options() -> Callable[..., DistillOptions]:
    def make(**options: Any) -> DistillOptions:
        return DistillOptions(**{"batch_size": 32, "mix": MixOptions(group=8), "epochs": 2, "loss": KD(), **options})

    return make
