"""Training on labels: teachers and baselines."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dalikd.kd.backbones.auxiliary import AuxiliaryNet
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.losses import cross_entropy, hsakd_teacher_loss, mixed_cross_entropy
from dalikd.kd.manifold import mixed_forward
from dalikd.kd.mixing import HiddenMix
from dalikd.kd.rotation import TURNS, rotations
from dalikd.pipelines.draw_spec import Batch
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.options import NumberRange, check_numbers
from dalikd.trainers.setup import Setup
from dalikd.trainers.tasks.base import Task, TrainingOptions
from dalikd.trainers.teacher_step import Branches

__all__ = ["HsakdTeacher", "Supervised", "SupervisedInputs", "TrainOptions"]


@dataclass
class TrainOptions(TrainingOptions):
    """Train a net on labels: a teacher, or a baseline.

    Args:
        label_smoothing: share of each label spread evenly over the classes.
        freeze_backbone: of a net with auxiliary heads train these alone: its backbone stays as its weights are.
    """

    label_smoothing: float = 0.0
    freeze_backbone: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can work with."""
        super().__post_init__()
        check_numbers(self, {"label_smoothing": NumberRange(lambda value: 0 <= value < 1, "a share from 0 to below 1")})

    def build(self, setup: Setup) -> "Supervised":
        """The net and its augmentation. One with auxiliary heads learns as HSAKD's teachers do."""
        student, augmenter = self.build_student(setup), setup.augmenter(self.augmentation)
        task = HsakdTeacher if isinstance(student.model, AuxiliaryNet) else Supervised
        return task(student, augmenter, self.label_smoothing)

    def build_student(self, setup: Setup, *, frozen: bool = False) -> Normalized:
        """The net that is trained, or its auxiliary heads alone.

        Raises:
            ValueError: as for all training; or what is to be frozen has no weights, or there are no heads.
        """
        if self.freeze_backbone and (self.weights is None or self.reinit):
            raise ValueError(
                "--freeze_backbone true keeps a backbone as its weights are: give them with --weights, without --reinit"
            )
        student = super().build_student(setup, frozen=frozen)
        if self.freeze_backbone:
            if not isinstance(student.model, AuxiliaryNet):
                raise ValueError(
                    f"--freeze_backbone true trains auxiliary heads alone, and {self.model} has none: take "
                    f"{self.model}_aux, or dalikd probe for a linear classifier on a frozen net"
                )
            student.model.backbone.requires_grad_(False)
        return student


class SupervisedInputs(NamedTuple):
    """What is trained on; mixed images have partners' labels and lam too."""

    pixels: Tensor  # [B, 3, S, S]
    labels: Tensor  # int64 [B]
    partner_labels: Tensor | None = None  # int64 [B]
    lam: Tensor | None = None  # [B], share of the image itself
    originals: Tensor | None = None  # [B, 3, S, S], whose hidden states are mixed in
    hidden: HiddenMix | None = None


class Supervised(Task):
    """Cross-entropy of a net on augmented images, with mixed labels where the images are mixed.

    Args:
        student: takes pixels.
        augmenter: its images take the place of the originals.
        label_smoothing: share of each label spread evenly over the classes.

    Raises:
        ValueError: an augmentation that picks candidates, which needs a teacher or belongs to distillation.
    """

    def __init__(self, student: Normalized, augmenter: Augmenter, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if augmenter.criterion is not None:
            raise ValueError(
                f"--augmentation {augmenter.name} picks images for distillation: use cutmix with dalikd train"
            )
        self.student, self.augmenter, self._branches = student, augmenter, Branches([augmenter])
        self.label_smoothing = label_smoothing

    @property
    def nets(self) -> dict[str, Normalized]:
        """The student alone."""
        return {"student": self.student}

    def prepare(self, batch: Batch, epoch: float) -> SupervisedInputs:  # noqa: ARG002 - nothing follows the epoch
        """Pixels and labels, augmented."""
        mixed = self._branches.candidates(batch)
        if mixed is None:
            return SupervisedInputs(batch.pixels, batch.labels)
        if not self.augmenter.labels_are_mixed:
            return SupervisedInputs(mixed.images, batch.labels)
        originals = None if mixed.hidden is None else batch.pixels
        return SupervisedInputs(
            mixed.images, batch.labels, batch.labels[mixed.partner], mixed.lam, originals, mixed.hidden
        )

    def forward(self, inputs: SupervisedInputs) -> dict[str, Tensor]:
        """Named terms."""
        logits = self.logits(self.student, inputs)
        return {"loss": self.label_loss(logits, inputs), "top1": (logits.argmax(1) == inputs.labels).float().mean()}

    def logits(self, net: Normalized, inputs: SupervisedInputs) -> Tensor:
        """A net's logits [B, C]. Where hidden states are mixed, a forward over the originals goes before: it gives
        theirs."""
        if inputs.hidden is None or inputs.originals is None:
            return net(inputs.pixels)
        return mixed_forward(net, inputs.originals, inputs.pixels, inputs.hidden, joint=False)[1]

    def label_loss(self, logits: Tensor, inputs: SupervisedInputs) -> Tensor:
        """Cross-entropy of the labels; of both by their shares, where images are mixed."""
        if inputs.partner_labels is None or inputs.lam is None:
            return cross_entropy(logits, inputs.labels, self.label_smoothing)
        return mixed_cross_entropy(logits, inputs.labels, inputs.partner_labels, inputs.lam, self.label_smoothing)


class HsakdTeacher(Supervised):
    """A net learns the classes of unturned images, and each of its auxiliary heads class and turn of turned ones.

    Yang et al., "Hierarchical Self-supervised Augmented Knowledge Distillation", IJCAI 2021, arXiv 2107.13715.

    Args:
        student: takes pixels; with auxiliary heads. Where its backbone is trained, the heads' gradient reaches it.
        augmenter: its images take the place of the originals, and are then turned.
        label_smoothing: share of each label spread evenly over the classes, or over the joint ones.

    Raises:
        ValueError: an augmentation that picks candidates, or mixes hidden states.
    """

    def __init__(self, student: Normalized, augmenter: Augmenter, label_smoothing: float = 0.0) -> None:
        super().__init__(student, augmenter, label_smoothing)
        if augmenter.mixes_hidden:
            raise ValueError(
                f"--augmentation {augmenter.name} mixes hidden states, not images that could be turned: take mixup, or "
                "the net without _aux"
            )
        assert isinstance(student.model, AuxiliaryNet)
        student.model.detach_heads = False

    def prepare(self, batch: Batch, epoch: float) -> SupervisedInputs:
        """Augmented images in all four quarter turns, 4B of them, and labels of the B images."""
        inputs = super().prepare(batch, epoch)
        return inputs._replace(pixels=rotations(inputs.pixels))

    def forward(self, inputs: SupervisedInputs) -> dict[str, Tensor]:
        """Return "loss", "ce", "ce_heads" and "top1"."""
        found = self.student.outputs(inputs.pixels, heads=True)
        terms = hsakd_teacher_loss(found, inputs.labels, inputs.partner_labels, inputs.lam, self.label_smoothing)
        return {**terms, "top1": (found.logits[::TURNS].argmax(1) == inputs.labels).float().mean()}
