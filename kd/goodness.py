"""T. stddev: how good a data augmentation is for distillation, judged by the teacher alone.

Wang et al., "What Makes a 'Good' Data Augmentation in Knowledge Distillation", NeurIPS 2022, arXiv 2012.02909: a good
augmentation lowers the standard deviation of the teacher's mean probability. Lower is better.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import full_precision
from dalikd.kd.picking import entropy

__all__ = ["GoodnessResult", "TeacherStddev"]

GROUPS = 20  # of windows, for the jackknife
FEWEST_GROUPS = 4  # a jackknife over fewer says nothing


@dataclass(frozen=True)
class GoodnessResult:
    """T. stddev of a stream of teacher outputs; None is what the stream was too short for."""

    stddev: float | None  # mean over classes of per_class; from 2 windows on
    entropy: float | None  # mean over all rows seen, in nats
    windows: int  # complete windows
    stderr: float | None  # standard error of stddev; from 4 windows on
    per_class: list[float]  # standard deviation over the window means, empty below 2 windows
    images: int  # rows seen, those of the open window included
    window: int  # rows in a window


class TeacherStddev:
    """Standard deviation of the teacher's mean probability over windows of a stream, in memory that does not grow.

    A window is `window` consecutive rows; its mean is one vector of class probabilities (softmax at temperature 1).
    T. stddev is the unbiased standard deviation over these vectors, per class, then the mean over the classes. It falls
    as 1 / sqrt(window), so a window is a number of rows and never of batches. An incomplete last window does not count.
    How the stream is cut into updates has no influence beyond float64 rounding.

    Windows are dealt in turn to 20 groups, each with its own running mean and sum of squares (Welford), which are
    merged when asked for (Chan, Golub and LeVeque, 1983). `stderr` is the standard error of T. stddev by the jackknife
    that leaves out one group at a time, with weights for groups of unequal size (Busing, Meijer and van der Leeden,
    Statistics and Computing 9, 1999). It takes windows as independent, which windows of neighbouring epochs over the
    same images are only nearly. It is None while fewer than 4 groups, that is 4 windows, are in use.

    One process holds the whole metric, there is no merge over ranks: the caller gathers rows into global sample order
    before `update`. Accumulators are float64 on `device` (float32 on mps, which has no float64); `update` never waits
    for the device.

    Args:
        num_classes: Columns of the logits.
        window: Rows in a window, even; the published protocol has 640.
        device: Where the logits will be.

    Raises:
        ValueError: window not even or not positive, or num_classes below 1.
    """

    def __init__(self, num_classes: int, window: int = 640, device: torch.device | str = "cpu") -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}: give at least 1")
        if window < 2 or window % 2:
            raise ValueError(f"window is {window}: give a positive even number of rows, it holds whole pairs")
        self.num_classes = num_classes
        self.window = window
        # Python numbers: they follow from the shapes alone, so that reading them does not wait for the device.
        self._rows_per_unit = 0  # 1 for rows, 2 for pairs, 0 before the first update
        self._images = 0
        self._windows = 0
        self._open_rows = 0
        device = torch.device(device)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._tensors = {
            "open_sum": torch.zeros(num_classes, dtype=dtype, device=device),
            "entropy_sum": torch.zeros((), dtype=dtype, device=device),
            "means": torch.zeros(GROUPS, num_classes, dtype=dtype, device=device),
            "squares": torch.zeros(GROUPS, num_classes, dtype=dtype, device=device),
        }

    @torch.no_grad()
    def update(self, logits: Tensor, augmented: Tensor | None = None) -> None:
        """Consume the next rows of the stream.

        Args:
            logits: [B, C] of the teacher, in global sample order.
            augmented: [B, C] on the augmented images. Row i of both is then a pair, and a window holds window / 2
                whole pairs. A stream is of pairs or of rows throughout.

        Raises:
            ValueError: wrong shape or device, or a stream that changes between rows and pairs.
        """
        self._check(logits, augmented)
        self._rows_per_unit = 1 if augmented is None else 2
        probabilities = self._read(logits)
        if augmented is not None:
            probabilities += self._read(augmented)
        start = 0
        while start < len(probabilities):
            missing = (self.window - self._open_rows) // self._rows_per_unit
            units = probabilities[start : start + missing]
            self._tensors["open_sum"].add_(units.sum(dim=0))
            self._open_rows += len(units) * self._rows_per_unit
            start += len(units)
            if self._open_rows == self.window:
                self._close_window()

    def compute(self) -> GoodnessResult:
        """Read the result so far; this waits for the device. The stream may go on afterwards."""
        stddev, stderr, per_class = None, None, []
        if self._windows >= 2:
            counts, means, squares = self._groups_in_use()
            deviations = _merged_stddev(counts, means, squares)
            stddev, per_class = deviations.mean().item(), deviations.tolist()
            if len(counts) >= FEWEST_GROUPS:
                stderr = _jackknife_stderr(counts, means, squares)
        mean_entropy = self._tensors["entropy_sum"].item() / self._images if self._images else None
        return GoodnessResult(stddev, mean_entropy, self._windows, stderr, per_class, self._images, self.window)

    def to(self, device: torch.device | str) -> Self:
        """Move the accumulators to `device`, in place."""
        moved = TeacherStddev(self.num_classes, self.window, device)
        moved.load_state_dict(self.state_dict())
        self._tensors = moved._tensors
        return self

    def state_dict(self) -> dict[str, Any]:
        """Copy everything that a resumed stream needs, an open window included."""
        return {
            "num_classes": self.num_classes,
            "window": self.window,
            "rows_per_unit": self._rows_per_unit,
            "images": self._images,
            "windows": self._windows,
            "open_rows": self._open_rows,
            **{name: tensor.clone() for name, tensor in self._tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any device.

        Raises:
            ValueError: the state is of another number of classes or another window.
        """
        for name, own in (("num_classes", self.num_classes), ("window", self.window)):
            if state[name] != own:
                raise ValueError(f"saved T. stddev has {name} {state[name]}, this one {own}: resume with the same")
        self._rows_per_unit = state["rows_per_unit"]
        self._images = state["images"]
        self._windows = state["windows"]
        self._open_rows = state["open_rows"]
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name].to(tensor.dtype))  # convert first: mps takes no float64, not even in transit

    def _read(self, logits: Tensor) -> Tensor:
        """Count rows and their entropy; return their probabilities [B, C] in the accumulators' precision."""
        entropy_sum = self._tensors["entropy_sum"]
        entropy_sum.add_(entropy(logits).sum(dtype=entropy_sum.dtype))
        self._images += len(logits)
        return functional.softmax(full_precision(logits), dim=1).to(entropy_sum.dtype)

    def _close_window(self) -> None:
        group = self._windows % GROUPS
        count = self._windows // GROUPS + 1  # windows in this group, the new one included
        mean, squares = self._tensors["means"][group], self._tensors["squares"][group]  # views
        vector = self._tensors["open_sum"] / self.window
        delta = vector - mean
        mean.add_(delta / count)
        squares.add_(delta * (vector - mean))
        self._tensors["open_sum"].zero_()
        self._open_rows = 0
        self._windows += 1

    def _groups_in_use(self) -> tuple[Tensor, Tensor, Tensor]:
        """Windows [K], means [K, C] and sums of squares [K, C] of the groups that have windows, float64 on the CPU."""
        used = min(self._windows, GROUPS)
        counts = (self._windows - 1 - torch.arange(used)) // GROUPS + 1
        means, squares = (self._tensors[name][:used].cpu().double() for name in ("means", "squares"))
        return counts.double(), means, squares

    def _check(self, logits: Tensor, augmented: Tensor | None) -> None:
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits have shape {tuple(logits.shape)}: give [rows, {self.num_classes}]")
        if augmented is not None and augmented.shape != logits.shape:
            raise ValueError(
                f"augmented logits have shape {tuple(augmented.shape)}, originals {tuple(logits.shape)}: give pairs"
            )
        device = self._tensors["open_sum"].device
        if logits.device != device:
            raise ValueError(f"logits are on {logits.device}, T. stddev on {device}: call .to({str(logits.device)!r})")
        if self._rows_per_unit == (2 if augmented is None else 1):
            raise ValueError("the stream changes between rows and pairs: give augmented logits always or never")


def _merged_stddev(counts: Tensor, means: Tensor, squares: Tensor) -> Tensor:
    """Unbiased standard deviation per class [C] over the windows of all groups (Chan's merge of K parts at once)."""
    total = counts.sum()
    weights = counts[:, None]
    mean = (weights * means).sum(dim=0) / total
    all_squares = (squares + weights * (means - mean) ** 2).sum(dim=0)
    return (all_squares / (total - 1)).sqrt()


def _jackknife_stderr(counts: Tensor, means: Tensor, squares: Tensor) -> float:
    """Standard error of the mean over classes of the standard deviation, by leaving out each group in turn."""
    groups = len(counts)
    whole = _merged_stddev(counts, means, squares).mean()
    kept = ~torch.eye(groups, dtype=torch.bool)
    without = torch.stack([_merged_stddev(counts[k], means[k], squares[k]).mean() for k in kept])
    scale = counts.sum() / counts  # one over the share of the group left out
    pseudo_values = scale * whole - (scale - 1) * without
    center = groups * whole - ((1 - 1 / scale) * without).sum()
    return ((pseudo_values - center) ** 2 / (scale - 1)).mean().sqrt().item()
