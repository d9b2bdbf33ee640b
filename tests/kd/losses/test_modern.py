"""ReviewKD, OFD, SRRL, SimKD, OFA, SemCKD, SRD, CAT-KD and the distillation token: published values, or the papers'
equations once more in numpy; and what all of them must stand."""

import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dalikd.kd.backbones import NetOutput, create_model
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.losses import (
    CATKD,
    OFA,
    OFD,
    SRD,
    SRRL,
    DistillationLoss,
    DistillationToken,
    LossContext,
    ReviewKD,
    Schedule,
    SemCKD,
    SimKD,
    StepOutputs,
    WeightedSum,
    class_attention,
    cross_entropy,
    hcl_loss,
    log_sum_distance,
    ofa_loss,
    ofd_loss,
)
from dalikd.kd.losses.ofd import margins
from dalikd.tools import cli

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "losses_modern.json").read_text())
BATCH, CLASSES = 4, 5


def published(name: str) -> dict[str, Tensor]:
    """The inputs of a published value, float64; the student's with gradient."""
    random, found = np.random.RandomState(REFERENCE[name]["seed"]), {}
    for entry in REFERENCE[name]["inputs"]:
        drawn = random.randint(0, entry["high"], entry["shape"]) if "high" in entry else None
        values = random.randn(*entry["shape"]) * entry["scale"] if drawn is None else drawn
        found[entry["name"]] = torch.from_numpy(np.asarray(values))
        if entry["name"] in REFERENCE[name]["grad_of_sum"]:
            found[entry["name"]].requires_grad_()
    return found


def filled(key: str, like: Tensor) -> Tensor:
    """A module's tensor by the rule of the published values."""
    leaf, z = key.rpartition(".")[2], np.random.RandomState(zlib.crc32(key.encode())).standard_normal(like.shape)
    if like.dim() >= 2:
        z = z / np.sqrt(np.prod(like.shape[1:]))
    elif leaf == "running_var":
        z = 1 + 0.1 * np.abs(z)
    else:
        z = 1 + 0.1 * z if leaf == "weight" else 0.1 * z
    return torch.from_numpy(z.astype(np.float32))


def fill(module: nn.Module, names: Callable[[str], str]) -> None:
    state = {key: filled(names(key), value) for key, value in module.state_dict().items() if value.is_floating_point()}
    module.load_state_dict(state, strict=False)


def check_gradients(name: str, inputs: dict[str, Tensor]) -> None:
    for key, expected in REFERENCE[name]["grad_of_sum"].items():
        gradient = inputs[key].grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(expected["norm"], rel=1e-9)
        assert gradient.flatten()[:4].tolist() == pytest.approx(expected["first4"], rel=1e-9, abs=1e-18)


def check_parameters(name: str, module: nn.Module, names: Callable[[str], str]) -> None:
    found = {names(key): value.grad.norm().item() for key, value in module.named_parameters() if value.grad is not None}
    assert found == pytest.approx(REFERENCE[name]["param_grad_norm"], rel=1e-9)


# --------------------------------------------------------------------------------------------- published values


def test_hcl_loss_equals_the_published_one():
    inputs = published("ReviewKD_hcl")
    loss = hcl_loss([inputs[f"s{i}"] for i in range(3)], [inputs[f"t{i}"] for i in range(3)])
    loss.backward()
    assert loss.item() == pytest.approx(REFERENCE["ReviewKD_hcl"]["value64"], rel=1e-12)
    check_gradients("ReviewKD_hcl", inputs)


