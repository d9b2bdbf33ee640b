"""What distillation losses share: their interface, the two forms that most of them have, weights over time, and the
cross-entropy against one label and against two."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.backbones.layers import NetOutput, Normalized, shape_of

__all__ = [
    "DistillationLoss",
    "FeatureLoss",
    "LogitLoss",
    "LossContext",
    "MixedOutputs",
    "Schedule",
    "StepOutputs",
    "Weight",
    "WeightedSum",
    "check_smoothing",
    "check_weight",
    "cross_entropy",
    "first_alone",
    "full_precision",
    "mixed_cross_entropy",
    "standardize_logits",
    "weight_at",
]


@dataclass(frozen=True)
class Schedule:
    """A weight over time: straight lines between points, level before the first and after the last.

    Args:
        epochs: when, in epochs done, in order. Two at the same epoch make a step.
        values: the weight then, 0 or more; one for each epoch.
    """

    epochs: list[float]
    values: list[float]

    def __post_init__(self) -> None:
        """Raises ValueError for points that make no line."""
        if len(self.epochs) != len(self.values) or not self.epochs:
            raise ValueError(f"{len(self.epochs)} epochs have {len(self.values)} values: give one for each")
        if not all(0 <= a <= b < math.inf for a, b in pairwise([0.0, *self.epochs])):
            raise ValueError(f"epochs are {self.epochs}: give numbers of 0 or more in ascending order")
        if not all(0 <= value < math.inf for value in self.values):
            raise ValueError(f"values are {self.values}: give numbers of 0 or more")


Weight = float | Schedule


def check_weight(name: str, weight: Weight) -> None:
    """Raises ValueError for a weight that is neither a number of 0 or more nor a schedule of such."""
    if not isinstance(weight, Schedule) and not 0 <= weight < math.inf:
        raise ValueError(f"{name} is {weight}: give 0 or more")


def weight_at(weight: Weight, epoch: Tensor) -> float | Tensor:
    """A weight after so many epochs, a float32 scalar on its device; a number stays one. No host sync."""
    if not isinstance(weight, Schedule):
        return weight
    value = torch.full_like(epoch, weight.values[0])
    points = zip(weight.epochs, weight.values, strict=True)
    for (start, before), (end, after) in pairwise(points):
        share = ((epoch - start) / (end - start)).clamp(0, 1) if end > start else (epoch >= end).to(epoch.dtype)
        value = value + (after - before) * share
    return value


def first_alone(weight: Weight, ce_weight: Weight, first_epochs: float) -> tuple[Weight, Weight]:
    """Weights of a comparison that is minimised alone in the first epochs, and of the cross-entropy, which is then.

    Args:
        weight: of the comparison; 0 after the first epochs.
        ce_weight: of the cross-entropy; 0 in the first epochs.
        first_epochs: 0 leaves both as they are.

    Raises:
        ValueError: epochs below 0, or a weight that changes by itself too.
    """
    if not 0 <= first_epochs < math.inf:
        raise ValueError(f"first_epochs is {first_epochs}: give 0 or more")
    if first_epochs == 0:
        return weight, ce_weight
    if isinstance(weight, Schedule) or isinstance(ce_weight, Schedule):
        raise ValueError(
            f"first_epochs is {first_epochs}, and a weight has a schedule: give first_epochs: 0, and both "
            "weights schedules that have these epochs in them"
        )
    for name, value in (("weight", weight), ("ce_weight", ce_weight)):
        check_weight(name, value)
    steps = [first_epochs, first_epochs]
    return Schedule(steps, [weight, 0.0]), Schedule(steps, [0.0, ce_weight]) if ce_weight else 0.0


class MixedOutputs(NamedTuple):
    """Outputs on the augmented images x' of a step, and the two labels each of them carries.

    Row i shows `lam[i]` of a sample labelled `labels[i]` and `1 - lam[i]` of one labelled `partner_labels[i]`.
    """

    student_logits: Tensor  # [B, C], on x'
    teacher_logits: Tensor  # [B, C], on x', not a mixture of the logits on x
    labels: Tensor  # int64 [B]
    partner_labels: Tensor  # int64 [B]
    lam: Tensor  # float [B], in [0, 1]


class StepOutputs(NamedTuple):
    """All that a loss may compare.

    Attributes:
        student: on the originals x.
        teacher: on x, without gradient.
        labels: int64 [B]; -1 where there are none.
        ids: rows of the data set, int64 [B].
        epoch: epochs done, in fractions too; a float32 scalar.
        mixed: outputs on the augmented images x', if there are any.
        turned: the student's and the teacher's on the originals in all four quarter turns, [4B] rows in the order of
            `kd.rotation.rotations`, with their heads; where a loss needs them. `student` and `teacher` are a part.
        labelled: whether there are labels; if not, terms of them are left out.
    """

    student: NetOutput
    teacher: NetOutput
    labels: Tensor
    ids: Tensor
    epoch: Tensor
    mixed: MixedOutputs | None = None
    turned: tuple[NetOutput, NetOutput] | None = None
    labelled: bool = True


#: needs of a loss that is built for the shapes of the student's features
_ON_FEATURES = frozenset({"features", "preactivations", "teacher_classifier", "student_classifier"})


class LossContext(NamedTuple):
    """What a loss is built from.

    Attributes:
        student: its outputs on two black images, all that the loss needs of them.
        teacher: the same.
        classes: of both nets.
        images: rows of the training set; ids are below.
        labels: of these rows, int64 [images], on the CPU, where they are asked for.
        teacher_classifier: the teacher's last layer, where it is asked for: pooled features -> logits.
        student_classifier: the student's. It is trained as a part of the student: keep it out of the loss's own parts
            (in a tuple, say).
        teacher_norms: the batch norms before the last ReLU of the teacher's stages, where they are asked for.
        batch: images of a training batch on one process; 0 where nobody says it.
        side: of the images, in pixels; likewise.
    """

    student: NetOutput
    teacher: NetOutput
    classes: int
    images: int
    labels: Tensor | None = None
    teacher_classifier: nn.Module | None = None
    student_classifier: nn.Module | None = None
    teacher_norms: tuple[nn.BatchNorm2d, ...] = ()
    batch: int = 0
    side: int = 0


class DistillationLoss(nn.Module, ABC):
    """A distillation objective: outputs of both nets in, named scalar terms out.

    A method is a subclass. The caller minimises "loss" and logs every term under its own name, so that a new method
    changes no training loop. Parameters of a subclass (connectors, regressors) are trained along with the student and
    are not exported with it.

    Attributes:
        paper: where it was published: authors, where, arXiv number.
        needs: what it takes beside logits and labels, and what is refused where it cannot be had: "features";
            "preactivations", "teacher_classifier", "student_classifier" and "teacher_norms", which bring the features
            along; "heads", of the student; "turned", which brings the features along too; "ids"; "all_labels", of the
            whole training set; "augmented", one augmented image for each original.
        local_buffers: names of buffers that processes do not share (memory banks): the loss keeps them equal itself.
    """

    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    local_buffers: ClassVar[tuple[str, ...]] = ()

    @property
    def uses_augmented(self) -> bool:
        """Whether it learns anything of augmented images. Where it does not, none are made for it."""
        return True

    @property
    def label_options(self) -> Sequence[str] | None:
        """Those of its options that must be 0, and are not, for images without labels; None: it learns from labels
        however it is set, as one does that says nothing of it."""
        return None

    def build(self, context: LossContext) -> None:
        """Make what depends on the nets' shapes: connectors, memories. Called once, before the optimizer is made; a
        loss belongs to one task.

        Raises:
            ValueError: the nets do not go together; names both shapes.
        """

    def complete(self, student: Normalized) -> Normalized:
        """The net that is trained, evaluated and saved, where that is more than the student. Called after `build`."""
        return student

    @abstractmethod
    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Compute the objective of one batch.

        Returns:
            Scalars by name: "loss" first, to be minimised, then its unweighted parts. All are attached to the graph.
        """


