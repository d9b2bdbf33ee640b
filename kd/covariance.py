"""Two costlier relatives of T. stddev: covariance of teacher probabilities, and of the teacher-student cross-entropy.

Wang et al., "What Makes a 'Good' Data Augmentation in Knowledge Distillation", NeurIPS 2022, arXiv 2012.02909: a good
augmentation lowers the covariance between the cross-entropies of different samples. Lower is better.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.goodness import accumulator_type, picked_groups
from dalikd.kd.losses.base import full_precision
from dalikd.kd.picking import entropy

__all__ = [
    "CrossEntropyCovariance",
    "CrossEntropyCovarianceResult",
    "ProbabilityCovariance",
    "ProbabilityCovarianceResult",
]


@dataclass(frozen=True)
class ProbabilityCovarianceResult:
    """Means over the entries of a block's matrices, diagonal included, then over blocks; None where there is none.

    "samples" relates two rows over the classes, "classes" two classes over the rows; "abs" is the mean of |entry|. The
    mean covariance of classes is 0 but for rounding, as probabilities sum to one.
    """

    covariance_samples: float | None
    covariance_samples_abs: float | None
    covariance_classes: float | None
    covariance_classes_abs: float | None
    correlation_samples: float | None
    correlation_samples_abs: float | None
    correlation_classes: float | None
    correlation_classes_abs: float | None
    constant_samples: int  # rows without a correlation, over all blocks
    constant_classes: int  # columns without one, over all blocks
    blocks: int
    left_out: int  # originals of mix groups too short for a block


@dataclass(frozen=True)
class CrossEntropyCovarianceResult:
    """Sum of the covariances between different positions of a draw, over the square of its size; None below 2 draws."""

    covariance: float | None  # of the teacher-student cross-entropy; None without a student as well
    approximation: float | None  # of the teacher's entropy, which takes the student for a copy of the teacher
    draws: int  # complete draws that it is of
    size: int  # values in a draw
    complete: bool  # as many draws as the published figure has
    constant_positions: int  # positions whose entropy was 0 in every draw


class ProbabilityCovariance:
    """Covariance and correlation of the teacher's probabilities inside blocks of a stream, averaged over blocks.

    A block is a published step: `group` originals and their augmented images, as rows [augmented ; originals] of class
    probabilities (softmax at temperature 1). Its covariance matrices (unbiased) and correlation matrices, of rows over
    classes and of classes over rows, are each reduced to the mean entry and the mean |entry|, diagonal included. Blocks
    run on across updates and epochs, and an incomplete last one does not count. How the stream is cut into updates has
    no influence. Where a mix group keeps more or fewer picks than it has originals, a block is one whole mix group with
    its picks, and a shorter group at the end of an epoch is left out and counted.

    A constant row or column (all its values equal, or so close that its variance underflows) has covariance 0 and no
    correlation. Correlations are averaged over the entries that exist, diagonal included; a block without any does not
    count among the correlations. The result says how many rows and columns were constant.

    One process holds the whole metric: the caller gathers rows into global sample order before `update`. Accumulators
    are float64 on `device` (float32 on mps); `update` never waits for the device. It takes 2 * (2 * group) ** 2 *
    num_classes + 2 * num_classes ** 2 * 2 * group operations a block and the memory of a [num_classes, num_classes]
    matrix.

    Args:
        num_classes: columns of the logits, at least 2.
        group: originals in a block; where n picks of each mix group are kept, n unlike its size, the mix group.
        device: where the logits will be.

    Raises:
        ValueError: num_classes below 2 or group below 1.
    """

    def __init__(self, num_classes: int, group: int = 64, device: torch.device | str = "cpu") -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}: a covariance needs at least 2")
        self.num_classes = num_classes
        self.group = group
        self._steps = _Steps(group, num_classes, torch.device(device))
        self._blocks = 0
        self._left_out = 0
        zeros = torch.zeros(4, 2, dtype=self._steps.open.dtype, device=device)
        self._tensors = {
            "covariance": zeros[:2].clone(),  # (samples, classes) x (mean, mean |.|), summed over blocks
            "correlation": zeros[:2].clone(),
            "correlated": zeros[0].clone(),  # blocks that have correlations of samples, of classes
            "constant": zeros[0].clone(),  # rows, columns
        }

    @torch.no_grad()
    def update(self, logits: Tensor, augmented: Tensor) -> None:
        """Consume the next rows of the stream.

        Args:
            logits: [B, C] of the teacher, in global sample order.
            augmented: [n, C] on the augmented images. With n = B row i of both is a pair. Else the originals are whole
                mix groups, the last of an epoch possibly shorter, and the picks of each group lie together.

        Raises:
            ValueError: wrong shape or device, numbers that do not fit, or a stream that changes its kind.
        """
        for name, rows in (("logits", logits), ("augmented logits", augmented)):
            _check_logits(name, rows, self._steps.open.device, self.num_classes)
        for originals, others in self._steps.cut(_probabilities(logits), _probabilities(augmented)):
            if len(originals) == self.group:
                self._add_block(torch.cat((others, originals)).to(self._steps.open.dtype))
            else:
                self._left_out += len(originals)

    def compute(self) -> ProbabilityCovarianceResult:
        """Read the result so far; this waits for the device. The stream may go on afterwards."""
        read = {name: tensor.cpu() for name, tensor in self._tensors.items()}
        blocks = torch.full((2,), self._blocks)
        covariance = _means(read["covariance"], blocks)
        correlation = _means(read["correlation"], read["correlated"])
        samples, classes = (int(count) for count in read["constant"].tolist())
        return ProbabilityCovarianceResult(*covariance, *correlation, samples, classes, self._blocks, self._left_out)

    def to(self, device: torch.device | str) -> Self:
        """Move the accumulators to `device`, in place."""
        moved = ProbabilityCovariance(self.num_classes, self.group, device)
        moved.load_state_dict(self.state_dict())
        self._tensors, self._steps = moved._tensors, moved._steps
        return self

    def state_dict(self) -> dict[str, Any]:
        """Copy everything that a resumed stream needs, an open block included."""
        return {
            "num_classes": self.num_classes,
            "group": self.group,
            "blocks": self._blocks,
            "left_out": self._left_out,
            "steps": self._steps.state_dict(),
            **{name: tensor.clone() for name, tensor in self._tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any device.

        Raises:
            ValueError: the state is of another number of classes or another group.
        """
        _check_state("covariance of probabilities", state, num_classes=self.num_classes, group=self.group)
        self._blocks, self._left_out = state["blocks"], state["left_out"]
        self._steps.load_state_dict(state["steps"])
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name].to(tensor.dtype))

    def _add_block(self, rows: Tensor) -> None:
        """Add the figures of one block [rows, C]."""
        for axis, variables in enumerate((rows, rows.T)):
            covariance, varies = _covariance(variables)
            self._tensors["covariance"][axis] += torch.stack((covariance.mean(), covariance.abs().mean()))
            correlation = _correlation(covariance, varies)
            entries = varies.sum() ** 2
            sums = torch.stack((correlation.sum(), correlation.abs().sum()))
            self._tensors["correlation"][axis] += sums / entries.clamp(min=1)
            self._tensors["correlated"][axis] += entries > 0
            self._tensors["constant"][axis] += (~varies).sum()
        self._blocks += 1