def test_reviewkd_equals_the_published_one():
    def names(key: str) -> str:
        place, part, rest = re.fullmatch(r"fusions\.(\d)\.(\w+)\.(.+)", key).groups()  # pyright: ignore[reportOptionalMemberAccess]
        conv = {"reduce": "conv1", "restore": "conv2", "attend": "att_conv.0"}[part]
        return f"abfs.{3 - int(place)}.{conv}.{rest}"

    inputs = published("ReviewKD_full")
    student, teacher = ([inputs[f"{net}{i}"] for i in range(4)] + [inputs[f"{net}_pool"]] for net in "st")
    outputs = StepOutputs(
        NetOutput(inputs["logits_s"], tuple(student)),
        NetOutput(inputs["logits_s"].detach(), tuple(teacher), tuple(teacher[1:4])),
        inputs["target"],
        inputs["target"],
        torch.tensor(5.0),
    )
    loss = ReviewKD()
    loss.build(LossContext(outputs.student, outputs.teacher, 10, 4))
    fill(loss, names)
    terms = loss.double()(outputs)
    terms["loss"].backward()
    ce, kd = REFERENCE["ReviewKD_full"]["value64"]
    assert terms["ce"].item() == pytest.approx(ce, rel=1e-12)
    assert terms["reviewkd"].item() / 4 == pytest.approx(kd, rel=1e-9)  # 5 of 20 epochs of warm-up
    assert terms["loss"].item() == pytest.approx(ce + kd, rel=1e-9)
    check_gradients("ReviewKD_full", inputs)
    check_parameters("ReviewKD_full", loss, names)


