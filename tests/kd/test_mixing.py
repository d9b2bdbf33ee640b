"""Mixing against published geometry, and against a loop over samples and pixels."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.mixing import MixDraws, Mixed, cutmix, cutout, masking, mixup, patchmix, random_erasing, same

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "mixing.json").read_text())
FILL = (129.3, 124.1, 112.4)


def center_of(pixel: int, side: int) -> float:
    return (pixel + 0.5) / side


def make_draws(batch: int, seed: int = 0, cells: int = 0) -> MixDraws:
    generator = torch.Generator().manual_seed(seed)
    partner = torch.randperm(batch, generator=generator)
    lam, center = torch.rand(batch, generator=generator), torch.rand(batch, 2, generator=generator)
    numbers = torch.rand(batch, cells, generator=generator) if cells else None
    return MixDraws(partner, lam, center, numbers, make_boxes(batch, generator))


def make_boxes(batch: int, generator: torch.Generator) -> Tensor:
    """Boxes inside of 20 x 33 pixels; every third image has none."""
    corners = [torch.randint(0, side, (batch, 2), generator=generator).sort(dim=1).values for side in (21, 34)]
    top, bottom, left, right = torch.cat(corners, dim=1).unbind(1)
    boxes = torch.stack([top, left, bottom - top, right - left], dim=1)
    boxes[::3] = 0
    return boxes.int()


def make_images(batch: int, height: int = 20, width: int = 33, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def published_draws(operation: dict) -> MixDraws:
    partner = torch.tensor(operation["perm_used"])
    floor, ceiling = operation.get("floor", 0.0), operation.get("ceiling", 1.0)
    lam = torch.full((4,), floor + (ceiling - floor) * operation["lam_drawn"], dtype=torch.float64)
    center = [center_of(operation.get("cy", 0), 32), center_of(operation.get("cx", 0), 32)]
    return MixDraws(partner, lam, torch.tensor([center] * 4))


@pytest.mark.parametrize("box", REFERENCE["rand_bbox"], ids=lambda box: f"lam{box['lam']}-{box['cx']}-{box['cy']}")
def test_cutmix_box_is_the_published_one(box: dict):
    images = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)])
    center = torch.tensor([[center_of(box["cy"], 32), center_of(box["cx"], 32)]] * 2)
    mixed = cutmix(images, MixDraws(torch.tensor([1, 0]), torch.full((2,), box["lam"]), center))
    expected = torch.zeros(32, 32)
    expected[box["y1"] : box["y2"], box["x1"] : box["x2"]] = 1
    assert torch.equal(mixed.images[0, 0], expected)
    assert torch.equal(mixed.images[1, 0], 1 - expected)
    assert mixed.lam.tolist() == pytest.approx([box["lam_adjusted"]] * 2, abs=1e-6)


@pytest.mark.parametrize("operation", REFERENCE["mix_ops"], ids=lambda operation: operation["op"])
def test_mixed_images_equal_the_published_ones(operation: dict):
    images = torch.from_numpy(np.random.RandomState(REFERENCE["seed"]).randn(4, 3, 32, 32))
    mixed = {"cutmix": cutmix, "mixup": mixup}[operation["op"]](images, published_draws(operation))
    assert_as_published(mixed.images, operation["input_mix"])
    assert mixed.lam.tolist() == pytest.approx([operation["lam_returned"]] * 4, abs=1e-6)
    if "target_mix" in operation:
        own, lam = functional.one_hot(torch.tensor(REFERENCE["target"]), 10), mixed.lam[:, None]
        found = lam * own + (1 - lam) * own[mixed.partner]
        torch.testing.assert_close(found, torch.tensor(operation["target_mix"]), rtol=0, atol=1e-6)


def assert_as_published(images: Tensor, expected: dict) -> None:
    values = images.flatten()
    assert images.dtype == torch.float64
    assert list(images.shape) == expected["shape"]
    assert values.mean().item() == pytest.approx(expected["mean"], rel=1e-10)
    assert values.std(unbiased=False).item() == pytest.approx(expected["std"], rel=1e-12)
    assert values.abs().mean().item() == pytest.approx(expected["abs_mean"], rel=1e-12)
    if "weighted_sum" in expected:  # tells rows from columns
        weighted = (values * torch.arange(len(values))).sum().item() / len(values)
        assert weighted == pytest.approx(expected["weighted_sum"], rel=1e-12)
    if "first4" in expected:
        assert values[:4].tolist() == pytest.approx(expected["first4"], rel=1e-12)


@pytest.mark.parametrize("operation", REFERENCE["cells"], ids=lambda operation: operation["op"])
def test_cells_are_the_published_ones(operation: dict):
    """One set of cells for the whole batch there, drawn as the order of squares, or as the rank of each cell."""
    images = torch.from_numpy(np.random.RandomState(REFERENCE["seed"]).randn(4, 3, 32, 32))
    if operation["op"] == "patchmix":
        numbers = torch.tensor(operation["squares"]).argsort() / 64
        draws = published_draws(operation)._replace(cells=numbers.expand(4, -1))
        mixed = patchmix(images, draws, operation["side"])
        kept = 1 - int(64 * operation["lam_drawn"]) / 64  # as drawn lam is the partner's share
        assert mixed.lam.tolist() == [kept] * 4
        assert torch.equal(mixed.partner, draws.partner)
    else:
        numbers = torch.tensor(operation["cells"]) / 16
        draws = make_draws(4)._replace(cells=numbers.expand(4, -1))
        mixed = masking(images, draws, (0.0, 0.0, 0.0), operation["cells_a_side"], operation["ratio"])
        assert mixed.lam.tolist() == [1.0] * 4
    assert_as_published(mixed.images, operation["input_mix"])


def test_cutout_hole_is_the_published_one():
    hole = REFERENCE["cutout"]
    center = torch.tensor([[center_of(hole["y"], 32), center_of(hole["x"], 32)]] * 4)
    draws = MixDraws(torch.zeros(4, dtype=torch.int64), torch.zeros(4), center)
    images = cutout(torch.ones(4, 3, 32, 32), draws, hole["side"], [0.0] * 3).images
    assert images.eq(0).sum() == hole["zeros"]
    rows, columns = images[0, 0].eq(0).nonzero().T
    assert [rows.min(), rows.max() + 1] == hole["rows"]
    assert [columns.min(), columns.max() + 1] == hole["cols"]


def test_cutmix_replaces_each_images_own_box():
    images, draws = make_images(16), make_draws(16)
    mixed = cutmix(images, draws)
    assert mixed.images.dtype == torch.uint8
    for row in range(16):
        expected, replaced = images[row].clone(), 0
        ratio = float(np.sqrt(np.float32(1) - np.float32(draws.lam[row].item())))
        middle = [int(draws.center[row, 0].item() * 20), int(draws.center[row, 1].item() * 33)]
        half = [int(20 * ratio) // 2, int(33 * ratio) // 2]
        for y in range(max(0, middle[0] - half[0]), min(20, middle[0] + half[0])):
            for x in range(max(0, middle[1] - half[1]), min(33, middle[1] + half[1])):
                expected[:, y, x] = images[int(draws.partner[row]), :, y, x]
                replaced += 1
        assert torch.equal(mixed.images[row], expected)
        assert mixed.lam[row].item() == pytest.approx(1 - replaced / (20 * 33), abs=1e-6)
    assert mixed.lam.dtype == torch.float32
    assert torch.equal(mixed.partner, draws.partner)


def test_mixup_of_pixels():
    images, draws = make_images(5), make_draws(5)
    mixed = mixup(images, draws)
    lam = draws.lam.double()[:, None, None, None]
    expected = lam * images.double() + (1 - lam) * images.double()[draws.partner]
    assert mixed.images.dtype == torch.float32
    assert torch.allclose(mixed.images.double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(mixed.lam, draws.lam)
    assert torch.equal(mixed.partner, draws.partner)


@pytest.mark.parametrize("side", [7, 8])
def test_cutout_fills_one_clipped_square_with_the_fill(side: int):
    images, draws = make_images(64), make_draws(64)
    before = images.clone()
    mixed = cutout(images, draws, side, FILL)
    fill = torch.tensor(FILL)[:, None, None]
    for row in range(64):
        expected = images[row].float()
        top = int(draws.center[row, 0].item() * 20) - side // 2
        left = int(draws.center[row, 1].item() * 33) - side // 2
        expected[:, max(0, top) : top + side, max(0, left) : left + side] = fill
        assert torch.equal(mixed.images[row], expected)
    assert torch.equal(images, before)
    assert torch.equal(mixed.lam, torch.ones(64))
    assert torch.equal(mixed.partner, torch.arange(64))


def smallest(numbers: Tensor, count: int) -> list[int]:
    return sorted(range(len(numbers)), key=lambda cell: (numbers[cell].item(), cell))[:count]


@pytest.mark.parametrize("lam", [None, 0.0, 1.0])
def test_patchmix_takes_each_images_own_squares(lam: float | None):
    images, draws = make_images(16, 20, 36), make_draws(16, cells=5 * 9)
    if lam is not None:
        draws = draws._replace(lam=torch.full((16,), lam))
    mixed = patchmix(images, draws, 4)
    for row in range(16):
        assert draws.cells is not None
        expected = images[row].clone()
        squares = smallest(draws.cells[row], int(45 * draws.lam[row].item()))
        for square in squares:
            y, x = square // 9 * 4, square % 9 * 4
            expected[:, y : y + 4, x : x + 4] = images[int(draws.partner[row]), :, y : y + 4, x : x + 4]
        assert torch.equal(mixed.images[row], expected)
        assert mixed.lam[row].item() == pytest.approx(1 - len(squares) / 45, abs=1e-6)
    assert torch.equal(mixed.partner, draws.partner)
    assert mixed.lam.dtype == torch.float32


@pytest.mark.parametrize(("cells_a_side", "ratio", "count"), [(4, 0.5, 8), (2, 0.74, 2), (1, 1.0, 1), (4, 0.0, 0)])
def test_masking_fills_each_images_own_cells(cells_a_side: int, ratio: float, count: int):
    images, draws = make_images(8, 20, 36), make_draws(8, cells=cells_a_side**2)
    mixed = masking(images, draws, FILL, cells_a_side, ratio)
    height, width = 20 // cells_a_side, 36 // cells_a_side
    for row in range(8):
        assert draws.cells is not None
        expected = images[row].float()
        for cell in smallest(draws.cells[row], count):
            y, x = cell // cells_a_side * height, cell % cells_a_side * width
            expected[:, y : y + height, x : x + width] = torch.tensor(FILL)[:, None, None]
        assert torch.equal(mixed.images[row], expected)
    assert torch.equal(mixed.lam, torch.ones(8))
    assert torch.equal(mixed.partner, torch.arange(8))


def test_equal_numbers_are_taken_in_order():
    draws = make_draws(2)._replace(cells=torch.zeros(2, 16), lam=torch.full((2,), 0.25), partner=torch.tensor([1, 0]))
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    mixed = patchmix(images, draws, 2).images
    assert mixed[0, 0, :2].eq(1).all()  # 4 of 16 squares: the first row of them
    assert mixed[0, 0, 2:].eq(0).all()


def test_random_erasing_fills_the_box_that_was_drawn():
    images, draws = make_images(12), make_draws(12)
    mixed = random_erasing(images, draws, FILL)
    assert draws.box is not None
    for row in range(12):
        expected, (top, left, height, width) = images[row].float(), draws.box[row].tolist()
        expected[:, top : top + height, left : left + width] = torch.tensor(FILL)[:, None, None]
        assert torch.equal(mixed.images[row], expected)
    assert torch.equal(mixed.images[::3], images[::3].float())
    assert not torch.equal(mixed.images[1::3], images[1::3].float())
    assert torch.equal(mixed.lam, torch.ones(12))
    assert torch.equal(mixed.partner, torch.arange(12))


def test_same_repeats_the_partner():
    images, first = make_images(6), torch.tensor([0, 0, 0, 3, 3, 3])
    mixed = same(images, make_draws(6)._replace(partner=first))
    assert mixed.images.dtype == torch.uint8
    assert torch.equal(mixed.images, images[first])
    assert torch.equal(mixed.partner, first)
    assert torch.equal(mixed.lam, torch.zeros(6))


def all_of(images: Tensor) -> list[Mixed]:
    """What every function makes of images of 20 x 36."""
    draws = make_draws(len(images), cells=45)
    grid = make_draws(len(images), cells=16)
    return [
        cutmix(images, draws),
        patchmix(images, draws, 4),
        same(images, draws),
        mixup(images, draws),
        cutout(images, draws, 8, FILL),
        masking(images, grid, FILL),
        random_erasing(images, draws, FILL),
    ]


def test_images_are_left_alone():
    images = make_images(3, 20, 36).float()
    before = images.clone()
    for mixed in all_of(images):
        assert torch.equal(images, before)
        assert not torch.equal(mixed.images, before)


def test_a_center_rounded_up_to_one_is_the_last_pixel():
    center = torch.ones(2, 2)
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    mixed = cutmix(images, MixDraws(torch.tensor([1, 0]), torch.full((2,), 0.75), center))
    assert mixed.images[0, 0].sum() == 9  # 2 of 4 pixels a side fit before pixel 7, and pixel 7 itself


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype):
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = [mixed.images.dtype for mixed in all_of(make_images(4, 20, 36).to(dtype))]
    assert dtypes == [dtype] * 3 + [computed] * 4


def test_the_memory_format_is_kept():
    for mixed in all_of(make_images(4, 20, 36).contiguous(memory_format=torch.channels_last)):
        assert mixed.images.is_contiguous(memory_format=torch.channels_last)


def test_a_sample_does_not_depend_on_its_batch():
    images, draws = make_images(8, 20, 36), make_draws(8, cells=45)
    together = draws._replace(partner=torch.tensor([1, 0, *range(2, 8)]))
    alone = MixDraws(*(None if part is None else part[:2] for part in together))  # type: ignore[arg-type]
    for function in (cutmix, mixup, partial(patchmix, side=4), partial(random_erasing, fill=FILL)):
        assert torch.equal(function(images[:2], alone).images, function(images, together).images[:2])


def test_unusable_arguments_are_refused():
    images, draws = make_images(4), make_draws(4)
    with pytest.raises(ValueError, match="side is 0"):
        cutout(images, draws, 0, FILL)
    with pytest.raises(ValueError, match="2 values for 3 channels"):
        cutout(images, draws, 8, (1.0, 2.0))
    for function in (cutmix, mixup, same):
        with pytest.raises(ValueError, match="for 4 images"):
            function(images, make_draws(1))
    with pytest.raises(ValueError, match="masking fill has 1 values for 3 channels"):
        masking(make_images(4, 20, 36), make_draws(4, cells=16), (1.0,))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (partial(patchmix, side=4), "4 pixels do not tile 20 x 33: set --mix.patch_side to a divisor"),
        (partial(patchmix, side=0), "0 pixels do not tile"),
        (partial(patchmix, side=1), r"cells have shape \(4, 16\) for 4 images of 20 x 33 cells: give \(4, 660\)"),
        (partial(masking, fill=FILL), "4 cells a side do not divide 20 x 33 pixels: set --mix.mask_cells to a divisor"),
        (partial(masking, fill=FILL, cells_a_side=0), "0 cells a side"),
        (partial(masking, fill=FILL, cells_a_side=1, ratio=1.5), "mask ratio is 1.5: set --mix.mask_ratio to a share"),
    ],
)
def test_grids_that_do_not_fit_are_refused(function: Callable[..., Mixed], message: str):
    with pytest.raises(ValueError, match=message):
        function(make_images(4), make_draws(4, cells=16))


def test_draws_that_are_not_there_are_named():
    images, draws = make_images(4, 20, 36), make_draws(4)._replace(box=None)
    with pytest.raises(ValueError, match="cells have shape None"):
        patchmix(images, draws, 4)
    with pytest.raises(ValueError, match="boxes have shape None for 4 images"):
        random_erasing(images, draws, FILL)


# ------------------------------------------------------------------------------------------------- runs and rows


@pytest.mark.parametrize("layers", [False, True])
def test_runs_are_joined_and_rows_taken(layers: bool):
    def run(seed: int) -> Mixed:
        mixed = mixup(make_images(4), make_draws(4, seed))
        return mixed._replace(layer=torch.arange(4).int() + seed) if layers else mixed

    first, second = run(0), run(1)
    pool = Mixed.join([first, second])
    assert torch.equal(pool.take(torch.arange(4)).images, first.images)
    rows = torch.tensor([5, 0])
    taken = pool.take(rows)
    assert torch.equal(taken.images, torch.stack([second.images[1], first.images[0]]))
    assert torch.equal(taken.partner, torch.stack([second.partner[1], first.partner[0]]))
    assert torch.equal(taken.lam, torch.stack([second.lam[1], first.lam[0]]))
    assert (taken.hidden is None) == (not layers)
    if taken.hidden is not None:
        assert taken.hidden.layer.tolist() == [2, 0]
        assert taken.hidden.lam is taken.lam
        assert taken.hidden.partner is taken.partner
