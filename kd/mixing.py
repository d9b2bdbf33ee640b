"""Batch-level augmentation of pixels on the device: mixup, CutMix, patch mixing, Cutout, masking, random erasing.

Nothing is drawn here. The draws come in as tensors, one set per image, so that the result depends on the samples
alone and not on the generator, the batch size or the rank. Images are NCHW (any memory format, which is kept), in
pixel space.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "DrawnTensors",
    "HiddenMix",
    "Mixed",
    "cutmix",
    "cutout",
    "masking",
    "mixup",
    "patchmix",
    "random_erasing",
    "same",
]


class DrawnTensors(Protocol):
    """What chance decided for each of B images: any object with these tensors, such as `draw_spec.MixDraws`.

    Attributes:
        partner: int64 [B], row of this batch to mix in.
        lam: float32 [B], wanted share of the image itself.
        center: float32 [B, 2], (y, x) as fractions of the height and width, in [0, 1).
        cells: float32 [B, cells], in [0, 1), one number for each cell of a grid, row by row; None where no function
            takes them.
        box: int32 [B, 4], a box's top, left, height and width in pixels, zeros for none; or None.
        layer: int32 [B], the stages of a net after which hidden states are mixed, 0 for the input; or None.
    """

    @property
    def partner(self) -> Tensor: ...
    @property
    def lam(self) -> Tensor: ...
    @property
    def center(self) -> Tensor: ...
    @property
    def cells(self) -> Tensor | None: ...
    @property
    def box(self) -> Tensor | None: ...
    @property
    def layer(self) -> Tensor | None: ...


class HiddenMix(NamedTuple):
    """How the hidden states of n augmented images are mixed with those of B originals (kd/manifold.py)."""

    partner: Tensor  # int64 [n], row of the originals
    lam: Tensor  # float [n], share of the image itself
    layer: Tensor  # int32 [n], after so many stages; 0: nothing is left to do


class Mixed(NamedTuple):
    """Augmented images and what each is made of."""

    images: Tensor  # [n, C, H, W]
    partner: Tensor  # int64 [n], row of the batch that was mixed in
    lam: Tensor  # float32 [n], share of the image itself
    layer: Tensor | None = None  # int32 [n], after how many stages a net has to mix the partner in, if it has to

    @property
    def hidden(self) -> HiddenMix | None:
        """How a net has to mix the hidden states of the images; None where they are mixed already."""
        return None if self.layer is None else HiddenMix(self.partner, self.lam, self.layer)

    def take(self, rows: Tensor) -> "Mixed":
        """The images numbered `rows`, int64 [n]."""
        layer = None if self.layer is None else self.layer[rows]
        return Mixed(self.images[rows], self.partner[rows], self.lam[rows], layer)

    @staticmethod
    def join(runs: Sequence["Mixed"], images: Tensor | None = None) -> "Mixed":
        """The images of several runs of one augmentation, run after run; `images`, where these are joined already."""
        layers = [run.layer for run in runs if run.layer is not None]
        return Mixed(
            torch.cat([run.images for run in runs]) if images is None else images,
            torch.cat([run.partner for run in runs]),
            torch.cat([run.lam for run in runs]),
            torch.cat(layers) if layers else None,
        )


# ------------------------------------------------------------------------------------------ images of two samples


def mixup(images: Tensor, draws: DrawnTensors) -> Mixed:
    """Blend each image with its partner: lam * x + (1 - lam) * x[partner].

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv 1710.09412.

    Args:
        images: uint8 or float [B, C, H, W].
        draws: partner and lam are used.

    Returns:
        float32 images (float64 stays), the partners and lam as drawn.

    Raises:
        ValueError: the draws are not for as many images as there are.
    """
    _check_draws(images, draws)
    dtype = torch.promote_types(images.dtype, torch.float32)
    lam = draws.lam.to(dtype)[:, None, None, None]
    mixed = torch.lerp(images[draws.partner].to(dtype), images.to(dtype), lam)
    return Mixed(mixed, draws.partner, draws.lam)


def cutmix(images: Tensor, draws: DrawnTensors) -> Mixed:
    """Paste a box of the partner into each image.

    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
    arXiv 1905.04899. The box has sqrt(1 - lam) of each side, rounded down to an even number of pixels, and is clipped
    at the border; lam is then recomputed from the pixels that were really replaced.

    Args:
        images: uint8 or float [B, C, H, W].
        draws: partner, lam and center are used; the centre pixel is floor(center * side).

    Returns:
        Images in the dtype of the input, the partners and the recomputed lam.

    Raises:
        ValueError: the draws are not for as many images as there are.
    """
    _check_draws(images, draws)
    height, width = images.shape[-2:]
    ratio = (1 - draws.lam).sqrt()
    rows, tall = _span(draws.center[:, 0], 2 * ((height * ratio).long() // 2), height)
    columns, wide = _span(draws.center[:, 1], 2 * ((width * ratio).long() // 2), width)
    box = rows[:, None, :, None] & columns[:, None, None]
    replaced = tall * wide / (height * width)
    return Mixed(torch.where(box, images[draws.partner], images), draws.partner, 1 - replaced)


def patchmix(images: Tensor, draws: DrawnTensors, side: int) -> Mixed:
    """Replace squares of a grid by the partner's.

    Wang et al., "What Makes a 'Good' Data Augmentation in Knowledge Distillation", NeurIPS 2022, arXiv 2012.02909:
    of all squares the share lam, rounded down to whole ones, comes from the partner. So lam means the opposite of what
    it means in CutMix as it is drawn, and the same as it is returned. The squares with the smallest numbers are taken.

    Args:
        images: uint8 or float [B, C, H, W].
        draws: partner, lam and cells are used, [B, (H / side) * (W / side)].
        side: of a square, in pixels; published: 4.

    Returns:
        Images in the dtype of the input, the partners and the share that each image keeps of itself.

    Raises:
        ValueError: squares that do not tile the images, or draws for other images or another grid.
    """
    _check_draws(images, draws)
    height, width = images.shape[-2:]
    if side < 1 or height % side or width % side:
        raise ValueError(f"squares of {side} pixels do not tile {height} x {width}: set --mix.patch_side to a divisor")
    grid = (height // side, width // side)
    numbers = _cells(draws, len(images), grid)
    replaced = (draws.lam * numbers.shape[1]).long()
    mask = _cell_mask(numbers, replaced, grid, side, side)
    return Mixed(
        torch.where(mask, images[draws.partner], images),
        draws.partner,
        1 - (replaced / numbers.shape[1]).to(draws.lam.dtype),
    )


def same(images: Tensor, draws: DrawnTensors) -> Mixed:
    """Replace each image by its partner altogether: by the first of its mix group, if the draws say so.

    Args:
        images: uint8 or float [B, C, H, W].
        draws: partner is used.

    Returns:
        Images in the dtype of the input, the partners and lam = 0: the label is the partner's.

    Raises:
        ValueError: the draws are not for as many images as there are.
    """
    _check_draws(images, draws)
    return Mixed(images[draws.partner], draws.partner, torch.zeros_like(draws.lam))


# ------------------------------------------------------------------------------------------ parts filled with a value


def cutout(images: Tensor, draws: DrawnTensors, side: int, fill: Sequence[float]) -> Mixed:
    """Fill one square of each image, centred anywhere and clipped at the border.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017, arXiv 1708.04552.

    Args:
        images: uint8 or float [B, C, H, W].
        draws: center is used.
        side: of the square, in pixels, at least 1.
        fill: one pixel value per channel. The mean of the data set times 255 is zero after normalising.

    Returns:
        float32 images (float64 stays), each image as its own partner, lam = 1: the label is untouched.

    Raises:
        ValueError: side below 1, not one fill value per channel, or draws for another number of images.
    """
    _check_draws(images, draws)
    if side < 1:
        raise ValueError(f"cutout side is {side}: give at least 1 pixel")
    height, width = images.shape[-2:]
    rows, _ = _span(draws.center[:, 0], side, height)
    columns, _ = _span(draws.center[:, 1], side, width)
    return _filled(images, draws, rows[:, None, :, None] & columns[:, None, None], fill, "cutout")


def masking(
    images: Tensor, draws: DrawnTensors, fill: Sequence[float], cells_a_side: int = 4, ratio: float = 0.5
) -> Mixed:
    """Fill a share of the cells of a grid, as the input of a masked autoencoder is masked.

    He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377. The cells with the
    smallest numbers are filled, `ratio` of them rounded down.

    Args:
        images: uint8 or float [B, C, H, W].
        draws: cells are used, [B, cells_a_side squared].
        fill: one pixel value per channel. The mean of the data set times 255 is zero after normalising.
        cells_a_side: rows and columns of the grid.
        ratio: share of the cells, 0 to 1.

    Returns:
        float32 images (float64 stays), each image as its own partner, lam = 1: the label is untouched.

    Raises:
        ValueError: a grid that does not divide the images, a ratio outside 0 to 1, not one fill value per channel, or
            draws for other images or another grid.
    """
    _check_draws(images, draws)
    height, width = images.shape[-2:]
    if cells_a_side < 1 or height % cells_a_side or width % cells_a_side:
        raise ValueError(
            f"{cells_a_side} cells a side do not divide {height} x {width} pixels: set --mix.mask_cells to a divisor"
        )
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask ratio is {ratio}: set --mix.mask_ratio to a share from 0 to 1")
    grid = (cells_a_side, cells_a_side)
    numbers = _cells(draws, len(images), grid)
    mask = _cell_mask(
        numbers, int(ratio * numbers.shape[1] + 1e-9), grid, height // cells_a_side, width // cells_a_side
    )
    return _filled(images, draws, mask, fill, "masking")


def random_erasing(images: Tensor, draws: DrawnTensors, fill: Sequence[float]) -> Mixed:
    """Fill the box that was drawn for each image, if there was one.

    Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, arXiv 1708.04896.

    Args:
        images: uint8 or float [B, C, H, W].
        draws: box is used.
        fill: one pixel value per channel. The mean of the data set times 255 is zero after normalising.

    Returns:
        float32 images (float64 stays), each image as its own partner, lam = 1: the label is untouched.

    Raises:
        ValueError: not one fill value per channel, no boxes, or draws for another number of images.
    """
    _check_draws(images, draws)
    if draws.box is None or draws.box.shape != (len(images), 4):
        found = None if draws.box is None else tuple(draws.box.shape)
        raise ValueError(f"boxes have shape {found} for {len(images)} images: give box [B, 4]")
    top, left, height, width = draws.box[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    in_rows, in_columns = (rows >= top) & (rows < top + height), (columns >= left) & (columns < left + width)
    return _filled(images, draws, in_rows[:, None, :, None] & in_columns[:, None, None], fill, "random erasing")


# ------------------------------------------------------------------------------------------------------- common


def _filled(images: Tensor, draws: DrawnTensors, mask: Tensor, fill: Sequence[float], name: str) -> Mixed:
    """Images with their part under the mask, bool [B, 1, H, W], filled; the labels stay."""
    if len(fill) != images.shape[1]:
        raise ValueError(f"{name} fill has {len(fill)} values for {images.shape[1]} channels: give one per channel")
    filled = images.to(torch.promote_types(images.dtype, torch.float32), copy=True)
    for channel, value in enumerate(fill):  # scalars go as kernel arguments: a tensor of them would be a blocking copy
        filled[:, channel].masked_fill_(mask[:, 0], value)
    return Mixed(filled, torch.arange(len(images), device=images.device), torch.ones_like(draws.lam))


def _cells(draws: DrawnTensors, batch: int, grid: tuple[int, int]) -> Tensor:
    """The number of each cell [B, cells]."""
    wanted = (batch, grid[0] * grid[1])
    if draws.cells is None or draws.cells.shape != wanted:
        found = None if draws.cells is None else tuple(draws.cells.shape)
        raise ValueError(f"cells have shape {found} for {batch} images of {grid[0]} x {grid[1]} cells: give {wanted}")
    return draws.cells


def _check_draws(images: Tensor, draws: DrawnTensors) -> None:
    batch = len(images)
    shapes = tuple(tuple(draw.shape) for draw in (draws.partner, draws.lam, draws.center))
    if shapes != ((batch,), (batch,), (batch, 2)):
        raise ValueError(f"draws have shapes {shapes} for {batch} images: give partner [B], lam [B], center [B, 2]")


def _span(center: Tensor, length: Tensor | int, side: int) -> tuple[Tensor, Tensor]:
    """Which pixels of a side are among `length` around the centre, a fraction of it: bool [B, side]; and how many [B],
    as the border cuts some off."""
    middle = (center * side).long().clamp(max=side - 1)  # a fraction may have been rounded up to 1
    start = middle - length // 2
    first, end = start.clamp(min=0), (start + length).clamp(max=side)
    pixels = torch.arange(side, device=center.device)
    return (pixels >= first[:, None]) & (pixels < end[:, None]), end - first


def _cell_mask(numbers: Tensor, count: Tensor | int, grid: tuple[int, int], height: int, width: int) -> Tensor:
    """Bool [B, 1, H, W], true in the `count` ([B] or one for all) cells of each image with the smallest numbers."""
    places = numbers.argsort(dim=1, stable=True).argsort(dim=1)  # of equal numbers the first come first
    chosen = places < (count[:, None] if isinstance(count, Tensor) else count)
    rows, columns = grid
    cells = chosen.reshape(-1, 1, rows, 1, columns, 1).expand(-1, 1, rows, height, columns, width)
    return cells.reshape(-1, 1, rows * height, columns * width)
