"""What is saved of a run, and how it is read back."""

import copy
import hashlib
import json
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dalikd.kd.backbones.layers import Normalisation
from dalikd.kd.checkpoints import ORIGIN_KEY, load_torch
from dalikd.pipelines.files import write_atomically

__all__ = [
    "CheckpointWriter",
    "HostCopies",
    "Weights",
    "read_newest",
    "read_state",
    "reading",
    "save_state",
    "save_weights",
    "weights_of",
]


def save_state(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write the trainer's state, whole or not at all: a kill leaves the file before it.

    The file is a zip archive, in which PyTorch keeps a CRC-32 of each record: `read_state` compares them.

    Args:
        path: of the file.
        state: of plain values and tensors.
        previous: where the state of before is kept, in the same folder.
    """
    write_atomically(path, lambda file: torch.save(state, file), previous=previous)


def read_state(path: Path) -> dict[str, Any]:
    """Read a saved state without executing pickle code.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no state of this program, or its content is not what was written.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: the run has saved no state yet; start it again with --overwrite true"
        )
    try:
        with path.open("rb") as file:
            state = load_torch(file)
            with zipfile.ZipFile(file) as archive:  # PyTorch writes checksums and compares none
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {damaged} differs")
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a saved state: {reason}") from error
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise ValueError(f"{path} is not a state saved by dalikd")
    return state


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """While a state that `read_state` has read is taken up: its parts are of the form that this version writes.

    Raises:
        ValueError: a part is missing, or of another form.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        words = f"{type(error).__name__}, {error}"
        raise ValueError(f"{path} is not a state that this version of dalikd saves ({words})") from error


def read_newest(paths: Sequence[Path], finite: Collection[str]) -> tuple[dict[str, Any], str]:
    """The first state that can be gone on from.

    Args:
        paths: of the last state and of those before it.
        finite: names of tensors of the task; they hold numbers in a state that can be gone on from.

    Returns:
        the state, and what was wrong with those that come before it; "" where nothing was.

    Raises:
        FileNotFoundError, ValueError: none can be read; as `read_state` of the first.
    """
    wrong: list[FileNotFoundError | ValueError] = []
    for path in paths:
        try:
            state = read_state(path)
            task = state.get("task", {})
            if broken := [name for name in finite if name in task and not task[name].isfinite().all()]:
                raise ValueError(f"{path} is of step {state['step']}, where {broken[0]} is not finite")
        except (FileNotFoundError, ValueError) as error:
            wrong.append(error)
        else:
            return state, "; ".join(str(error).partition(": the run has saved no")[0] for error in wrong)
    if isinstance(wrong[0], FileNotFoundError) or isinstance(wrong[-1], FileNotFoundError):
        raise wrong[0]
    raise ValueError(f"{'; '.join(map(str, wrong))}: start the run again with --overwrite true")


#: tensors by their published keys, and what else the file says
Weights = tuple[dict[str, Tensor], dict[str, str]]


def weights_of(
    model: nn.Module, normalisation: Normalisation | None = None, class_names: Sequence[str] | None = None
) -> Weights:
    """A net's state_dict and what its file says of it; the tensors are the net's own.

    Args:
        model: the net.
        normalisation: of the images it was trained on; goes into the metadata, so that whoever loads the file has it.
        class_names: of its logits, in their order; the same.
    """
    mean, std = normalisation or (None, None)
    origin = {"mean": mean, "std": std, "class_names": None if class_names is None else list(class_names)}
    # one entry: several are written in any order, and the file's checksum would not be reproducible
    return {key: value.detach() for key, value in model.state_dict().items()}, {ORIGIN_KEY: json.dumps(origin)}


def save_weights(
    path: Path, model: nn.Module, normalisation: Normalisation | None = None, class_names: Sequence[str] | None = None
) -> None:
    """Write a net's state_dict as safetensors, with its published keys; arguments as of `weights_of`."""
    _write_weights(path, weights_of(model, normalisation, class_names))


def _write_weights(path: Path, weights: Weights) -> str:
    """Write them. Returns the file's SHA-256."""
    content = save({key: value.cpu().contiguous() for key, value in weights[0].items()}, weights[1])
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