class CrossEntropyCovariance:
    """Covariance of the teacher-student cross-entropy between samples, and its approximation by the teacher alone.

    Each row gives -sum p_t log p_s and -sum p_t log p_t, in nats, at temperature 1. The values of a published step are
    those of `group` originals, then those of their augmented images. `size` consecutive values are one draw of a random
    vector, and over all draws a position is divided by its maximum. Of the covariance matrix of positions (unbiased)
    the strict lower triangle is summed and divided by size². The sum is had from variances, (Var(sum of positions) -
    sum of Var(position)) / 2, so that the matrix is never formed.

    The published figure is of 100 draws of 6400 values. More draws count as well, and take 8 bytes a value (16 with a
    student) of `device`: 100 draws are 10 MB. A step runs on across updates and epochs, and a draw across steps; how
    the stream is cut into updates has no influence. Where a mix group keeps more or fewer picks than it has originals,
    a step is one mix group with its picks, the shorter one at the end of an epoch included. A position whose value is
    0 in all draws has no maximum to divide by; it is constant, adds 0 and is counted.

    One process holds the whole metric: the caller gathers rows into global sample order before `update`, which never
    waits for the device. Values are kept in float64 (float32 on mps).

    Args:
        size: values in a draw, at least 2.
        draws: draws that make the figure complete, at least 2.
        group: originals in a step; where n picks of each mix group are kept, n unlike its size, the mix group.
        student: whether student logits are given, else there is the approximation only.
        device: where the logits will be.

    Raises:
        ValueError: size or draws below 2, or group below 1.
    """

    def __init__(
        self,
        size: int = 6400,
        draws: int = 100,
        group: int = 64,
        *,
        student: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("size", size), ("draws", draws)):
            if value < 2:
                raise ValueError(f"{name} is {value}: a covariance needs at least 2")
        self.size, self.draws, self.group, self.student = size, draws, group, student
        self._columns = 2 if student else 1  # entropy of the teacher, then cross-entropy
        self._steps = _Steps(group, self._columns, torch.device(device))
        self._open_values = 0
        self._open_draw = self._steps.open.new_zeros(size, self._columns)
        self._draws: list[Tensor] = []  # [size, columns] each

    @property
    def complete(self) -> bool:
        """Whether there are as many draws as the figure asks for; reading it does not wait for the device."""
        return len(self._draws) >= self.draws

    @torch.no_grad()
    def update(
        self,
        logits: Tensor,
        augmented: Tensor | None = None,
        student: Tensor | None = None,
        student_augmented: Tensor | None = None,
    ) -> None:
        """Consume the next rows of the stream.

        Args:
            logits: [B, C] of the teacher, in global sample order.
            augmented: [n, C] of the teacher on the augmented images. With n = B row i of both is a pair. Else the
                originals are whole mix groups, the last of an epoch possibly shorter, and the picks of each group lie
                together. A stream is with augmented rows or without them throughout.
            student: [B, C] of the student on the originals, where the metric has one.
            student_augmented: [n, C] of the student on the augmented images, where there are such.

        Raises:
            ValueError: wrong shape or device, something given or missing that must not be, numbers that do not fit, or
                a stream that changes its kind.
        """
        originals = self._values("", logits, student)
        if augmented is None and student_augmented is None:
            self._steps.check_kind("rows")
            self._append(originals)
            return
        others = self._values("augmented ", augmented, student_augmented)
        for step in self._steps.cut(originals, others):
            self._append(torch.cat(step))

    def compute(self, first: int | None = None) -> CrossEntropyCovarianceResult:
        """Read the result so far; this waits for the device. The stream may go on afterwards.

        Args:
            first: only so many draws; the published figure is of the first 100, however long the stream.
        """
        draws = self._draws[:first]
        complete = len(draws) >= self.draws
        if len(draws) < 2:
            return CrossEntropyCovarianceResult(None, None, len(draws), self.size, complete, 0)
        values = torch.stack(draws, dim=2)  # [size, columns, draws]
        figures = [_triangle_of_covariance(values[:, column]) for column in range(self._columns)]
        approximation, covariance = figures[0], figures[1] if self.student else None
        constant = int((values[:, 0].amax(dim=1) == 0).sum().item())
        return CrossEntropyCovarianceResult(covariance, approximation, len(draws), self.size, complete, constant)

    def to(self, device: torch.device | str) -> Self:
        """Move the draws to `device`, in place."""
        moved = CrossEntropyCovariance(self.size, self.draws, self.group, student=self.student, device=device)
        moved.load_state_dict(self.state_dict())
        self._steps, self._open_draw, self._draws = moved._steps, moved._open_draw, moved._draws
        return self

    def state_dict(self) -> dict[str, Any]:
        """Copy everything that a resumed stream needs: the draws, the open one and an open step included."""
        nothing = self._open_draw.new_zeros(0, self.size, self._columns)
        return {
            "size": self.size,
            "group": self.group,
            "student": self.student,
            "steps": self._steps.state_dict(),
            "open_draw": self._open_draw[: self._open_values].clone(),
            "draws": torch.stack(self._draws) if self._draws else nothing,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any device.

        Raises:
            ValueError: the state is of another size or group, or has no student where this one has, or vice versa.
        """
        own = {"size": self.size, "group": self.group, "student": self.student}
        _check_state("covariance of cross-entropy", state, **own)
        self._steps.load_state_dict(state["steps"])
        self._open_values = len(state["open_draw"])
        self._open_draw[: self._open_values].copy_(state["open_draw"].to(self._open_draw.dtype))
        saved = state["draws"].to(self._open_draw.dtype)
        self._draws = [torch.empty_like(self._open_draw).copy_(draw) for draw in saved]

    def _values(self, name: str, logits: Tensor | None, student: Tensor | None) -> Tensor:
        """Entropy of the teacher and, with a student, the cross-entropy of the two, [rows, columns]."""
        if logits is None or (student is not None) != self.student:
            wanted = "those of both nets" if self.student else "the teacher's and no others"
            raise ValueError(f"the {name}logits of one net are missing or too many: give {wanted}")
        device = self._open_draw.device
        _check_logits(f"{name}logits", logits, device)
        if student is None:
            return entropy(logits)[:, None]
        _check_logits(f"{name}student logits", student, device)
        if student.shape != logits.shape:
            shapes = f"{tuple(logits.shape)} and {tuple(student.shape)}"
            raise ValueError(
                f"{name}logits of teacher and student have shapes {shapes}: give the same rows and classes"
            )
        return torch.stack((entropy(logits), _cross_entropy(logits, student)), dim=1)

    def _append(self, values: Tensor) -> None:
        """Add values [n, columns] to the open draw, and close it whenever it is full."""
        start = 0
        while start < len(values):
            part = values[start : start + self.size - self._open_values]
            self._open_draw[self._open_values : self._open_values + len(part)].copy_(part)
            self._open_values += len(part)
            start += len(part)
            if self._open_values == self.size:
                self._draws.append(self._open_draw)
                self._open_draw, self._open_values = torch.zeros_like(self._open_draw), 0


class _Steps:
    """Cuts a stream of originals and their augmented rows into steps of `group` originals.

    The first update decides the kind: "pairs" wait for a whole step across updates, "groups" (another number of
    augmented rows than originals) are the mix groups of each update, "rows" come without augmented ones.
    """

    def __init__(self, group: int, columns: int, device: torch.device) -> None:
        if group < 1:
            raise ValueError(f"group is {group}: give at least 1 original")
        self.group = group
        self.kind: Literal["rows", "pairs", "groups"] | None = None
        self.open = torch.zeros(2, 0, columns, dtype=accumulator_type(device), device=device)  # originals, augmented

    def cut(self, originals: Tensor, augmented: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Steps, as rows of originals and of augmented images: whole ones, and in groups a shorter last one too."""
        pairs = len(originals) == len(augmented) and self.kind != "groups"  # a short group may have as many by chance
        blocks = [] if pairs else picked_groups(len(originals), len(augmented), self.group)
        self.check_kind("pairs" if pairs else "groups")
        return (
            self._cut_pairs(torch.stack((originals, augmented))) if pairs else _cut_groups(originals, augmented, blocks)
        )

    def _cut_pairs(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = torch.cat((self.open, rows.to(self.open.dtype)), dim=1)
        whole = rows.shape[1] // self.group * self.group
        self.open = rows[:, whole:].clone()  # a copy, so that the batch need not stay in memory
        return [(step[0], step[1]) for step in rows[:, :whole].split(self.group, dim=1)] if whole else []

    def check_kind(self, kind: Literal["rows", "pairs", "groups"]) -> None:
        if self.kind not in (None, kind):
            raise ValueError(
                f"the stream changes from {self.kind} to {kind}: give as many augmented rows a group always"
            )
        self.kind = kind

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "open": self.open.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kind = state["kind"]
        self.open = state["open"].to(self.open.dtype).to(self.open.device, copy=True)


def _cut_groups(originals: Tensor, augmented: Tensor, blocks: list[Any]) -> list[tuple[Tensor, Tensor]]:
    sizes = [(block.originals, block.picks) for block in blocks for _ in range(block.groups)]
    own = originals.split([size[0] for size in sizes])
    return list(zip(own, augmented.split([size[1] for size in sizes]), strict=True))


def _probabilities(logits: Tensor) -> Tensor:
    return functional.softmax(full_precision(logits), dim=1)


def _cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """-sum p_t log p_s [B]; a teacher's probability of 0 contributes 0, whatever the student says."""
    log_student = functional.log_softmax(full_precision(student), dim=1)
    log_student = log_student.clamp(min=torch.finfo(log_student.dtype).min)  # since 0 * inf is NaN
    return -(_probabilities(teacher) * log_student).sum(dim=1)


def _covariance(variables: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased covariance [n, n] of the rows of [n, m], and which of them vary, bool [n]; a NaN counts as varying."""
    centered = variables - variables.mean(dim=1, keepdim=True)
    covariance = centered @ centered.T / (variables.shape[1] - 1)
    constant = (variables.amax(dim=1) <= variables.amin(dim=1)) | (covariance.diagonal() <= 0)
    return covariance, ~constant


def _correlation(covariance: Tensor, varies: Tensor) -> Tensor:
    """Correlations [n, n], 0 where one of the two does not vary."""
    deviation = torch.where(varies, covariance.diagonal(), 1.0).sqrt()
    correlation = (covariance / deviation[:, None] / deviation).clamp(-1, 1)
    return torch.where(varies[:, None] & varies, correlation, 0.0)


def _means(sums: Tensor, counts: Tensor) -> tuple[float | None, float | None, float | None, float | None]:
    """Sums [2, 2] over counts [2], row by row; None where the count is 0."""
    flat = zip(sums.flatten().tolist(), counts.repeat_interleave(2).tolist(), strict=True)
    first, second, third, fourth = (value / count if count else None for value, count in flat)
    return first, second, third, fourth


def _triangle_of_covariance(values: Tensor) -> float:
    """Sum of the covariances between different positions over their number squared; values are [size, draws]."""
    highest = values.amax(dim=1, keepdim=True)
    shares = values / torch.where(highest == 0, 1.0, highest)
    triangle = (shares.sum(dim=0).var() - shares.var(dim=1).sum()) / 2
    return (triangle / len(shares) ** 2).item()


def _check_logits(name: str, rows: Tensor, device: torch.device, columns: int | None = None) -> None:
    if rows.dim() != 2 or columns not in (None, rows.shape[1]):
        raise ValueError(f"{name} have shape {tuple(rows.shape)}: give [rows, {columns or 'classes'}]")
    if rows.device != device:
        raise ValueError(f"{name} are on {rows.device}, the metric on {device}: call .to({str(rows.device)!r})")


def _check_state(metric: str, state: Mapping[str, Any], **own: Any) -> None:
    for name, value in own.items():
        if state[name] != value:
            raise ValueError(f"saved {metric} has {name} {state[name]}, this one {value}: resume with the same")
