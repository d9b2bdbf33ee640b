"""kd_loss against published values; KD's terms, weights and configuration."""

import json
import re
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch
from torch import Tensor

from dalikd.kd.backbones import NetOutput
from dalikd.kd.losses import (
    KD,
    DistillationLoss,
    MixedOutputs,
    Schedule,
    StepOutputs,
    WeightedSum,
    cross_entropy,
    kd_loss,
    mixed_cross_entropy,
)
from dalikd.kd.losses.base import weight_at

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "kd_loss.json").read_text())


@pytest.fixture
def batch() -> StepOutputs:
    torch.manual_seed(0)
    logits = [torch.randn(6, 5, dtype=torch.float64) * 3 for _ in range(4)]
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    mixed = MixedOutputs(logits[2], logits[3], labels, labels.flip(0), torch.rand(6))
    return StepOutputs(NetOutput(logits[0]), NetOutput(logits[1]), labels, labels, torch.zeros(()), mixed)


def reference_logits() -> tuple[Tensor, Tensor]:
    random = np.random.RandomState(REFERENCE["seed"])
    student, teacher = (random.randn(*REFERENCE["shape"]) * REFERENCE["scale"] for _ in range(2))
    return torch.from_numpy(student).requires_grad_(), torch.from_numpy(teacher)


def test_kd_loss_and_its_gradient_equal_the_published_ones():
    student, teacher = reference_logits()
    loss = kd_loss(student, teacher, REFERENCE["temperature"])
    loss.backward()
    assert loss.item() == pytest.approx(REFERENCE["value64"], rel=1e-12)
    assert student.grad is not None
    assert student.grad.norm().item() == pytest.approx(REFERENCE["gradient"]["norm"], rel=1e-10)
    assert student.grad.flatten()[:4].tolist() == pytest.approx(REFERENCE["gradient"]["first4"], rel=1e-10)


def test_kd_loss_in_float32():
    student, teacher = reference_logits()
    loss = kd_loss(student.float(), teacher.float(), REFERENCE["temperature"])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(REFERENCE["value32"], rel=1e-6)


def test_kd_loss_is_zero_at_equal_logits_and_ignores_shifts():
    logits = torch.randn(4, 7, dtype=torch.float64)
    assert kd_loss(logits, logits + 3, 4.0).item() == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kd_loss_of_confident_opponents_is_finite(dtype: torch.dtype):
    teacher = torch.tensor([[500.0, -500.0, 0.0], [-500.0, 500.0, 0.0]], dtype=dtype)
    student = (-teacher).requires_grad_()
    loss = kd_loss(student, teacher, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1000.0)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_kd_loss_of_half_logits_is_computed_in_float32():
    student, teacher = torch.randn(2, 64, 100).bfloat16()
    exact = kd_loss(student.float(), teacher.float(), 4.0)
    assert kd_loss(student, teacher, 4.0).dtype == torch.float32
    assert torch.equal(kd_loss(student, teacher, 4.0), exact)


def test_without_mixed_images(batch: StepOutputs):
    terms = KD(ce_weight=0.3, kd_weight=0.6, temperature=2.0, kd_share=0.5, ce_mix_share=1.0)(
        batch._replace(mixed=None)
    )
    ce, kd = cross_entropy(batch.student.logits, batch.labels), kd_loss(batch.student.logits, batch.teacher.logits, 2.0)
    assert list(terms) == ["loss", "ce", "kd"]
    assert [terms["ce"].item(), terms["kd"].item()] == [ce.item(), kd.item()]
    assert terms["loss"].item() == pytest.approx((0.3 * ce + 0.6 * 0.5 * kd).item(), rel=1e-12)