def teacher_norm(place: int, channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.weight.data = filled(f"teacher_bn{place}.weight", norm.weight)
    norm.bias.data = 5 * filled(f"teacher_bn{place}.bias", norm.bias)
    return norm


def test_ofd_equals_the_published_one():
    def names(key: str) -> str:
        return f"connectors.{key}"

    inputs = published("OFD")
    student, teacher = (tuple(inputs[f"{net}{i}"] for i in range(3)) for net in "st")
    outputs = StepOutputs(
        NetOutput(inputs["logits_s"], (student[0], *student, student[0]), student),
        NetOutput(inputs["logits_s"].detach(), (teacher[0], *teacher, teacher[0]), teacher),
        inputs["target"],
        inputs["target"],
        torch.zeros(()),
    )
    norms = tuple(teacher_norm(place, channels) for place, channels in enumerate((12, 24, 48)))
    loss = OFD()
    loss.build(LossContext(outputs.student, outputs.teacher, 10, 4, teacher_norms=norms))
    for place, first in enumerate(REFERENCE["OFD"]["margins_first4"]):
        assert margins(norms[place])[:4].tolist() == first
    fill(loss, names)
    terms = loss.double()(outputs)
    terms["loss"].backward()
    ce, kd = REFERENCE["OFD"]["value64"]
    assert terms["ce"].item() == pytest.approx(ce, rel=1e-12)
    assert 0.001 * terms["ofd"].item() == pytest.approx(kd, rel=1e-9)
    check_gradients("OFD", inputs)
    check_parameters("OFD", loss, names)


def test_ofd_loss_equals_the_published_one():
    inputs = published("OFD_feat_loss")
    loss = ofd_loss(inputs["source"], inputs["target_feat"], -inputs["margin"].abs() - 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(REFERENCE["OFD_feat_loss"]["value64"], rel=1e-12)
    check_gradients("OFD_feat_loss", inputs)


def test_margins_of_channels_that_are_never_or_always_negative():
    norm = nn.BatchNorm2d(5)
    norm.weight.data, norm.bias.data = (
        torch.tensor([1.0, -2.0, 0.0, 0.0, 1.0]),
        torch.tensor([9.0, 9.0, -3.0, 0.0, 0.0]),
    )
    assert margins(norm).tolist() == pytest.approx([-3.0, -6.0, -3.0, 0.0, -math.sqrt(2 / math.pi)], abs=1e-6)


@pytest.mark.parametrize(
    ("model", "last"),
    [
        ("resnet8", ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"]),
        ("resnet20_option_a", ["layer1.2.bn2", "layer2.2.bn2", "layer3.2.bn2"]),
        ("ResNet50", ["layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"]),
        ("wrn_16_1", ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]),
        ("vgg8", ["block1.1", "block2.1", "block3.1", "block4.1"]),
        ("MobileNetV2_0_25", ["blocks.1.1.conv.7", "blocks.2.2.conv.7", "blocks.4.2.conv.7", "blocks.6.0.conv.7"]),
    ],
)
def test_norms_before_the_last_relu_are_the_published_ones(model: str, last: list[str]):
    with torch.device("meta"):
        net = create_model(model, 3)
    names = {id(module): name for name, module in net.named_modules()}
    assert [names[id(norm)] for norm in net.norms_before_last_relu()] == last  # pyright: ignore[reportCallIssue]


# ------------------------------------------------------------------------------- the papers' equations, once more


def softmax(rows: np.ndarray) -> np.ndarray:
    powers = np.exp(rows - rows.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def normalized(rows: np.ndarray, eps: float) -> np.ndarray:
    """By the statistics of the batch, without scale and shift."""
    return (rows - rows.mean(0)) / np.sqrt(rows.var(0) + eps)


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("epsilon", [1.0, 1.3])
def test_ofa_loss_is_eq_6(epsilon: float):
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 5).double(), torch.randn(6, 5).double(), torch.arange(6) % 5
    q, p, expected = softmax(student.numpy() / 2), softmax(teacher.numpy() / 2), 0.0
    for row, label in enumerate(labels.tolist()):
        for c in range(5):
            target = (1 + p[row, c]) ** epsilon - 1 if c == label else p[row, c] ** epsilon
            expected -= target * math.log(q[row, c]) / 6
    assert ofa_loss(student, teacher, labels, epsilon, 2.0).item() == pytest.approx(expected, rel=1e-12)


def test_ofa_adds_the_branches_and_the_logits():
    loss, outputs = made("ofa", epsilon=1.2, kd_weight=0.5, weight=2.0)
    terms = loss(outputs)
    teacher, labels = outputs.teacher.logits, outputs.labels
    branches = sum(
        ofa_loss(branch(feature), teacher, labels, 1.2)
        for branch, feature in zip(loss.branches, outputs.student.features[1:3], strict=True)
    )
    kd = ofa_loss(outputs.student.logits, teacher, labels, 1.2)
    assert list(terms) == ["loss", "ce", "ofa", "kd"]
    assert terms["ofa"].item() == pytest.approx(branches.item(), rel=1e-12)  # pyright: ignore[reportAttributeAccessIssue]
    assert terms["loss"].item() == pytest.approx((terms["ce"] + 2 * branches + 0.5 * kd).item(), rel=1e-12)
    strides = [
        [layer.stride for layer in branch if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1)]
        for branch in loss.branches
    ]
    assert strides == [[(2, 2)], []]  # 8x8 is halved to 4x4, which stays


def test_srd_is_the_logarithm_of_a_sum():
    loss, outputs = made("srd", alpha=3.0)
    student, teacher = (net.features[-1].detach().numpy() for net in (outputs.student, outputs.teacher))
    weights = arrays(loss)
    own = normalized(student @ weights["projector.weight"].T + weights["projector.bias"], 1e-4)
    total = (np.abs(own - normalized(teacher, 1e-4)) ** 3).sum()
    assert loss(outputs)["srd"].item() == pytest.approx(math.log(total + 1e-5), rel=1e-9)
    assert log_sum_distance(torch.ones(2, 3), torch.ones(2, 3)).item() == pytest.approx(math.log(1e-5), rel=1e-6)


def test_srrl_judges_by_the_teachers_classifier():
    loss, outputs = made("srrl", logit_weight=0.5)
    weights, teacher = arrays(loss), outputs.teacher
    features = normalized(outputs.student.features[-1].detach().numpy() @ weights["connector.0.weight"].T, 1e-5)
    features = np.maximum(features * weights["connector.1.weight"] + weights["connector.1.bias"], 0)
    logits = features @ CLASSIFIERS["teacher"].weight.numpy().T + CLASSIFIERS["teacher"].bias.numpy()
    expected = np.square(features - teacher.features[-1].numpy()).mean()
    expected += 0.5 * np.square(logits - teacher.logits.numpy()).mean()
    term = loss(outputs)["srrl"]
    term.backward()
    assert term.item() == pytest.approx(expected, rel=1e-9)
    assert not any("classifier" in key for key in loss.state_dict())
    assert CLASSIFIERS["teacher"].weight.grad is None


@pytest.mark.parametrize("normalize", [True, False])
def test_catkd_compares_class_activation_maps(normalize: bool):
    loss, outputs = made("catkd", normalize=normalize)

    def maps(features: np.ndarray, weight: np.ndarray) -> np.ndarray:
        found = np.zeros((BATCH, CLASSES, 2, 2))
        for row, label, y, x in np.ndindex(*found.shape):  # 4 x 4 places, four of each pooled
            part = features[row, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            found[row, label, y, x] = np.mean([weight[label] @ part[:, i, j] for i in range(2) for j in range(2)])
        return found / np.sqrt(np.square(found).sum((2, 3), keepdims=True)) if normalize else found

    own, other = (
        maps(net.features[-2].detach().numpy(), CLASSIFIERS[name].weight.detach().numpy())
        for name, net in (("student", outputs.student), ("teacher", outputs.teacher))
    )
    term = loss(outputs)["catkd"]
    assert term.item() == pytest.approx(np.square(own - other).mean(), rel=1e-9)
    term.backward()
    gradient, CLASSIFIERS["student"].weight.grad = CLASSIFIERS["student"].weight.grad, None
    assert gradient is not None


def test_class_attention_of_all_places_is_the_logits():
    features, weight = torch.randn(2, 6, 3, 3).double(), torch.randn(5, 6).double()
    found = class_attention(features, weight, 1, normalize=False)
    torch.testing.assert_close(found.flatten(1), features.mean((2, 3)) @ weight.T)


def test_semckd_weighs_all_pairs():
    loss, outputs = made("semckd", temperature=0.5)
    student = [feature.detach().numpy() for feature in outputs.student.features[1:-1]]
    teacher = [feature.numpy() for feature in outputs.teacher.features[1:-1]]
    weights = arrays(loss)

    def embedded(kind: str, place: int, feature: np.ndarray) -> np.ndarray:
        name, rows = f"{kind}.{place}", feature.reshape(BATCH, -1)
        hidden = rows @ rows.T @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"]
        found = np.maximum(hidden, 0) @ weights[f"{name}.2.weight"].T + weights[f"{name}.2.bias"]
        return found / np.sqrt(np.square(found).sum(1, keepdims=True))

    expected = 0.0
    for place, own in enumerate(student):
        query = embedded("queries", place, own)
        energies = [(query * embedded("keys", k, other)).sum(1) / 0.5 for k, other in enumerate(teacher)]
        shares = softmax(np.stack(energies, axis=1))
        for k, other in enumerate(teacher):
            side = min(own.shape[2], other.shape[2])

            def pooled(maps: np.ndarray, side: int = side) -> np.ndarray:
                step = maps.shape[2] // side
                return maps.reshape(*maps.shape[:2], side, step, side, step).mean((3, 5))

            with torch.no_grad():
                projected = loss.projectors[place][k](torch.from_numpy(pooled(own))).numpy()
            differences = np.square(projected - pooled(other)).mean((1, 2, 3))
            expected += (shares[:, k] * differences).sum() / (BATCH * len(student))
    assert loss(outputs)["semckd"].item() == pytest.approx(expected, rel=1e-9)
    assert loss.attention(outputs.student.features[1:-1], outputs.teacher.features[1:-1]).shape == (BATCH, 2, 3)


@pytest.mark.parametrize("target", ["hard", "soft"])
def test_a_token_learns_the_teacher_and_the_other_the_labels(target: Any):
    loss, outputs = made("token", target=target, weight=0.3, temperature=2.0, label_smoothing=0.1)
    first, second = (head.detach().numpy() for head in outputs.student.heads)
    teacher, terms = outputs.teacher.logits.numpy(), loss(outputs)
    log_q = np.log(softmax(second / (1 if target == "hard" else 2)))
    if target == "hard":
        kd = -np.mean([log_q[row, teacher[row].argmax()] for row in range(BATCH)])
    else:
        p = softmax(teacher / 2)
        kd = 4 * (p * (np.log(p) - log_q)).sum(1).mean()
    ce = cross_entropy(torch.from_numpy(first), outputs.labels, 0.1).item()
    assert terms["kd"].item() == pytest.approx(kd, rel=1e-9)
    assert terms["loss"].item() == pytest.approx(0.7 * ce + 0.3 * kd, rel=1e-9)


def test_simkd_compares_the_projected_maps():
    loss, outputs = made("simkd")
    own, other = outputs.student.features[-2].detach().numpy(), outputs.teacher.features[-2].numpy()
    assert own.shape == other.shape  # as the completed student gives it
    terms = loss(outputs)
    assert terms["simkd"].item() == pytest.approx(np.square(own - other).mean(), rel=1e-12)
    assert terms["loss"].item() == pytest.approx(terms["simkd"].item(), rel=1e-12)


# -------------------------------------------------------------------------------------------- what all must stand

CLASSIFIERS = {"student": nn.Linear(8, CLASSES).double(), "teacher": nn.Linear(12, CLASSES).double()}
CLASSIFIERS["teacher"].requires_grad_(False)
NORMS = tuple(nn.BatchNorm2d(channels) for channels in (10, 12))
WIDE = [(6, 8, 8), (8, 8, 8), (10, 8, 8), (12, 4, 4)]  # the teacher's features: stem and three stages
METHODS: dict[str, Callable[..., Any]] = {
    "reviewkd": lambda **options: ReviewKD(**{"weight": 1.0, "teacher_features": [2, 3, 4], **options}),
    "ofd": lambda **options: OFD(**{"teacher_features": [2, 3], **options}),
    "srrl": SRRL,
    "simkd": SimKD,
    "ofa": OFA,
    "semckd": SemCKD,
    "srd": SRD,
    "catkd": CATKD,
    "token": DistillationToken,
}
BATCH_NORMED = {"reviewkd", "srrl", "srd", "semckd"}  # normalise vectors over the batch, or compare its images


def outputs_of(
    classifier: nn.Linear, shapes: list[tuple[int, ...]], scale: float, batch: int, dtype: torch.dtype
) -> NetOutput:
    maps = [torch.randn(batch, *shape, dtype=torch.float64) * scale for shape in shapes]
    features = (*(feature.relu() for feature in maps), maps[-1].relu().mean((2, 3)))
    logits = classifier.double()(features[-1]).detach()
    heads = [torch.randn(batch, CLASSES, dtype=torch.float64) * scale for _ in range(2)]
    return NetOutput(logits, features, tuple(maps[1:]), tuple(heads)).map(lambda part: part.to(dtype))


def leaves(outputs: NetOutput) -> NetOutput:
    return outputs.map(lambda part: part.detach().requires_grad_())


def made(
    name: str, scale: float = 1.0, batch: int = BATCH, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Any, StepOutputs]:
    """A loss, built, and outputs of both nets; the student's have gradients."""
    torch.manual_seed(0)
    student_shapes = [(4, 8, 8), (6, 8, 8), (8, 4, 4)]
    student = outputs_of(CLASSIFIERS["student"], student_shapes, scale, batch, dtype)
    teacher = outputs_of(CLASSIFIERS["teacher"], WIDE, scale, batch, dtype)
    loss = METHODS[name](**options)
    shown = [outputs_of(CLASSIFIERS[net], shapes, 1.0, 2, torch.float64)
             for net, shapes in (("student", student_shapes), ("teacher", WIDE))]  # fmt: skip
    loss.build(
        LossContext(
            *shown, CLASSES, 96, teacher_classifier=CLASSIFIERS["teacher"], student_classifier=CLASSIFIERS["student"],
            teacher_norms=(nn.BatchNorm2d(8), *NORMS), batch=batch if name != "semckd" else max(batch, 4), side=8,
        )
    )  # fmt: skip
    if name == "simkd":  # what the completed student gives
        student = student._replace(features=(*student.features[:-2], torch.randn_like(teacher.features[-2]),
                                             torch.randn_like(teacher.features[-1])))  # fmt: skip
    labels = torch.arange(batch) % CLASSES
    loss.to(torch.promote_types(dtype, torch.float32))
    return loss, StepOutputs(leaves(student), teacher, labels, labels, torch.tensor(5.0))


def gradients(outputs: StepOutputs) -> list[Tensor]:
    student = outputs.student
    parts = (student.logits, *student.features, *student.preactivations, *student.heads)
    return [part.grad for part in parts if part.grad is not None]


@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_reads_from_the_device(name: str, no_sync: Callable[[], Any]):
    loss, outputs = made(name, weight=Schedule([0, 20], [0, 1])) if name != "token" else made(name)
    with no_sync():
        loss(outputs)["loss"].backward()
    assert gradients(outputs)
    assert all(values.grad is not None for values in loss.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_a_gpu(name: str, sync_is_an_error: Callable[[], None]):
    loss, outputs = made(name, dtype=torch.float32)
    loss, classifiers = loss.cuda(), [classifier.float().cuda() for classifier in CLASSIFIERS.values()]
    moved = [leaves(net.map(Tensor.cuda)) for net in outputs[:2]]
    outputs = StepOutputs(*moved, *(values.cuda() for values in outputs[2:5]))  # pyright: ignore[reportArgumentType, reportCallIssue]
    loss(outputs)["loss"].backward()  # libraries are opened
    sync_is_an_error()
    loss(outputs)["loss"].backward()
    for classifier in classifiers:
        classifier.cpu()


@pytest.mark.parametrize("name", METHODS)
def test_a_compiler_sees_one_graph(name: str):
    loss, outputs = made(name)
    expected = loss(outputs)["loss"]
    torch.compiler.reset()
    found = torch.compile(loss.forward, fullgraph=True, backend="eager")(outputs)["loss"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_large_features_and_logits_stay_finite(name: str, dtype: torch.dtype):
    classifiers = [classifier.float() for classifier in CLASSIFIERS.values()]
    loss, outputs = made(name, scale=500.0, dtype=dtype)
    for classifier in classifiers:
        classifier.float()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        terms = loss(outputs)
    terms["loss"].backward()
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients(outputs))
    CLASSIFIERS["student"].zero_grad()


@pytest.mark.parametrize("name", METHODS)
def test_features_of_zero_have_finite_gradients(name: str):
    loss, outputs = made(name, scale=0.0)
    terms = loss(outputs)
    terms["loss"].backward()
    assert terms["loss"].isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(outputs))
    assert all(values.grad.isfinite().all() for values in loss.parameters() if values.grad is not None)
    CLASSIFIERS["student"].zero_grad()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in BATCH_NORMED])
