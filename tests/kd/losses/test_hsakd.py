"""HSAKD's three objectives against published values."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dalikd.kd.backbones import NetOutput
from dalikd.kd.losses import (
    HSAKD,
    LossContext,
    MixedOutputs,
    StepOutputs,
    hsakd_mutual_loss,
    hsakd_teacher_loss,
    kd_loss,
)
from dalikd.kd.rotation import class_logits, joint_labels, rotations

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "hsakd_step.json").read_text())


def published(kind):
    """Images, labels and both nets' outputs, as the reference says that they are drawn."""
    entry = REFERENCE[kind]
    random, batch = np.random.RandomState(entry["seed"]), entry["B"]
    images = torch.from_numpy(random.randn(batch, 3, 32, 32))
    labels = torch.from_numpy(random.randint(0, 100, batch))

    def net():
        logits, *heads = (
            torch.from_numpy(entry["scale"] * random.randn(4 * batch, classes)).requires_grad_()
            for classes in (100, *[400] * entry["n_aux"])
        )
        return NetOutput(logits, heads=tuple(heads))

    return entry, images, labels, net(), net()


def student_loss(student, teacher, labels, mixed=None, **options):
    whole = [net.map(lambda rows: rows[::4]) for net in (student, teacher)]
    epoch = torch.zeros((), dtype=torch.float64)
    return HSAKD(**options)(StepOutputs(*whole, labels, labels, epoch, mixed, (student, teacher)))


def check_gradients(net, logits, heads):
    for values, expected in zip((net.logits, *net.heads), (logits, *heads), strict=True):
        assert values.grad.norm().item() == pytest.approx(expected["norm"], rel=1e-9)
        for row in range(2):
            assert values.grad[row, :4].tolist() == pytest.approx(expected[f"row{row}_first4"], rel=1e-9, abs=1e-15)


def test_student():
    entry, _, labels, student, teacher = published("student")
    terms = student_loss(student, teacher.map(torch.Tensor.detach), labels)
    expected = {"loss": entry["total"], "ce": entry["loss_cls"], "kd": entry["loss_div_final"]}
    expected["kd_heads"] = sum(entry["loss_div_aux"])
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-9)
    terms["loss"].backward()
    check_gradients(student, entry["grad_logits"], entry["grad_ss_logits"])


def test_teacher():
    entry, _, labels, teacher, _ = published("teacher")
    terms = hsakd_teacher_loss(teacher, labels)
    expected = {"loss": entry["total"], "ce": entry["loss_final"], "ce_heads": sum(entry["loss_aux"])}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-9)
    terms["loss"].backward()
    check_gradients(teacher, entry["grad_logits"], entry["grad_ss_logits"])


def test_two_nets_that_learn_from_each_other():
    entry, _, labels, first, second = published("online")
    terms = hsakd_mutual_loss([first, second], labels)
    found = {name: term.item() for name, term in terms.items()}
    assert found["loss"] == pytest.approx(entry["total"], rel=1e-9)
    assert found["ce"] + found["ce_heads"] == pytest.approx(entry["loss_cls"], rel=1e-9)
    assert found["ce"] == pytest.approx(sum(entry["loss_cls_final_per_net"]), rel=1e-9)
    assert found["kd"] == pytest.approx(sum(entry["loss_div_final_[1from2,2from1]"]), rel=1e-9)
    assert found["kd_heads"] == pytest.approx(sum(map(sum, entry["loss_div_aux_[1from2,2from1]"])), rel=1e-9)
    terms["loss"].backward()
    for net, logits, heads in zip(
        (first, second), entry["grad_logits_per_net"], entry["grad_ss_logits_per_net"], strict=True
    ):
        check_gradients(net, logits, heads)


def test_turned_images_and_accuracies_are_the_published_ones():
    _, images, labels, *nets = published("online")
    rows = rotations(images.float())
    for row, expected in enumerate(REFERENCE["rotated_rows_first4_values"]):
        assert rows[row].flatten()[:4].tolist() == expected

    def share(scores, wanted):
        return round((scores.argmax(1) == wanted).double().mean().item(), 4)

    joint, of_class = [], []
    for net in nets:
        joint.append([share(head, joint_labels(labels)) for head in net.heads])
        of_class.append([share(class_logits(head), labels.repeat_interleave(4)) for head in net.heads])
        of_class[-1].append(share(net.logits[::4], labels))
    published_lines = [json.loads(re.search(r"\[.*\]", line)[0]) for line in REFERENCE["log_lines"]]
    assert [joint, of_class] == published_lines


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_extreme_logits_of_one_image_stay_finite_in_full_precision(dtype):
    def net():
        return NetOutput(
            (torch.randn(4, 5) * 500).to(dtype).requires_grad_(), heads=((torch.randn(4, 20) * 500).to(dtype),)
        )

    one, other, labels = net(), net(), torch.tensor([3])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for terms in (
            hsakd_teacher_loss(one, labels),
            student_loss(one, other, labels),
            hsakd_mutual_loss([one, other], labels),
        ):
            assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
            terms["loss"].backward()
    assert one.logits.grad.isfinite().all()