class LogitLoss(DistillationLoss):
    """Labels, and logits that are compared, on original and on augmented images.

    With augmented images x' beside the originals x, as Wang et al. (NeurIPS 2022, arXiv 2012.02909, eq. 5):
    `ce_weight * CE(x) + kd_weight * (kd_share * D(x) + ce_mix_share * CE(x') + kd_mix_share * D(x'))`. D is what a
    subclass compares by; where that is by a label, x' has two of them, and D(x') is the mean of both by their shares.

    Attributes:
        by_labels: it compares by the labels too; images without labels are refused then.

    Args:
        ce_weight: Weight of the cross-entropy of the original images, 0 or more; a number, or a schedule over epochs.
        kd_weight: Weight of everything else; likewise.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1); for the cross-entropies only.
        kd_share: Share of the comparison on original images in kd_weight, 0 or more.
        ce_mix_share: Share of the cross-entropy on augmented images.
        kd_mix_share: Share of the comparison on augmented images; with --augmentation identity these are the originals
            once more.
        standardize: Compare logits whose mean over the classes is 0 and whose standard deviation is 1 (Sun et al., CVPR
            2024, arXiv 2403.01427).
    """

    by_labels: ClassVar[bool] = False

    def __init__(
        self,
        ce_weight: Weight = 1.0,
        kd_weight: Weight = 1.0,
        label_smoothing: float = 0.0,
        kd_share: float = 1.0,
        ce_mix_share: float = 0.0,
        kd_mix_share: float = 0.0,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        shares = {"kd": kd_share, "ce_mix": ce_mix_share, "kd_mix": kd_mix_share}
        for name, weight in [("ce_weight", ce_weight), ("kd_weight", kd_weight)]:
            check_weight(name, weight)
        for name, share in shares.items():
            if not 0 <= share < math.inf:
                raise ValueError(f"{name}_share is {share}: give 0 or more")
        check_smoothing(label_smoothing)
        self.ce_weight, self.kd_weight, self.shares = ce_weight, kd_weight, shares
        self.label_smoothing, self.standardize = label_smoothing, standardize

    @property
    def uses_augmented(self) -> bool:
        """Where it gives them a share."""
        return self.shares["ce_mix"] != 0 or self.shares["kd_mix"] != 0

    @property
    def label_options(self) -> Sequence[str] | None:
        """The weights of its cross-entropies; None where it compares by labels."""
        weights = {"ce_weight": self.ce_weight, "ce_mix_share": self.shares["ce_mix"]}
        return None if self.by_labels else [name for name, weight in weights.items() if weight != 0]

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, labels: Tensor, epoch: Tensor) -> Tensor:
        """How far apart the nets' logits are.

        Args:
            student: [B, C], standardised where that is asked for.
            teacher: the same.
            labels: int64 [B]; for augmented images first those of one image, then those of the other.
            epoch: epochs done.

        Returns:
            a scalar, the mean over the batch; or [B], where it depends on the labels.
        """

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return "loss", "ce", "kd"; with augmented images also "ce_mix" and "kd_mix", where their shares are not 0."""
        mixed, epoch, smoothing = outputs.mixed, outputs.epoch, self.label_smoothing
        terms = self.compare_originals(outputs)
        if outputs.labelled:
            terms = {"ce": cross_entropy(outputs.student.logits, outputs.labels, smoothing), **terms}
        if mixed is not None:
            if self.shares["ce_mix"] != 0:
                terms["ce_mix"] = mixed_cross_entropy(
                    mixed.student_logits, mixed.labels, mixed.partner_labels, mixed.lam, smoothing
                )
            if self.shares["kd_mix"] != 0:
                compared = self.prepared(mixed.student_logits, mixed.teacher_logits)
                own = self.compare(*compared, mixed.labels, epoch)
                if own.dim():
                    lam = mixed.lam.to(own.dtype)
                    own = (lam * own + (1 - lam) * self.compare(*compared, mixed.partner_labels, epoch)).mean()
                terms["kd_mix"] = own
        ce_weight, kd_weight = weight_at(self.ce_weight, epoch), weight_at(self.kd_weight, epoch)
        weights = {"ce": ce_weight, **{name: kd_weight * share for name, share in self.shares.items()}}
        return {"loss": torch.stack([weights[name] * term for name, term in terms.items()]).sum(), **terms}

    def compare_originals(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """What is compared on original images: scalars, by the names of their shares."""
        compared = self.prepared(outputs.student.logits, outputs.teacher.logits)
        return {"kd": self.compare(*compared, outputs.labels, outputs.epoch).mean()}

    def prepared(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both nets, standardised where that is asked for."""
        return (standardize_logits(student), standardize_logits(teacher)) if self.standardize else (student, teacher)


