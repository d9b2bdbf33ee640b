"""What a batch holds, and what is drawn for it: the draws of its views and of its mixing, as arrays.

A *view* turns a stored image into uint8 pixels of a fixed side. Training sees the base view; each per-image
augmentation adds an augmented view on top of it. Batch-level mixing (mixup, cutmix, cutout) happens later, on the
device, from the draws made here. A batch may have any number of both: none of them changes what another one draws.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dalikd.pipelines.draws import Microbatch, Stream, crop_windows, derangements, erasing_boxes, uniforms
from dalikd.pipelines.policies import (
    BINS,
    POLICIES,
    auto_augment_draws,
    policy_name,
    rand_augment_draws,
    trivial_augment_draws,
)

if TYPE_CHECKING:  # the process that decodes JPEG 2000 images imports this, and no torch
    from torch import Tensor

__all__ = [
    "AUGMENTED_VIEWS_IN_DALI",
    "MOST_RUNS",
    "AugmentedView",
    "Batch",
    "BatchPlan",
    "DrawSpec",
    "Draws",
    "MixDraws",
    "MixRun",
    "Schedule",
    "View",
    "ViewRun",
]

AugmentedView = Literal["flip", "crop_flip", "autoaugment", "randaugment", "trivialaugment"]
Partner = Literal["none", "permutation", "derangement", "first"]
Schedule = tuple[tuple[float, float], ...]  # (epoch, value), ascending from epoch 0

#: The augmented views that only DALI can make. Arrays in memory are gathered by torch where there is none of them.
AUGMENTED_VIEWS_IN_DALI: frozenset[str] = POLICIES

MOST_RUNS = 240  # streams set aside for each use
_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))  # what is rounded to float32 stays there: floor(n x) is below n


@dataclass(frozen=True)
class View:
    """How a stored image becomes a square of `size` x `size` uint8 pixels.

    Attributes:
        size: side of the result in pixels.
        crop: random_resized_crop (window of random area and aspect ratio, resized; then a random flip), pad_crop
            (resize the short side to `size`, crop the centre, pad, crop at random, flip at random), center_crop
            (evaluation: resize the short side to `resize`, crop the centre). Parts of these: square (what pad_crop
            starts from), window (random_resized_crop before its resize and flip), whole (the image as it is).
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
class ViewRun:
    """One augmented view of every image.

    Attributes:
        kind: what is done to the base view.
        run: which of several independent draws.
        ops: operations one after the other. It is for randaugment to choose; autoaugment has 2, trivialaugment 1.
        magnitude: of randaugment's operations, 0 to 30.
    """

    kind: AugmentedView
    run: int = 0
    ops: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        _check_run(self.run)
        if self.kind != "randaugment":  # equal views must compare equal, whatever was said of RandAugment
            object.__setattr__(self, "ops", 1 if self.kind == "trivialaugment" else 2)
            object.__setattr__(self, "magnitude", 9)
        if self.ops < 1:
            raise ValueError(f"--mix.randaugment_ops {self.ops}: give at least 1 (published: 2)")
        if not 0 <= self.magnitude < BINS["randaugment"]:
            raise ValueError(f"--mix.randaugment_magnitude {self.magnitude}: give 0 to 30 (published: 9)")

    @property
    def stream(self) -> tuple[int, int]:
        """Where its numbers come from, and how many an image takes."""
        first, further, count = {
            "flip": (Stream.AUGMENTED_VIEW, Stream.AUGMENTED_VIEW_RUN, 3),
            "crop_flip": (Stream.AUGMENTED_VIEW, Stream.AUGMENTED_VIEW_RUN, 3),
            "autoaugment": (Stream.POLICY, Stream.POLICY_RUN, 5),
            "randaugment": (Stream.RANDAUGMENT, Stream.RANDAUGMENT, 2 * self.ops),
            "trivialaugment": (Stream.TRIVIALAUGMENT, Stream.TRIVIALAUGMENT, 3),
        }[self.kind]
        return (further + self.run if self.run else int(first)), count