def test_a_student_that_is_its_teacher_has_nothing_left_to_imitate():
    _, _, labels, net, _ = published("student")
    terms = student_loss(net, net, labels)
    assert terms["kd"].item() == pytest.approx(0, abs=1e-12)
    assert terms["kd_heads"].item() == pytest.approx(0, abs=1e-12)


def test_bad_input_is_named():
    _, _, labels, net, _ = published("student")
    with pytest.raises(ValueError, match="no auxiliary heads: take the net NAME_aux"):
        hsakd_teacher_loss(NetOutput(net.logits), labels)
    with pytest.raises(ValueError, match="32 rows of logits for 4 labels: give 4 an image"):
        hsakd_teacher_loss(net, labels[:4])
    fewer = net._replace(heads=net.heads[:2])
    with pytest.raises(ValueError, match="a net has 3 auxiliary heads, another one 2: heads are compared one by one"):
        hsakd_mutual_loss([net, fewer], labels)
    with pytest.raises(ValueError, match="the student has 3 auxiliary heads, the teacher none"):
        HSAKD().build(LossContext(net, NetOutput(net.logits), 100, 8))
    with pytest.raises(ValueError, match="heads_share is -1: give 0 or more"):
        HSAKD(heads_share=-1)


def test_shares_weigh_the_terms_and_augmented_images_have_logits_alone():
    _, _, labels, student, teacher = published("student")
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 100, generator=random, dtype=torch.float64)
    lam = torch.rand(5, generator=random, dtype=torch.float64)
    mixed = MixedOutputs(*logits, labels[:5], labels[3:8], lam)
    options = {"ce_weight": 0.3, "kd_weight": 2.0, "kd_share": 0.5, "heads_share": 0.7, "kd_mix_share": 0.2}
    terms = student_loss(student, teacher, labels, mixed, **options, ce_mix_share=0.1, temperature=2.0)
    weights = {"ce": 0.3, "kd": 1.0, "kd_heads": 1.4, "ce_mix": 0.2, "kd_mix": 0.4}
    assert terms["kd_mix"].item() == pytest.approx(kd_loss(*logits, 2.0).item(), rel=1e-12)
    total = sum(weight * terms[name].item() for name, weight in weights.items())
    assert (set(terms), terms["loss"].item()) == ({*weights, "loss"}, pytest.approx(total, rel=1e-12))


def test_a_teachers_mixed_images_carry_both_labels_by_their_shares():
    _, _, labels, net, _ = published("teacher")
    partners, lam = labels.flip(0), torch.linspace(0, 1, len(labels), dtype=torch.float64)
    found = hsakd_teacher_loss(net, labels, partners, lam)
    logits = (net.logits[::4], labels, partners, lam)
    heads = [(head, joint_labels(labels), joint_labels(partners), lam.repeat_interleave(4)) for head in net.heads]
    for name, parts in (("ce", [logits]), ("ce_heads", heads)):
        expected = 0.0
        for scores, own, other, share in parts:
            logs = scores.detach().log_softmax(1)
            rows = torch.arange(len(logs))
            expected -= (share * logs[rows, own] + (1 - share) * logs[rows, other]).mean().item()
        assert found[name].item() == pytest.approx(expected, rel=1e-12)


def test_each_of_three_nets_takes_the_mean_of_the_two_others():
    _, _, labels, one, two = published("online")
    three = two.map(lambda rows: rows.detach() * 0.5)
    pairs = [hsakd_mutual_loss(pair, labels) for pair in ([one, two], [one, three], [two, three])]
    found = hsakd_mutual_loss([one, two, three], labels)
    for name in (
        "ce",
        "ce_heads",
        "kd",
        "kd_heads",
    ):  # in all pairs every net stands twice, and imitates at full weight
        assert found[name].item() == pytest.approx(sum(pair[name].item() for pair in pairs) / 2, rel=1e-12)
