"""crld_loss against a loop over samples; the terms of losses of two views."""

import math

import numpy as np
import pytest
import torch

from dalikd.kd.backbones import NetOutput
from dalikd.kd.losses import CRLD, MixedOutputs, StepOutputs, Views, crld_loss, cross_entropy


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    powers = np.exp(logits / temperature)
    return powers / powers.sum()


def kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return temperature**2 * float(sum(p * np.log(p / q)))


def test_it_equals_the_equations():
    random = np.random.RandomState(0)
    student, augmented_student, teacher, augmented_teacher = 2 * random.randn(4, 8, 5)
    within = cross = 0.0
    counted = [0, 0]
    for s, s_, t, t_ in zip(student, augmented_student, teacher, augmented_teacher, strict=True):
        if softmax(t).max() >= 0.7:
            within, counted[0] = within + (kl(s, t, 3) + kl(s_, t_, 3)) / 8, counted[0] + 1
        if softmax(t_).max() >= 0.6:
            cross, counted[1] = cross + (kl(s_, t, 3) + kl(s, t_, 3)) / 8, counted[1] + 1
    assert counted[0] not in (0, 8)  # else the thresholds were not tried
    assert counted[1] not in (0, 8)
    views = [torch.from_numpy(logits) for logits in (student, augmented_student, teacher, augmented_teacher)]
    found = crld_loss(Views(*views[:2]), Views(*views[2:]), 3.0, 0.7, 0.6)
    assert [term.item() for term in found] == pytest.approx([within, cross], rel=1e-12)
    same = Views(views[2], views[2])
    assert [term.item() for term in crld_loss(same, same, 3.0)] == pytest.approx([0.0, 0.0], abs=1e-14)


def test_its_terms_are_weighted_and_both_views_are_labelled():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(4, 6, 5, dtype=torch.float64), torch.arange(6) % 5
    mixed = MixedOutputs(logits[2], logits[3], labels, labels.flip(0), torch.ones(6))
    given = StepOutputs(NetOutput(logits[0]), NetOutput(logits[1]), labels, labels, torch.zeros(()), mixed)
    terms = CRLD()(given)
    assert list(terms) == ["loss", "ce", "ce_mix", "within", "cross"]
    assert terms["ce_mix"].item() == pytest.approx(cross_entropy(logits[2], labels).item(), rel=1e-12)
    expected = terms["ce"] + terms["ce_mix"] + 2 * terms["within"] + 0.5 * terms["cross"]
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert math.isfinite(expected)


def test_views_that_do_not_belong_together_are_named():
    labels = torch.arange(4)
    logits = torch.randn(4, 5)
    given = StepOutputs(NetOutput(logits), NetOutput(logits), labels, labels, torch.zeros(()))
    with pytest.raises(ValueError, match="CRLD compares two views of each image: 4 originals have 0 augmented images"):
        CRLD()(given)
    half = MixedOutputs(logits[:2], logits[:2], labels[:2], labels[:2], torch.ones(2))
    with pytest.raises(ValueError, match="4 originals have 2 augmented images"):
        CRLD()(given._replace(mixed=half))
