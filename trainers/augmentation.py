"""The augmentations by name: which view DALI makes, what is mixed on the device, and how candidates are picked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from dalikd.kd.mixing import MixDraws, Mixed, cutmix, cutout, mixup
from dalikd.kd.teacher import STUDENT_ENTROPY, TEACHER_ENTROPY, Criterion
from dalikd.pipelines.augment import AugmentedView, DrawSpec, View
from dalikd.pipelines.loader import Batch
from dalikd.pipelines.sources import Source

__all__ = ["AUGMENTATIONS", "Augmentation", "Augmenter", "MixOptions", "augmentation_names"]

MixFunction = Callable[[Tensor, MixDraws], Mixed]


@dataclass
class MixOptions:
    """How augmentations are drawn.

    Args:
        mode: per_sample (every image draws its own parameters), or per_batch (one draw for a whole mix group: one flip,
            crop, policy, hole, lam and box, as in the published code).
        mix_group: consecutive images that mix among themselves and share a pool of picks; published: 64.
        alpha: lam of mixup and cutmix is drawn from Beta(alpha, alpha).
        cutout_side: side of the cutout square in pixels; default: 16 for cifar10, a quarter of the image size else.
        mix_n_run: runs of the mixing that make the pool picks are taken from.
    """

    mode: Literal["per_sample", "per_batch"] = "per_sample"
    mix_group: int = 64
    alpha: float = 1.0
    cutout_side: int | None = None
    mix_n_run: int = 2


@dataclass(frozen=True)
class _Setting:
    """What a mixing function may depend on besides images and draws."""

    cutout_side: int
    fill: tuple[float, ...]  # pixel values: the data's mean, which is zero after normalising


@dataclass(frozen=True)
class Augmentation:
    """One row of the table.

    Attributes:
        view: the per-image part, made by the loader.
        mix: builds the batch-level part, applied on the device.
        partner: whom an image is mixed with, inside its mix group.
        criterion: how picks are made out of several runs of `mix`.
    """

    view: AugmentedView = "none"
    mix: Callable[[_Setting], MixFunction] | None = None
    partner: Literal["none", "permutation", "derangement"] = "none"
    criterion: Criterion | None = None


_CUTMIX = Augmentation(mix=lambda _: cutmix, partner="derangement")

AUGMENTATIONS: dict[str, Augmentation] = {
    "identity": Augmentation(),
    "flip": Augmentation(view="flip"),
    "crop_flip": Augmentation(view="crop_flip"),
    "cutout": Augmentation(mix=lambda setting: partial(cutout, side=setting.cutout_side, fill=setting.fill)),
    "autoaugment": Augmentation(view="autoaugment"),
    "mixup": Augmentation(mix=lambda _: mixup, partner="permutation"),
    "cutmix": _CUTMIX,
    "cutmixpick_student": replace(_CUTMIX, criterion=STUDENT_ENTROPY),
    "cutmixpick_teacher": replace(_CUTMIX, criterion=TEACHER_ENTROPY),
}


def augmentation_names(wanted: Sequence[str]) -> list[str]:
    """Check names; "all" stands for every one.

    Raises:
        ValueError: a name is unknown.
    """
    names = [name for entry in wanted for name in (AUGMENTATIONS if entry == "all" else [entry])]
    for name in names:
        if name not in AUGMENTATIONS:
            close = get_close_matches(name, AUGMENTATIONS) or list(AUGMENTATIONS)
            raise ValueError(f'unknown --augmentation "{name}": did you mean {", ".join(close)}?')
    return list(dict.fromkeys(names))


class Augmenter:
    """An augmentation bound to a data set: draws for the loader, candidates from its batches.

    Args:
        name: of the augmentation.
        options: how it is drawn.
        source: the data set, for the fill of cutout and its published side.
        view: the base view.
        seed: of all draws.

    Raises:
        ValueError: an unknown name, or options that do not fit.
    """

    def __init__(self, name: str, options: MixOptions, source: Source, view: View, seed: int) -> None:
        self.name = augmentation_names([name])[0]
        self.augmentation = AUGMENTATIONS[self.name]
        _check_options(options)
        self.group = options.mix_group
        self.runs = 0 if self.augmentation.mix is None else options.mix_n_run if self.augmentation.criterion else 1
        self.draw_spec = DrawSpec(
            view,
            seed,
            self.augmentation.view,
            self.augmentation.partner,
            self.runs,
            options.alpha,
            options.mode,
            options.mix_group,
        )
        side = options.cutout_side or (16 if source.name == "cifar10" else view.size // 4)
        setting = _Setting(side, tuple(255 * value for value in source.mean))
        self._mix = self.augmentation.mix(setting) if self.augmentation.mix else None

    @property
    def criterion(self) -> Criterion | None:
        """How picks are made, or None."""
        return self.augmentation.criterion

    @property
    def labels_are_mixed(self) -> bool:
        """Whether an augmented image shows two samples."""
        return self.augmentation.partner != "none"

    @property
    def makes_candidates(self) -> bool:
        """Whether there are images beside the originals (not so for identity)."""
        return self._mix is not None or self.augmentation.view != "none"

    def candidates(self, batch: Batch) -> Mixed | None:
        """runs * B augmented images, run after run; None where the originals are the candidates (identity)."""
        return self.mix(batch.pixels, batch.augmented_pixels, batch.mix)

    def mix(self, pixels: Tensor, augmented: Tensor | None, draws: Sequence[MixDraws]) -> Mixed | None:
        """The same of a batch's tensors: originals and augmented view [B, 3, S, S], and the draws of each run."""
        if self._mix is not None:
            runs = [self._mix(pixels, of_run) for of_run in draws]
            return runs[0] if len(runs) == 1 else Mixed(*(torch.cat(parts) for parts in zip(*runs, strict=True)))
        if augmented is None:
            return None
        own = torch.arange(len(pixels), device=pixels.device)
        return Mixed(augmented, own, torch.ones(len(pixels), device=own.device))


def _check_options(options: MixOptions) -> None:
    if options.mix_group < 1:
        raise ValueError(f"--mix_group {options.mix_group}: give at least 1 (published: 64)")
    if options.alpha <= 0:
        raise ValueError(f"--alpha {options.alpha}: give a number above 0 (published: 1)")
    if options.mix_n_run < 1:
        raise ValueError(f"--mix_n_run {options.mix_n_run}: give at least 1 (published: 2)")
    if options.cutout_side is not None and options.cutout_side < 1:
        raise ValueError(f"--cutout_side {options.cutout_side}: give at least 1 pixel")