def test_with_mixed_images(batch: StepOutputs):
    terms = KD(label_smoothing=0.1, kd_share=0.5, ce_mix_share=2.0, kd_mix_share=0.7)(batch)
    mixed = batch.mixed
    ce = cross_entropy(batch.student.logits, batch.labels, 0.1)
    kd = kd_loss(batch.student.logits, batch.teacher.logits, 4.0)
    ce_mix = mixed_cross_entropy(mixed.student_logits, mixed.labels, mixed.partner_labels, mixed.lam, 0.1)
    kd_mix = kd_loss(mixed.student_logits, mixed.teacher_logits, 4.0)
    assert list(terms) == ["loss", "ce", "kd", "ce_mix", "kd_mix"]
    assert [term.item() for term in terms.values()][1:] == [term.item() for term in (ce, kd, ce_mix, kd_mix)]
    expected = 0.1 * ce + 0.9 * (0.5 * kd + 2.0 * ce_mix + 0.7 * kd_mix)
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_default_leaves_mixed_labels_out(batch: StepOutputs):
    terms = KD()(batch)
    assert list(terms) == ["loss", "ce", "kd", "kd_mix"]
    expected = 0.1 * terms["ce"] + 0.9 * (terms["kd"] + terms["kd_mix"])
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_loss_trains_the_student_on_both_kinds_of_images(batch: StepOutputs):
    student, on_mixed = batch.student.logits.requires_grad_(), batch.mixed.student_logits.requires_grad_()
    KD()(batch._replace(student=NetOutput(student)))["loss"].backward()
    assert student.grad is not None
    assert on_mixed.grad is not None
    assert student.grad.abs().sum() > 0
    assert on_mixed.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kd_share": -0.1}, "kd_share is -0.1: give 0 or more"),
        ({"ce_mix_share": float("nan")}, "ce_mix_share is nan"),
        ({"kd_mix_share": float("inf")}, "kd_mix_share is inf"),
        ({"teacher_temperature": 0.0}, "teacher_temperature is 0.0"),
        ({"ce_weight": -0.1}, "ce_weight is -0.1: give 0 or more"),
        ({"ce_weight": float("nan")}, "ce_weight is nan"),
        ({"kd_weight": -1.0}, "kd_weight is -1.0"),
        ({"kd_weight": float("inf")}, "kd_weight is inf"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -4.0}, "temperature"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_unusable_settings_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        KD(**arguments)
    assert "\n" not in str(error.value)


def instantiate(parser: jsonargparse.ArgumentParser, config: jsonargparse.Namespace) -> jsonargparse.Namespace:
    """Build what the configuration names; jsonargparse 4.49 renamed the method."""
    return getattr(parser, "instantiate" if hasattr(parser, "instantiate") else "instantiate_classes")(config)


def test_the_signature_is_read_by_jsonargparse():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(KD, "loss")
    config = parser.parse_args(["--loss.ce_mix_share=0.5", "--loss.kd_mix_share=2", "--loss.temperature=2"])
    loss = instantiate(parser, config).loss
    assert isinstance(loss, KD)
    assert loss.temperature == 2.0
    assert loss.shares == {"kd": 1.0, "ce_mix": 0.5, "kd_mix": 2.0}
    help_text = " ".join(parser.format_help().split())
    for phrase in (
        "Weight of the cross-entropy",
        "Weight of everything",
        "Divides the",
        "Share of each",
        "Share of the KL",
    ):
        assert phrase in help_text


def test_a_later_method_is_a_subclass_chosen_by_its_path():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DistillationLoss, "loss")
    config = parser.parse_args(["--loss=dalikd.kd.losses.KD", "--loss.kd_weight=0.5"])
    assert isinstance(instantiate(parser, config).loss, KD)


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        DistillationLoss()  # pyright: ignore[reportAbstractUsage]


def test_a_weighted_sum_keeps_the_terms_of_its_parts(batch: StepOutputs):
    parts = [KD(temperature=2.0), KD(ce_weight=0.0, kd_weight=0.5)]
    one, other = (part(batch) for part in parts)
    terms = WeightedSum([*parts], [0.5, 2.0])(batch)
    assert list(terms) == ["loss", "ce", "kd", "kd_mix", "ce1", "kd1", "kd_mix1"]
    assert terms["loss"].item() == pytest.approx((0.5 * one["loss"] + 2 * other["loss"]).item(), rel=1e-12)
    assert (terms["kd"], terms["kd1"]) == (one["kd"], other["kd"])
    nested = WeightedSum([WeightedSum([*parts]), KD(ce_weight=0.0)])(batch)
    assert [name for name in nested if name.startswith("ce")] == ["ce", "ce1", "ce2"]
    assert WeightedSum([*parts])(batch)["loss"].item() == pytest.approx((one["loss"] + other["loss"]).item(), rel=1e-12)


