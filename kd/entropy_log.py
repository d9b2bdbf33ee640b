"""What picking does to the entropies of a run: those of originals, candidates and picks, logged and plotted."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from dalikd.pipelines.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EntropyLog", "draw_entropies", "plot_entropies"]

KINDS = ("originals", "candidates", "picks")
_COLORS = ("#0072B2", "#E69F00", "#009E73")  # Okabe and Ito's, which stay apart for the colour-blind
_BINS = 50
_MOST_POINTS = 200  # along the training steps; further records are averaged
_BAND = (25, 75)  # percentiles: the middle half of the images
_SMALL, _LARGEST_RATIO = 1 << 20, 100  # bytes that a log may unpack to, or times its own: rows are filled up
_TICKS = (1, 5, 10, 20, 40, 60, 80, 100)  # per cent of the images


class _Record(NamedTuple):
    step: int
    entropies: tuple[Tensor, ...]  # of each kind, on the CPU; perhaps still on their way there


class EntropyLog:
    """Entropies of originals, candidates and picks, in nats, each `every`-th step of a run.

    Nothing waits for the device until the log is read: a record is copied to pinned memory behind the work that is
    queued already. Each process logs its own rows.

    Args:
        every: steps between two records.

    Raises:
        ValueError: every below 1.
    """

    def __init__(self, every: int = 100) -> None:
        if every < 1:
            raise ValueError(f"every is {every}: log each step (1) or fewer")
        self.every = every
        self._records: list[_Record] = []
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self._records)

    def due(self, step: int) -> bool:
        """Whether `step` is one to record: ask before computing entropies."""
        return step % self.every == 0

    @torch.no_grad()
    def add(self, step: int, originals: Tensor, candidates: Tensor, picks: Tensor) -> None:
        """Record a step.

        Args:
            step: global step, larger than that of the last record.
            originals: [B].
            candidates: [runs * B], the whole pool, the picks included.
            picks: [n].

        Raises:
            ValueError: entropies that are no vector or of nothing, or a step that is not later than the last.
        """
        if self._records and step <= self._records[-1].step:
            raise ValueError(f"step {step} comes after step {self._records[-1].step} in the entropy log: add in order")
        tensors = (originals, candidates, picks)
        for name, tensor in zip(KINDS, tensors, strict=True):
            if tensor.dim() != 1 or not len(tensor):
                raise ValueError(f"entropies of {name} have shape {tuple(tensor.shape)}: give one value an image")
        self._device = originals.device
        self._records.append(_Record(step, tuple(_leave(tensor) for tensor in tensors)))

    def arrays(self) -> dict[str, np.ndarray]:
        """The records; this waits for the device.

        Returns:
            "steps" int64 [K], "sizes" int64 [K, 3] (images of each kind), and "originals", "candidates" and "picks",
            float32 [K, the largest size], filled up with NaN.
        """
        self._wait()
        columns = zip(*(record.entropies for record in self._records), strict=True) if self._records else ((),) * 3
        return {
            "steps": np.array([record.step for record in self._records], dtype=np.int64),
            "sizes": np.array([[len(rows) for rows in record.entropies] for record in self._records], dtype=np.int64),
            **{name: _filled_up(rows) for name, rows in zip(KINDS, columns, strict=True)},
        }

    def save(self, file: BinaryIO) -> None:
        """Write `arrays`, and "every", to an open .npz file."""
        arrays: dict[str, Any] = {"every": np.int64(self.every), **self.arrays()}
        np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no entropy log.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, give an entropy log (.npz)")
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > max(_SMALL, _LARGEST_RATIO * path.stat().st_size):
                raise ValueError(f"{unpacked} bytes when unpacked")
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in ("every", "steps", "sizes", *KINDS)}
            log = cls(int(arrays["every"]))
            for index, (step, sizes) in enumerate(zip(arrays["steps"], arrays["sizes"], strict=True)):
                rows = zip(KINDS, sizes, strict=True)
                log.add(int(step), *(torch.from_numpy(arrays[name][index, :size]) for name, size in rows))
        except Exception as error:  # a damaged file can raise almost anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{path}: no entropy log ({reason}), give a .npz file that EntropyLog.save wrote"
            ) from None
        return log

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; this waits for the device."""
        self._wait()
        kinds = {name: [record.entropies[index] for record in self._records] for index, name in enumerate(KINDS)}
        return {
            "steps": [record.step for record in self._records],
            "sizes": [[len(rows) for rows in record.entropies] for record in self._records],
            **{name: torch.cat(rows) if rows else torch.zeros(0) for name, rows in kinds.items()},  # few, large tensors
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; `every` may be another one."""
        sizes = zip(*state["sizes"], strict=True) if state["sizes"] else ((),) * len(KINDS)
        kinds = [state[name].split(list(lengths)) for name, lengths in zip(KINDS, sizes, strict=True) if lengths]
        rows = zip(state["steps"], *kinds, strict=True)
        self._records = [_Record(step, tuple(entropies)) for step, *entropies in rows]

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def plot_entropies(log: EntropyLog | str | Path, path: str | Path, title: str = "") -> None:
    """Draw a log, or the file of one, into a PNG file.

    Raises:
        FileNotFoundError, ValueError: as of `EntropyLog.load`; also a log without records.
        NotADirectoryError: the folder of path does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise NotADirectoryError(f"{path.parent}: no such folder, make it first")
    log = log if isinstance(log, EntropyLog) else EntropyLog.load(log)
    figure = draw_entropies(log, title)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160))


