"""What is saved of a run, and how it is read back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from dalikd.kd.backbones.layers import Normalisation
from dalikd.kd.checkpoints import ORIGIN_KEY, load_torch
from dalikd.pipelines.files import write_atomically

__all__ = ["read_state", "save_state", "save_weights"]


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the trainer's state, whole or not at all: a kill leaves the file before it."""
    write_atomically(path, lambda file: torch.save(state, file))


def read_state(path: Path) -> dict[str, Any]:
    """Read a saved state without executing pickle code.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no state of this program.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: the run has saved no state yet; start it again with --overwrite true"
        )
    try:
        with path.open("rb") as file:
            state = load_torch(file)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a saved state: {reason}") from error
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise ValueError(f"{path} is not a state saved by dalikd")
    return state


def save_weights(
    path: Path, model: nn.Module, normalisation: Normalisation | None = None, class_names: Sequence[str] | None = None
) -> None:
    """Write a net's state_dict as safetensors, with its published keys.

    Args:
        path: the file.
        model: the net.
        normalisation: of the images it was trained on; goes into the metadata, so that whoever loads the file has it.
        class_names: of its logits, in their order; the same.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    mean, std = normalisation or (None, None)
    origin = {"mean": mean, "std": std, "class_names": None if class_names is None else list(class_names)}
    # one entry: several are written in any order, and the file's checksum would not be reproducible
    write_atomically(path, save(tensors, {ORIGIN_KEY: json.dumps(origin)}))
