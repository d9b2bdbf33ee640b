"""The losses of hierarchical self-supervised augmented distillation, for nets with auxiliary heads.

Yang et al., "Hierarchical Self-supervised Augmented Knowledge Distillation", IJCAI 2021, arXiv 2107.13715, section
3, and their published training of two nets that learn from each other. A net sees every image in its four quarter
turns, in the order of `kd.rotation.rotations`. All terms have weight 1.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dalikd.kd.backbones.auxiliary import AuxiliaryNet
from dalikd.kd.backbones.layers import NetOutput, Normalized
from dalikd.kd.losses.base import LogitLoss, LossContext, StepOutputs, Weight, cross_entropy, mixed_cross_entropy
from dalikd.kd.losses.kd import check_temperature, kd_loss
from dalikd.kd.rotation import TURNS, joint_labels

__all__ = ["HSAKD", "hsakd_mutual_loss", "hsakd_teacher_loss"]


def hsakd_teacher_loss(
    outputs: NetOutput,
    labels: Tensor,
    partner_labels: Tensor | None = None,
    lam: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """What a teacher learns from: CE of the logits of unturned images, and CE of every head's joint logits.

    Args:
        outputs: logits [4B, C] and heads [4B, 4C], of the turned images.
        labels: of the images before they are turned, int64 [B].
        partner_labels: of the images mixed into them, int64 [B]; each CE is then the mean of both by their shares.
        lam: share of the image itself, [B].
        label_smoothing: share of each label spread evenly over the classes, in [0, 1).

    Returns:
        Scalars in float32 (float64 stays): "loss", the sum of the others; "ce"; "ce_heads", summed over the heads.

    Raises:
        ValueError: the net has no heads, or the rows are not four an image.
    """
    if not outputs.heads:
        raise ValueError("the net gives no auxiliary heads: take the net NAME_aux, and ask for its heads")
    if len(outputs.logits) != TURNS * len(labels):
        raise ValueError(
            f"{len(outputs.logits)} rows of logits for {len(labels)} labels: give {TURNS} an image, as rotations does"
        )
    logits = outputs.logits[::TURNS]
    if partner_labels is None or lam is None:
        ce, joint = cross_entropy(logits, labels, label_smoothing), joint_labels(labels)
        of_heads = [cross_entropy(head, joint, label_smoothing) for head in outputs.heads]
    else:
        ce = mixed_cross_entropy(logits, labels, partner_labels, lam, label_smoothing)
        carried = joint_labels(labels), joint_labels(partner_labels), lam.repeat_interleave(TURNS)
        of_heads = [mixed_cross_entropy(head, *carried, label_smoothing) for head in outputs.heads]
    ce_heads = torch.stack(of_heads).sum()
    return {"loss": ce + ce_heads, "ce": ce, "ce_heads": ce_heads}


def hsakd_mutual_loss(
    nets: Sequence[NetOutput],
    labels: Tensor,
    partner_labels: Tensor | None = None,
    lam: Tensor | None = None,
    *,
    temperature: float = 3.0,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """What nets learn from together: each as a teacher does, and by imitating the others.

    The published form is of two nets. With K each takes the mean over the K - 1 others, as in deep mutual learning
    (arXiv 1706.00384).

    Args:
        nets: logits [4B, C] and heads [4B, 4C] of each, of the same turned images; equally many heads. No gradient
            flows into the side that is imitated.
        labels, partner_labels, lam, label_smoothing: as for `hsakd_teacher_loss`.
        temperature: divides all logits that are compared; above 0.

    Returns:
        Scalars in float32 (float64 stays), each summed over the nets: "loss", the sum of the others; "ce"; "ce_heads"
        and "kd_heads", summed over the heads too; "kd", of the logits.

    Raises:
        ValueError: the nets have no heads or not equally many, or the rows are not four an image.
    """
    found: dict[str, list[Tensor]] = {"ce": [], "ce_heads": [], "kd": [], "kd_heads": []}
    for net in nets:
        terms = hsakd_teacher_loss(net, labels, partner_labels, lam, label_smoothing)
        for other in nets:
            if other is not net:
                check_heads(len(net.heads), len(other.heads), "a net", "another one")
                target, share = other.map(Tensor.detach), 1 / (len(nets) - 1)
                pairs = zip(net.heads, target.heads, strict=True)
                found["kd"].append(share * kd_loss(net.logits, target.logits, temperature))
                found["kd_heads"] += [share * kd_loss(one, another, temperature) for one, another in pairs]
        found["ce"].append(terms["ce"])
        found["ce_heads"].append(terms["ce_heads"])
    sums = {name: torch.stack(terms).sum() for name, terms in found.items()}
    return {"loss": torch.stack(list(sums.values())).sum(), **sums}


def check_heads(own: int, others: int, name: str, other: str) -> None:
    """Raises ValueError where two nets have no heads or not equally many; they are compared one by one."""
    if own and others and own == others:
        return
    raise ValueError(
        f"{name} has {own or 'no'} auxiliary heads, {other} {others or 'none'}: heads are compared one by one, from "
        "the shallowest to the deepest, so take nets NAME_aux with equally many stages"
    )


class HSAKD(LogitLoss):
    """Logits and auxiliary heads, compared on every image in its four quarter turns (Yang et al., IJCAI 2021).

    `ce_weight * CE(x) + kd_weight * (kd_share * KL + heads_share * sum over the heads of KL)`, where CE is of the
    unturned images x, and KL, `kd_loss`, of all 4B turned ones. Heads are matched in their order, from the shallowest
    to the deepest. Both nets have them (NAME_aux). Augmented images are not turned: their logits are compared as in KD
    where kd_mix_share gives them a share. Published: all 1, T = 3.

    Args:
        ce_weight: Weight of the cross-entropy of the original images, 0 or more; a number, or a schedule over epochs.
        kd_weight: Weight of everything else; likewise.
        temperature: Divides the logits of both nets where they are compared; above 0.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1); for the cross-entropies only.
        kd_share: Share of the comparison of logits in kd_weight, 0 or more.
        heads_share: Share of the comparison of heads, summed over them.
        ce_mix_share: Share of the cross-entropy on augmented images.
        kd_mix_share: Share of the comparison on augmented images, which have logits alone.
        standardize: Compare standardised logits (Sun et al., CVPR 2024), those of heads too.
    """

    paper = "Yang et al., IJCAI 2021, arXiv 2107.13715"
    needs: ClassVar[frozenset[str]] = frozenset({"turned"})

    def __init__(
        self,
        ce_weight: Weight = 1.0,
        kd_weight: Weight = 1.0,
        temperature: float = 3.0,
        label_smoothing: float = 0.0,
        kd_share: float = 1.0,
        heads_share: float = 1.0,
        ce_mix_share: float = 0.0,
        kd_mix_share: float = 0.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(ce_weight, kd_weight, label_smoothing, kd_share, ce_mix_share, kd_mix_share, standardize)
        check_temperature(temperature)
        if not 0 <= heads_share < math.inf:
            raise ValueError(f"heads_share is {heads_share}: give 0 or more")
        self.temperature = temperature
        self.shares["kd_heads"] = heads_share

    def build(self, context: LossContext) -> None:
        """Check the heads of both nets."""
        check_heads(len(context.student.heads), len(context.teacher.heads), "the student", "the teacher")

    def complete(self, student: Normalized) -> Normalized:
        """The student, whose heads teach its backbone."""
        assert isinstance(student.model, AuxiliaryNet)
        student.model.detach_heads = False
        return student

    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor, epoch: Tensor) -> Tensor:  # noqa: ARG002
        """`kd_loss`."""
        return kd_loss(student, teacher, self.temperature)

    def compare_originals(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """ "kd" and "kd_heads", on all turned images."""
        assert outputs.turned is not None
        (student, teacher), epoch = outputs.turned, outputs.epoch
        logits, *heads = (
            self.compare(*self.prepared(own, other), outputs.labels, epoch)
            for own, other in zip((student.logits, *student.heads), (teacher.logits, *teacher.heads), strict=True)
        )
        return {"kd": logits, "kd_heads": torch.stack(heads).sum()}
