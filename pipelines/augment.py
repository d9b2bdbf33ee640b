"""What is drawn for a batch: the draws of its views and of its mixing, as arrays.

A *view* turns a stored picture into uint8 pixels of a fixed side. Training sees the base view; a per-image augmentation
adds an augmented view on top of it. Batch-level mixing (mixup, cutmix, cutout) happens later, on the device, from the
draws made here.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from dalikd.pipelines.draws import Stream, crop_windows, derangements, uniforms
from dalikd.pipelines.sampler import Microbatch

__all__ = ["AUGMENTED_VIEWS_IN_DALI", "AugmentedView", "DrawSpec", "Draws", "MixArrays", "View", "policy_table"]

AugmentedView = Literal["none", "flip", "crop_flip", "autoaugment"]
Partner = Literal["none", "permutation", "derangement"]

#: The augmented views that only DALI can make. Arrays in memory are gathered by torch for every other view.
AUGMENTED_VIEWS_IN_DALI: frozenset[str] = frozenset({"autoaugment"})


@dataclass(frozen=True)
class View:
    """How a stored picture becomes a square of `size` x `size` uint8 pixels.

    Attributes:
        size: side of the result in pixels.
        crop: random_resized_crop (window of random area and aspect ratio, resized; then a random flip), pad_crop
            (resize the short side to `size`, crop the centre, pad, crop at random, flip at random), center_crop
            (evaluation: resize the short side to `resize`, crop the centre). Parts of these: square (what pad_crop
            starts from), window (random_resized_crop before its resize and flip), whole (the picture as it is).
        resize: short side before the centre crop; only for center_crop.
        padding: pixels on each side; for pad_crop and the crop_flip augmentation.
        border: what the padding holds.
        interpolation: filter of every resize, with antialiasing.
        scale: area range of random_resized_crop.
        ratio: aspect ratio range of random_resized_crop.
    """

    size: int
    crop: Literal["random_resized_crop", "pad_crop", "center_crop", "square", "window", "whole"]
    resize: int = 0
    padding: int = 4
    border: Literal["zero", "reflect"] = "zero"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class MixArrays:
    """Draws of one mixing run: partner int64 [B] (row of this batch), lam float32 [B], center float32 [B, 2] (y, x)."""

    partner: np.ndarray
    lam: np.ndarray
    center: np.ndarray


@dataclass(frozen=True)
class Draws:
    """All draws of a microbatch: named arrays for the views, one MixArrays for each mixing run."""

    views: dict[str, np.ndarray]
    mix: tuple[MixArrays, ...]


@dataclass(frozen=True)
class DrawSpec:
    """Which draws a loader needs, and how they are addressed.

    Attributes:
        view: the base view; its draws are always one for each sample.
        seed: the run's seed.
        augmented: the per-image augmentation.
        partner: whether mixing takes a partner, and whether one may be one's own.
        runs: independent mixing runs (the pool factor of picking); 0 for no mixing.
        alpha: lam ~ Beta(alpha, alpha).
        mode: per_sample, or per_batch: one augmentation draw for a whole mix group, as published.
        mix_group: consecutive positions of the epoch's order that share partners and per_batch draws.
    """

    view: View
    seed: int = 0
    augmented: AugmentedView = "none"
    partner: Partner = "none"
    runs: int = 0
    alpha: float = 1.0
    mode: Literal["per_sample", "per_batch"] = "per_sample"
    mix_group: int = 64

    def draw(self, micro: Microbatch) -> Draws:
        """Draw everything for one microbatch: a function of (seed, epoch, row, group) alone."""
        groups = (micro.start + np.arange(len(micro.rows))) // self.mix_group
        views = self._base_draws(micro.epoch, micro.rows)
        addresses, spread = micro.rows, slice(None)
        if self.mode == "per_batch":
            addresses, spread = np.unique(groups, return_inverse=True)
        streams = self._streams
        if not streams:
            return Draws(views, ())
        numbers = {key: value[spread] for key, value in uniforms(self.seed, micro.epoch, addresses, streams).items()}
        views |= self._augmented_draws(numbers)
        partners = (self._partners(micro.epoch, groups, run) for run in range(self.runs))
        mix = tuple(self._mix(numbers[Stream.MIX + run], partner) for run, partner in enumerate(partners))
        return Draws(views, mix)

    @cached_property
    def _streams(self) -> dict[int, int]:
        counts = {"none": {}, "flip": {Stream.AUGMENTED_VIEW: 3}, "crop_flip": {Stream.AUGMENTED_VIEW: 3}}
        counts["autoaugment"] = {Stream.POLICY: 5}
        return {**counts[self.augmented], **{Stream.MIX + run: 3 for run in range(self.runs)}}

    def _base_draws(self, epoch: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        if self.view.crop in ("center_crop", "square", "whole"):
            return {}
        if self.view.crop == "pad_crop":
            numbers = uniforms(self.seed, epoch, rows, {Stream.BASE_VIEW: 3})[Stream.BASE_VIEW]
            return {"crop": self._crop(numbers), "flip": _flip(numbers)}
        numbers = uniforms(self.seed, epoch, rows, {Stream.BASE_VIEW: 23})[Stream.BASE_VIEW]
        tries, offsets = crop_windows(numbers[:, :22], self.view.scale, self.view.ratio)
        return {"tries": tries, "offsets": offsets, "flip": _flip(numbers[:, 20:])}

    def _augmented_draws(self, numbers: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
        if self.augmented == "autoaugment":
            return _policy_draws(numbers[Stream.POLICY], policy_name(self.view.size))
        if self.augmented == "none":
            return {}
        view = numbers[Stream.AUGMENTED_VIEW]
        crop = {"augmented_crop": self._crop(view)} if self.augmented == "crop_flip" else {}
        return {**crop, "augmented_flip": _flip(view)}

    def _crop(self, numbers: np.ndarray) -> np.ndarray:
        return np.floor(numbers[:, :2] * (2 * self.view.padding + 1)).astype(np.int32)

    def _partners(self, epoch: int, groups: np.ndarray, run: int) -> np.ndarray:
        rows = np.arange(len(groups))
        if self.partner == "none":
            return rows
        whole = len(groups) // self.mix_group * self.mix_group
        pieces = []
        for start, stop, size in ((0, whole, self.mix_group), (whole, len(groups), len(groups) - whole)):
            if start == stop:
                continue
            numbers = groups[start:stop:size]
            inside = derangements(self.seed, epoch, numbers, size, run, fixed_points=self.partner == "permutation")
            pieces.append((inside + (start + size * np.arange(len(numbers)))[:, None]).reshape(-1))
        return np.concatenate(pieces)

    def _mix(self, numbers: np.ndarray, partner: np.ndarray) -> MixArrays:
        lam = numbers[:, 0]
        if self.alpha != 1.0:
            from scipy.special import betaincinv

            lam = betaincinv(self.alpha, self.alpha, lam)
        return MixArrays(partner, lam.astype(np.float32), _below_one(numbers[:, 1:3]))


def _flip(numbers: np.ndarray) -> np.ndarray:
    return (numbers[:, 2] < 0.5).astype(np.int32)


def _below_one(numbers: np.ndarray) -> np.ndarray:
    """Round to float32 without reaching 1, so that floor(n x) stays below n."""
    return np.minimum(numbers.astype(np.float32), np.nextafter(np.float32(1), np.float32(0)))


def policy_name(size: int) -> Literal["cifar10", "imagenet"]:
    """The AutoAugment policy for a side: CIFAR-10's at 32 pixels, ImageNet's else (Cubuk et al., CVPR 2019)."""
    return "cifar10" if size <= 32 else "imagenet"


def policy_table(name: Literal["cifar10", "imagenet"]) -> tuple[list[str], np.ndarray]:
    """An AutoAugment policy as a table, from torchvision's published policies.

    Returns:
        names of the operations, the first one "identity"; and float64 [25, 2, 3]: for each sub-policy and step the
        operation's index, its probability and its magnitude bin of 0 to 9.
    """
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    policies = AutoAugment(AutoAugmentPolicy(name)).policies
    used = sorted({step[0] for policy in policies for step in policy})
    names = ["identity", *used]
    table = [[(names.index(op), share, magnitude or 0) for op, share, magnitude in policy] for policy in policies]
    return names, np.array(table, np.float64)


_TABLES: dict[str, np.ndarray] = {}


def _policy_draws(numbers: np.ndarray, policy: Literal["cifar10", "imagenet"]) -> dict[str, np.ndarray]:
    """Two operations each, with bins and signs; an operation that its probability leaves out becomes identity."""
    if policy not in _TABLES:
        _TABLES[policy] = policy_table(policy)[1]
    table = _TABLES[policy]
    steps = table[np.floor(numbers[:, 0] * len(table)).astype(np.int64)]  # [B, 2, 3]
    applied = numbers[:, 1:3] < steps[:, :, 1]
    return {
        "operation": np.where(applied, steps[:, :, 0], 0).astype(np.int32),
        "magnitude": steps[:, :, 2].astype(np.int32),
        "sign": (numbers[:, 3:5] < 0.5).astype(np.int32),
    }
