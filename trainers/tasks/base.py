"""A way to train: its options make a task, which makes inputs of a batch, and named terms of the inputs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from dalikd.kd.backbones.layers import Normalized
from dalikd.pipelines.data import FilePath
from dalikd.pipelines.draw_spec import Batch
from dalikd.pipelines.loader import Loader
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.evaluate import net_sums
from dalikd.trainers.launch import model_type
from dalikd.trainers.models import build_model, reinitialise
from dalikd.trainers.options import (
    ABOVE_0,
    FROM_0,
    FROM_1,
    AugmentingOptions,
    NumberRange,
    ScheduleConfig,
    check_numbers,
)
from dalikd.trainers.setup import Setup
from dalikd.trainers.trackers import TrackerName

__all__ = ["OptimizerFactory", "Task", "TrainingOptions"]

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]

_TRAINING = {
    "init_seed": NumberRange(lambda value: 0 <= value < 1 << 63, "a whole number from 0 to 2^63 - 1"),
    "epochs": FROM_1,
    "epoch_factor": ABOVE_0,
    "accumulation": FROM_1,
    "clip_grad_norm": NumberRange(lambda value: 0 < value < math.inf, "a norm above 0, or leave it out"),
    "ema": NumberRange(lambda value: 0 <= value < 1, "a decay below 1, such as 0.999, or 0 for none"),
    "log_every": FROM_1,
    "restarts": FROM_0,
    "eval_every": FROM_1,
    "checkpoint_every": NumberRange(lambda value: value >= 0, "at least 1, or 0 for none"),
    "checkpoint_minutes": NumberRange(lambda value: 0 <= value < math.inf, "minutes, or 0 for none"),
    "schedule.milestones": NumberRange(
        lambda values: all(map(math.isfinite, values)) and all(a < b for a, b in pairwise([-1e-9, *values])),
        "epochs from 0 on, each later than the one before",
    ),
    "schedule.gamma": NumberRange(lambda value: 0 < value <= 1, "a factor above 0, up to 1"),
    "schedule.warmup_epochs": NumberRange(lambda value: 0 <= value < math.inf, "0 or more epochs"),
    "schedule.final": NumberRange(lambda value: 0 <= value <= 1, "a share of the base rate, from 0 to 1"),
}


def _sgd(parameters: Iterable[Tensor]) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


@dataclass
class TrainingOptions(AugmentingOptions, ABC):
    """What training commands have.

    Args:
        model: architecture of the net that is trained, such as resnet20, wrn_16_2 or timm:resnet18.
        model_args: options of that architecture.
        weights: weights the net starts from: a file, or "pretrained" for timm's own.
        reinit: after that, make its convolutions, linear layers and batch norms anew, as torch does, from the seed.
        init_seed: of its fresh weights and of what it draws itself (dropout), where images and augmentations are to
            stay those of --seed; default: the same.
        mean: that its images are normalised by: three numbers, of pixels scaled to 0..1; default: as its weights were
            trained, where they or dalikd's list of published files say it, else as the data set is.
        std: as mean; give both or none.
        augmentation: identity, flip, crop_flip, cutout, autoaugment, mixup, cutmix, cutmixpick_student,
            cutmixpick_teacher, manifold_mixup, patchmix, masking, same, randaugment, trivialaugment or random_erasing,
            on top of the training view; BASE+CRITERION picks out of several runs of another one, such as
            mixup+teacher_entropy (student_entropy, kld, dissimilarity).
        optimizer: its class path, with its options as --optimizer.lr and so on; SGD, AdamW or any other.
            --optimizer.fused true updates all weights in one kernel, where the class can; SGD, Adam and AdamW do so on
            a GPU unless it is false.
        schedule: the learning rate over time.
        epochs: passes over the training data.
        epoch_factor: multiplies epochs and milestones (prolonged training).
        accumulation: microbatches whose gradients make one optimizer step.
        clip_grad_norm: largest norm of the gradient, or none.
        no_decay_norms: no weight decay for biases and normalisation.
        ema: decay of an exponential moving average of the weights, such as 0.999; 0: none. The average is what is
            evaluated then, and lies beside student.safetensors as ema.safetensors.
        sync_bn: batch statistics over all processes (GPU only).
        output: the run folder; default: runs/COMMAND-DATA-MODEL.
        resume: go on with this run folder; its config.yaml is read first.
        overwrite: replace a run that lies in the run folder.
        json: file for the content of results.json, - for stdout.
        restarts: how often the run is started again, from its last saved state, after a crash (by a signal such as
            SIGSEGV, or for lack of memory); under torchrun give --max_restarts to torchrun.
        trackers: one or several that get what log.jsonl does: tensorboard, wandb, trackio, mlflow. All but the first
            are extras, as pip install 'dalikd[wandb]'; a resumed run goes on in its own curves.
        log_every: steps between log lines.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        checkpoint_every: steps between checkpoints, besides the one after each epoch; 0: none.
        checkpoint_minutes: minutes from a checkpoint to the next one at the latest, which is written with the log line
            that comes next; 0: none.
    """

    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: FilePath | None = None
    reinit: bool = False
    init_seed: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    augmentation: str = "identity"
    optimizer: OptimizerFactory = _sgd
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    epochs: int = 240
    epoch_factor: float = 1.0
    accumulation: int = 1
    clip_grad_norm: float | None = None
    no_decay_norms: bool = False
    ema: float = 0.0
    sync_bn: bool = False
    output: FilePath | None = None
    resume: FilePath | None = None
    overwrite: bool = False
    json: FilePath | None = None
    restarts: int = 0
    trackers: list[TrackerName] = field(default_factory=lambda: ["tensorboard"])
    log_every: int = 50
    eval_every: int = 1
    checkpoint_every: int = 0
    checkpoint_minutes: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can work with."""
        super().__post_init__()
        check_numbers(self, _TRAINING)
        warmup = self.schedule.warmup_epochs
        if self.length < 1:
            raise ValueError(f"--epochs {self.epochs} x --epoch_factor {self.epoch_factor} is no whole epoch")
        if warmup > self.length:
            raise ValueError(f"--schedule.warmup_epochs {warmup}: give at most as many as are trained, {self.length}")

    @property
    def length(self) -> int:
        """Epochs that are trained in all."""
        return round(self.epochs * self.epoch_factor)

    @property
    def net_seed(self) -> int:
        """The seed of what is drawn for the net alone."""
        return self.seed if self.init_seed is None else self.init_seed

    def check_machine(self, accelerator: Accelerator) -> None:
        """Check what the options ask for beyond their own numbers.

        Raises:
            ValueError: the optimizer cannot work with its numbers, or the device not with an option.
        """
        keywords = getattr(self.optimizer, "keywords", {})  # those of a class; a function keeps its own
        for name, value in keywords.items():
            numbers = [one for one in (value if isinstance(value, tuple | list) else [value]) if isinstance(one, float)]
            if not all(map(math.isfinite, numbers)) or (name == "lr" and numbers and numbers[0] <= 0):
                wanted = "a number above 0" if name == "lr" else "finite numbers"
                raise ValueError(f"--optimizer.{name} {value}: give {wanted}")
        try:
            self.optimizer([nn.Parameter(torch.zeros(1, 1))])
        except ValueError as error:
            raise ValueError(f"--optimizer: {error}") from error
        if self.sync_bn and accelerator.device.type != "cuda":
            raise ValueError("--sync_bn true needs GPUs: leave it out on the CPU")

    @abstractmethod
    def build(self, setup: Setup) -> "Task":
        """What is trained, on the data that are set up.

        Raises:
            ValueError, OSError: the nets, the augmentation or the loss are not as they should be.
        """

    def build_student(self, setup: Setup, *, frozen: bool = False, fresh_classifier: bool = False) -> Normalized:
        """The net that is trained, the same on every process; without gradient where it is frozen.

        Args:
            setup: gives the classes.
            frozen: whether it is observed alone.
            fresh_classifier: take all but the classifier of its weights, which may be for any classes.

        Raises:
            ValueError: no or an unknown model, or weights that do not fit.
        """
        if self.model is None:
            raise ValueError("no model given: name its architecture with --model, e.g. --model resnet20")
        torch.manual_seed(self.net_seed)
        student = build_model(
            self.model, setup.source, weights=self.weights, args=self.model_args, mean=self.mean, std=self.std,
            trained=not frozen, fresh_classifier=fresh_classifier,
        )  # fmt: skip
        if self.reinit:
            reinitialise(student.model, self.net_seed)
        student.to(model_type(self.precision))
        return student.requires_grad_(False) if frozen else student