class FeatureLoss(DistillationLoss):
    """Labels, and features that are compared on the original images: `ce_weight * CE(x) + weight * D(x)`.

    Args:
        weight: Of the comparison, 0 or more; a number, or a schedule over epochs.
        ce_weight: Of the cross-entropy; likewise. In a sum of losses one part alone may have it.
        label_smoothing: Share of each label spread evenly over the classes, in [0, 1).
        student_features: Which of the student's features are compared, as numbers: 0 is the stem's, then one for each
            stage, -1 the pooled; default: those of the method.
        teacher_features: The same of the teacher, as many.

    Attributes:
        places: the features of the method, where none are named.
        counted: the student's features are compared with the teacher's one by one: as many of each.
    """

    needs = frozenset({"features"})
    places: ClassVar[slice] = slice(1, -1)
    counted: ClassVar[bool] = True

    def __init__(
        self,
        weight: Weight = 1.0,
        ce_weight: Weight = 1.0,
        label_smoothing: float = 0.0,
        student_features: list[int] | None = None,
        teacher_features: list[int] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("ce_weight", ce_weight)):
            check_weight(name, value)
        check_smoothing(label_smoothing)
        self.weight, self.ce_weight, self.label_smoothing = weight, ce_weight, label_smoothing
        self.student_features, self.teacher_features = student_features, teacher_features

    @property
    def uses_augmented(self) -> bool:
        """Features are those of the originals."""
        return False

    @property
    def label_options(self) -> Sequence[str] | None:
        """The weight of its cross-entropy."""
        return [] if self.ce_weight == 0 else ["ce_weight"]

    def build(self, context: LossContext) -> None:
        """Check the features that are compared, and make what depends on their shapes (`connect`)."""
        features = self.choose(context.student, context.teacher)
        if not all(map(len, features)):
            raise ValueError(f"{type(self).__name__} compares no features: name some of both nets, or leave them out")
        if self.counted and len(features[0]) != len(features[1]):
            raise ValueError(
                f"{type(self).__name__} compares as many features of the student as of the teacher, and the student's "
                f"are {_shapes(features[0])}, the teacher's {_shapes(features[1])}: name those that belong together "
                "with --loss.student_features and --loss.teacher_features, or take SemCKD, which weighs all pairs"
            )
        self.connect(*features, context)

    def connect(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: LossContext) -> None:
        """Make what depends on the shapes of the features that are compared.

        Raises:
            ValueError: they cannot be compared; names both shapes, and the method or connector that could.
        """

    @abstractmethod
    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor], outputs: StepOutputs) -> Tensor:
        """How far apart the features are: a scalar, the sum over the pairs."""

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return "loss", "ce", and the comparison by the name of the class in small letters."""
        term = self.compare(*self.choose(outputs.student, outputs.teacher), outputs)
        name = type(self).__name__.lower()
        if not outputs.labelled:
            unused = 0 * outputs.student.logits.sum()  # several processes wait for a gradient of every weight
            return {"loss": weight_at(self.weight, outputs.epoch) * term + unused, name: term}
        ce = cross_entropy(outputs.student.logits, outputs.labels, self.label_smoothing)
        total = weight_at(self.ce_weight, outputs.epoch) * ce + weight_at(self.weight, outputs.epoch) * term
        return {"loss": total, "ce": ce, name: term}

    def choose(self, student: NetOutput, teacher: NetOutput) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The features that are compared.

        Raises:
            ValueError: a net has no such feature.
        """
        return (
            self._chosen(self._given(student), self.student_features, "student"),
            self._chosen(self._given(teacher), self.teacher_features, "teacher"),
        )

    def _given(self, outputs: NetOutput) -> Sequence[Tensor]:
        """What features are chosen from: with "preactivations", those in the places of the stages."""
        if "preactivations" not in self.needs:
            return outputs.features
        return (outputs.features[0], *outputs.preactivations, outputs.features[-1])

    def _chosen(self, features: Sequence[Tensor], numbers: list[int] | None, which: str) -> Sequence[Tensor]:
        if numbers is None:
            return features[self.places]
        if not all(-len(features) <= number < len(features) for number in numbers):
            raise ValueError(
                f"--loss.{which}_features {numbers}: the {which} gives {len(features)} features, {_shapes(features)}; "
                f"give numbers from 0 to {len(features) - 1}"
            )
        return [features[number] for number in numbers]


