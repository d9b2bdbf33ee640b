"""Policies of operations: which of them an image gets, how strong and with which sign, drawn from uniform numbers.

AutoAugment: Cubuk et al., CVPR 2019. RandAugment: Cubuk et al., NeurIPS 2020, arXiv 1909.13719. TrivialAugment: Müller
and Hutter, ICCV 2021, arXiv 2103.10158. Operations and ranges are torchvision's; DALI executes them (`operations.py`).
"""

from typing import Literal

import numpy as np

__all__ = [
    "BINS",
    "POLICIES",
    "RANDOM_OPERATIONS",
    "PolicyKind",
    "auto_augment_draws",
    "operation_names",
    "policy_name",
    "policy_table",
    "rand_augment_draws",
    "trivial_augment_draws",
]

PolicyKind = Literal["autoaugment", "randaugment", "trivialaugment"]
POLICIES: frozenset[str] = frozenset({"autoaugment", "randaugment", "trivialaugment"})

#: Magnitude bins of each policy, from the weakest to the strongest.
BINS: dict[PolicyKind, int] = {"autoaugment": 10, "randaugment": 31, "trivialaugment": 31}

#: What RandAugment and TrivialAugment draw from, each as often as any other.
RANDOM_OPERATIONS: tuple[str, ...] = (
    "identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)


def policy_name(size: int) -> Literal["cifar10", "imagenet"]:
    """The AutoAugment policy for a side: CIFAR-10's at 32 pixels, ImageNet's else."""
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


def operation_names(kind: PolicyKind, size: int) -> list[str]:
    """What the drawn operation numbers of a policy stand for, on images of a side."""
    return policy_table(policy_name(size))[0] if kind == "autoaugment" else list(RANDOM_OPERATIONS)


_TABLES: dict[str, np.ndarray] = {}


def auto_augment_draws(numbers: np.ndarray, policy: Literal["cifar10", "imagenet"]) -> dict[str, np.ndarray]:
    """Two operations each, with bins and signs; an operation that its probability leaves out becomes identity.

    Args:
        numbers: uniform [n, 5]: sub-policy, two for the probabilities, two signs.
        policy: which one.

    Returns:
        "operation", "magnitude" (a bin) and "sign" (1 for minus), int32 [n, 2] each.
    """
    if policy not in _TABLES:
        _TABLES[policy] = policy_table(policy)[1]
    table = _TABLES[policy]
    steps = table[np.floor(numbers[:, 0] * len(table)).astype(np.int64)]  # [n, 2, 3]
    applied = numbers[:, 1:3] < steps[:, :, 1]
    return {
        "operation": np.where(applied, steps[:, :, 0], 0).astype(np.int32),
        "magnitude": steps[:, :, 2].astype(np.int32),
        "sign": _sign(numbers[:, 3:5]),
    }


def rand_augment_draws(numbers: np.ndarray, magnitude: int) -> dict[str, np.ndarray]:
    """Any operations, all of one magnitude.

    Args:
        numbers: uniform [n, 2 x ops]: operation and sign, one step after the other.
        magnitude: the bin, 0 to 30.

    Returns:
        "operation", "magnitude" and "sign", int32 [n, ops] each.
    """
    operation = _below(numbers[:, ::2], len(RANDOM_OPERATIONS))
    return {
        "operation": operation,
        "magnitude": np.full_like(operation, magnitude),
        "sign": _sign(numbers[:, 1::2]),
    }


def trivial_augment_draws(numbers: np.ndarray) -> dict[str, np.ndarray]:
    """One operation of any magnitude.

    Args:
        numbers: uniform [n, 3]: operation, magnitude, sign.

    Returns:
        "operation", "magnitude" and "sign", int32 [n, 1] each.
    """
    return {
        "operation": _below(numbers[:, :1], len(RANDOM_OPERATIONS)),
        "magnitude": _below(numbers[:, 1:2], BINS["trivialaugment"]),
        "sign": _sign(numbers[:, 2:3]),
    }


def _below(numbers: np.ndarray, count: int) -> np.ndarray:
    return np.floor(numbers * count).astype(np.int32)


def _sign(numbers: np.ndarray) -> np.ndarray:
    return (numbers < 0.5).astype(np.int32)
