"""AT, FSP, FitNet, SP, NST, AB, FT and KDSVD: published values, and what all of them hold to."""

import json
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dalikd.kd.backbones import NetOutput, create_model
from dalikd.kd.connectors import ConvRegressor, connectors
from dalikd.kd.losses import (
    AB,
    AT,
    FSP,
    FT,
    KD,
    KDSVD,
    NST,
    SP,
    DistillationLoss,
    FeatureLoss,
    FitNet,
    LossContext,
    Schedule,
    StepOutputs,
    WeightedSum,
    ab_loss,
    at_loss,
    cross_entropy,
    fsp_loss,
    ft_loss,
    hint_loss,
    kdsvd_loss,
    nst_loss,
    sp_loss,
)
from dalikd.kd.losses.ft import Paraphraser, Translator

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "losses_classic.json").read_text())
PUBLISHED, MODULES = REFERENCE["losses"], REFERENCE["modules"]

LOSSES: dict[str, Callable[..., FeatureLoss]] = {
    "at": AT,
    "fsp": FSP,
    "fitnet": FitNet,
    "sp": SP,
    "nst": NST,
    "ab": partial(AB, first_epochs=0),
    "ft": partial(FT, first_epochs=1),
    "kdsvd": KDSVD,
}
SHAPES = [(8, 8, 8), (8, 8, 8), (12, 4, 4), (16, 2, 2), (16,)]  # stem, three stages, pooled


