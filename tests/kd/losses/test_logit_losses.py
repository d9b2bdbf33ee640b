"""What every loss of logits keeps: finite numbers, full precision, one graph, no wait, its configuration."""

from collections.abc import Callable
from typing import Any

import jsonargparse
import pytest
import torch
from torch import Tensor

from dalikd.kd.backbones import NetOutput
from dalikd.kd.losses import (
    CRLD,
    CTKD,
    DIST,
    DKD,
    KD,
    MLKD,
    NKD,
    RLD,
    TTM,
    WTTM,
    DistillationLoss,
    LogitLoss,
    MixedOutputs,
    StepOutputs,
)

LOSSES: dict[str, type[DistillationLoss]] = {
    loss.__name__: loss for loss in (KD, DKD, DIST, NKD, TTM, WTTM, RLD, CTKD, MLKD, CRLD)
}
every_loss = pytest.mark.parametrize("name", LOSSES)
of_one_view = pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if issubclass(loss, LogitLoss)])


def step(*logits: Tensor, lam: float = 0.75) -> StepOutputs:
    """After 5 epochs: logits of student and teacher on originals, then on augmented images."""
    labels = torch.arange(len(logits[0]), device=logits[0].device) % logits[0].shape[1]
    share = torch.full((len(labels),), lam, device=labels.device)
    mixed = MixedOutputs(logits[2], logits[3], labels, labels.flip(0), share)
    epoch = torch.full((), 5.0, device=labels.device)
    return StepOutputs(NetOutput(logits[0]), NetOutput(logits[1]), labels, labels, epoch, mixed)


def random_logits(images: int = 6, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(images, 5, generator=generator, dtype=torch.float64)).to(device, dtype) for _ in range(4)]


def extreme(dtype: torch.dtype) -> list[Tensor]:
    """±500, where student and teacher oppose each other, agree, and give all classes the same."""
    teacher = torch.tensor([[500.0, -500, 0], [-500, 500, 0], [500, -500, -500], [0, 0, 0]], dtype=dtype)
    student = torch.tensor([[-500.0, 500, 0], [-500, 500, 0], [0, 0, 500], [500, 500, -500]], dtype=dtype)
    return [student, teacher, student.flip(1), teacher]


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("standardize", [False, True])
def test_extreme_logits_give_finite_losses_and_gradients(name: str, dtype: torch.dtype, standardize: bool):
    loss = LOSSES[name](standardize=standardize)
    for logits in (extreme(dtype), [torch.zeros(4, 3, dtype=dtype)] * 4, random_logits(1, dtype)):
        students = [logits[number].clone().requires_grad_() for number in (0, 2)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            terms = loss(step(students[0], logits[1], students[1], logits[3]))
        terms["loss"].backward()
        assert all(term.isfinite() for term in terms.values())
        assert all(student.grad.isfinite().all() for student in students if student.grad is not None)
        assert students[0].grad is not None


@every_loss
def test_half_precision_is_left_before_anything_is_computed(name: str):
    logits = random_logits(8, torch.bfloat16)
    exact = LOSSES[name]()(step(*(values.float() for values in logits)))
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name]()(step(*logits))
    assert {term: value.item() for term, value in found.items()} == {
        term: value.item() for term, value in exact.items()
    }
    assert found["loss"].dtype == torch.float32


@pytest.mark.parametrize("name", ["KD", "DKD", "CTKD", "MLKD", "RLD", "DIST"])
def test_nets_that_agree_lose_nothing(name: str):
    teacher = random_logits()[1]
    teacher = torch.cat((teacher, 9 * torch.eye(5, dtype=torch.float64)))[6:]  # right about each label
    terms = LOSSES[name]()(step(teacher, teacher, teacher, teacher, lam=1.0))
    for term in set(terms) - {"loss", "ce", "ce_mix", "temperature"}:
        assert terms[term].item() == pytest.approx(0.0, abs=1e-5 if name == "DIST" else 1e-13)


@every_loss
def test_standardised_logits_have_no_shift_and_no_scale(name: str):
    shares = {"kd_mix_share": 1.0} if issubclass(LOSSES[name], LogitLoss) else {}
    logits, loss = random_logits(), LOSSES[name](standardize=True, **shares)
    nets = (0, 1, 2, 3) if isinstance(loss, LogitLoss) else (0, 2)  # thresholds hold for the teacher's own confidence
    moved = [3 * values - 7 if number in nets else values for number, values in enumerate(logits)]
    found, expected = loss(step(*moved)), loss(step(*logits))
    compared = set(expected) - {"loss", "ce", "ce_mix", "batch", "class"}
    for term in compared:
        assert found[term].item() == pytest.approx(expected[term].item(), rel=1e-6)
    plain = LOSSES[name](**shares)(step(*logits))
    assert any(plain[term].item() != pytest.approx(expected[term].item(), rel=1e-3) for term in compared)


