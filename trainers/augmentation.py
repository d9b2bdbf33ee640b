"""The augmentations by name: which views DALI makes, what is mixed on the device, and how candidates are picked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor, nn

from dalikd.kd.manifold import LAYERS, MANIFOLD_ALPHA, check_mixable, manifold_mixup
from dalikd.kd.mixing import Mixed, cutmix, cutout, masking, mixup, patchmix, random_erasing, same
from dalikd.kd.picking import CRITERIA, PICK_TEMPERATURE, Criterion, criterion_by_name
from dalikd.pipelines.datasets.info import cutout_side
from dalikd.pipelines.draw_spec import MOST_RUNS, AugmentedView, DrawSpec, MixDraws, MixRun, View, ViewRun
from dalikd.pipelines.sources import Source

__all__ = [
    "AUGMENTATIONS",
    "PUBLISHED",
    "Augmentation",
    "Augmenter",
    "MixOptions",
    "Part",
    "augmentation_names",
    "joint_draws",
]

MixFunction = Callable[[Tensor, MixDraws], Mixed]


@dataclass
class MixOptions:
    """How augmentations are drawn.

    Args:
        mode: per_sample (every image draws its own parameters), or per_batch (one draw for a whole mix group: one flip,
            crop, policy, hole, lambda and box, as in the published code).
        group: consecutive images that are mixed with each other and share a pool of picks; published: 64.
        alpha: lambda of mixup and cutmix is drawn from Beta(alpha, alpha).
        manifold_alpha: the same for manifold_mixup.
        lam_max: largest lambda, the share that an image keeps of itself, in cutmix and patchmix (there: that it takes),
            by epoch, such as {0: 0.75, 150: 1}, epochs counted from 0 and not stretched by epoch_factor; default: 1
            throughout.
        lam_min: smallest such share, by epoch; default: 0 throughout.
        cutout_side: side of the cutout square in pixels; default: the published one of the data set, a quarter of the
            image size else.
        patch_side: side of the squares that patchmix exchanges, in pixels.
        mask_cells: masking cuts the image into so many cells a side.
        mask_ratio: share of them that masking hides.
        randaugment_ops: operations of randaugment, one after the other.
        randaugment_magnitude: their magnitude, 0 to 30.
        n_run: runs of an augmentation that make the pool picks are taken from.
        n_pick: picks from the pool of each mix group; default: as many as it has originals.
        pick_temperature: of the kld criterion; published: that of distillation.
    """

    mode: Literal["per_sample", "per_batch"] = "per_sample"
    group: int = 64
    alpha: float = 1.0
    manifold_alpha: float = MANIFOLD_ALPHA
    lam_max: dict[int, float] = field(default_factory=dict)
    lam_min: dict[int, float] = field(default_factory=dict)
    cutout_side: int | None = None
    patch_side: int = 4
    mask_cells: int = 4
    mask_ratio: float = 0.5
    randaugment_ops: int = 2
    randaugment_magnitude: int = 9
    n_run: int = 2
    n_pick: int | None = None
    pick_temperature: float = PICK_TEMPERATURE


class _Setting(NamedTuple):
    """What a mixing function may depend on besides images and draws."""

    options: MixOptions
    side: int  # of the images, in pixels
    cutout_side: int
    fill: tuple[float, ...]  # pixel values: the data's mean, which is zero after normalising


@dataclass(frozen=True)
class Augmentation:
    """One row of the table.

    Attributes:
        view: the per-image part, made by the loader.
        mix: builds the batch-level part, applied on the device.
        draws: what it draws for a run, besides its number.
        pick: base and criterion, where images are picked out of several runs of another augmentation.
    """

    view: AugmentedView | None = None
    mix: Callable[[_Setting], MixFunction] | None = None
    draws: Callable[[_Setting], MixRun] | None = None
    pick: tuple[str, str] | None = None


def _cutout(setting: _Setting) -> MixFunction:
    return partial(cutout, side=setting.cutout_side, fill=setting.fill)


def _masking(setting: _Setting) -> MixFunction:
    return partial(
        masking, cells_a_side=setting.options.mask_cells, ratio=setting.options.mask_ratio, fill=setting.fill
    )


def _boxes(setting: _Setting) -> MixRun:
    options = setting.options
    return MixRun("derangement", 0, options.alpha, _shares(options.lam_min), _shares(options.lam_max))


def _patches(setting: _Setting) -> MixRun:
    return replace(_boxes(setting), cells=(setting.side // setting.options.patch_side) ** 2)


_CUTMIX = Augmentation(mix=lambda _: cutmix, draws=_boxes)

AUGMENTATIONS: dict[str, Augmentation] = {
    "identity": Augmentation(),
    "flip": Augmentation(view="flip"),
    "crop_flip": Augmentation(view="crop_flip"),
    "cutout": Augmentation(mix=_cutout, draws=lambda _: MixRun()),
    "autoaugment": Augmentation(view="autoaugment"),
    "mixup": Augmentation(mix=lambda _: mixup, draws=lambda setting: MixRun("permutation", 0, setting.options.alpha)),
    "cutmix": _CUTMIX,
    "cutmixpick_student": Augmentation(pick=("cutmix", "student_entropy")),
    "cutmixpick_teacher": Augmentation(pick=("cutmix", "teacher_entropy")),
    "manifold_mixup": Augmentation(
        mix=lambda _: manifold_mixup,
        draws=lambda setting: MixRun("permutation", 0, setting.options.manifold_alpha, layers=LAYERS),
    ),
    "patchmix": Augmentation(mix=lambda setting: partial(patchmix, side=setting.options.patch_side), draws=_patches),
    "masking": Augmentation(mix=_masking, draws=lambda setting: MixRun(cells=setting.options.mask_cells**2)),
    "same": Augmentation(mix=lambda _: same, draws=lambda _: MixRun("first")),
    "randaugment": Augmentation(view="randaugment"),
    "trivialaugment": Augmentation(view="trivialaugment"),
    "random_erasing": Augmentation(
        mix=lambda setting: partial(random_erasing, fill=setting.fill), draws=lambda _: MixRun(box=True)
    ),
}

#: The nine of Wang et al. (NeurIPS 2022).
PUBLISHED = tuple(AUGMENTATIONS)[:9]
_SETS = {"published": PUBLISHED, "all": tuple(AUGMENTATIONS)}


def augmentation_names(wanted: Sequence[str]) -> list[str]:
    """Check names; "published" stands for the paper's nine, "all" for every one of the table.

    Raises:
        ValueError: a name is unknown.
    """
    names = [name for entry in wanted for name in _SETS.get(entry, (entry,))]
    for name in names:
        augmentation_named(name)
    return list(dict.fromkeys(names))


def augmentation_named(name: str) -> Augmentation:
    """An augmentation of the table, or BASE+CRITERION: picks out of several runs of another one.

    Raises:
        ValueError: the name is unknown, or there is nothing to pick from.
    """
    if name in AUGMENTATIONS:
        return AUGMENTATIONS[name]
    base, plus, criterion = name.partition("+")
    if plus and base in AUGMENTATIONS:
        if criterion not in CRITERIA:
            raise ValueError(f'unknown criterion in --augmentation "{name}": there are {", ".join(CRITERIA)}')
        if base == "identity" or AUGMENTATIONS[base].pick:
            raise ValueError(f'--augmentation "{name}": {base} gives nothing to pick from; name another base')
        return Augmentation(pick=(base, criterion))
    close = get_close_matches(base, [*AUGMENTATIONS, *_SETS]) or [*AUGMENTATIONS, *_SETS]
    raise ValueError(
        f'unknown --augmentation "{name}": did you mean {", ".join(close)}? '
        "Picks out of any of them are named BASE+CRITERION, such as mixup+teacher_entropy"
    )


def picks_by_student(name: str) -> bool:
    """Whether an augmentation of that name needs the student, so that each student has images of its own.

    Raises:
        ValueError: the name is unknown.
    """
    pick = augmentation_named(name).pick
    return pick is not None and CRITERIA[pick[1]].needs_student


class Part(NamedTuple):
    """One run of an augmentation, which gives one image for each original. Equal parts give equal images."""

    base: str
    view: ViewRun | None
    mix: MixRun | None


class Augmenter:
    """An augmentation bound to a data set: what the loader must draw, and how images are made of it.

    Args:
        name: of the augmentation.
        options: how it is drawn.
        source: the data set, for the fill of cutout and its published side.
        view: the base view.
        seed: of all draws.

    Attributes:
        name: of the augmentation.
        parts: its runs: none (identity), one, or those that make the pool picks are taken from.
        criterion: how picks are made, or None.
        group: originals that share a pool.
        side: of the images, in pixels.
        mix_images: makes a run of images and draws, where it is not a view of the loader.
        n_pick: picks out of each pool, where they are not as many as the originals.
        draw_spec: what the loader must draw.

    Raises:
        ValueError: an unknown name, or options that do not fit.
    """

    def __init__(self, name: str, options: MixOptions, source: Source, view: View, seed: int) -> None:
        if name in _SETS:
            raise ValueError(f'--augmentation "{name}" stands for several, which measure alone takes: name one of them')
        augmentation = augmentation_named(name)
        _check_options(options)
        self.name = name
        base, criterion = augmentation.pick or (self.name, None)
        self.criterion: Criterion | None = criterion_by_name(criterion, options.pick_temperature) if criterion else None
        self.base = AUGMENTATIONS[base]
        self.group, self.side = options.group, view.size
        _check_grid(base, options, view.size)
        fill = tuple(255 * value for value in source.mean)
        setting = _Setting(options, view.size, options.cutout_side or cutout_side(source.name, view.size), fill)
        self.mix_images = self.base.mix(setting) if self.base.mix else None
        self.parts = _parts(base, setting, options.n_run if criterion else 1)
        self.n_pick = options.n_pick if criterion and options.n_pick != options.group else None
        self.draw_spec = joint_draws(self.parts, DrawSpec(view, seed, mode=options.mode, mix_group=options.group))
        _check_group(self)

    @property
    def runs(self) -> int:
        """Candidates for each original."""
        return len(self.parts)

    @property
    def labels_are_mixed(self) -> bool:
        """Whether an augmented image shows two samples."""
        return any(part.mix is not None and part.mix.partner != "none" for part in self.parts)

    @property
    def mixes_hidden(self) -> bool:
        """Whether images are mixed inside the nets."""
        return any(part.mix is not None and part.mix.layers for part in self.parts)

    @property
    def picked_by_student(self) -> bool:
        """Whether a student alone scores its candidates."""
        return self.criterion is not None and not self.criterion.needs_teacher

    @property
    def makes_candidates(self) -> bool:
        """Whether there are images beside the originals (not so for identity)."""
        return bool(self.parts)

    def check_nets(self, compile_mode: str, *nets: tuple[str, nn.Module | None]) -> None:
        """Check that nets can do what it asks of them.

        Args:
            compile_mode: of the nets' forwards, or off.
            nets: name and net, None where there is none.

        Raises:
            ValueError: hidden states are mixed, and a net has not the stages for it or is to be compiled.
        """
        for name, net in nets:
            if self.mixes_hidden and net is not None:
                check_mixable(net, name, compile_mode, self.side)


def _parts(base: str, setting: _Setting, runs: int) -> tuple[Part, ...]:
    augmentation, options = AUGMENTATIONS[base], setting.options
    if augmentation.view is not None:
        views = (
            ViewRun(augmentation.view, run, options.randaugment_ops, options.randaugment_magnitude)
            for run in range(runs)
        )
        return tuple(Part(base, view, None) for view in views)
    if augmentation.draws is None:
        return ()
    return tuple(Part(base, None, replace(augmentation.draws(setting), run=run)) for run in range(runs))


def joint_draws(parts: Sequence[Part], spec: DrawSpec) -> DrawSpec:
    """What the loader must draw for all of these runs; the rest as `spec` has it."""
    views = dict.fromkeys(part.view for part in parts if part.view is not None)
    mixes = dict.fromkeys(part.mix for part in parts if part.mix is not None)
    return replace(spec, views=tuple(views), mixes=tuple(mixes))


def _check_group(augmenter: Augmenter) -> None:
    if augmenter.labels_are_mixed and augmenter.group < 2:
        raise ValueError(
            f"--mix.group {augmenter.group}: {augmenter.name} mixes an image with another one of its group; "
            "give at least 2"
        )
    pool = augmenter.runs * augmenter.group
    if augmenter.n_pick is not None and not 1 <= augmenter.n_pick <= pool:
        raise ValueError(
            f"--mix.n_pick {augmenter.n_pick}: the pool of {augmenter.name} holds {pool} images (--mix.n_run "
            f"{augmenter.runs} x --mix.group {augmenter.group}); give 1 to {pool}"
        )


def _check_options(options: MixOptions) -> None:
    for name, published in (("group", 64), ("n_run", 2), ("patch_side", 4), ("mask_cells", 4)):
        if getattr(options, name) < 1:
            raise ValueError(f"--mix.{name} {getattr(options, name)}: give at least 1 (published: {published})")
    if options.n_run > MOST_RUNS:
        raise ValueError(f"--mix.n_run {options.n_run}: give at most {MOST_RUNS}")
    for name, published in (("alpha", 1), ("manifold_alpha", 2), ("pick_temperature", 4)):
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"--mix.{name} {getattr(options, name)}: give a number above 0 (published: {published})")
    if options.cutout_side is not None and options.cutout_side < 1:
        raise ValueError(f"--mix.cutout_side {options.cutout_side}: give at least 1 pixel")
    if not 0 <= options.mask_ratio <= 1:
        raise ValueError(f"--mix.mask_ratio {options.mask_ratio}: give a share from 0 to 1 (published: 0.5)")
    _check_shares(options)


def _check_grid(base: str, options: MixOptions, side: int) -> None:
    """Squares of patchmix and cells of masking must cover the image."""
    if base == "patchmix" and side % options.patch_side:
        raise ValueError(f"--mix.patch_side {options.patch_side}: images of {side} pixels need a divisor of {side}")
    if base == "masking" and side % options.mask_cells:
        raise ValueError(f"--mix.mask_cells {options.mask_cells}: images of {side} pixels need a divisor of {side}")


def _check_shares(options: MixOptions) -> None:
    for name in ("lam_max", "lam_min"):
        shares = getattr(options, name)
        if shares and (min(shares) != 0 or not all(0 <= value <= 1 for value in shares.values())):
            raise ValueError(
                f"--mix.{name} {shares}: give shares from 0 to 1 by epoch, from epoch 0 on, such as {{0: 0.75}}"
            )
    for epoch in sorted({0, *options.lam_max, *options.lam_min}):
        smallest, largest = _share_at(options.lam_min, epoch, 0.0), _share_at(options.lam_max, epoch, 1.0)
        if smallest > largest:
            raise ValueError(
                f"--mix.lam_min {smallest} is above --mix.lam_max {largest} in epoch {epoch}: exchange or change them"
            )


def _share_at(by_epoch: dict[int, float], epoch: int, default: float) -> float:
    begun = [key for key in by_epoch if key <= epoch]
    return by_epoch[max(begun)] if begun else default


def _shares(by_epoch: dict[int, float]) -> tuple[tuple[float, float], ...]:
    return tuple(sorted(by_epoch.items()))
