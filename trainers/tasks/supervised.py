"""Training on labels: teachers and baselines."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.losses import cross_entropy, mixed_cross_entropy
from dalikd.kd.manifold import mixed_forward
from dalikd.kd.mixing import HiddenMix
from dalikd.pipelines.draw_spec import Batch
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.options import NumberRange, check_numbers
from dalikd.trainers.setup import Setup
from dalikd.trainers.tasks.base import Task, TrainingOptions
from dalikd.trainers.teacher_step import Branches

__all__ = ["Supervised", "SupervisedInputs", "TrainOptions"]


@dataclass
class TrainOptions(TrainingOptions):
    """Train a net on labels: a teacher, or a baseline.

    Args:
        label_smoothing: share of each label spread evenly over the classes.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can work with."""
        super().__post_init__()
        check_numbers(self, {"label_smoothing": NumberRange(lambda value: 0 <= value < 1, "a share from 0 to below 1")})

    def build(self, setup: Setup) -> "Supervised":
        """The net and its augmentation."""
        return Supervised(self.build_student(setup), setup.augmenter(self.augmentation), self.label_smoothing)


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
