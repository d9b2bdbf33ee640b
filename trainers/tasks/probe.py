"""Linear probe: how far a frozen net's features carry to other images. A linear classifier on them is trained alone.

The protocol is that of Yang et al., "Hierarchical Self-supervised Augmented Knowledge Distillation", IJCAI 2021,
arXiv:2107.13715. Beside it stands a vote of nearest neighbours among the same features.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import SGD

from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.checkpoints import find_classifier
from dalikd.kd.knn import classifier_inputs, knn_scores
from dalikd.kd.known_weights import file_sha256, identify, weights_digest
from dalikd.pipelines.data import FilePath
from dalikd.pipelines.draw_spec import Batch
from dalikd.pipelines.files import read_yaml
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.evaluate import evaluate
from dalikd.trainers.options import FROM_0, ScheduleConfig, check_numbers
from dalikd.trainers.runs import read_run_files
from dalikd.trainers.setup import Setup
from dalikd.trainers.tasks.base import OptimizerFactory, TrainingOptions
from dalikd.trainers.tasks.supervised import Supervised
from dalikd.trainers.trial import ask

__all__ = ["Probe", "ProbeOptions"]

_SGD = partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0)


@dataclass
class ProbeOptions(TrainingOptions):
    """Train a linear classifier on a frozen net's features, and let nearest neighbours among them vote: how far what
    the net has learned carries to other images.

    Args:
        run: the run folder of the net: its config.yaml says the architecture, its last weights are taken. Give it, or
            model and weights; of a net with auxiliary heads the backbone is taken.
        knn: so many training images that are nearest to a validation image vote for its class; 0: no vote.
        optimizer: its class path, with its options as --optimizer.lr and so on; SGD, AdamW or any other, of the
            classifier alone.
    """

    run: FilePath | None = None
    knn: int = 20
    optimizer: OptimizerFactory = _SGD
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(milestones=[30.0, 60.0, 90.0]))
    epochs: int = 100

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no training can work with."""
        super().__post_init__()
        check_numbers(self, {"knn": FROM_0})

    def settled(self) -> "ProbeOptions":
        """The same with the run folder's model, its options and weights by themselves, and the backbone's name for that
        of a net with auxiliary heads.

        Raises:
            ValueError: no net is given, or two; or the folder holds no run or no weights yet.
        """
        if self.run is not None:
            if self.weights is not None:
                raise ValueError(
                    f"--run {self.run} has weights of its own: leave out --weights {self.weights}, or --run"
                )
            model, args, weights = _read_run(Path(self.run))
            for option, own, theirs in (("model", self.model, model), ("model_args", self.model_args, args)):
                if own and own != theirs:
                    raise ValueError(f"--run {self.run} has --{option} {theirs}: leave out --{option} {own}, or --run")
            return replace(self, run=None, model=model, model_args=args, weights=weights).settled()
        if self.model is None or self.weights is None:
            raise ValueError(
                "no net given: name the folder of its run with --run, or give --model (the architecture) and --weights "
                "(a file, or pretrained with timm models)"
            )
        args = {name: value for name, value in self.model_args.items() if name != "detach_heads"}
        heads = self.model.endswith("_aux")
        return replace(self, model=self.model.removesuffix("_aux"), model_args=args) if heads else self

    def build(self, setup: Setup) -> "Probe":
        """The net with its fresh classifier, and its augmentation."""
        options = self.settled()
        if options.knn > len(setup.source):
            raise ValueError(f"--knn {options.knn}: give at most the number of training images, {len(setup.source)}")
        try:
            student = options.build_student(setup, frozen=True, fresh_classifier=True)
        except ValueError as error:
            theirs = _architecture(options.weights)
            given = f"weights of {theirs}" if theirs not in (None, options.model) else "--weights"
            raise ValueError(f"--model {options.model} with {given}: {error}") from error
        task = Probe(student, setup.augmenter(options.augmentation), setup, options.knn)
        weights = None if options.weights == "pretrained" else options.weights
        known = identify(weights) if weights else None
        task.header = {
            "backbone": {
                "weights": options.weights,
                "sha256": file_sha256(weights) if weights else None,
                "known_as": str(known) if known else None,
            }
        }
        return task


