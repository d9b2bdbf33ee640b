"""Mixing against published geometry, and against a loop over samples and pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dalikd.kd.mixing import MixDraws, cutmix, cutout, mixup

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "mixing.json").read_text())
FILL = (129.3, 124.1, 112.4)


def center_of(pixel: int, side: int) -> float:
    return (pixel + 0.5) / side


def make_draws(batch: int, seed: int = 0) -> MixDraws:
    generator = torch.Generator().manual_seed(seed)
    partner = torch.randperm(batch, generator=generator)
    return MixDraws(partner, torch.rand(batch, generator=generator), torch.rand(batch, 2, generator=generator))


def make_images(batch: int, height: int = 20, width: int = 33, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def published_draws(operation: dict) -> MixDraws:
    partner = torch.tensor(operation["perm_used"])
    lam = torch.full((4,), operation["lam_drawn"], dtype=torch.float64)
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
    expected, values = operation["input_mix"], mixed.images.flatten()
    assert mixed.images.dtype == torch.float64
    assert values.std(unbiased=False).item() == pytest.approx(expected["std"], rel=1e-12)
    assert values.abs().mean().item() == pytest.approx(expected["abs_mean"], rel=1e-12)
    assert mixed.lam.tolist() == pytest.approx([operation["lam_returned"]] * 4, abs=1e-6)
    if "weighted_sum" in expected:  # tells rows from columns
        weighted = (values * torch.arange(len(values))).sum().item() / len(values)
        assert weighted == pytest.approx(expected["weighted_sum"], rel=1e-12)
    if "first4" in expected:
        assert values[:4].tolist() == pytest.approx(expected["first4"], rel=1e-12)


def test_cutout_hole_is_the_published_one():
    hole = REFERENCE["cutout"]
    center = torch.tensor([[center_of(hole["y"], 32), center_of(hole["x"], 32)]])
    draws = MixDraws(torch.zeros(1, dtype=torch.int64), torch.zeros(1), center)
    rows, columns = cutout(torch.ones(1, 1, 32, 32), draws, hole["side"], [0.0]).images[0, 0].eq(0).nonzero().T
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


def test_cutout_leaves_float_input_alone():
    images = torch.rand(3, 3, 16, 16)
    before = images.clone()
    mixed = cutout(images, make_draws(3), 8, FILL)
    assert torch.equal(images, before)
    assert not torch.equal(mixed.images, before)


def test_a_center_rounded_up_to_one_is_the_last_pixel():
    center = torch.ones(2, 2)
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    mixed = cutmix(images, MixDraws(torch.tensor([1, 0]), torch.full((2,), 0.75), center))
    assert mixed.images[0, 0].sum() == 9  # 2 of 4 pixels a side fit before pixel 7, and pixel 7 itself


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype):
    images, draws = make_images(4).to(dtype), make_draws(4)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    assert cutmix(images, draws).images.dtype == dtype
    assert mixup(images, draws).images.dtype == computed
    assert cutout(images, draws, 8, FILL).images.dtype == computed


def test_the_memory_format_is_kept():
    images, draws = make_images(4).contiguous(memory_format=torch.channels_last), make_draws(4)
    for mixed in (cutmix(images, draws), mixup(images, draws), cutout(images, draws, 8, FILL)):
        assert mixed.images.is_contiguous(memory_format=torch.channels_last)


def test_a_sample_does_not_depend_on_its_batch():
    images, draws = make_images(8), make_draws(8)
    alone = MixDraws(torch.tensor([1, 0]), draws.lam[:2], draws.center[:2])
    together = MixDraws(torch.tensor([1, 0, *range(2, 8)]), draws.lam, draws.center)
    for function in (cutmix, mixup):
        assert torch.equal(function(images[:2], alone).images, function(images, together).images[:2])


def test_unusable_arguments_are_refused():
    images, draws = make_images(4), make_draws(4)
    with pytest.raises(ValueError, match="side is 0"):
        cutout(images, draws, 0, FILL)
    with pytest.raises(ValueError, match="2 values for 3 channels"):
        cutout(images, draws, 8, (1.0, 2.0))
    for function in (cutmix, mixup):
        with pytest.raises(ValueError, match="for 4 images"):
            function(images, make_draws(1))