def test_a_batch_of_one(name: str):
    loss, outputs = made(name, batch=1)
    assert loss(outputs)["loss"].isfinite()


def test_equal_features_cost_nothing():
    maps, zero = [torch.randn(3, 4, 8, 8).double(), torch.randn(3, 4, 1, 1).double()], pytest.approx(0.0, abs=1e-15)
    assert hcl_loss(maps, maps).item() == zero
    assert ofd_loss(maps[0], maps[0], torch.full((4, 1, 1), -0.5)).item() == zero
    assert ofd_loss(maps[0] - 1, maps[0], torch.full((4, 1, 1), -9.0)).item() > 0
    weight = torch.randn(5, 4).double()
    loss, outputs = made("simkd")
    same = outputs._replace(student=outputs.teacher)
    assert loss(same)["simkd"].item() == zero
    assert (class_attention(maps[0], weight, 2) - class_attention(maps[0], weight, 2)).abs().max().item() == zero


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda: SimKD(reduction=0), "reduction is 0: give 1 or more"),
        (lambda: CATKD(resolution=0), "resolution is 0"),
        (lambda: OFA(epsilon=0.5), "epsilon is 0.5: give 1 or more"),
        (lambda: OFA(kd_weight=-1), "kd_weight is -1"),
        (lambda: OFA(temperature=0), "temperature is 0"),
        (lambda: SRD(alpha=math.nan), "alpha is nan"),
        (lambda: SRRL(logit_weight=-1), "logit_weight is -1"),
        (lambda: SemCKD(temperature=0), "temperature is 0"),
        (lambda: ReviewKD(weight=-1), "weight is -1"),
        (lambda: OFD(label_smoothing=1), "label_smoothing is 1"),
        (lambda: DistillationToken(weight=1.5), "weight is 1.5: give a number from 0 to 1"),
        (lambda: DistillationToken(target="best"), 'target is best: give "hard" or "soft"'),  # pyright: ignore[reportArgumentType]
        (lambda: DistillationToken(label_smoothing=1), "label_smoothing is 1"),
        (lambda: DistillationToken(temperature=0), "temperature is 0"),
    ],
)
def test_unusable_settings_are_refused(loss: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        loss()
    assert "\n" not in str(error.value)


def context(student: str, teacher: str, side: int = 32, *, preactivations: bool = False, **options: Any) -> LossContext:
    """What the task shows of two nets."""
    torch.manual_seed(0)
    nets = [
        Normalized(create_model(name, CLASSES, **options.get(name, {})), (0.5,) * 3, (0.25,) * 3).eval()
        for name in (student, teacher)
    ]
    with torch.no_grad():
        given = [
            net.outputs(torch.zeros(2, 3, side, side), features=True, preactivations=preactivations) for net in nets
        ]
    own, other = (net.model.get_classifier() for net in nets)  # pyright: ignore[reportCallIssue]
    named = getattr(nets[1].model, "norms_before_last_relu", list)
    return LossContext(*given, CLASSES, 96, None, other, own, tuple(named()), 8, side)


TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
VIT = "timm:deit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "message"),
    [
        (ReviewKD(), "resnet8", "vgg8", "as the student as of the teacher|ReviewKD compares as many features"),
        (
            ReviewKD(student_features=[7]),
            "resnet8",
            "resnet14",
            r"student_features \[7\]: the student gives 5 features",
        ),
        (
            OFD(),
            "resnet8",
            "ShuffleV2_0_3",
            r"features 40x16x16 follow a batch norm of 20 channels: take a teacher such",
        ),
        (OFD(student_features=[4], teacher_features=[4]), "resnet8", "resnet14", "OFD needs maps .* and is given 64"),
        (SimKD(), "resnet8", "wrn_16_1", "averages its last map for its classifier, and this one makes 64 of 64x8x8"),
        (SimKD(reduction=100), "resnet8", "resnet14", "leaves no channel of the teacher's last map 64x8x8 .* 64x8x8"),
        (CATKD(), "wrn_16_1", "resnet8", "CATKD needs a student that averages its last map"),
        (CATKD(), "resnet8", "MobileNetV2_0_25", "CATKD needs a teacher that averages .* makes 1280 of 80x2x2"),
        (CATKD(resolution=16), "resnet8", "resnet14", "resolution 16 is finer than the student's last map 64x8x8"),
        (DistillationToken(), "resnet8", "resnet8", "two heads of 5 classes, and its heads are none: .*deit_tiny_dist"),
    ],
)
def test_nets_that_do_not_go_together_are_named(loss: DistillationLoss, student: str, teacher: str, message: str):
    shown = context(student, teacher, preactivations="preactivations" in loss.needs)
    with pytest.raises(ValueError, match=message) as error:
        loss.build(shown)
    assert "\n" not in str(error.value)