@dataclass(frozen=True)
class MixRun:
    """One run of a batch-level mixing: what is drawn for it.

    Attributes:
        partner: whether mixing takes a partner, and whether one may be one's own; first: everyone takes the first
            image of the mix group.
        run: which of several independent draws.
        alpha: lam ~ Beta(alpha, alpha), then floor + (ceiling - floor) x lam.
        floor: by epoch, each value until the next one's epoch; none: 0.
        ceiling: the same; none: 1.
        cells: uniform numbers an image, for masks by patches.
        box: whether to draw the box of random erasing.
        box_probability: of a box.
        box_scale: range of its area as a share of the image's.
        box_ratio: range of its height / width.
        layers: how many layers there are to draw one from; 0 to draw none.
    """

    partner: Partner = "none"
    run: int = 0
    alpha: float = 1.0
    floor: Schedule = ()
    ceiling: Schedule = ()
    cells: int = 0
    box: bool = False
    box_probability: float = 0.5
    box_scale: tuple[float, float] = (0.02, 0.33)
    box_ratio: tuple[float, float] = (0.3, 3.3)
    layers: int = 0

    def __post_init__(self) -> None:
        assert min(self.cells, self.layers) >= 0
        _check_run(self.run)
        _check_bounds(self)
        _check_box(self.box_probability, self.box_scale, self.box_ratio)

    def bounds(self, epoch: float) -> tuple[float, float]:
        """The least and the largest lam of an epoch: floor and ceiling."""
        return _value_at(self.floor, epoch, 0.0), _value_at(self.ceiling, epoch, 1.0)


class MixDraws(NamedTuple):
    """What chance decided in one mixing run: numpy arrays as drawn, tensors in a batch. The last three are there for
    the functions that use them."""

    partner: Any  # int64 [B], row of this batch to mix in
    lam: Any  # float32 [B], wanted share of the image itself
    center: Any  # float32 [B, 2], (y, x) as fractions of the height and width, in [0, 1)
    cells: Any = None  # float32 [B, cells], in [0, 1), one number for each cell of a grid, row by row
    box: Any = None  # int32 [B, 4], a box's top, left, height and width in pixels; zeros for none
    layer: Any = None  # int32 [B], the stages of a net after which hidden states are mixed; 0: the input


@dataclass(frozen=True)
class Draws:
    """All draws of a microbatch: named arrays for the views, one MixDraws for each mixing run.

    The base view's names are "crop", "flip", "tries" and "offsets", as it needs them. Augmented view number i has
    "augmented_crop{i}" and "augmented_flip{i}", or, of a policy, "operation{i}", "magnitude{i}" and "sign{i}".
    """

    views: dict[str, np.ndarray]
    mix: tuple[MixDraws, ...]


@dataclass(frozen=True)
class BatchPlan:
    """What a microbatch holds: its place and rows as drawn, its rows after replacing quarantined ones, its draws."""

    micro: Microbatch
    rows: np.ndarray
    draws: Draws


@dataclass(frozen=True)
class Batch:
    """One process's microbatch, on the device.

    Attributes:
        images: uint8 [B, S, S, 3], the base view.
        augmented: uint8 [B, S, S, 3] for each augmented view, in the order of `DrawSpec.views`.
        labels: int64 [B].
        ids: rows of the data set, int64 [B].
        mix: draws of each mixing run, in the order of `DrawSpec.mixes`.
        total: rows of this microbatch over all processes.
        extras: what the loader was told to attach, each [B, ...].
    """

    images: "Tensor"
    augmented: "tuple[Tensor, ...]"
    labels: "Tensor"
    ids: "Tensor"
    mix: tuple[MixDraws, ...]
    total: int
    extras: "dict[str, Tensor]" = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pixels(self) -> "Tensor":
        """The images as [B, 3, S, S], in channels_last memory, without a copy."""
        return self.images.permute(0, 3, 1, 2)

    @property
    def augmented_pixels(self) -> "tuple[Tensor, ...]":
        """The augmented views as [B, 3, S, S], in channels_last memory, without a copy."""
        return tuple(view.permute(0, 3, 1, 2) for view in self.augmented)