class Probe(Supervised):
    """Cross-entropy of a linear classifier on what a frozen net gives. The net stays in eval mode, weights and running
    statistics bit for bit as they are.

    Args:
        student: takes pixels; of it the classifier alone is trained.
        augmenter: its images take the place of the originals.
        setup: gives the images among which neighbours are looked for, and those that are classified by them.
        neighbours: that vote; 0: none.

    Raises:
        ValueError: the net names no classifier, or cannot take the images; or the augmentation picks candidates.
    """

    def __init__(self, student: Normalized, augmenter: Augmenter, setup: Setup, neighbours: int) -> None:
        super().__init__(student.requires_grad_(False).eval(), augmenter)
        self._classifiers = tuple(find_classifier(student.model).values())
        for classifier in self._classifiers:
            classifier.requires_grad_(True)
        self._setup, self._neighbours = setup, neighbours
        self._found: float | None = None
        self.contents = {"backbone": weights_digest(student.model)}
        black = torch.zeros(2, 3, setup.view.size, setup.view.size, device=student.scale.device)
        with torch.no_grad():
            self._width = ask(self._features, black, "the net that is probed").shape[1]

    def train(self, mode: bool = True) -> "Probe":
        """Set the mode of the classifier: dropout and norms before it stay in eval mode too."""
        super().train(mode)
        self.student.eval()
        for classifier in self._classifiers:
            classifier.train(mode)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """What the neighbours' vote has come to."""
        return {"knn": self._found}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it from a saved run."""
        self._found = state["knn"]

    def metrics(self) -> dict[str, float | int | None]:
        """Return "knn", the share of the validation images whose class their nearest training images vote for. As the
        net does not change, they vote once, at the first evaluation."""
        if self._neighbours == 0:
            return {}
        if self._found is None:
            self._found = self._vote()
        return {"knn": self._found}

    @torch.no_grad()
    def _vote(self) -> float:
        """Every process scores its share of the validation images against the features of all training images."""
        data = replace(self._setup.options.data, resident=False)  # each image is read once
        setup = replace(self._setup, options=replace(self._setup.options, data=data))
        accelerator, classes = setup.accelerator, len(setup.source.classes)
        bank = torch.zeros(len(setup.source), self._width, dtype=self.student.scale.dtype, device=accelerator.device)
        labels = torch.tensor(setup.source.labels, device=accelerator.device)

        def remember(_: Normalized, batch: Batch) -> dict[str, Tensor]:
            bank[batch.ids] = self._features(batch.pixels)
            return {"images": _count(batch)}

        def count(_: Normalized, batch: Batch) -> dict[str, Tensor]:
            features = functional.normalize(self._features(batch.pixels))
            scores = knn_scores(features, bank, labels, classes, self._neighbours)
            return {"top1": (scores.argmax(1) == batch.labels).sum().double(), "images": _count(batch)}

        nets = {"net": self.student}
        training = replace(setup, val=setup.source).val_loader()
        evaluate(nets, training, accelerator, remember, "features")
        training.close()
        if accelerator.num_processes > 1:
            bank = cast(Tensor, accelerator.reduce(bank))
        for row, other in training.replaced.items():
            bank[row], labels[row] = bank[other], labels[other]
        functional.normalize(bank, out=bank)
        validation = setup.val_loader()
        found = evaluate(nets, validation, accelerator, count, "nearest neighbours")["net"]
        validation.close()
        return found["top1"]

    def _features(self, pixels: Tensor) -> Tensor:
        return classifier_inputs(self.student, self._classifiers, pixels)


def _count(batch: Batch) -> Tensor:
    return torch.full((), len(batch), dtype=torch.float64, device=batch.labels.device)


def _read_run(folder: Path) -> tuple[str, dict[str, Any], str]:
    """Architecture of the first net of a run, its options, and the weights file of the run's last figures."""
    options, found = read_run_files(folder, f"--run {folder}")
    weights = folder / "last" / Path(str(found.get("evaluated") or "student.safetensors")).name
    if not weights.is_file():
        raise ValueError(f"--run {folder} has no weights: {weights} is missing; wait for its first epoch to end")
    return options["model"], dict(options.get("model_args") or {}), str(weights)


def _architecture(weights: str | None) -> str | None:
    """Which net weights are of, where their list or the run folder that they lie in says it."""
    if weights is None or not (path := Path(weights)).is_file():
        return None
    if known := identify(path):
        return known.model
    config = path.absolute().parents[1] / "config.yaml"
    options = read_yaml(config) if config.is_file() else None
    return options.get("model") if isinstance(options, dict) else None
