"""CC, VID, RKD, PKT and Logits against published values; what these and CRD do with hard and with bad input."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dalikd.kd.backbones import NetOutput
from dalikd.kd.losses import (
    CC,
    CRD,
    PKT,
    RKD,
    VID,
    DistillationLoss,
    Logits,
    LossContext,
    StepOutputs,
    cc_loss,
    logits_loss,
    pkt_loss,
    rkd_loss,
    vid_loss,
)

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "losses_relations.json").read_text())
PURE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "CC": cc_loss,
    "RKD": rkd_loss,
    "RKD_distance_only": lambda student, teacher: rkd_loss(student, teacher, 1, 0),
    "RKD_angle_only": lambda student, teacher: rkd_loss(student, teacher, 0, 1),
    "PKT": pkt_loss,
    "logits": logits_loss,
}
LOSSES = {"CC": CC, "CRD": lambda: CRD(nce_k=5), "PKT": PKT, "RKD": RKD, "VID": VID, "Logits": Logits}


def inputs(entry: dict[str, Any]) -> list[Tensor]:
    random = np.random.RandomState(entry["seed"])
    return [torch.from_numpy(random.randn(*one["shape"]) * one["scale"]) for one in entry["inputs"]]


def fill(key: str, values: Tensor) -> Tensor:
    """The value that published figures have been made with, by the name of the weight."""
    drawn = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(values.shape))
    drawn = drawn / np.sqrt(np.prod(drawn.shape[1:])) if drawn.ndim > 1 else 0.1 * drawn
    return torch.from_numpy(drawn.astype(np.float32)).double()


def outputs(count: int = 6, seed: int = 0, **to: Any) -> StepOutputs:
    """Of two nets with other widths; the student's are leaves that take gradients."""
    random = torch.Generator().manual_seed(seed)

    def net(channels: int, side: int, classes: int = 5) -> NetOutput:
        shapes = [(4, side, side), (channels, side, side), (channels, side // 2, side // 2), (channels,)]
        features = [torch.randn(count, *shape, generator=random).relu().to(**to) for shape in shapes]
        return NetOutput(torch.randn(count, classes, generator=random).to(**to), tuple(features))

    student = net(8, 4).map(lambda values: values.requires_grad_())
    ids = torch.arange(count, device=to.get("device"))
    return StepOutputs(student, net(12, 8), ids % 5, ids, torch.zeros((), device=to.get("device")))


def built(loss: DistillationLoss, images: int = 20, labels: Tensor | None = None) -> DistillationLoss:
    given = outputs(2)
    labels = torch.arange(images) % 5 if labels is None else labels
    loss.build(LossContext(given.student, given.teacher, 5, images, labels))
    return loss


@pytest.mark.parametrize("name", [name for name in PURE if name != "logits"])
def test_values_and_gradients_equal_the_published_ones(name: str):
    entry = REFERENCE[name]
    student, teacher = inputs(entry)
    loss = PURE[name](student.requires_grad_(), teacher)
    loss.backward()
    assert loss.item() == pytest.approx(entry["value64"], rel=1e-9)
    assert student.grad is not None
    assert student.grad.norm().item() == pytest.approx(entry["grad_of_sum"]["f_s"]["norm"], rel=1e-9)
    assert student.grad.flatten()[:4].tolist() == pytest.approx(entry["grad_of_sum"]["f_s"]["first4"], rel=1e-8)


def test_vid_equals_the_published_one():
    entry = REFERENCE["VID"]
    student, teacher = inputs(entry)
    loss = VID()
    given = [NetOutput(torch.zeros(4, 5), (maps, maps, maps)) for maps in (student, teacher)]
    loss.build(LossContext(given[0], given[1], 5, 9))
    loss.double()
    (regressor,), (log_scale,) = loss.regressors, loss.log_scales
    assert log_scale[0].item() == entry["hyper"]["log_scale_value_after_init"]
    for key, values in regressor.named_parameters():
        values.data.copy_(fill(f"regressor.{key}", values))
    found = loss.compare([student.requires_grad_()], [teacher], outputs())
    found.backward()
    assert found.item() == pytest.approx(entry["value64"], rel=1e-9)
    assert student.grad is not None
    assert student.grad.norm().item() == pytest.approx(entry["grad_of_sum"]["f_s"]["norm"], rel=1e-9)
    norms = {f"regressor.{key}": values.grad.norm().item() for key, values in regressor.named_parameters()}
    norms["log_scale"] = log_scale.grad.norm().item()
    assert norms == pytest.approx(entry["param_grad_norm"], rel=1e-9)


def test_embeddings_equal_the_published_ones():
    """CC's are linear; CRD's have a length of 1 besides."""
    features = torch.from_numpy(np.random.RandomState(1700).randn(4, 64))
    embed = nn.Linear(64, 32).double()
    for key, values in embed.named_parameters():
        values.data.copy_(fill(f"linear.{key}", values))
    for name, found in (
        ("LinearEmbed(64,32)", embed(features)),
        ("Embed(64,32)", nn.functional.normalize(embed(features), dim=1)),
    ):
        (wanted,) = REFERENCE[name]["outputs"]
        assert found.abs().mean().item() == pytest.approx(wanted["abs_mean"], rel=1e-9)
        assert found.flatten()[:4].tolist() == pytest.approx(wanted["first4"], rel=1e-9)


def test_logits_loss_is_the_mean_of_squares():
    student, teacher = (torch.from_numpy(np.random.RandomState(seed).randn(3, 4)) for seed in (0, 1))
    expected = sum((student[i, c] - teacher[i, c]).item() ** 2 for i in range(3) for c in range(4)) / 12
    assert logits_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    given = outputs()
    terms = Logits(ce_weight=0.5, kd_weight=3.0)(given)
    assert terms["loss"].item() == pytest.approx((0.5 * terms["ce"] + 3 * terms["kd"]).item())


@pytest.mark.parametrize("name", PURE)
def test_it_is_zero_where_both_are_equal_and_for_one_image(name: str):
    rows = torch.randn(5, 7, dtype=torch.float64)
    assert PURE[name](rows, rows).item() == pytest.approx(0, abs=1e-15)
    one, other = torch.randn(2, 1, 7, dtype=torch.float64)
    loss = PURE[name](one.requires_grad_(), other)
    loss.backward()
    assert loss.item() == 0 or name == "logits"
    assert one.grad is not None
    assert one.grad.isfinite().all()


@pytest.mark.parametrize("name", PURE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("values", ["wide", "zeros", "one_zero", "equal", "opposite"])
def test_hard_rows_give_finite_losses_and_gradients(name: str, dtype: torch.dtype, values: str):
    student = torch.randn(6, 9) * 500
    if values in ("zeros", "equal"):
        student = torch.full_like(student, 500 * (values == "equal"))
    elif values == "one_zero":
        student[2] = 0
    elif values == "opposite":
        student[1::2] = -student[::2]
    student = student.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = PURE[name](student, (torch.randn(6, 9) * 500).to(dtype))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert name != "PKT" or values != "one_zero" or not student.grad[2].any()


@pytest.mark.parametrize("name", ["RKD", "PKT", "CC"])
def test_it_is_computed_in_float32_under_autocast(name: str):
    student, teacher = torch.randn(2, 16, 32).bfloat16()
    exact = PURE[name](student.float(), teacher.float())
    module, given = built(LOSSES[name]()), outputs()
    whole = module(given)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(PURE[name](student, teacher), exact)
        assert torch.equal(module(given)["loss"], whole)


def test_relations_ignore_what_they_should():
    """RKD the size of a net's embeddings and where they lie; PKT their size; both the order of the batch."""
    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64)
    order = torch.randperm(6)
    for loss in (rkd_loss, pkt_loss):
        found = loss(student, teacher).item()
        assert loss(3 * student[order], teacher[order]).item() == pytest.approx(found, rel=1e-6)
    assert rkd_loss(student - 5, teacher).item() == pytest.approx(rkd_loss(student, teacher).item(), rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_is_built_from_the_nets_and_trained_along(name: str, dtype: torch.dtype):
    loss, given = built(LOSSES[name]()), outputs(dtype=dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        terms = loss(given)
    terms["loss"].backward()
    own = "kd" if name == "Logits" else name.lower()
    assert list(terms) == ["loss", "ce", own]
    weight = {"CC": 0.02, "CRD": 0.8, "PKT": 30000.0}.get(name, 1.0)
    assert terms["loss"].item() == pytest.approx((terms["ce"] + weight * terms[own]).item(), rel=1e-5)
    grads = [values.grad for values in loss.parameters()]
    compared = {"VID": given.student.features[1:-1], "Logits": (given.student.logits,)}
    grads += [values.grad for values in compared.get(name, given.student.features[-1:])]
    assert all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)
    loss(outputs(1, dtype=torch.float32))["loss"].backward()  # one image alone


def test_vid_pools_the_larger_map():
    loss, given = built(VID()), outputs()
    by_hand = [
        vid_loss(regressor(own), nn.functional.adaptive_avg_pool2d(its, own.shape[2:]), log_scale)
        for regressor, own, its, log_scale in zip(
            loss.regressors, given.student.features[1:-1], given.teacher.features[1:-1], loss.log_scales, strict=True
        )
    ]
    assert loss(given)["vid"].item() == pytest.approx(sum(by_hand).item(), rel=1e-6)
    assert torch.nn.functional.softplus(loss.log_scales[0]).add(1e-5).tolist() == pytest.approx([5.0] * 12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CC(feat_dim=0), "feat_dim is 0: give 1 or more"),
        (lambda: CC(weight=-1.0), "weight is -1.0: give 0 or more"),
        (lambda: RKD(distance_weight=-1.0), "distance_weight is -1.0: give 0 or more"),
        (lambda: RKD(0.0, 0.0), "both 0"),
        (lambda: VID(0.0), "init_variance is 0.0: give a number above"),
        (lambda: VID(student_features=[-1], teacher_features=[-1]), "VID needs maps of channels"),
        (lambda: PKT(student_features=[9]), "the student gives 4 features"),
        (lambda: PKT(student_features=[1, 2]), "name those that belong together"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], DistillationLoss], message: str):
    with pytest.raises(ValueError, match=message):
        built(make()).forward(outputs())


@pytest.mark.parametrize("name", LOSSES)
def test_options_of_both_classes_are_on_the_command_line(name: str):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DistillationLoss, "loss")
    config = parser.parse_args([f"--loss=dalikd.kd.losses.{name}", "--loss.ce_weight=0.5"])
    assert config.loss.init_args.ce_weight == 0.5
    with pytest.raises(jsonargparse.ArgumentError, match="ce_wait"):
        parser.parse_args([f"--loss=dalikd.kd.losses.{name}", "--loss.ce_wait=0.5"])


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_never_reads_from_the_device(name: str, no_sync: Callable[[], Any]):
    loss, given = built(LOSSES[name]()), outputs()
    with no_sync():
        loss(given)["loss"].backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_never_waits_for_a_gpu(name: str, sync_is_an_error: Callable[[], None]):
    loss, given = built(LOSSES[name]()).cuda(), outputs(device="cuda")
    sync_is_an_error()
    loss(given)["loss"].backward()
