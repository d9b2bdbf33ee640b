"""T. stddev: how good a data augmentation is for distillation, judged by the teacher alone.

Wang et al., "What Makes a 'Good' Data Augmentation in Knowledge Distillation", NeurIPS 2022, arXiv 2012.02909: a good
augmentation lowers the standard deviation of the teacher's mean probability. Lower is better.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from dalikd.kd.losses.base import full_precision
from dalikd.kd.picking import entropy

__all__ = [
    "FEWEST_GROUPS",
    "GoodnessResult",
    "Jackknife",
    "PickedGroups",
    "TeacherStddev",
    "accumulator_type",
    "picked_groups",
]

GROUPS = 20  # of windows, for the jackknife
FEWEST_GROUPS = 4  # a jackknife over fewer says nothing
_STATE_VERSION = 2  # 1, without a number: rows and pairs only


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

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """Lower and upper bound of T. stddev: Student's t with as many degrees of freedom as jackknife groups less one.

        Approximate: it takes the jackknife's error for that of a normal mean. It is about the value that streams of as
        many windows have on average, which lies below that of an endless stream by about 1 / (4 windows) of it, and
        further where window means are skewed: compare augmentations at equal windows. None where there is no `stderr`.

        Raises:
            ValueError: confidence not between 0 and 1.
        """
        from scipy import stats

        if not 0 < confidence < 1:
            raise ValueError(f"confidence is {confidence}: give a share between 0 and 1, such as 0.95")
        if self.stddev is None or self.stderr is None:
            return None
        half = float(stats.t.ppf((1 + confidence) / 2, min(self.windows, GROUPS) - 1)) * self.stderr
        return max(self.stddev - half, 0.0), self.stddev + half


class Jackknife(NamedTuple):
    """T. stddev as a whole and with each group of windows left out; float64 on the CPU."""

    whole: Tensor  # scalar
    without: Tensor  # [K], without group k
    counts: Tensor  # [K], windows in group k

    def minus(self, other: "Jackknife") -> "Jackknife":
        """The same of the difference of two values that come from the same windows, group by group."""
        return Jackknife(self.whole - other.whole, self.without - other.without, self.counts)

    def stderr(self) -> float:
        """Standard error of `whole`, by pseudo-values with weights for groups of unequal size."""
        scale = self.counts.sum() / self.counts  # one over the share of the group left out
        pseudo_values = scale * self.whole - (scale - 1) * self.without
        center = len(self.counts) * self.whole - ((1 - 1 / scale) * self.without).sum()
        return ((pseudo_values - center) ** 2 / (scale - 1)).mean().sqrt().item()


class PickedGroups(NamedTuple):
    """Mix groups of equal size: consecutive originals, and consecutive picks of each group."""

    groups: int
    originals: int  # in a group
    picks: int  # in a group


def picked_groups(originals: int, picks: int, group: int) -> list[PickedGroups]:
    """How rows of originals and of picked augmented images form mix groups, by their numbers alone.

    Groups of `group` originals have equal numbers of picks. A shorter last one of w originals has its share of them,
    rounded up, as `picking.pick_rows` keeps it.

    Returns:
        The whole groups and the shorter last one, each where there are such.

    Raises:
        ValueError: the numbers do not fit, or group is below 1.
    """
    if group < 1:
        raise ValueError(f"group is {group}: give at least 1")
    whole, last = divmod(originals, group)
    each = picks * group // originals if whole else 0
    of_last = picks - whole * each
    expected = -(-each * last // group) if whole else picks
    if of_last != expected or (whole and not each) or bool(last) != bool(of_last):
        raise ValueError(
            f"{picks} augmented rows do not form mix groups with {originals} originals: give whole groups of {group} "
            "originals, the last may be shorter, with as many picks each"
        )
    blocks = [PickedGroups(whole, group, each), PickedGroups(1, last, of_last)]
    return [block for block in blocks if block.groups * block.originals]


def accumulator_type(device: torch.device) -> torch.dtype:
    """float64, and float32 on mps, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class TeacherStddev:
    """Standard deviation of the teacher's mean probability over windows of a stream, in memory that does not grow.

    A window is `window` consecutive rows; its mean is one vector of class probabilities (softmax at temperature 1).
    T. stddev is the unbiased standard deviation over these vectors, per class, then the mean over the classes. It falls
    as 1 / sqrt(window), so a window is a number of rows and never of batches. An incomplete last window does not count.
    How the stream is cut into updates has no influence beyond float64 rounding.

    Where a mix group keeps more or fewer picks than it has originals, its originals carry equal shares of them: one of
    w originals stands for itself and for 1/w of the sum over the picks. A window holds window / 2 originals with what
    they carry, so that one which splits a group takes its share of the picks; its mean is over all rows it holds, a
    share of a row counting as such. With as many picks as originals row i of both is a pair, and a window holds
    `window` rows exactly.

    Where a net gives several rows of logits for an image, such as an auxiliary head for its quarter turns, the mean of
    their probabilities is the image's row here, so that windows hold the same images as those of one row each; entropy
    is the mean over all that is given.

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
        rows_per_image: Consecutive rows of logits that an image has.

    Raises:
        ValueError: window not even or not positive, or num_classes or rows_per_image below 1.
    """

    def __init__(
        self, num_classes: int, window: int = 640, device: torch.device | str = "cpu", rows_per_image: int = 1
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}: give at least 1")
        if window < 2 or window % 2:
            raise ValueError(f"window is {window}: give a positive even number of rows, it holds whole pairs")
        if rows_per_image < 1:
            raise ValueError(f"rows_per_image is {rows_per_image}: give at least 1")
        self.num_classes = num_classes
        self.window = window
        self.rows_per_image = rows_per_image
        # Python numbers: they follow from the shapes alone, so that reading them does not wait for the device.
        self._rows_per_unit = 0  # 1 for rows, 2 for originals with augmented rows, 0 before the first update
        self._images = 0
        self._originals = 0
        self._windows = 0
        self._open_units = 0  # originals in the open window
        self._open_rows: float = 0  # what they and their augmented rows come to
        device = torch.device(device)
        dtype = accumulator_type(device)
        self._tensors = {
            "open_sum": torch.zeros(num_classes, dtype=dtype, device=device),
            "entropy_sum": torch.zeros((), dtype=dtype, device=device),
            "means": torch.zeros(GROUPS, num_classes, dtype=dtype, device=device),
            "squares": torch.zeros(GROUPS, num_classes, dtype=dtype, device=device),
        }

    @property
    def windows(self) -> int:
        """Complete windows so far; reading it does not wait for the device."""
        return self._windows

    @property
    def originals(self) -> int:
        """Originals so far; reading it does not wait for the device."""
        return self._originals

    @torch.no_grad()
    def update(self, logits: Tensor, augmented: Tensor | None = None, group: int = 64) -> None:
        """Consume the next rows of the stream.

        Args:
            logits: [B, C] of the teacher, in global sample order; [rows_per_image * B, C], image by image, where that
                is more than 1.
            augmented: [n, C] on the augmented images, or so many times that. With n = B row i of both is a pair. Else
                the originals are whole mix groups, the last of an epoch possibly shorter, and the rows of each group's
                picks lie together, in the order of the groups. A stream is with augmented rows or without them
                throughout.
            group: originals in a mix group; without influence where n = B.

        Raises:
            ValueError: wrong shape or device, numbers that do not fit, or a stream that changes its kind.
        """
        given = {"logits": logits} if augmented is None else {"logits": logits, "augmented logits": augmented}
        for name, rows in given.items():
            if rows.dim() != 2 or rows.shape[1] != self.num_classes or len(rows) % self.rows_per_image:
                of = f" with {self.rows_per_image} rows an image" if self.rows_per_image > 1 else ""
                raise ValueError(f"{name} have shape {tuple(rows.shape)}: give [rows, {self.num_classes}]{of}")
        entropy_sum = self._tensors["entropy_sum"]
        if logits.device != (device := entropy_sum.device):
            raise ValueError(f"logits are on {logits.device}, T. stddev on {device}: call .to({str(logits.device)!r})")
        if self._rows_per_unit not in (0, len(given)):
            raise ValueError("the stream changes between rows and pairs: give augmented logits always or never")
        originals = len(logits) // self.rows_per_image
        blocks = [PickedGroups(1, originals, originals)]
        if augmented is not None and len(augmented) != len(logits):
            blocks = picked_groups(originals, len(augmented) // self.rows_per_image, group)
        self._rows_per_unit = len(given)
        self._originals += originals
        probabilities = []  # of images, in the accumulators' precision
        for rows in given.values():
            entropy_sum.add_(entropy(rows).sum(dtype=entropy_sum.dtype))
            images = functional.softmax(full_precision(rows), dim=1).unflatten(0, (-1, self.rows_per_image))
            probabilities.append(images.mean(dim=1, dtype=entropy_sum.dtype))  # of one row each: the same, cast
            self._images += len(images)
        own = probabilities[0]
        if augmented is None:
            self._consume(own, 1)
            return
        picks = probabilities[1].split([block.groups * block.picks for block in blocks])
        units = own.split([block.groups * block.originals for block in blocks])
        for (groups, originals, each), unit, carried in zip(blocks, units, picks, strict=True):
            if each == originals:
                self._consume(unit + carried, 2)
            else:
                shares = carried.reshape(groups, each, -1).sum(dim=1, keepdim=True) / originals
                sums = unit.reshape(groups, originals, -1) + shares
                self._consume(sums.flatten(0, 1), 1 + each / originals)

    def compute(self) -> GoodnessResult:
        """Read the result so far; this waits for the device. The stream may go on afterwards."""
        stddev, stderr, per_class = None, None, []
        if self._windows >= 2:
            counts, means, squares = self._groups_in_use()
            deviations = _merged_stddev(counts, means, squares)
            stddev, per_class = deviations.mean().item(), deviations.tolist()
            if len(counts) >= FEWEST_GROUPS:
                stderr = _jackknife(counts, means, squares).stderr()
        rows = self._images * self.rows_per_image
        mean_entropy = self._tensors["entropy_sum"].item() / rows if rows else None
        return GoodnessResult(stddev, mean_entropy, self._windows, stderr, per_class, self._images, self.window)

    def jackknife(self) -> Jackknife:
        """T. stddev with each group of windows left out in turn; this waits for the device.

        Raises:
            ValueError: fewer than 4 groups, that is windows, are in use.
        """
        if self._windows < FEWEST_GROUPS:
            raise ValueError(f"{self._windows} windows are too few to leave out some: give at least {FEWEST_GROUPS}")
        return _jackknife(*self._groups_in_use())

    def to(self, device: torch.device | str) -> Self:
        """Move the accumulators to `device`, in place."""
        moved = TeacherStddev(self.num_classes, self.window, device, self.rows_per_image)
        moved.load_state_dict(self.state_dict())
        self._tensors = moved._tensors
        return self

    def state_dict(self) -> dict[str, Any]:
        """Copy everything that a resumed stream needs, an open window included."""
        return {
            "version": _STATE_VERSION,
            "num_classes": self.num_classes,
            "window": self.window,
            "rows_per_image": self.rows_per_image,
            "rows_per_unit": self._rows_per_unit,
            "images": self._images,
            "originals": self._originals,
            "windows": self._windows,
            "open_units": self._open_units,
            "open_rows": self._open_rows,
            **{name: tensor.clone() for name, tensor in self._tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any device. States of version 1 are read as well.

        Raises:
            ValueError: the state is of other numbers of classes or of rows an image, another window or a later version.
        """
        if state.get("version", 1) > _STATE_VERSION:
            raise ValueError(f"saved T. stddev is of version {state['version']}: update dalikd to resume it")
        state = {"rows_per_image": 1, **state}
        for name in ("num_classes", "window", "rows_per_image"):
            if state[name] != (own := getattr(self, name)):
                raise ValueError(f"saved T. stddev has {name} {state[name]}, this one {own}: resume with the same")
        self._rows_per_unit = state["rows_per_unit"]
        self._images = state["images"]
        self._windows = state["windows"]
        self._open_rows = state["open_rows"]
        per_unit = self._rows_per_unit or 1  # version 1 counted rows only, of which a unit had 1 or 2
        self._originals = state.get("originals", self._images // per_unit)
        self._open_units = state.get("open_units", state["open_rows"] // per_unit)
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name].to(tensor.dtype))  # convert first: mps takes no float64, not even in transit

    def _consume(self, units: Tensor, rows: float) -> None:
        """Add originals with what they carry, as sums of probabilities [n, C], which are of so many rows each."""
        whole = self.window // self._rows_per_unit  # originals in a window
        start = 0
        while start < len(units):
            taken = units[start : start + whole - self._open_units]
            self._tensors["open_sum"].add_(taken.sum(dim=0))
            self._open_units += len(taken)
            self._open_rows += len(taken) * rows
            start += len(taken)
            if self._open_units == whole:
                self._close_window()

    def _close_window(self) -> None:
        group = self._windows % GROUPS
        count = self._windows // GROUPS + 1  # windows in this group, the new one included
        mean, squares = self._tensors["means"][group], self._tensors["squares"][group]  # views
        vector = self._tensors["open_sum"] / self._open_rows
        delta = vector - mean
        mean.add_(delta / count)
        squares.add_(delta * (vector - mean))
        self._tensors["open_sum"].zero_()
        self._open_units = self._open_rows = 0
        self._windows += 1

    def _groups_in_use(self) -> tuple[Tensor, Tensor, Tensor]:
        """Windows [K], means [K, C] and sums of squares [K, C] of the groups that have windows, float64 on the CPU."""
        used = min(self._windows, GROUPS)
        counts = (self._windows - 1 - torch.arange(used)) // GROUPS + 1
        means, squares = (self._tensors[name][:used].cpu().double() for name in ("means", "squares"))
        return counts.double(), means, squares


def _merged_stddev(counts: Tensor, means: Tensor, squares: Tensor) -> Tensor:
    """Unbiased standard deviation per class [C] over the windows of all groups (Chan's merge of K parts at once)."""
    total = counts.sum()
    weights = counts[:, None]
    mean = (weights * means).sum(dim=0) / total
    all_squares = (squares + weights * (means - mean) ** 2).sum(dim=0)
    return (all_squares / (total - 1)).sqrt()


def _jackknife(counts: Tensor, means: Tensor, squares: Tensor) -> Jackknife:
    """The mean over classes of the standard deviation, whole and with each group left out in turn."""
    whole = _merged_stddev(counts, means, squares).mean()
    kept = ~torch.eye(len(counts), dtype=torch.bool)
    without = torch.stack([_merged_stddev(counts[k], means[k], squares[k]).mean() for k in kept])
    return Jackknife(whole, without, counts)