@dataclass(frozen=True)
class DrawSpec:
    """Which draws a loader needs, and how they are addressed.

    Attributes:
        view: the base view; its draws are always one for each sample.
        seed: the run's seed.
        views: the augmented views.
        mixes: the mixing runs.
        mode: per_sample, or per_batch: one augmentation draw for a whole mix group, as published.
        mix_group: consecutive positions of the epoch's order that share partners and per_batch draws.
    """

    view: View
    seed: int = 0
    views: tuple[ViewRun, ...] = ()
    mixes: tuple[MixRun, ...] = ()
    mode: Literal["per_sample", "per_batch"] = "per_sample"
    mix_group: int = 64

    @property
    def grouped(self) -> bool:
        """Whether a microbatch must hold whole mix groups."""
        return self.mode == "per_batch" or any(run.partner != "none" for run in self.mixes)

    def draw(self, micro: Microbatch) -> Draws:
        """Draw everything for one microbatch: a function of (seed, epoch, row, group) alone."""
        groups = (micro.start + np.arange(len(micro.rows))) // self.mix_group
        of_view = {"pad_crop": 3, "random_resized_crop": 23, "window": 23}.get(self.view.crop, 0)
        own: dict[int, int] = {Stream.BASE_VIEW: of_view} if of_view else {}
        streams = self._streams
        if self.mode == "per_batch":
            addresses, spread = np.unique(groups, return_inverse=True)
            shared = uniforms(self.seed, micro.epoch, addresses, streams)
            numbers = {key: value[spread] for key, value in shared.items()}
            numbers |= uniforms(self.seed, micro.epoch, micro.rows, own)
        else:
            numbers = uniforms(self.seed, micro.epoch, micro.rows, {**own, **streams})
        views: dict[str, np.ndarray] = {}
        if own:
            base = numbers[Stream.BASE_VIEW]
            if self.view.crop == "pad_crop":
                views["crop"] = np.floor(base[:, :2] * (2 * self.view.padding + 1)).astype(np.int32)
            else:
                views["tries"], views["offsets"] = crop_windows(base[:, :22], self.view.scale, self.view.ratio)
            views["flip"] = (base[:, of_view - 1] < 0.5).astype(np.int32)
        for index, run in enumerate(self.views):
            drawn = self._augmented_draws(run, numbers)
            views |= {f"{name}{index}": array for name, array in drawn.items()}
        wanted: set[tuple[Partner, int]] = {(run.partner, run.run) for run in self.mixes}
        partners = {key: self._partners(micro.epoch, groups, *key) for key in wanted}  # each drawn once
        mix = (self._mix(run, micro.epoch, numbers, partners[run.partner, run.run]) for run in self.mixes)
        return Draws(views, tuple(mix))

    @cached_property
    def _streams(self) -> dict[int, int]:
        """Numbers an image takes from each stream; where several take from one, as many as the greediest."""
        wanted = [run.stream for run in self.views]
        for run in self.mixes:
            taken = {
                Stream.MIX: 3,
                Stream.CELLS: run.cells,
                Stream.BOX: 23 * run.box,
                Stream.LAYER: int(run.layers > 0),
            }
            wanted += [(stream + run.run, count) for stream, count in taken.items() if count]
        counts: dict[int, int] = {}
        for stream, count in wanted:
            counts[stream] = max(count, counts.get(stream, 0))
        return counts

    def _augmented_draws(self, run: ViewRun, numbers: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
        stream, count = run.stream
        own = numbers[stream][:, :count]
        if run.kind == "autoaugment":
            return auto_augment_draws(own, policy_name(self.view.size))
        if run.kind == "randaugment":
            return rand_augment_draws(own, run.magnitude)
        if run.kind == "trivialaugment":
            return trivial_augment_draws(own)
        flip = {"augmented_flip": (own[:, 2] < 0.5).astype(np.int32)}
        if run.kind == "flip":
            return flip
        return {"augmented_crop": np.floor(own[:, :2] * (2 * self.view.padding + 1)).astype(np.int32), **flip}

    def _partners(self, epoch: int, groups: np.ndarray, partner: Partner, run: int) -> np.ndarray:
        rows = np.arange(len(groups))
        if partner == "none":
            return rows
        if partner == "first":
            return rows // self.mix_group * self.mix_group
        whole = len(groups) // self.mix_group * self.mix_group
        pieces = []
        for start, stop, size in ((0, whole, self.mix_group), (whole, len(groups), len(groups) - whole)):
            if start == stop:
                continue
            numbers = groups[start:stop:size]
            inside = derangements(self.seed, epoch, numbers, size, run, fixed_points=partner == "permutation")
            pieces.append((inside + (start + size * np.arange(len(numbers)))[:, None]).reshape(-1))
        return np.concatenate(pieces)

    def _mix(self, run: MixRun, epoch: int, numbers: dict[int, np.ndarray], partner: np.ndarray) -> MixDraws:
        mixed = numbers[Stream.MIX + run.run]
        lam, center = mixed[:, 0], np.minimum(mixed[:, 1:3].astype(np.float32), _BELOW_ONE)
        if run.alpha != 1.0:
            from scipy.special import betaincinv

            lam = betaincinv(run.alpha, run.alpha, lam)
        if run.floor or run.ceiling:
            low, high = run.bounds(epoch)
            lam = low + (high - low) * lam
        cells = box = layer = None
        if run.cells:
            cells = np.minimum(numbers[Stream.CELLS + run.run][:, : run.cells].astype(np.float32), _BELOW_ONE)
        if run.box:
            erased = (self.view.size, run.box_probability, run.box_scale, run.box_ratio)
            box = erasing_boxes(numbers[Stream.BOX + run.run], *erased)
        if run.layers:
            layer = np.floor(numbers[Stream.LAYER + run.run][:, 0] * run.layers).astype(np.int32)
        return MixDraws(partner, lam.astype(np.float32), center, cells, box, layer)


def _value_at(schedule: Schedule, epoch: float, usual: float) -> float:
    """The value of the last entry that is not after the epoch."""
    return next((value for start, value in reversed(schedule) if start <= epoch), usual)


def _check_run(run: int) -> None:
    if not 0 <= run < MOST_RUNS:
        raise ValueError(f"run {run} of an augmentation: there is room for runs 0 to {MOST_RUNS - 1}")


def _check_bounds(run: MixRun) -> None:
    _check_schedule("mix.lam_min", run.floor)
    _check_schedule("mix.lam_max", run.ceiling)
    for epoch, _ in (*run.floor, *run.ceiling):
        low, high = run.bounds(epoch)
        if low > high:
            raise ValueError(
                f"--mix.lam_min {low} is above --mix.lam_max {high} from epoch {epoch:g} on: give a smaller one"
            )


def _check_box(probability: float, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"random erasing has probability {probability}: give 0 to 1 (published: 0.5)")
    if not 0 <= scale[0] <= scale[1] <= 1:
        raise ValueError(f"random erasing has areas of {scale}: give shares of 0 to 1, the smaller one first")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"random erasing has ratios of {ratio}: give two numbers above 0, the smaller one first")


def _check_schedule(name: str, schedule: Schedule) -> None:
    epochs = [epoch for epoch, _ in schedule]
    if epochs and (epochs[0] != 0 or epochs != sorted(set(epochs))):
        raise ValueError(f"--{name} has epochs {epochs}: start with epoch 0, and give each once, in ascending order")
    for epoch, value in schedule:
        if not 0 <= value <= 1:
            raise ValueError(f"--{name} {value} from epoch {epoch:g} on: give a share of 0 to 1")