class Task(nn.Module, ABC):
    """A way to train. It holds all that is trained, and nothing else as a sub-module: a teacher is none.

    It alone is compiled, and then prepared for several processes. State beside weights and buffers goes through
    `get_extra_state` and `set_extra_state`.

    Attributes:
        augmenter: makes the images that it is trained on.
        header: what results.json says of it besides the figures.
        contents: digests of what its files hold, by their names in messages; a resumed run must have the same.
        told: what may be otherwise in a resumed run, and is said then.
    """

    augmenter: Augmenter
    header: Mapping[str, Any] = MappingProxyType({})
    contents: Mapping[str, str] = MappingProxyType({})
    told: Mapping[str, str] = MappingProxyType({})

    def loader(self, setup: Setup, accumulation: int = 1) -> Loader:
        """The batches that it is trained on, with what its augmentation draws. Nothing is read ahead yet.

        Args:
            setup: gives the data.
            accumulation: batches of an optimizer step.
        """
        return setup.loader(self.augmenter.draw_spec, accumulation=accumulation)

    @property
    @abstractmethod
    def nets(self) -> dict[str, Normalized]:
        """The nets that are averaged, evaluated and saved, by name; the first one's accuracy picks the best epoch."""

    @abstractmethod
    def prepare(self, batch: Batch, epoch: float) -> Any:
        """What `forward` takes of a batch: a NamedTuple. Called without gradient, and free of host syncs.

        Args:
            batch: on the device.
            epoch: epochs done, in fractions too.
        """

    @abstractmethod
    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """Named scalar terms; "loss", which is minimised, among them."""

    def own_draws(self, batch: Batch) -> Batch:
        """A batch as this task alone would get it, where its loader draws for others too."""
        return batch

    def evaluate(self, net: Normalized, batch: Batch) -> dict[str, Tensor]:
        """Sums over a batch's images, float64 scalars; figures are the sums over "images".

        "images", "loss" and "top1" must be among them: a run is watched and its best epoch chosen by these.
        """
        return net_sums(net, batch)

    def get_extra_state(self) -> dict[str, Any]:
        """State beside weights and buffers."""
        return {}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it from a saved run."""

    def metrics(self) -> dict[str, Any]:
        """Running figures beside the terms. May wait for the device, and for other processes: all of them ask."""
        return {}

    def finish(self, folder: Path) -> None:
        """Write what else there is to keep into the run folder. Called at the end, by the main process."""

    @property
    def local_buffers(self) -> list[str]:
        """Names of buffers that processes do not share: what holds them keeps them equal itself."""
        return []

    def train(self, mode: bool = True) -> "Task":
        """Set the mode. A part none of whose parameters is trained stays in eval mode: its running statistics stay."""
        super().train(mode)
        for module in self.modules():
            trained = [values.requires_grad for values in module.parameters()]
            if module is not self and trained and not any(trained):
                module.eval()
        return self
