"""What runs inside a step never waits for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalikd.kd.backbones import NetOutput, create_model
from dalikd.kd.covariance import CrossEntropyCovariance, ProbabilityCovariance
from dalikd.kd.entropy_log import EntropyLog
from dalikd.kd.goodness import TeacherStddev
from dalikd.kd.losses import HSAKD, KD, MixedOutputs, StepOutputs, hsakd_mutual_loss
from dalikd.kd.manifold import manifold_mixup, mixed_forward
from dalikd.kd.mixing import cutmix, cutout, masking, mixup, patchmix, random_erasing, same
from dalikd.kd.picking import dissimilarity, entropy, kl_divergence, pick, pick_rows
from dalikd.kd.rotation import TURNS, class_logits, rotations
from dalikd.pipelines.draw_spec import MixDraws

FILL = (129.3, 124.1, 112.4)


def mix_inside(net: nn.Module, images: Tensor, draws: MixDraws, joint: bool) -> None:
    mixed = manifold_mixup(images, draws)
    assert mixed.hidden is not None
    mixed_forward(net, images.float(), mixed.images, mixed.hidden, joint=joint)[1].sum().backward()


def imitate_itself(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    found, epoch = net(rotations(images).float()), torch.zeros((), device=images.device)
    step = StepOutputs(*[found.map(lambda rows: rows[::TURNS])] * 2, labels, labels, epoch, None, (found, found))
    terms = [HSAKD()(step), hsakd_mutual_loss([found, found._replace()], labels)]
    (terms[0]["loss"] + terms[1]["loss"] + class_logits(found.heads[0]).sum()).backward()


def make_steps(device: str) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(64, 10, generator=generator).to(device) for _ in range(4)]
    labels = torch.arange(64, device=device) % 10
    lam = torch.rand(64, generator=generator).to(device)
    mixed = MixedOutputs(logits[2], logits[3], labels, labels.flip(0), lam)
    draws = MixDraws(
        torch.arange(64, device=device).flip(0),
        lam,
        torch.rand(64, 2, generator=generator).to(device),
        torch.rand(64, 64, generator=generator).to(device),
        torch.randint(1, 16, (64, 4), generator=generator).int().to(device),
        (torch.arange(64, device=device) % 3).int(),
    )
    net, headed = create_model("resnet8", 10).to(device), create_model("resnet8_aux", 10).to(device)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
    metric, picked = (TeacherStddev(10, window=40, device=device) for _ in range(2))
    probabilities = ProbabilityCovariance(10, group=24, device=device)
    cross_entropy = CrossEntropyCovariance(size=100, group=24, device=device)
    entropies = EntropyLog(every=1)
    loss = KD(ce_mix_share=0.5, label_smoothing=0.1)
    student = logits[0].requires_grad_()
    epoch = torch.zeros((), device=device)
    step = StepOutputs(NetOutput(student), NetOutput(logits[1]), labels, labels, epoch, mixed)
    return {
        "goodness": lambda: metric.update(student, logits[1]),
        "goodness_of_picks": lambda: picked.update(student, logits[1][:35], group=24),
        "probability_covariance": lambda: probabilities.update(student, logits[1]),
        "cross_entropy_covariance": lambda: cross_entropy.update(student, logits[1], logits[2], logits[3]),
        "entropy_log": lambda: entropies.add(0, *(entropy(rows) for rows in logits[1:])),
        "mixup": lambda: mixup(images, draws),
        "cutmix": lambda: cutmix(images, draws),
        "cutout": lambda: cutout(images, draws, 8, FILL),
        "patchmix": lambda: patchmix(images, draws, 4),
        "masking": lambda: masking(images, draws, FILL, cells_a_side=8),
        "random_erasing": lambda: random_erasing(images, draws, FILL),
        "same": lambda: same(images, draws),
        "manifold_mixup": lambda: mix_inside(net, images, draws, joint=True),
        "manifold_mixup_apart": lambda: mix_inside(net, images, draws, joint=False),
        "kl_divergence": lambda: kl_divergence(logits[1], logits[2]),
        "dissimilarity": lambda: dissimilarity(logits[1], logits[2], 12),
        "n_pick": lambda: pick_rows(entropy(logits[1]).reshape(2, 32), 12, 20),
        "pick": lambda: pick(entropy(logits[1]), 8, groups=4),
        "pick_rows": lambda: pick_rows(entropy(logits[1]).reshape(2, 32), 12),
        "kd": lambda: loss(step)["loss"].backward(),
        "hsakd": lambda: imitate_itself(headed, images[:4], labels[:4]),
    }


STEPS = make_steps("cpu")


@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_reads_from_the_device(name: str, no_sync: Callable[[], Any]):
    with no_sync():
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
def test_the_guard_sees_reads(read: Callable[[], Any], no_sync: Callable[[], Any]):
    with no_sync(), pytest.raises(AssertionError, match="waits for the device"):
        read()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_waits_for_a_gpu(name: str, sync_is_an_error: Callable[[], None]):
    step = make_steps("cuda")[name]
    sync_is_an_error()
    step()
