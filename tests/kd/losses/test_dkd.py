"""dkd_loss against published values and against the loss that it decouples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dalikd.kd import losses
from dalikd.kd.losses import DKD, dkd_loss, kd_loss
from dalikd.kd.losses.base import weight_at

REFERENCES = json.loads((Path(__file__).parents[2] / "data" / "losses_logits.json").read_text())


@pytest.mark.parametrize("name", REFERENCES)
def test_the_loss_and_its_gradient_equal_the_published_ones(name: str):
    reference = REFERENCES[name]
    random, shape = np.random.RandomState(reference["seed"]), reference["shape"]
    student, teacher = (torch.from_numpy(random.randn(*shape) * reference["scale"]) for _ in range(2))
    labels = torch.from_numpy(random.randint(0, shape[1], size=shape[:1]))
    given = (student.requires_grad_(), teacher, labels)[: 3 if name == "dkd_loss" else 2]
    loss = getattr(losses, name)(*given, **reference["arguments"])
    loss.backward()
    assert loss.item() == pytest.approx(reference["value64"], rel=1e-12)
    assert student.grad is not None
    assert student.grad.norm().item() == pytest.approx(reference["gradient_norm"], rel=1e-10)
    assert student.grad.flatten()[:4].tolist() == pytest.approx(reference["gradient_first4"], rel=1e-9)


def test_weighted_by_the_teacher_it_is_the_loss_that_it_decouples():
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(6, 5, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    on_target = dkd_loss(student, teacher, labels, 1.0, 0.0, 2.0, per_sample=True)
    on_others = dkd_loss(student, teacher, labels, 0.0, 1.0, 2.0, per_sample=True)
    of_target = (teacher / 2).softmax(1).gather(1, labels[:, None]).squeeze(1)
    expected = kd_loss(student, teacher, 2.0).item()
    assert (on_target + (1 - of_target) * on_others).mean().item() == pytest.approx(expected, rel=1e-12)
    assert dkd_loss(student, teacher, labels, 1, 8).item() == pytest.approx(
        dkd_loss(student, teacher, labels, 1, 8, per_sample=True).mean().item()
    )


def test_it_warms_up_in_20_epochs():
    weights = [float(weight_at(DKD().kd_weight, torch.tensor(epoch))) for epoch in (0.0, 5.0, 20.0, 99.0)]
    assert weights == [0.0, 0.25, 1.0, 1.0]