def draw_entropies(log: EntropyLog, title: str = "") -> "Figure":
    """Return the figure that `plot_entropies` saves: histograms over all records, and means along the steps.

    Raises:
        ValueError: a log without records.
    """
    from matplotlib.figure import Figure

    arrays = log.arrays()
    if not all(np.isfinite(arrays[name]).any() for name in KINDS):
        raise ValueError("the entropy log has no records with numbers: nothing to plot")
    several = len(arrays["steps"]) > 1
    figure = Figure(figsize=(7.2, 7.6 if several else 4.6), layout="constrained")
    panels = figure.subplots(4 if several else 3, 1, height_ratios=(1, 1, 1, 1.8)[: 4 if several else 3])
    _draw_histograms(panels[:3], arrays)
    if several:
        _draw_steps(panels[3], arrays)
    figure.axes[0].set_title(title, loc="left", fontsize=10)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure


def _draw_histograms(panels: Sequence["Axes"], arrays: Mapping[str, np.ndarray]) -> None:
    """Share of each kind's images by entropy, one panel below the other, the means as dashed lines.

    A sure teacher puts most originals into the first bin: the square root keeps the others visible.
    """
    highest = max(np.nanmax(arrays[name]) for name in KINDS)
    edges = np.linspace(0, highest or 1, _BINS + 1)
    for axes, name, color in zip(panels, KINDS, _COLORS, strict=True):
        if axes is not panels[0]:
            axes.sharex(panels[0])
            axes.sharey(panels[0])
        axes.tick_params(labelbottom=axes is panels[-1])
        values = arrays[name][~np.isnan(arrays[name])]
        shares = np.histogram(values, edges)[0] / len(values) * 100
        axes.stairs(shares, edges, fill=True, color=color, alpha=0.35)
        axes.stairs(shares, edges, color=color, linewidth=1.3)
        axes.axvline(values.mean(), color=color, linestyle="--", linewidth=1.4)
        axes.annotate(
            f"{name}\nmean {values.mean():.3g}",
            (0.99, 0.93),
            xycoords="axes fraction",
            ha="right",
            va="top",
            color=color,
        )
    panels[0].set_yscale("function", functions=(np.sqrt, np.square))
    panels[0].set(xlim=(0, edges[-1]), ylim=(0, None))
    panels[0].set_yticks([tick for tick in _TICKS if tick <= panels[0].get_ylim()[1]])
    panels[len(KINDS) // 2].set_ylabel("share of the images, % (square-root scale)")
    panels[-1].set_xlabel("entropy (nats)")


def _draw_steps(axes: "Axes", arrays: Mapping[str, np.ndarray]) -> None:
    """Mean and middle half of each kind along the training steps."""
    size = -(-len(arrays["steps"]) // _MOST_POINTS)  # records in a point
    steps = _averaged(arrays["steps"].astype(np.float64), size)
    for name, color in zip(KINDS, _COLORS, strict=True):
        low, high = (_averaged(bound, size) for bound in np.nanpercentile(arrays[name], _BAND, axis=1))
        axes.fill_between(steps, low, high, color=color, alpha=0.16, linewidth=0)
        mean = _averaged(np.nanmean(arrays[name], axis=1), size)
        axes.plot(steps, mean, color=color, linewidth=1.6, marker="o" if len(steps) < 20 else None, markersize=4)
    axes.set(xlabel="training step", ylabel="entropy (nats)", xlim=(steps[0], steps[-1]))
    axes.set_ylim(bottom=0)
    axes.set_title("mean along the training steps, and the middle half of the images", loc="left", fontsize=9)


def _averaged(values: np.ndarray, size: int) -> np.ndarray:
    """Means of `size` consecutive values, the last of those that are left."""
    return np.array([values[start : start + size].mean() for start in range(0, len(values), size)])


def _leave(tensor: Tensor) -> Tensor:
    """A copy in float32 on the CPU that may not be complete yet; it outlives static buffers of CUDA graphs."""
    return tensor.detach().to("cpu", torch.float32, non_blocking=True, copy=True)


def _filled_up(rows: Sequence[Tensor]) -> np.ndarray:
    """Vectors as one float32 array, the shorter ones filled up with NaN."""
    filled = np.full((len(rows), max((len(row) for row in rows), default=0)), np.nan, dtype=np.float32)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row)] = row.numpy()
    return filled
