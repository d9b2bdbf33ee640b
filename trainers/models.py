"""Nets for a data set: built by name, filled with weights, wrapped with their own normalisation."""

from dataclasses import dataclass, field
from typing import Any

import torch

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.timm_models import input_statistics
from dalikd.kd.checkpoints import load_weights
from dalikd.kd.normalize import Normalized
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.augment import View
from dalikd.pipelines.sources import Source
from dalikd.trainers.launch import Precision, autocast_type, model_type

__all__ = ["TeacherConfig", "build_model", "build_teacher", "open_teacher"]


@dataclass
class TeacherConfig:
    """The teacher.

    Args:
        name: its architecture, such as resnet56, wrn_40_2 or timm:resnet34.
        weights: its weights file (.pt, .pth, .th, .safetensors), or "pretrained" for timm's own.
        args: options of the architecture.
        fold_bn: fold its batch norms into its convolutions: faster, the same outputs up to rounding.
        cache: a folder that dalikd cache has written for the same data, seed and augmentation: distilling then reads
            the teacher's outputs there and needs no teacher; name and weights may be left out.
    """

    name: str | None = None
    weights: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    fold_bn: bool = True
    cache: str | None = None


def build_model(
    name: str, source: Source, *, weights: str | None = None, args: dict[str, Any] | None = None
) -> Normalized:
    """Build a net for the classes of a data set.

    timm models normalise as they were trained to; all others by the data's mean and standard deviation.

    Args:
        name: as for `create_model`.
        source: gives the classes and their statistics.
        weights: a file, "pretrained" (timm models), or None for fresh ones.
        args: options of the architecture.

    Raises:
        ValueError: unknown name, or weights that do not fit.
        FileNotFoundError: no such weights file.
    """
    classes = len(source.classes)
    args = dict(args or {})
    if weights == "pretrained":
        _check_pretrained(name, classes)
        args["pretrained"] = True
    model = create_model(name, classes, **args)
    if weights not in (None, "pretrained"):
        load_weights(model, weights)
    mean, std = input_statistics(model) or (source.mean, source.std)
    return Normalized(model, mean, std)


def build_teacher(config: TeacherConfig, source: Source, view: View | None = None) -> Normalized:
    """Build the teacher with its weights; `view` is compared with what pretrained weights were made for.

    Raises:
        ValueError: no name or no weights given, or they do not fit the data set.
    """
    if config.cache is not None:
        raise ValueError("--teacher.cache is read by dalikd distill alone: name a teacher with --teacher.name instead")
    if config.name is None:
        raise ValueError("no teacher given: name its architecture with --teacher.name, e.g. --teacher.name resnet56")
    if config.weights is None:
        raise ValueError(
            f"the teacher {config.name} has no weights: give a file with --teacher.weights (dalikd train makes one), "
            'or "pretrained" for a timm model'
        )
    try:
        teacher = build_model(config.name, source, weights=config.weights, args=config.args)
    except ValueError as error:
        raise ValueError(
            f"teacher {config.name}: {error} (data set {source.name}: {len(source.classes)} classes)"
        ) from error
    if config.weights == "pretrained" and view is not None:
        _warn_of_other_view(teacher, view)
    return teacher


def open_teacher(
    config: TeacherConfig, source: Source, view: View | None, device: torch.device, precision: Precision
) -> Teacher:
    """Build the teacher as a run uses it: frozen, on its device, in its precision, batch norms folded if wanted.

    Args:
        config: of the teacher.
        source: the data set it is asked about.
        view: what it will see, compared with what pretrained weights were made for.
        device: where it runs.
        precision: of the run.

    Raises:
        ValueError: as for `build_teacher`.
    """
    net = build_teacher(config, source, view).to(model_type(precision))
    return Teacher(net, device, autocast_type(precision), fold_bn=config.fold_bn)


def _check_pretrained(name: str, classes: int) -> None:
    if not name.startswith("timm:"):
        raise ValueError(f'{name} has no pretrained weights to download: give a file, or a model named "timm:..."')
    import timm

    config = timm.get_pretrained_cfg(name.removeprefix("timm:"))
    if config is not None and config.num_classes != classes:
        raise ValueError(
            f"{name}'s pretrained weights have {config.num_classes} classes, the data set has {classes}: "
            "give weights trained on it"
        )


def _warn_of_other_view(teacher: Normalized, view: View) -> None:
    import warnings

    config = getattr(teacher.model, "pretrained_cfg", {})
    interpolation = config.get("interpolation")
    if interpolation not in (None, view.interpolation):
        warnings.warn(
            f"the teacher was trained with {interpolation} resizing, the data use {view.interpolation}: "
            f"set --data.interpolation {interpolation}",
            stacklevel=3,
        )
    crop = config.get("crop_pct")
    if crop and view.resize and abs(view.size / view.resize - crop) > 0.01:
        warnings.warn(
            f"the teacher was evaluated at crop_pct {crop}: set --data.val_resize {round(view.size / crop)}",
            stacklevel=3,
        )
