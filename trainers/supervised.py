"""Training on labels: teachers and baselines."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dalikd.kd.losses import cross_entropy, mixed_cross_entropy
from dalikd.kd.manifold import mixed_forward
from dalikd.kd.mixing import HiddenMix
from dalikd.kd.normalize import Normalized
from dalikd.pipelines.loader import Batch
from dalikd.trainers.augmentation import Augmenter

__all__ = ["Supervised", "SupervisedTask"]


class SupervisedTask(nn.Module):
    """Cross-entropy of a net on its images, with mixed labels where the images are mixed."""

    def __init__(self, student: Normalized, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.student = student
        self.label_smoothing = label_smoothing

    def forward(
        self, pixels: Tensor, labels: Tensor, partner_labels: Tensor | None = None, lam: Tensor | None = None,
        originals: Tensor | None = None, hidden: HiddenMix | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Named terms for pixels [B, 3, S, S] and labels int64 [B]; mixed images have partners' labels and lam too.

        Where hidden states are mixed, a forward over the originals [B, 3, S, S] goes before: it gives the partners'.
        """
        if hidden is None or originals is None:
            logits = self.student(pixels)
        else:
            logits = mixed_forward(self.student, originals, pixels, hidden, joint=False)[1]
        if partner_labels is None or lam is None:
            loss = cross_entropy(logits, labels, self.label_smoothing)
        else:
            loss = mixed_cross_entropy(logits, labels, partner_labels, lam, self.label_smoothing)
        return {"loss": loss, "top1": (logits.argmax(1) == labels).float().mean()}


class Supervised:
    """The augmented images take the place of the originals.

    Raises:
        ValueError: an augmentation that picks candidates, which needs a teacher or belongs to distillation.
    """

    def __init__(self, student: Normalized, augmenter: Augmenter, label_smoothing: float = 0.0) -> None:
        if augmenter.criterion is not None:
            raise ValueError(
                f"--augmentation {augmenter.name} picks images for distillation: use cutmix with dalikd train"
            )
        self.student, self._augmenter = student, augmenter
        self.task = SupervisedTask(student, label_smoothing)

    def inputs(self, batch: Batch) -> Sequence[Any]:
        """Pixels and labels, augmented."""
        mixed = self._augmenter.candidates(batch)
        if mixed is None:
            return batch.pixels, batch.labels
        if not self._augmenter.labels_are_mixed:
            return mixed.images, batch.labels
        inputs = (mixed.images, batch.labels, batch.labels[mixed.partner], mixed.lam)
        return inputs if mixed.hidden is None else (*inputs, batch.pixels, mixed.hidden)

    def metrics(self) -> dict[str, float | int | None]:
        """Nothing beside the terms."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """No state outside the task."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """No state outside the task."""