@of_one_view
def test_mixed_images_are_compared_by_both_labels(name: str):
    logits, loss = random_logits(), LOSSES[name](kd_mix_share=1.0)
    assert isinstance(loss, LogitLoss)
    given = step(*logits)
    rows = [loss.compare(logits[2], logits[3], labels, given.epoch) for labels in (given.labels, given.labels.flip(0))]
    expected = (0.75 * rows[0] + 0.25 * rows[1]).mean()
    assert rows[0].dim() == (name in ("DKD", "NKD", "RLD"))
    assert loss(given)["kd_mix"].item() == pytest.approx(expected.item(), rel=1e-12)


@every_loss
def test_it_is_one_graph(name: str):
    given, loss = step(*random_logits()), LOSSES[name]()
    try:
        compiled = torch.compile(loss, fullgraph=True, backend="eager")(given)["loss"]
    finally:
        torch.compiler.reset()
    torch.testing.assert_close(compiled, loss(given)["loss"])


@every_loss
def test_a_step_never_reads_from_the_device(name: str, no_sync: Callable[[], Any]):
    logits, loss = random_logits(), LOSSES[name](label_smoothing=0.1, standardize=True)
    logits[0].requires_grad_()
    given = step(*logits)
    with no_sync():
        loss(given)["loss"].backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_loss
def test_a_step_never_waits_for_a_gpu(name: str, sync_is_an_error: Callable[[], None]):
    logits, loss = random_logits(dtype=torch.float32, device="cuda"), LOSSES[name](standardize=True).cuda()
    logits[0].requires_grad_()
    given = step(*logits)
    sync_is_an_error()
    loss(given)["loss"].backward()


@every_loss
def test_all_its_options_are_read_from_a_config(name: str):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DistillationLoss, "loss")
    words = [f"--loss=dalikd.kd.losses.{name}", "--loss.label_smoothing=0.25", "--loss.standardize=true"]
    config = parser.parse_args([*words, '--loss.ce_weight={"epochs": [0, 9], "values": [1, 0]}'])
    again = parser.parse_string(parser.dump(config))
    loss = getattr(parser, "instantiate" if hasattr(parser, "instantiate") else "instantiate_classes")(again).loss
    assert type(loss) is LOSSES[name]
    assert (loss.label_smoothing, loss.standardize, loss.ce_weight.values) == (0.25, True, [1.0, 0.0])
    assert parser.dump(config) == parser.dump(again)


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    [
        (DKD, {"alpha": -1.0}, "alpha is -1.0: give 0 or more"),
        (DKD, {"beta": float("nan")}, "beta is nan"),
        (DKD, {"temperature": 0.0}, "temperature is 0.0: give a number above 0"),
        (DIST, {"beta": -1.0}, "beta is -1.0"),
        (DIST, {"gamma": -1.0}, "gamma is -1.0"),
        (DIST, {"temperature": 0.0}, "temperature is 0.0"),
        (NKD, {"gamma": -0.5}, "gamma is -0.5"),
        (NKD, {"temperature": -1.0}, "temperature is -1.0"),
        (TTM, {"gamma": 0.0}, "gamma is 0.0: give a number above 0"),
        (WTTM, {"gamma": 0.0}, "gamma is 0.0"),
        (RLD, {"alpha": -1.0}, "alpha is -1.0"),
        (RLD, {"beta": -1.0}, "beta is -1.0"),
        (RLD, {"temperature": 0.0}, "temperature is 0.0"),
        (RLD, {"confidence_temperature": 0.0}, "confidence_temperature is 0.0"),
        (CTKD, {"lowest": 0.0}, "lowest is 0.0"),
        (CTKD, {"span": 0.0}, "span is 0.0"),
        (CTKD, {"ramp_epochs": 0.0}, "ramp_epochs is 0.0"),
        (MLKD, {"kd_weight": -1.0}, "kd_weight is -1.0"),
        (MLKD, {"temperatures": []}, "temperatures is empty"),
        (MLKD, {"temperatures": [2.0, 0.0]}, "a temperature is 0.0"),
        (CRLD, {"ce_weight": -1.0}, "ce_weight is -1.0"),
        (CRLD, {"cross_weight": -1.0}, "cross_weight is -1.0"),
        (CRLD, {"within_threshold": 1.5}, r"within_threshold is 1.5: give a number in \[0, 1\]"),
        (CRLD, {"label_smoothing": 1.0}, "label_smoothing is 1.0"),
    ],
)
def test_unusable_settings_are_named(loss: type[DistillationLoss], arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        loss(**arguments)


@every_loss
def test_without_labels_the_nets_alone_are_compared(name):
    """The same loss as with labels that have no weight; terms of labels are left out."""
    loss = LOSSES[name](ce_weight=0.0)  # pyright: ignore[reportCallIssue]
    given = step(*random_logits(), *random_logits())
    if name in ("DKD", "NKD", "RLD"):
        assert loss.label_options is None
        return
    assert (LOSSES[name]().label_options, loss.label_options) == (["ce_weight"], [])
    unknown = torch.full_like(given.labels, -1)
    assert given.mixed is not None
    mixed = given.mixed._replace(labels=unknown, partner_labels=unknown)
    found = loss(given._replace(labels=unknown, mixed=mixed, labelled=False))
    expected = loss(given)
    assert found.keys() == expected.keys() - {"ce", "ce_mix"}
    for term, value in found.items():
        torch.testing.assert_close(value, expected[term])