def test_a_weighted_sum_is_chosen_on_the_command_line():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DistillationLoss, "loss")
    words = '{"class_path": "dalikd.kd.losses.WeightedSum", "init_args": {"weights": [1, 3], "losses": [%s, %s]}}'
    part = '{"class_path": "dalikd.kd.losses.KD", "init_args": {"temperature": %d, "ce_weight": %d}}'
    loss = instantiate(parser, parser.parse_args([f"--loss={words % (part % (2, 1), part % (5, 0))}"])).loss
    assert isinstance(loss, WeightedSum)
    assert [part.temperature for part in loss.losses] == [2.0, 5.0]
    assert loss.weights == [1.0, 3.0]


def test_bad_weights_are_named():
    with pytest.raises(ValueError, match="2 losses have 1 weights"):
        WeightedSum([KD(), KD()], [1.0])
    with pytest.raises(ValueError, match=re.escape("weights[0] is -1.0")):
        WeightedSum([KD()], [-1.0])
    with pytest.raises(ValueError, match=r"KD and KD each count the cross-entropy of the labels: .* ce_weight: 0"):
        WeightedSum([KD(), KD()])


def test_weights_change_over_the_epochs(batch: StepOutputs):
    schedule = Schedule([1, 3, 3, 5], [0, 1, 0.5, 0.5])
    values = [float(weight_at(schedule, torch.tensor(epoch))) for epoch in (0.0, 1.0, 2.0, 2.75, 3.0, 4.0, 9.0)]
    assert values == [0.0, 0.0, 0.5, 0.875, 0.5, 0.5, 0.5]
    warm, at_2 = KD(kd_weight=schedule), batch._replace(epoch=torch.tensor(2.0))
    assert warm(at_2)["loss"].item() == pytest.approx(KD(kd_weight=0.5)(batch)["loss"].item(), rel=1e-6)
    total = WeightedSum([KD()], [schedule])(at_2)["loss"].item()
    assert total == pytest.approx(0.5 * KD()(batch)["loss"].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("points", "message"),
    [(([0], []), "1 epochs have 0 values"), (([3, 1], [0, 1]), "ascending"), (([0], [-1]), r"values are \[-1\]")],
)
def test_bad_schedules_are_named(points: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        Schedule(*points)


def test_a_schedule_is_given_on_the_command_line():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DistillationLoss, "loss")
    words = ["--loss=dalikd.kd.losses.KD", '--loss.kd_weight={"epochs": [0, 20], "values": [0, 1]}']
    assert instantiate(parser, parser.parse_args(words)).loss.kd_weight == Schedule([0, 20], [0, 1])


def test_two_temperatures_and_standardised_logits(batch: StepOutputs):
    student, teacher = batch.student.logits, batch.teacher.logits
    one, other = (torch.log_softmax(logits / at, 1) for logits, at in ((student, 2.0), (teacher, 3.0)))
    expected = 4 * (other.exp() * (other - one)).sum(1).mean()
    assert kd_loss(student, teacher, 2.0, 3.0).item() == pytest.approx(expected.item(), rel=1e-12)
    found = KD(temperature=2.0, standardize=True)(batch)["kd"]
    scaled = batch._replace(teacher=NetOutput(5 * teacher - 3))
    assert KD(temperature=2.0, standardize=True)(scaled)["kd"].item() == pytest.approx(found.item(), rel=1e-6)
    assert found.item() != pytest.approx(KD(temperature=2.0)(batch)["kd"].item(), rel=0.1)