class HostCopies:
    """Copies of tensors in memory of the host, which is used again for the next copies.

    On a GPU the copies go to pinned memory, in the order of the current stream, so that what the next step computes
    comes after them; the host waits for them once, in `wait`.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._new: dict[tuple[Any, ...], Tensor] = {}
        self._ready: torch.cuda.Event | None = None
        self._on_device = False

    def take(self, tree: Any) -> Any:
        """Dictionaries, lists and tuples with a copy in the place of each tensor; one for tensors of the same memory.

        What was taken before is overwritten.
        """
        self._new, self._on_device = {}, False
        copied = self._copied(tree)
        self._kept = list(self._new.values())
        self._ready = torch.cuda.Event() if self._on_device else None
        if self._ready is not None:
            self._ready.record()
        return copied

    def wait(self) -> None:
        """Wait until the device has filled them."""
        if self._ready is not None:
            self._ready.synchronize()

    def _copied(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._copy(tree.detach())
        if isinstance(tree, dict):
            new = copy.copy(tree)  # a state_dict has an attribute beside its entries
            new.update({key: self._copied(value) for key, value in tree.items()})
            return new
        if isinstance(tree, list | tuple):
            return type(tree)(map(self._copied, tree))
        return tree

    def _copy(self, tensor: Tensor) -> Tensor:
        form = tensor.shape, tensor.stride(), tensor.dtype
        key = (tensor.device, tensor.data_ptr() if tensor.numel() else id(tensor), *form)
        if key not in self._new:
            place = len(self._new)
            old = self._kept[place] if place < len(self._kept) else None
            if old is None or (old.shape, old.stride(), old.dtype) != form:
                old = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._on_device |= tensor.is_cuda
            self._new[key] = old.copy_(tensor, non_blocking=True)
        return self._new[key]


class CheckpointWriter:
    """Writes checkpoints in a thread, one after the other: each from copies, or at once where nothing goes on.

    Args:
        check: is called before anything is written, and raises where it must not be.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check, self._copies = check, HostCopies()
        self._thread: ThreadPoolExecutor | None = None
        self._written: Future[None] | None = None
        self.digests: dict[str, str] = {}

    def save(
        self, weights: dict[Path, Weights], state: dict[str, Any], paths: tuple[Path, Path], *, wait: bool = False
    ) -> None:
        """Write weights, then the state: after a kill in between a run goes on from the state before, and writes these
        weights again.

        Args:
            weights: by their files.
            state: the trainer's; its "digests" become the SHA-256 of all weights that were written, by FOLDER/FILE.
            paths: of the state, and of the one before it.
            wait: write here and now, without a copy.

        Raises:
            OSError: a file of this checkpoint (where it waits), or of the one before it, cannot be written.
            ValueError: a weight is not finite; the checkpoint before it stays.
        """
        self.wait()
        if wait:
            self._write(weights, state, paths)
            return
        weights, state = self._copies.take((weights, state))
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="dalikd-checkpoint")
        self._written = self._thread.submit(self._write, weights, state, paths)

    def write_weights(self, weights: dict[Path, Weights]) -> None:
        """Write weights alone, here and now. Raises OSError."""
        for path, content in weights.items():
            self.digests[f"{path.parent.name}/{path.name}"] = _write_weights(path, content)

    def check(self) -> None:
        """Raise what a checkpoint that is being written has met by now; without waiting."""
        if self._written is not None and self._written.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written, and raise what went wrong. Raises as `save`."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """End the thread, after what it is writing."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _write(self, weights: dict[Path, Weights], state: dict[str, Any], paths: tuple[Path, Path]) -> None:
        self._copies.wait()
        for path, (tensors, _) in weights.items():
            for name, tensor in tensors.items():
                # the sum comes first: it takes a small part of the time
                if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
                    raise ValueError(
                        f"{name} of {path.name} is not finite at step {state['step']}: training has diverged, and the "
                        "checkpoint before it stays; lower --optimizer.lr, set --clip_grad_norm or "
                        "--schedule.warmup_epochs"
                    )
        self._check()
        self.write_weights(weights)
        self._check()
        save_state(paths[0], {**state, "digests": dict(self.digests)}, paths[1])