class WeightedSum(DistillationLoss):
    """Several losses, each times its weight. Its terms keep their names; where two have one name they are numbered.

    Args:
        losses: The parts. One alone may count the cross-entropy of the labels: the others have a ce_weight of 0.
        weights: One for each, 0 or more, a number or a schedule over epochs; default: 1 for all.
    """

    paper = "those of its parts"

    def __init__(self, losses: list[DistillationLoss], weights: list[Weight] | None = None) -> None:
        super().__init__()
        self.weights: list[Weight] = [1.0] * len(losses) if weights is None else weights
        if len(losses) != len(self.weights) or not losses:
            raise ValueError(f"{len(losses)} losses have {len(self.weights)} weights: give one for each, and a loss")
        for number, weight in enumerate(self.weights):
            check_weight(f"weights[{number}]", weight)
        counting = [type(loss).__name__ for loss in losses if getattr(loss, "ce_weight", 0.0) != 0]
        if len(counting) > 1:
            raise ValueError(
                f"{' and '.join(counting)} each count the cross-entropy of the labels: give all but one of them "
                "ce_weight: 0"
            )
        self.ce_weight = float(bool(counting))
        self.losses = nn.ModuleList(losses)

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All that the parts need."""
        return frozenset().union(*(loss.needs for loss in self._parts()))

    @property
    def local_buffers(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the parts."""
        return tuple(
            f"losses.{number}.{name}" for number, loss in enumerate(self._parts()) for name in loss.local_buffers
        )

    @property
    def uses_augmented(self) -> bool:
        """Whether a part does."""
        return any(loss.uses_augmented for loss in self._parts())

    @property
    def label_options(self) -> Sequence[str] | None:
        """Those of the parts, whatever their weights; None where one learns from labels however it is set."""
        each = [(type(loss).__name__, loss.label_options) for loss in self._parts()]
        if any(options is None for _, options in each):
            return None
        return [f"{name} of {part}" for part, options in each for name in options or ()]

    def _parts(self) -> list[DistillationLoss]:
        return list(self.losses)  # pyright: ignore[reportReturnType]

    def build(self, context: LossContext) -> None:
        """Build each part."""
        for loss in self._parts():
            loss.build(context)

    def complete(self, student: Normalized) -> Normalized:
        """The student, completed by each part in turn.

        Raises:
            ValueError: one completes it, and another is built for the features that it had before.
        """
        on_features = [loss for loss in self._parts() if loss.needs & _ON_FEATURES]
        for loss in self._parts():
            before, student = student, loss.complete(student)
            others = " and ".join(type(other).__name__ for other in on_features if other is not loss)
            if student is not before and others:
                raise ValueError(
                    f"{type(loss).__name__} changes the student's features, which {others} would compare: sum it with "
                    "losses on logits alone"
                )
        return student

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return "loss", then the terms of all parts; a part's own "loss" where it has no other term."""
        total, terms = torch.zeros((), device=outputs.labels.device), {}
        for loss, weight in zip(self.losses, self.weights, strict=True):
            found = loss(outputs)
            total = total + weight_at(weight, outputs.epoch) * found["loss"]
            own = {name: term for name, term in found.items() if name != "loss"} or {
                type(loss).__name__.lower(): found["loss"]
            }
            for name, term in own.items():
                numbered = (f"{name}{number}" for number in itertools.count(1))
                terms[name if name not in terms else next(free for free in numbered if free not in terms)] = term
        return {"loss": total, **terms}