def test_a_classifier_that_is_not_the_last_layer_is_named():
    shown = context("resnet8", "resnet14")
    with pytest.raises(ValueError, match=r"SRRL needs a teacher whose classifier .* Linear does not make 5 of 64"):
        SRRL().build(shown._replace(teacher_classifier=nn.Linear(64, CLASSES)))
    with pytest.raises(ValueError, match="CATKD needs a linear classifier, and the teacher's is Conv2d"):
        CATKD().build(shown._replace(teacher_classifier=nn.Conv2d(64, CLASSES, 1)))
    with pytest.raises(ValueError, match="a process has 0: give a --batch_size of at least 4"):
        SemCKD().build(shown._replace(batch=0))


@pytest.mark.parametrize(
    ("loss", "student", "teacher"),
    [
        (ReviewKD(teacher_preactivations=False, teacher_features=[2, -1]), VIT, "timm:test_resnet"),
        (ReviewKD(teacher_preactivations=False, student_features=[3, -1]), "timm:test_resnet", VIT),
        (ReviewKD(student_features=[1, 2, 3, -1], teacher_features=[1, 2, 4, -1]), "ShuffleV2_0_3", "vgg8"),
        (OFD(student_features=[1, 3], teacher_features=[2, 4]), "MobileNetV2_0_25", "vgg8"),
        (OFD(), "resnet8", "wrn_16_1"),
        (OFA(), VIT, "resnet8"),
        (OFA(), "resnet8", VIT),
        (SemCKD(), "resnet8", VIT),
        (SRD(), VIT, "MobileNetV2_0_25"),
        (SRRL(), "vgg8", VIT),
        (SRRL(), VIT, "wrn_16_1"),
        (CATKD(), "timm:test_resnet", "vgg8"),
    ],
)
def test_any_two_nets_go_together(loss: Any, student: str, teacher: str):
    small = {VIT: TINY_VIT}
    if "timm:test_resnet" in (student, teacher):
        loss.resolution = 1  # its last map is 1 x 1
    shown = context(student, teacher, preactivations="preactivations" in loss.needs, **small)
    loss.build(shown)
    labels = torch.zeros(2, dtype=torch.int64)
    if isinstance(loss, SemCKD):
        shown = shown._replace(**{net: getattr(shown, net).map(lambda part: part.repeat_interleave(4, 0))
                                  for net in ("student", "teacher")})  # fmt: skip
        labels = labels.repeat(4)
    terms = loss(StepOutputs(shown.student, shown.teacher, labels, labels, torch.tensor(30.0)))
    assert terms["loss"].isfinite()


