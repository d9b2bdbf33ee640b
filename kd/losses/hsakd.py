"""The losses of hierarchical self-supervised augmented distillation, for nets with auxiliary heads.

Yang et al., "Hierarchical Self-supervised Augmented Knowledge Distillation", IJCAI 2021, arXiv 2107.13715, section
3, and their published training of two nets that learn from each other. A net sees every image in its four quarter
turns, in the order of `kd.rotation.rotations`. All terms have weight 1.
"""

import torch
from torch import Tensor

from dalikd.kd.backbones.layers import NetOutput
from dalikd.kd.losses.base import cross_entropy
from dalikd.kd.losses.kd import kd_loss
from dalikd.kd.rotation import TURNS, joint_labels

__all__ = ["hsakd_mutual_loss", "hsakd_student_loss", "hsakd_teacher_loss"]


def hsakd_teacher_loss(outputs: NetOutput, labels: Tensor) -> dict[str, Tensor]:
    """What a teacher learns from: CE of the logits of unturned images, and CE of every head's joint logits.

    Args:
        outputs: logits [4B, C] and heads [4B, 4C], of the turned images.
        labels: of the images before they are turned, int64 [B].

    Returns:
        Scalars in float32 (float64 stays): "loss", the sum of the others; "ce"; "ce_heads", summed over the heads.

    Raises:
        ValueError: the net has no heads, or the rows are not four an image.
    """
    ce, joint = _label_loss(outputs, labels), joint_labels(labels)
    ce_heads = torch.stack([cross_entropy(head, joint) for head in outputs.heads]).sum()
    return {"loss": ce + ce_heads, "ce": ce, "ce_heads": ce_heads}


def hsakd_student_loss(
    student: NetOutput, teacher: NetOutput, labels: Tensor, temperature: float = 3.0
) -> dict[str, Tensor]:
    """What a student learns from: CE of the logits of unturned images, `kd_loss` of logits and heads on all of them.

    Args:
        student: logits [4B, C] and heads [4B, 4C], of the turned images.
        teacher: likewise, as many heads. A gradient flows into these too: detach them where the teacher is trained.
        labels: of the images before they are turned, int64 [B].
        temperature: divides all logits that are compared; above 0.

    Returns:
        Scalars in float32 (float64 stays): "loss", the sum of the others; "ce"; "kd", of the logits; "kd_heads", summed
        over the heads.

    Raises:
        ValueError: the nets have no heads or not equally many, or the rows are not four an image.
    """
    if len(student.heads) != len(teacher.heads):
        raise ValueError(
            f"the student has {len(student.heads)} heads, the teacher {len(teacher.heads)}: take nets of equally many "
            "stages"
        )
    ce, kd = _label_loss(student, labels), kd_loss(student.logits, teacher.logits, temperature)
    pairs = zip(student.heads, teacher.heads, strict=True)
    kd_heads = torch.stack([kd_loss(own, other, temperature) for own, other in pairs]).sum()
    return {"loss": ce + kd + kd_heads, "ce": ce, "kd": kd, "kd_heads": kd_heads}


def hsakd_mutual_loss(
    first: NetOutput, second: NetOutput, labels: Tensor, temperature: float = 3.0
) -> dict[str, Tensor]:
    """What two nets learn from together: each as a teacher does, and as a student of the other.

    Args:
        first: logits [4B, C] and heads [4B, 4C], of the turned images.
        second: likewise, as many heads. No gradient flows into the side that is imitated.
        labels: of the images before they are turned, int64 [B].
        temperature: divides all logits that are compared; above 0.

    Returns:
        Scalars in float32 (float64 stays), each summed over both nets: "loss", the sum of the others; "ce"; "ce_heads"
        and "kd_heads", summed over the heads too; "kd", of the logits.

    Raises:
        ValueError: the nets have no heads or not equally many, or the rows are not four an image.
    """
    terms = [
        {**hsakd_student_loss(own, other.map(Tensor.detach), labels, temperature), **hsakd_teacher_loss(own, labels)}
        for own, other in ((first, second), (second, first))
    ]
    found = {name: terms[0][name] + terms[1][name] for name in ("ce", "ce_heads", "kd", "kd_heads")}
    return {"loss": torch.stack(list(found.values())).sum(), **found}


def _label_loss(outputs: NetOutput, labels: Tensor) -> Tensor:
    """CE of the logits of unturned images."""
    if not outputs.heads:
        raise ValueError("the net gives no auxiliary heads: take the net NAME_aux, and ask for its heads")
    if len(outputs.logits) != TURNS * len(labels):
        raise ValueError(
            f"{len(outputs.logits)} rows of logits for {len(labels)} labels: give {TURNS} an image, as rotations does"
        )
    return cross_entropy(outputs.logits[::TURNS], labels)
