"""The operations of policies, executed by DALI with torchvision's ranges."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from typing import Any

import numpy as np
from nvidia.dali.auto_aug import augmentations as dali
from nvidia.dali.auto_aug.core import signed_bin
from nvidia.dali.auto_aug.core._augmentation import Augmentation
from nvidia.dali.auto_aug.core._select import select
from nvidia.dali.pipeline import do_not_convert

from dalikd.pipelines.policies import BINS, PolicyKind, operation_names

__all__ = ["apply_policy"]

_WARP_FILL = 128  # grey, as in the published policies
_SHIFT = 150 / 331  # of the side

# tables of numbers: converted, number by number, they took three quarters of the time that building a graph takes
Augmentation._map_mags_to_params = do_not_convert(Augmentation._map_mags_to_params)


def apply_policy(kind: PolicyKind, pixels, steps: int, size: int, draws: dict[str, Any]):
    """Apply drawn operations one after the other, inside a graph.

    Args:
        kind: of the policy.
        pixels: uint8 [size, size, 3] a sample.
        steps: operations each.
        size: the images' side.
        draws: "operation", "magnitude" and "sign", int32 [steps] a sample.
    """
    operations = _drawn_operations(kind, size)
    for step in range(steps):
        pixels = select(
            operations,
            draws["operation"][step],
            data=pixels,
            magnitude_bin=signed_bin(draws["magnitude"][step], random_sign=draws["sign"][step]),
            num_magnitude_bins=BINS[kind],
            fill_value=_WARP_FILL,
            shape=np.array([size, size]),
        )
    return pixels


@do_not_convert
def _drawn_operations(kind: PolicyKind, size: int) -> list[Any]:
    table = _wide_operations() if kind == "trivialaugment" else _operations()
    return [table[name] for name in operation_names(kind, size)]


def _operations() -> dict[str, Any]:
    """With the ranges of AutoAugment and RandAugment."""
    return _ranged(shear=0.3, degrees=30, enhance=0.9, fewest_bits=4) | {
        "TranslateX": dali.translate_x.augmentation((0, _SHIFT), True),
        "TranslateY": dali.translate_y.augmentation((0, _SHIFT), True),
    }


def _wide_operations() -> dict[str, Any]:
    """With the ranges of TrivialAugment; it shifts by pixels, on images of any size."""
    return _ranged(shear=0.99, degrees=135, enhance=0.99, fewest_bits=2) | {
        "TranslateX": dali.translate_x_no_shape.augmentation((0, 32), True),
        "TranslateY": dali.translate_y_no_shape.augmentation((0, 32), True),
    }


def _ranged(shear: float, degrees: float, enhance: float, fewest_bits: int) -> dict[str, Any]:
    return {
        "identity": dali.identity,
        "ShearX": dali.shear_x.augmentation((0, shear), True),
        "ShearY": dali.shear_y.augmentation((0, shear), True),
        "Rotate": dali.rotate.augmentation((0, degrees), True),
        "Brightness": dali.brightness.augmentation((0, enhance), True),
        "Color": dali.color.augmentation((0, enhance), True),
        "Contrast": dali.contrast.augmentation((0, enhance), True),
        "Sharpness": dali.sharpness.augmentation((0, enhance), True),
        "Posterize": dali.posterize.augmentation((8, fewest_bits), False),
        "Solarize": dali.solarize.augmentation((255, 0), False),
        "AutoContrast": dali.auto_contrast,
        "Equalize": dali.equalize,
        "Invert": dali.invert,
    }
