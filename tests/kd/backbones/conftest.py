"""What the tests of the nets share: weights that depend on nothing but the names and shapes of the parameters."""

import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn


def _values(key: str, shape: tuple[int, ...], gain: float) -> np.ndarray:
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    normal = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if leaf == "running_var":
        values = 1 + 0.1 * np.abs(normal)
    elif len(shape) >= 2:
        values = normal * gain / np.sqrt(np.prod(shape[1:]))
    elif leaf == "weight":
        values = 1 + 0.1 * normal
    else:  # running means and biases
        values = 0.1 * normal
    return values.astype(np.float32)


@pytest.fixture
def fill() -> Callable[[nn.Module, float], nn.Module]:
    """Gives a net reproducible float32 weights, then makes it float64 and sets it to evaluation."""

    def fill_model(model: nn.Module, gain: float) -> nn.Module:
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict({key: torch.from_numpy(_values(key, shape, gain)) for key, shape in shapes.items()})
        return model.double().eval()

    return fill_model


@pytest.fixture
def images() -> Tensor:
    """Two images of 32x32, float32 values as float64."""
    return torch.from_numpy(np.random.RandomState(0).randn(2, 3, 32, 32).astype(np.float32)).double()