def make_outputs(
    seed: int, rows: int = 4, shapes: list | None = None, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> NetOutput:
    generator = torch.Generator().manual_seed(seed)
    made = [
        scale * torch.randn(rows, *shape, dtype=torch.float64, generator=generator)
        for shape in (SHAPES if shapes is None else shapes)
    ]
    logits = torch.randn(rows, 5, dtype=torch.float64, generator=generator)
    features = tuple(maps.relu().to(dtype).requires_grad_() for maps in made)
    befores = tuple(maps.to(dtype).requires_grad_() for maps in made[1:-1])
    return NetOutput(logits.to(dtype).requires_grad_(), features, befores)


def make_step(student: NetOutput, teacher: NetOutput, epoch: float = 9.0) -> StepOutputs:
    labels = torch.arange(len(student.logits)) % 5
    return StepOutputs(student, teacher.map(Tensor.detach), labels, labels, torch.tensor(epoch))


def build(loss: FeatureLoss, student: NetOutput, teacher: NetOutput) -> FeatureLoss:
    loss.build(LossContext(student.first(2), teacher.first(2), 5, 100))
    return loss.to(student.logits.dtype)


def leaves(student: NetOutput) -> list[Tensor]:
    return [student.logits, *student.features, *student.preactivations]


def gradients(student: NetOutput) -> list[Tensor]:
    return [leaf.grad for leaf in leaves(student) if leaf.grad is not None]


def draw(entry: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Student's and teacher's features of a published entry."""
    random, drawn = np.random.RandomState(entry["seed"]), {}
    for one in entry["inputs"]:
        values = random.randn(*one["shape"]) * one["scale"]
        drawn[one["name"]] = torch.from_numpy(np.maximum(values, 0) if one.get("relu") else values)
    students = [values.requires_grad_() for name, values in drawn.items() if name in entry["gradient"]]
    return students, [values for values in drawn.values() if not values.requires_grad]


def fill(module: nn.Module) -> nn.Module:
    """Weights that depend on their names alone, as the published figures have them."""
    filled = {}
    for key, value in module.state_dict().items():
        leaf, drawn = (
            key.rpartition(".")[2],
            np.random.RandomState(zlib.crc32(key.encode())).standard_normal(value.shape),
        )
        if leaf == "num_batches_tracked":
            drawn = np.zeros(value.shape, np.int64)
        elif leaf == "running_var":
            drawn = 1 + 0.1 * np.abs(drawn)
        elif value.dim() >= 2:
            drawn = drawn / np.sqrt(np.prod(value.shape[1:]))
        else:
            drawn = 0.1 * drawn + (leaf == "weight")
        filled[key] = torch.from_numpy(drawn if leaf == "num_batches_tracked" else drawn.astype(np.float32))
    module.load_state_dict(filled)
    return module.double()


def hint_through_regressor(student: list[Tensor], teacher: list[Tensor], module: nn.Module) -> Tensor:
    return hint_loss(module(student[0]), teacher[0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_and_gradients_are_the_published_ones(name: str):
    entry = PUBLISHED[name]
    student, teacher = draw(entry)
    hyper, regressor = (
        entry["hyper"],
        fill(ConvRegressor(student[0], teacher[0])) if "param_grad_norm" in entry else None,
    )
    losses: dict[str, Callable[[], Tensor]] = {
        "AT": lambda: at_loss(student, teacher, hyper["p"]),
        "SP": lambda: sp_loss(student, teacher),
        "NST": lambda: nst_loss(student, teacher),
        "FT": lambda: ft_loss(student[0], teacher[0], **hyper),
        "FT_p2_2": lambda: ft_loss(student[0], teacher[0], **hyper),
        "AB": lambda: ab_loss(student, teacher, hyper["margin"]),
        "Hint": lambda: hint_loss(student[0], teacher[0]),
        "FSP": lambda: fsp_loss(student, teacher),
        "KDSVD": lambda: kdsvd_loss(
            student, teacher, hyper["k"], teacher_signs=[torch.tensor(signs) for signs in entry["teacher_v_signs"]]
        ),
        "Hint_ConvReg": lambda: hint_through_regressor(student, teacher, regressor),
    }
    loss = losses[name]()
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(np.sum(entry["value"]), rel=1e-10)
    for features, expected in zip(student, entry["gradient"].values(), strict=True):
        assert features.grad.norm().item() == pytest.approx(expected["norm"], rel=1e-9)
        assert features.grad.flatten()[:4].tolist() == pytest.approx(expected["first4"], rel=1e-8, abs=1e-15)
    for key, norm in entry.get("param_grad_norm", {}).items():
        assert regressor.get_parameter(key).grad.norm().item() == pytest.approx(norm, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_the_published_ones(name: str):
    published = MODULES[name]
    random = np.random.RandomState(published["seed"])
    inputs = [torch.from_numpy(random.randn(*shape)) for shape in published["inputs"]]
    if name == "Connector":
        made = connectors(inputs, [torch.zeros(shape) for shape in published["targets"]])
        module = fill(nn.ModuleDict({"connectors": made}))
        found = [connector(features) for connector, features in zip(made, inputs, strict=True)]
    elif name == "Paraphraser":
        module = fill(Paraphraser(16))
        found = module(*inputs)
    else:
        module = fill(Translator(8, 8))
        found = [module(*inputs)]
    assert [[key, list(value.shape)] for key, value in module.state_dict().items()] == published["keys"]
    for output, expected in zip(found, published["outputs"], strict=True):
        assert list(output.shape) == expected["shape"]
        figures = [output.mean(), output.std(unbiased=False), output.abs().mean(), *output.flatten()[:4]]
        published_figures = [expected[key] for key in ("mean", "std", "abs_mean")] + expected["first4"]
        assert [figure.item() for figure in figures] == pytest.approx(published_figures, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(
    ("loss", "weight", "chosen"),
    [
        (AT, 1000, [1, 2, 3]),
        (FSP, 50, [0, 1, 2, 3]),
        (FitNet, 100, [2]),
        (SP, 3000, [3]),
        (NST, 50, [1, 2, 3]),
        (FT, 200, [3]),
        (KDSVD, 1, [1, 2, 3]),
    ],
)
def test_the_features_and_the_weight_of_the_protocol(loss: type[FeatureLoss], weight: float, chosen: list[int]):
    student, teacher = make_outputs(0), make_outputs(1)
    made = loss()
    assert (made.weight, made.ce_weight) == (weight, 1)
    for net, found in zip((student, teacher), made.choose(student, teacher), strict=True):
        assert [id(features) for features in found] == [id(net.features[number]) for number in chosen]


@pytest.mark.parametrize("name", LOSSES)
def test_terms_and_weights(name: str):
    student, teacher = make_outputs(0), make_outputs(1)
    loss = build(LOSSES[name](weight=0.3, ce_weight=Schedule([9, 10], [2, 4]), label_smoothing=0.1), student, teacher)
    step = make_step(student, teacher)
    terms = loss(step)
    ce = cross_entropy(student.logits, step.labels, 0.1)
    assert list(terms) == ["loss", "ce", name] + ["reconstruction"] * (name == "ft")
    assert terms["ce"].item() == ce.item()
    assert terms["loss"].item() == pytest.approx((2 * ce + 0.3 * terms[name]).item(), rel=1e-12)
    terms["loss"].backward()
    assert student.logits.grad.abs().sum() > 0
    compared = loss.choose(student, teacher)[0]
    assert all(features.grad.abs().sum() > 0 for features in compared)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_half_precision_features_and_logits_are_finite(name: str, dtype: torch.dtype):
    student, teacher = (make_outputs(seed, dtype=torch.float32, scale=30.0) for seed in (0, 1))
    loss = build(LOSSES[name](), student, teacher)
    logits = torch.full((4, 5), 500.0).fill_diagonal_(-500.0)
    step = make_step(student._replace(logits=student.logits + logits).map(lambda part: part.to(dtype)), teacher)
    step = step._replace(teacher=step.teacher.map(lambda part: part.to(dtype)))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        terms = loss(step)
    terms["loss"].backward()
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert all(term.isfinite() for term in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients(student))


@pytest.mark.parametrize(
    "loss",
    [
        lambda one, other: at_loss(one, other),
        fsp_loss,
        sp_loss,
        nst_loss,
        lambda one, other: ft_loss(one[-1], other[-1]),
        lambda one, other: kdsvd_loss(one, other),
        lambda one, other: hint_loss(one[-1], other[-1]),
    ],
)
def test_under_autocast_as_without(loss: Callable[[Any, Any], Tensor]):
    """Half-precision features are compared in float32: no product of them is rounded."""
    one, other = (make_outputs(seed, dtype=torch.bfloat16).features[:-1] for seed in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(one, other)
    exact = loss([features.double() for features in one], [features.double() for features in other])
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(one, one).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dead", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_of_zeros_have_finite_gradients(name: str, dead: str, dtype: torch.dtype):
    nets = [
        make_outputs(seed, dtype=dtype, scale=float(dead not in (which, "both")))
        for seed, which in enumerate(("student", "teacher"))
    ]
    loss = build(LOSSES[name](), *nets)
    terms = loss(make_step(*nets))
    terms["loss"].backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients(nets[0]))
    assert all(p.grad.isfinite().all() for p in loss.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", LOSSES)
def test_one_image(name: str):
    student, teacher = make_outputs(0), make_outputs(1)
    loss = build(LOSSES[name](), student, teacher)
    one = NetOutput(*(tuple(f[:1] for f in part) if isinstance(part, tuple) else part[:1] for part in student))
    terms = loss(make_step(one, teacher.first(1)))
    terms["loss"].backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients(student))


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_reads_from_the_device(name: str, no_sync: Callable[[], Any]):
    student, teacher = make_outputs(0), make_outputs(1)
    loss, step = build(LOSSES[name](), student, teacher), make_step(student, teacher)
    with no_sync():
        loss(step)["loss"].backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "kdsvd"])  # torch's decomposition waits
def test_no_loss_waits_for_a_gpu(name: str, sync_is_an_error: Callable[[], None]):
    student, teacher = make_outputs(0), make_outputs(1)
    loss, step = build(LOSSES[name](), student, teacher).cuda(), make_step(student, teacher)
    step = step._replace(student=student.map(Tensor.cuda), teacher=step.teacher.map(Tensor.cuda))
    step = step._replace(labels=step.labels.cuda(), epoch=step.epoch.cuda())
    loss(step)["loss"].backward()
    torch.cuda.synchronize()
    sync_is_an_error()
    loss(step)["loss"].sum()


@pytest.mark.parametrize("name", ["at", "fsp", "nst", "ab", "ft", "kdsvd", "fitnet"])
def test_pooled_features_are_refused(name: str):
    loss = LOSSES[name](student_features=[-1], teacher_features=[-1])
    with pytest.raises(
        ValueError, match=r"needs maps of channels x height x width, and is given 16: name the features"
    ):
        build(loss, make_outputs(0), make_outputs(1))


@pytest.mark.parametrize("name", ["fsp", "kdsvd"])
def test_other_channels_are_refused_or_connected(name: str):
    wide = [(8, 4, 4), (16, 4, 4), (24, 4, 4), (32, 2, 2), (32,)]
    student, teacher = make_outputs(0), make_outputs(1, shapes=wide)
    with pytest.raises(
        ValueError, match=rf"{name.upper()} needs as many channels.* 8x8x8 .* 16x4x4: .*connect true.* AT"
    ):
        build(LOSSES[name](), student, teacher)
    loss = build(LOSSES[name](connect=True), student, teacher)
    connected = [part.conv.weight.shape[:2] for part in loss.connectors if not isinstance(part, nn.Identity)]
    assert [tuple(shape) for shape in connected] == [(16, 8), (24, 12), (32, 16)]
    loss(make_step(student, teacher))["loss"].backward()
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    with pytest.raises(ValueError, match="follow each other, and is given 1: name two or more"):
        build(LOSSES[name](student_features=[1], teacher_features=[1]), student, student)


@pytest.mark.parametrize("name", ["at", "nst", "sp", "ft", "fitnet", "ab"])
def test_other_shapes_are_compared(name: str):
    wide = [(8, 16, 16), (16, 8, 8), (24, 8, 8), (32, 4, 4), (32,)]
    student, teacher = make_outputs(0), make_outputs(1, shapes=wide)
    loss = build(LOSSES[name](), student, teacher)
    loss(make_step(student, teacher))["loss"].backward()
    assert all(gradient.isfinite().all() for gradient in gradients(student))
    if name in ("fitnet", "ab"):
        far = make_outputs(1, shapes=[(8, 28, 28), (16, 14, 14), (24, 14, 14), (32, 7, 7), (32,)])
        with pytest.raises(ValueError, match=r"no convolution brings the student's features \S+ to the teacher's \S+:"):
            build(LOSSES[name](), student, far)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AT(p=0.5), "p is 0.5: give a number of 1 or more"),
        (lambda: AT(weight=-1.0), "weight is -1.0"),
        (lambda: AB(margin=0.0), "margin is 0.0: give a number above 0"),
        (lambda: AB(first_epochs=-1.0), "first_epochs is -1.0: give 0 or more"),
        (lambda: AB(weight=-1.0), "weight is -1.0"),
        (lambda: FSP(first_epochs=2.0, weight=Schedule([0], [1])), "first_epochs is 2.0, and a weight has a schedule"),
        (lambda: FT(first_epochs=0.0), "first_epochs is 0.0: give a number above 0"),
        (lambda: FT(k=0.0), "k is 0.0"),
        (lambda: FT(p2=0.0), "p2 is 0.0"),
        (lambda: KDSVD(k=0), "k is 0: give 1 or more"),
        (lambda: build(KDSVD(k=5), make_outputs(0), make_outputs(1)), "k is 5, and features of 16x2x2 have fewer"),
        (
            lambda: build(FT(k=0.01), make_outputs(0), make_outputs(1)),
            "k is 0.01: of the teacher's 16 channels it leaves",
        ),
        (
            lambda: build(FT(student_features=[1, 2], teacher_features=[1, 2]), make_outputs(0), make_outputs(1)),
            "FT compares one feature, and is given 2",
        ),
    ],
)
def test_bad_settings_are_named(make: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["ab", "fsp"])
def test_the_first_epochs_are_the_comparisons_alone(name: str):
    student, teacher = make_outputs(0), make_outputs(1)
    loss = build({"ab": AB, "fsp": FSP}[name](0.3, 2.0, first_epochs=1.5), student, teacher)
    first = loss(make_step(student, teacher, 1.4))
    first["loss"].backward()
    assert first["loss"].item() == pytest.approx(0.3 * first[name].item(), rel=1e-6)
    assert not student.logits.grad.any()
    compared = loss.choose(student, teacher)[0]
    assert all(features.grad.any() for features in compared)
    for leaf in leaves(student):
        leaf.grad = None
    later = loss(make_step(student, teacher, 1.5))
    later["loss"].backward()
    assert later["loss"].item() == 2 * later["ce"].item()
    assert student.logits.grad.any()
    assert not any(features.grad.any() for features in compared)
    both = build(LOSSES[name](0.3, 2.0), student, teacher)(make_step(student, teacher))
    assert both["loss"].item() == pytest.approx((2 * both["ce"] + 0.3 * both[name]).item(), rel=1e-12)


def test_activation_boundaries_are_of_preactivations_and_come_first():
    student, teacher, loss = make_outputs(0), make_outputs(1), AB(ce_weight=0)
    assert loss.needs == {"preactivations"}
    assert (loss.weight, loss.ce_weight) == (Schedule([30, 30], [1, 0]), 0)
    found = loss.choose(student, teacher)
    assert [id(maps) for maps in found[0]] == [id(maps) for maps in student.preactivations]
    assert isinstance(WeightedSum([loss, KD()]), WeightedSum)  # one of them alone counts labels


def test_the_paraphraser_learns_first_and_stays():
    student, teacher = make_outputs(0), make_outputs(1)
    loss = build(FT(weight=3.0, first_epochs=1, reconstruction_weight=0.5), student, teacher)
    optimizer = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], 0.1, momentum=0.9, weight_decay=0.01)
    encoder, frozen, kept = loss.paraphraser.encoder.state_dict(), loss.frozen.state_dict(), {}
    for epoch in (0.0, 0.5, 1.0, 1.5, 2.0):
        before = {key: value.clone() for key, value in encoder.items()}
        for leaf in [*leaves(student), *loss.parameters()]:
            leaf.grad = None
        terms = loss(make_step(student, teacher, epoch))
        terms["loss"].backward()
        learnt = [student.logits, student.features[3], *loss.translator.parameters()]
        if epoch < 1:
            kept = before
            assert terms["loss"].item() == 0.5 * terms["reconstruction"].item()
            assert all(p.grad.any() for p in loss.paraphraser.parameters())
            assert not any(leaf.grad.any() for leaf in learnt)
        else:
            assert terms["loss"].item() == pytest.approx((terms["ce"] + 3 * terms["ft"]).item(), rel=1e-12)
            assert not any(p.grad.any() for p in loss.paraphraser.parameters())
            assert sum(bool(leaf.grad.any()) for leaf in learnt) >= len(learnt) - 3  # a bias before a norm has none
        optimizer.step()
        assert all(not torch.equal(value, before[key]) for key, value in encoder.items())  # by weight decay, too
        assert all(torch.equal(value, kept[key]) for key, value in frozen.items())
    again = build(FT(weight=3.0, first_epochs=1, reconstruction_weight=0.5), student, teacher)
    again.load_state_dict(loss.state_dict())
    for made in (loss, again):
        made.eval()
    step = make_step(student, teacher, 3.0)
    assert again(step)["ft"].item() == loss(step)["ft"].item()


def kdsvd_by_numpy(student: list[Tensor], teacher: list[Tensor], k: int) -> float:
    """The definition, one image and vector after the other."""
    total, images = 0.0, len(student[0])
    for image in range(images):
        layers = []
        for one, other in zip(student, teacher, strict=True):
            rows = [maps[image].flatten(1).T.detach().numpy() for maps in (one, other)]
            (_, _, own), (_, values, vectors) = (np.linalg.svd(matrix, full_matrices=False) for matrix in rows)
            scales, pairs = values[:k] / np.linalg.norm(values[:k]), []
            for scale, vector in zip(scales, vectors[:k], strict=True):
                turned = vector * np.sign(vector[np.abs(vector).argmax()])
                nearest = max(own[: k + 3], key=lambda candidate: abs(candidate @ turned))
                pairs.append((scale * nearest * np.sign(nearest @ turned), scale * turned))
            layers.append(pairs)
        for before, after in pairwise(layers):
            for (s0, t0), (s1, t1) in zip(before, after, strict=True):
                kernels = [np.exp(-((b[:, None] - a[None]) ** 2) / 8) for a, b in ((s0, s1), (t0, t1))]
                total += ((kernels[0] - kernels[1]) ** 2).sum()
    return total / images


VECTORS = [(5, 3, 3), (6, 3, 2), (7, 2, 2), (9, 2, 3)]  # more and fewer positions than channels


@pytest.mark.parametrize("k", [1, 2])
def test_singular_vectors_are_compared_by_the_definition(k: int):
    student, teacher = (list(make_outputs(seed, 3, VECTORS).features) for seed in (0, 1))
    assert kdsvd_loss(student, teacher, k).item() == pytest.approx(kdsvd_by_numpy(student, teacher, k), rel=1e-9)
    assert kdsvd_loss(teacher, teacher, k).item() == 0


def test_the_gradient_of_singular_vectors_is_that_of_finite_differences():
    student, teacher = (make_outputs(seed, 2, VECTORS).features for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda *maps: kdsvd_loss(maps, teacher, 2), student, fast_mode=True)


def test_signs_of_singular_vectors_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    teacher = make_outputs(1).features[:-1]
    found, decompose = [], torch.linalg.eigh
    for seed in range(3):
        signs = torch.Generator().manual_seed(seed)

        def turned(matrices: Tensor, signs: torch.Generator = signs) -> tuple[Tensor, Tensor]:
            values, vectors = decompose(matrices)
            return values, vectors * (2.0 * torch.randint(0, 2, vectors[:, :1].shape, generator=signs) - 1)

        monkeypatch.setattr(torch.linalg, "eigh", turned)
        student = make_outputs(0).features[:-1]
        loss = kdsvd_loss(student, teacher, 2)
        loss.backward()
        found.append([loss.item(), *(maps.grad.norm().item() for maps in student)])
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert found[0] == pytest.approx(found[2], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_channels_leave_gradients_finite(dtype: torch.dtype):
    student, teacher = (make_outputs(seed, dtype=dtype).features[:-1] for seed in (0, 1))
    alive = [(maps.detach() * (torch.arange(maps.shape[1]) > 2)[:, None, None]).requires_grad_() for maps in student]
    kdsvd_loss(alive, teacher).backward()
    assert all(maps.grad.isfinite().all() and maps.grad.any() for maps in alive)


def test_all_are_chosen_on_the_command_line():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DistillationLoss, "loss")
    for name in ("AT", "FSP", "FitNet", "SP", "NST", "AB", "FT", "KDSVD"):
        words = [f"--loss=dalikd.kd.losses.{name}", "--loss.weight=7", "--loss.student_features=[1, 2]"]
        config = parser.parse_args(words)
        made = getattr(parser, "instantiate" if hasattr(parser, "instantiate") else "instantiate_classes")(config).loss
        assert made.student_features == [1, 2]
        assert made.weight == (Schedule([30, 30], [7, 0]) if name == "AB" else 7)


def test_a_vision_transformer_teaches_with_chosen_features():
    """A convolutional student of three stages, a transformer of two blocks: their maps differ in number and size."""
    student = create_model("resnet8", 5)
    teacher = create_model(
        "timm:vit_tiny_patch16_224", 5, img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        given = teacher.outputs(images)
    found = student.outputs(images)
    with pytest.raises(ValueError, match=r"AT compares as many .* 64x8x8, the teacher's .*12x4x4.*teacher_features"):
        AT().build(LossContext(found, given, 5, 100))
    loss = AT(student_features=[2, 3], teacher_features=[0, 1])
    loss.build(LossContext(found, given, 5, 100))
    loss(make_step(found, given))["loss"].backward()
    assert student.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_as_one_graph(name: str):
    """All of them as a graph, one by the compiler too."""
    student, teacher = (make_outputs(seed, dtype=torch.float32) for seed in (0, 1))
    loss = build(LOSSES[name](), student, teacher).eval()
    step = make_step(student, teacher)
    expected = loss(step)
    found = torch.compile(loss, fullgraph=True, backend="inductor" if name == "sp" else "aot_eager")(step)
    found["loss"].backward()
    assert list(found) == list(expected)
    for term, value in expected.items():
        assert found[term].item() == pytest.approx(value.item(), rel=1e-4)
    assert all(gradient.isfinite().all() for gradient in gradients(student))
