"""What runs inside a step never waits for the device."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dalikd.kd.goodness import TeacherStddev
from dalikd.kd.losses import KD, MixedOutputs
from dalikd.kd.mixing import MixDraws, cutmix, cutout, mixup
from dalikd.kd.picking import entropy, pick, pick_rows

# Reading a scalar, shapes that depend on data, and tensors made of Python numbers (a blocking copy on a GPU).
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh")


class NoSync(TorchDispatchMode):
    """Raises at every operation that would make the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(FORBIDDEN) or (name.startswith("index") and _has_mask(args[1])):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    """Whether an indexing operation selects by a bool tensor, whose count of true values the host has to know."""
    return isinstance(indices, list | tuple) and any(i is not None and i.dtype == torch.bool for i in indices)


def make_steps(device: str) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(64, 10, generator=generator).to(device) for _ in range(4)]
    labels = torch.arange(64, device=device) % 10
    lam = torch.rand(64, generator=generator).to(device)
    mixed = MixedOutputs(logits[2], logits[3], labels, labels.flip(0), lam)
    draws = MixDraws(torch.arange(64, device=device).flip(0), lam, torch.rand(64, 2, generator=generator).to(device))
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
    metric = TeacherStddev(10, window=40, device=device)
    loss = KD(lw_mix=(1.0, 0.5, 1.0), label_smoothing=0.1)
    student = logits[0].requires_grad_()
    return {
        "goodness": lambda: metric.update(student, logits[1]),
        "mixup": lambda: mixup(images, draws),
        "cutmix": lambda: cutmix(images, draws),
        "cutout": lambda: cutout(images, draws, 8, (129.3, 124.1, 112.4)),
        "pick": lambda: pick(entropy(logits[1]), 8, groups=4),
        "pick_rows": lambda: pick_rows(entropy(logits[1]).reshape(2, 32), 12),
        "kd": lambda: loss(student, labels, logits[1], mixed)["loss"].backward(),
    }


STEPS = make_steps("cpu")


@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_reads_from_the_device(name: str):
    with NoSync():
        STEPS[name]()


@pytest.mark.parametrize(
    "read",
    [
        lambda: torch.ones(()).item(),
        lambda: bool(torch.ones(())),
        lambda: torch.ones(3)[torch.ones(3) > 0],
        lambda: torch.tensor([1.0, 2.0]),
    ],
)
def test_the_guard_sees_reads(read: Callable[[], Any]):
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        read()


@pytest.fixture
def sync_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_waits_for_a_gpu(name: str, request: pytest.FixtureRequest):
    step = make_steps("cuda")[name]
    request.getfixturevalue("sync_is_an_error")
    step()