@pytest.mark.parametrize(
    "name", ["ReviewKD", "OFD", "SRRL", "SimKD", "OFA", "SemCKD", "SRD", "CATKD", "DistillationToken"]
)
def test_a_command_takes_it(name: str):
    words = ["--model", "resnet8", "--teacher.name", "resnet14", "--loss", f"dalikd.kd.losses.{name}"]
    options, plain = cli.parse("distill", [*words, "--loss.label_smoothing", "0.1"])
    assert (type(options.loss).__name__, options.loss.label_smoothing) == (name, 0.1)
    assert plain["loss"]["class_path"] == f"dalikd.kd.losses.{name}"


def test_reviewkd_warms_up():
    assert ReviewKD().weight == Schedule([0, 20], [0, 1])
    words = ["--loss", "dalikd.kd.losses.ReviewKD", "--loss.weight", '{"epochs": [0, 20], "values": [0, 5]}']
    assert cli.parse("distill", words)[0].loss.weight == Schedule([0, 20], [0, 5])


def test_the_token_counts_the_labels_in_a_sum():
    with pytest.raises(ValueError, match="DistillationToken and SRD each count"):
        WeightedSum([DistillationToken(), SRD()])
    assert WeightedSum([DistillationToken(), SRD(ce_weight=0)]).needs == {"heads", "features"}
