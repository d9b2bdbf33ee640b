"""CTKD's temperature: its value, and the gradient that is turned round."""

import math

import pytest
import torch

from dalikd.kd.backbones import NetOutput
from dalikd.kd.losses import CTKD, StepOutputs, kd_loss


@pytest.mark.parametrize(("epoch", "factor"), [(0.0, 0.0), (5.0, 0.5), (2.5, (1 - math.sqrt(0.5)) / 2), (99.0, 1.0)])
def test_the_student_descends_and_the_temperature_climbs(epoch: float, factor: float):
    torch.manual_seed(0)
    loss = CTKD(ce_weight=0.0, kd_weight=0.5).double()
    student, teacher = 3 * torch.randn(2, 6, 5, dtype=torch.float64)
    student.requires_grad_()
    labels = torch.arange(6) % 5
    given = StepOutputs(NetOutput(student), NetOutput(teacher), labels, labels, torch.tensor(epoch))
    terms = loss(given)
    terms["loss"].backward()

    raw = torch.ones((), dtype=torch.float64, requires_grad=True)
    other = student.detach().requires_grad_()
    temperature = 1 + 20 * raw.sigmoid()
    expected = 0.5 * temperature**2 * kd_loss(other / temperature, teacher / temperature, 1.0)
    expected.backward()
    assert raw.grad is not None
    assert loss.raw_temperature.grad is not None
    assert list(terms) == ["loss", "ce", "kd", "temperature"]
    assert terms["temperature"].item() == pytest.approx(15.621171, rel=1e-6)
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.raw_temperature.grad.item() == pytest.approx(-factor * raw.grad.item(), rel=1e-6, abs=1e-15)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, other.grad)