def full_precision(values: Tensor) -> Tensor:
    """Return `values` in float32, or in float64 where they are that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of `logits` [B, C] and `labels` int64 [B], a scalar in float32 (float64 stays)."""
    return functional.cross_entropy(full_precision(logits), labels, label_smoothing=label_smoothing)


def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Mean of `lam * CE(labels) + (1 - lam) * CE(partner_labels)` over the batch.

    The loss of mixup (Zhang et al., ICLR 2018, arXiv 1710.09412) and CutMix (Yun et al., ICCV 2019, arXiv 1905.04899).

    Args:
        logits: [B, C].
        labels: int64 [B], of the sample itself.
        partner_labels: int64 [B], of the sample mixed into it.
        lam: [B], share of the sample itself.
        label_smoothing: share of each target spread evenly over the classes.
    """
    logits = full_precision(logits)
    own = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    partner = functional.cross_entropy(logits, partner_labels, label_smoothing=label_smoothing, reduction="none")
    lam = lam.to(logits.dtype)
    return (lam * own + (1 - lam) * partner).mean()


def standardize_logits(logits: Tensor) -> Tensor:
    """Logits [B, C] less their mean over the classes, over their standard deviation (unbiased) plus 1e-7.

    Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427, eq. 10. Invariant to
    shift and scale; float32, float64 stays.
    """
    logits = full_precision(logits)
    spread = logits.std(1, keepdim=True)
    flat = spread <= torch.finfo(logits.dtype).eps * logits.abs().amax(1, keepdim=True)
    logits = torch.where(flat, logits.detach(), logits)  # 0 has no direction to grow in: its gradient would be 1e7
    return (logits - logits.mean(1, keepdim=True)) / (1e-7 + torch.where(flat, 1, spread))


def check_smoothing(label_smoothing: float) -> None:
    """Raises ValueError for a label smoothing outside [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: give a number in [0, 1)")


def _shapes(features: Sequence[Tensor]) -> str:
    """For messages: the shapes of one image's features."""
    return ", ".join(map(shape_of, features)) or "none"
