from copy import deepcopy
from itertools import pairwise, repeat
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from dalikd.kd.backbones import create_model
from dalikd.kd.losses import HSAKD, KD
from dalikd.kd.teacher import Teacher
from dalikd.tools.bench import published
from dalikd.tools.bench.published import ABLATIONS, TURNED_ABLATIONS, AblatedLoop, TurnedLoop
from dalikd.tools.cli import parse
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop

BATCH = 16
NAMES = [*ABLATIONS, "dalikd distill's step"]
SAME_LOSSES = NAMES[2:]  # those that mix by the draws of the batch
TURNED = [*TURNED_ABLATIONS, "dalikd distill's step"]
AUX = ["--teacher.name", "resnet8_aux", "--model", "resnet8_aux", "--data.image_size", "8"]


class CountWaits(TorchDispatchMode):
    """Counts the tensors whose value the host reads."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def arguments(training, teacher):
    training = training[: training.index("--epochs")]
    return [*map(str, [*training, *teacher]), "--metric", "false"]


@pytest.fixture
def turned(training):
    training = training[: training.index("--epochs")]
    return [*map(str, training), *AUX, "--metric", "false"]


@pytest.fixture
def opened():
    """Opens every variant, with the loader they share."""
    loaders = []

    def opened(arguments):
        options, _ = parse("bench published", arguments)
        variants, loader = published.open_variants(options, start("cpu", "fp32"))
        loaders.append(loader)
        return variants, loader

    yield opened
    for loader in loaders:
        loader.close()


@pytest.fixture
def variants_and_loader(opened, arguments):
    return opened(arguments)


@pytest.mark.parametrize(("ablations", "changes"), [(ABLATIONS, 7), (TURNED_ABLATIONS, 6)])
def test_each_variant_changes_one_thing(ablations, changes):
    variants = list(ablations.values())
    assert [len(published) for published in variants] == [*range(changes, -1, -1)]
    assert all(upper < lower for lower, upper in pairwise(variants))


def test_the_variants_that_mix_alike_have_the_same_losses(variants_and_loader):
    variants, loader = variants_and_loader
    losses = {name: _losses(variants[name], loader) for name in SAME_LOSSES}
    reference = losses.pop("dalikd distill's step")
    assert reference[0] > 0
    assert len(set(reference)) == 5  # they train
    for name, values in losses.items():
        assert values == pytest.approx(reference, abs=1e-4), name


def _losses(variant, loader):
    loader.seek(0)
    losses = []
    for _ in range(5):
        terms = variant.loop.step()
        if isinstance(variant.loop, Loop):
            terms = variant.loop.meter.means()
            variant.loop.meter.reset()
        losses.append(float(torch.as_tensor(terms["loss"]).detach()))
    return losses


def test_each_variant_asks_the_teacher_as_it_should_and_the_lower_two_wait_and_train(variants_and_loader):
    variants, _ = variants_and_loader
    assert list(variants) == NAMES
    thrice, twice = [BATCH, 2 * BATCH, BATCH], [BATCH, 2 * BATCH]
    assert [one.asked() for one in variants.values()] == [thrice, thrice, thrice, twice, *[[3 * BATCH]] * 5]
    waits = []
    for name, variant in variants.items():
        net: Any = variant.loop.student if name in NAMES[:2] else torch.nn.Identity()
        before = [values.clone() for values in net.parameters()]
        with CountWaits() as mode:
            variant.loop.step()
        waits.append(mode.count)
        assert not any(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    # four terms of the loss, and at least one look at each of two orders
    assert min(waits[:2]) >= 6
    assert max(waits[2:]) == 0


def test_the_published_step_has_the_losses_of_an_independent_computation():
    torch.manual_seed(3)
    student, teacher = torch.nn.Linear(3 * 8 * 8, 4), torch.nn.Linear(3 * 8 * 8, 4)
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    asked = []
    frozen = Teacher(torch.nn.Sequential(torch.nn.Flatten(), teacher))
    frozen.model.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].clone()))
    augmenter: Any = SimpleNamespace(runs=2)
    loss = KD(ce_weight=0.1, kd_weight=0.9, temperature=4.0)
    trained = torch.nn.Sequential(torch.nn.Flatten(), student)
    batches, optimizer = repeat((images, labels, ())), SGD(trained.parameters(), 0.5)
    loop = AblatedLoop(ABLATIONS["published"], batches, trained, frozen, loss, optimizer, augmenter, seed=7)
    weight, bias = student.weight.detach().clone(), student.bias.detach().clone()
    torch.manual_seed(11)
    terms = loop.step()

    originals, pool, again = asked
    assert torch.equal(originals, images)
    torch.manual_seed(11)
    random = np.random.default_rng(7)
    assert torch.equal(pool, torch.cat([_cutmix_by_pixels(images, random) for _ in range(2)]))
    probabilities = (pool.flatten(1) @ teacher.weight.T + teacher.bias).double().softmax(1)
    order = (-(probabilities * probabilities.log()).sum(1)).argsort()
    assert torch.equal(again, pool[order[-6:].sort().values])

    def divergence(seen):
        target = ((seen.flatten(1) @ teacher.weight.T + teacher.bias).double() / 4).softmax(1)
        own = ((seen.flatten(1) @ weight.T + bias).double() / 4).softmax(1)
        return 16 * (target * (target / own).log()).sum(1).mean()

    plain = (images.flatten(1) @ weight.T + bias).double().softmax(1)
    expected = {"ce": -plain[range(6), labels].log().mean(), "kd": divergence(images), "kd_mix": divergence(again)}
    expected["loss"] = 0.1 * expected["ce"] + 0.9 * (expected["kd"] + expected["kd_mix"])
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )


def _cutmix_by_pixels(images, random):
    """Pastes one box of the partner into every image, a pixel at a time."""
    count, _, height, width = images.shape
    share = (1 - random.beta(1, 1)) ** 0.5
    tall, middle_y = int(height * share), int(random.integers(height))
    wide, middle_x = int(width * share), int(random.integers(width))
    partner = torch.randperm(count)
    while any(int(partner[index]) == index for index in range(count)):
        partner = torch.randperm(count)
    mixed = images.clone()
    for y in range(middle_y - tall // 2, middle_y + tall // 2):
        for x in range(middle_x - wide // 2, middle_x + wide // 2):
            if 0 <= y < height and 0 <= x < width:
                mixed[:, :, y, x] = images[partner, :, y, x]
    return mixed


def test_the_host_adds_up_terms_and_hits():
    unused: Any = None
    loop = AblatedLoop(ABLATIONS["published"], unused, torch.nn.Identity(), unused, unused, unused, unused)
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0]] * 3 + [[0, 1, 2, 3, 4, 5]])
    for term in (1.0, 2.0):
        loop._count({"loss": torch.tensor(term)}, logits, torch.tensor([0, 4, 5, 5]))
    assert loop.sums == {"loss": 3, "top1": 2 * 2, "top5": 2 * 3}


# ---------------------------------------------------------------------------------------------- HSAKD's loop


def test_all_that_turn_have_the_same_losses_on_the_same_batch_and_ask_the_teacher_once(opened, turned):
    variants, loader = opened(turned)
    assert list(variants) == TURNED
    found = {}
    for name, variant in variants.items():
        loader.seek(0)
        loop, waits = variant.loop, name in TURNED[:2]
        assert variant.asked() == [4 * BATCH]
        with CountWaits() as mode:  # after the first step, where more is looked at
            loop.step()
        assert mode.count == (4 if waits else 0)
        found[name] = {term: float(value) for term, value in loop.meter.means().items()}
        if waits:
            found[name] = {term: float(loop.sums[term]) / 2 for term in ("loss", "ce", "kd", "kd_heads")}
            found[name]["top1"] = float(loop.sums["top1"]) / (2 * BATCH)
    reference = found["dalikd distill's step"]
    assert reference["kd_heads"] > 0
    for name in TURNED[1:]:  # the first has a loader, and so images, of its own
        assert found[name] == pytest.approx(reference, rel=1e-5), name


def test_the_published_turned_step_learns_and_counts_as_an_independent_computation():
    torch.manual_seed(3)
    student, teacher = (create_model("resnet8_aux", 5, detach_heads=False).double() for _ in range(2))
    images, labels = torch.randn(6, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3, 4, 1])
    copies = torch.stack([torch.rot90(image, turn, (1, 2)) for image in images for turn in range(4)])
    reference = deepcopy(student).train()
    own, given = reference(copies), teacher.eval()(copies)
    parts: Any = student, Teacher(teacher), HSAKD(), SGD(student.parameters(), 0.5), None
    loop = TurnedLoop(TURNED_ABLATIONS["published"], repeat((images, labels, ())), *parts)
    terms = loop.step()

    def divergence(logits, target):
        logits, target = (logits / 3).log_softmax(1), (target / 3).softmax(1)
        return 9 * (target * (target.log() - logits)).sum(1).mean()

    expected = {
        "ce": functional.cross_entropy(own.logits[::4], labels),
        "kd": divergence(own.logits, given.logits),
        "kd_heads": sum(divergence(*pair) for pair in zip(own.heads, given.heads, strict=True)),
    }
    expected["loss"] = sum(expected.values())
    torch.testing.assert_close(terms, expected)
    expected["loss"].backward()
    for after, before in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.5 * before.grad)
    assert loop.sums["top1"] == (own.logits[::4].argmax(1) == labels).sum()
    joint = [4 * label + turn for label in labels.tolist() for turn in range(4)]
    for number, head in enumerate(own.heads, start=1):
        of_classes = sum(head[:, turn::4] for turn in range(4))
        best = [row.argsort(descending=True).tolist() for row in head]
        hits = {
            "joint_top1": sum(row[0] == label for row, label in zip(best, joint, strict=True)),
            "joint_top5": sum(label in row[:5] for row, label in zip(best, joint, strict=True)),
            "class_top1": sum(int(row.argmax()) == label // 4 for row, label in zip(of_classes, joint, strict=True)),
            "class_top5": 24,
        }
        assert {name: loop.sums[f"head{number}_{name}"] for name in hits} == hits


class CountAll(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_operators_of_the_turned_step_are_told_apart(opened, turned):
    variants, loader = opened(turned)
    own = variants["dalikd distill's step"]
    images = own.loop.task.student.normalize(loader.next().pixels)
    own.loop.step()  # the momentum's first
    with CountAll() as mode:
        own.loop.step()
    counted = published.operators(own, images, None)
    assert sum(counted.values()) == mode.count
    with CountAll() as mode, torch.no_grad():
        own.teacher.model.model.outputs(images)
    assert counted["teacher"] == mode.count
    weights = list(own.loop.task.student.parameters())
    assert counted["student"] > 3 * sum(values.dim() == 4 for values in weights)  # forward, and two gradients
    assert 4 * len(weights) <= counted["optimizer"] <= 4 * len(weights) + 2  # decay, two of momentum, step; its events
    assert published.operators(variants["published"], images, None)["teacher"] > mode.count  # which has batch norms


def test_the_run_writes_all_variants(arguments, bench):
    """Batch norms that stay make none."""
    record, _ = bench("published", *arguments, "--steps", 1, "--metric", "true", "--teacher.fold_bn", "false")
    rows, names = record.rows, [name for name in NAMES if name != "batch norms folded"]
    assert [row["loop"] for row in rows] == [*names, "T. stddev streamed too"]
    assert [row["teacher images an original"] for row in rows] == [4, 4, 4, *[3] * 6]
    assert [row["teacher calls a step"] for row in rows] == [3, 3, 3, 2, *[1] * 5]
    rates = [row["images/s"]["values"] for row in rows]
    assert all(len(values) == 2 and min(values) > 0 for values in rates)
    convolution, linear = 2 * 8 * (3 * 3 * 3) * 15 * 15 / 1e9, 2 * 8 * 3 / 1e9
    teacher, student = convolution + linear, 2 * convolution + 3 * linear  # pixels need no gradient
    assert rows[0]["GFLOP an original"] == pytest.approx(4 * teacher + 2 * student)
    assert f"{(4 * teacher + 2 * student) / (3 * teacher + 2 * student):.3f}: (4 T" in record.notes[0]
    for number, row in enumerate(rows):
        if number:
            assert row["to the published"]["values"] == _by_round(rates[number], rates[0])
            assert row["to the rung before"]["values"] == _by_round(rates[number], rates[number - 1])
    assert rows[0]["to the published"] is rows[0]["to the rung before"] is None
    assert "(4 T + 2 S) / (3 T + 2 S)" in record.notes[0]


def _by_round(ours, theirs):
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def test_a_teacher_without_heads_is_named(turned, refused):
    error = refused("published", *turned, "--teacher.name", "resnet8")
    assert "the student has 3 auxiliary heads, the teacher none" in error


def test_the_run_of_a_turned_loss_writes_its_variants_and_operators(turned, bench):
    record, _ = bench("published", *turned, "--batch_size", 8, "--steps", 1)
    assert "the published HSAKD loop: resnet8_aux to resnet8_aux" in record.title
    assert [row["loop"] for row in record.rows] == TURNED
    assert {(row["teacher images an original"], row["teacher calls a step"]) for row in record.rows} == {(4, 1)}
    (work,) = {row["GFLOP an original"] for row in record.rows}
    assert work > 0
    *counted, compared = record.notes
    assert compared.startswith("dalikd distill's step against the published loop: ")
    starts = [f"Operators that torch dispatches in a step, without views, {name}: " for name in (TURNED[0], TURNED[-1])]
    assert [note[: len(start)] for note, start in zip(counted, starts, strict=True)] == starts


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ema", "0.9"], "--ema 0.9: the published loop has no such thing"),
        (["--clip_grad_norm", "1"], "give --clip_grad_norm null"),
        (["--accumulation", "2"], "--accumulation 2"),
        (["--rounds", "1"], "--rounds 1: give at least 2"),
        (["--precision", "fp16"], "--precision fp16"),
        (["--model", "timm:test_resnet"], "normalise by different means"),
        (["--augmentation", "cutmix"], "augmentation"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, more, message, refused):
    assert message in refused("published", *arguments, *more)
