"""Nets for a data set: built by name, filled with weights, wrapped with their own normalisation."""

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.auxiliary import AuxiliaryNet
from dalikd.kd.backbones.layers import Normalisation, Normalized
from dalikd.kd.backbones.timm_models import input_statistics
from dalikd.kd.checkpoints import (
    Origin,
    class_order,
    has_heads,
    last_layers,
    load_weights,
    order_classes,
    read_origin,
    read_state_dict,
)
from dalikd.kd.known_weights import file_sha256, identify, published_classes, weights_digest
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.data import FilePath
from dalikd.pipelines.datasets.file_list import cache_folder
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.files import write_atomically
from dalikd.pipelines.sources import Source
from dalikd.trainers.launch import Precision, autocast_type, model_type

__all__ = [
    "TeacherConfig",
    "build_model",
    "build_teacher",
    "describe_teacher",
    "open_teacher",
    "reinitialise",
    "teacher_classes",
]

_PRETRAINED = "pretrained"  # in place of a weights file
_IMAGENET_CLASSES = 1000
_SET_HERE = {  # options of nets that follow from others, and how
    "num_classes": "it follows from the data's classes",
    "in_chans": "images have three channels",
    "features_only": "losses on features take them from the whole net",
    "pretrained": 'give "pretrained" in place of the weights file',
    "checkpoint_path": "name the weights file as weights",
}


@dataclass
class TeacherConfig:
    """The teacher.

    Args:
        name: its architecture, such as resnet56, wrn_40_2 or timm:resnet34.
        weights: its weights file (.pt, .pth, .th, .safetensors), also one in a tar, as FILE.tar:MEMBER; of a file of
            two nets that learned together one is FILE:net1; or "pretrained" for timm's own.
        args: options of the architecture.
        sha256: checksum that the weights file must have, or its leading digits (at least 8).
        mean: that its images are normalised by: three numbers, of pixels scaled to 0..1; default: as its weights were
            trained, where they or dalikd's list of published files say it, else as the data set is.
        std: as mean; give both or none.
        verify: before the work begins, ask it about 256 validation images, and stop if it is right no more often than
            by chance; false goes on with such a teacher.
        fold_bn: fold its batch norms into its convolutions: faster, the same outputs up to rounding.
        cache: a folder that dalikd cache has written for the same data, seed and augmentation: distilling then reads
            the teacher's outputs there and needs no teacher; name and weights may be left out.
    """

    name: str | None = None
    weights: FilePath | None = None
    args: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    verify: bool = True
    fold_bn: bool = True
    cache: FilePath | None = None


def build_model(
    name: str,
    source: Source,
    *,
    weights: str | None = None,
    args: dict[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    sha256: str | None = None,
    trained: bool = False,
    fresh_classifier: bool = False,
) -> Normalized:
    """Build a net for the classes of a data set, in their order where its weights say for which classes they are.

    It normalises by `mean` and `std` where given, else as its weights were trained where that is known, else as timm
    says, else by the data's mean and standard deviation.

    Args:
        name: as for `create_model`.
        source: gives the classes and their statistics.
        weights: a file, "pretrained" (timm models), or None for fresh ones.
        args: options of the architecture.
        mean: of each channel, of pixels scaled to 0..1.
        std: of each channel, of pixels scaled to 0..1.
        sha256: checksum of the weights file, or its leading digits.
        trained: whether it is only a start, which may be for other classes of the same number; a warning says so. Of a
            net with auxiliary heads the weights may then be those of its backbone alone.
        fresh_classifier: take all but the classifier of the weights, which may be for any classes.

    Raises:
        ValueError: unknown name, impossible mean or std, or weights that do not fit, have another checksum or are for
            other classes.
        FileNotFoundError: no such weights file.
    """
    given = _given_normalisation(mean, std)
    classes = len(source.classes)
    args = dict(args or {})
    if set_here := sorted(args.keys() & _SET_HERE.keys()):
        raise ValueError(f"{name}: {set_here[0]} is no option to give: {_SET_HERE[set_here[0]]}; leave it out")
    file = None if weights == _PRETRAINED else weights
    if sha256 is not None and file is None:
        raise ValueError("sha256 is the checksum of a weights file: leave it out, or give the file")
    if weights == _PRETRAINED:
        check_pretrained(name, None if fresh_classifier else classes)
        args["pretrained"] = True
    model: Any = create_model(name, classes, **args)
    origin = Origin()
    if file is not None:
        origin = read_origin(file)
        foreign = trained and not origin.published and set(origin.class_names or ()) - set(source.classes)
        part = model
        if trained and isinstance(model, AuxiliaryNet) and not has_heads(read_state_dict(file, sha256=sha256)):
            part = model.backbone  # what the heads start from, which are new
        class_names = None if foreign or fresh_classifier else source.classes
        load_weights(part, file, sha256=sha256, class_names=class_names, keep_classifier=fresh_classifier)
        _remember(file, chosen=sha256 is not None)
        if foreign and not fresh_classifier:
            warnings.warn(f"{file} is for other classes than the data: its last layer has to learn anew", stacklevel=2)
    elif weights == _PRETRAINED and fresh_classifier:
        model.reset_classifier(classes)  # timm keeps its own where the number of classes is the same
    elif weights == _PRETRAINED and classes == _IMAGENET_CLASSES:
        imagenet = Origin(class_names=published_classes("ImageNet"), published=True)
        order = class_order(imagenet, source.classes, f"{name}, pretrained,")
        if order is not None:
            model.load_state_dict(order_classes(model.state_dict(), model, order, f"{name}, pretrained,"))
    mean, std = given or origin.normalisation or input_statistics(model) or (source.mean, source.std)
    return Normalized(model, mean, std)


def _remember(file: str, *, chosen: bool) -> None:
    """Show and keep the checksum of a file that is known by its path alone, and warn of another content there later.

    Args:
        file: the weights file.
        chosen: whether its checksum was given: then it is the one to keep.
    """
    known = identify(file)
    if known is None or known.sha256 or os.environ.get("RANK", "0") != "0":
        return
    kept, digest = cache_folder() / "weights" / f"{known.file}.sha256", file_sha256(file)
    before = kept.read_text("utf-8").strip() if kept.is_file() else None
    if before is None or (chosen and before != digest):
        print(f"dalikd: by its path {file} is {known}; its SHA-256 is {digest}, kept in {kept}", flush=True)
        with contextlib.suppress(OSError):  # a cache that cannot be written keeps nothing
            write_atomically(kept, f"{digest}\n".encode())
    elif before != digest:
        warnings.warn(
            f"{file} is not what was loaded under this published name before: its SHA-256 is {digest}, that was "
            f"{before}. Fetch it again from {known.publisher}; or, if this is the one that you want, give "
            f"--teacher.sha256 {digest[:16]} once, or remove {kept}",
            stacklevel=3,
        )


def _no_weights(teacher: str) -> ValueError:
    return ValueError(
        f"the teacher {teacher} has no weights: give a file with --teacher.weights (dalikd train makes one), "
        'or "pretrained" for a timm model'
    )


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
        raise _no_weights(config.name)
    try:
        teacher = build_model(
            config.name, source, weights=config.weights, args=config.args, mean=config.mean, std=config.std,
            sha256=config.sha256,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(
            f"teacher {config.name}: {error} (data set {source.name}: {len(source.classes)} classes)"
        ) from error
    if config.weights == _PRETRAINED and view is not None:
        _warn_of_other_view(teacher, view)
    return teacher


def teacher_classes(config: TeacherConfig) -> tuple[str, ...]:
    """The classes that a teacher answers with, index = logit: their names where its weights say them, else numbers.

    Raises:
        ValueError, OSError: no weights are named, they cannot be read, or their number of classes is not found.
    """
    name, weights = str(config.name), config.weights
    if weights is None:
        raise _no_weights(name)
    if weights == _PRETRAINED:
        check_pretrained(name, None)
        import timm

        pretrained = timm.get_pretrained_cfg(name.removeprefix("timm:").removesuffix("_aux"))
        count = 0 if pretrained is None else pretrained.num_classes
        names = published_classes("ImageNet") if count == _IMAGENET_CLASSES else None
    else:
        names, state = read_origin(weights).class_names, read_state_dict(weights, sha256=config.sha256)
        with torch.device("meta"):
            last = last_layers(create_model(name, _IMAGENET_CLASSES, **config.args))
        own = [key for layer in last for key in (f"{layer}.weight", f"backbone.{layer}.weight") if key in state]
        count = len(state[own[0]]) if own else 0
    if not count and names is None:
        raise ValueError(
            f"{weights}: the number of classes of the teacher {name} is not found: check --teacher.name, or name "
            "labelled images with --data.val_root"
        )
    return names or tuple(map(str, range(count)))


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
    net = build_teacher(config, source, view)
    digest, net = weights_digest(net.model), net.to(model_type(precision))
    return Teacher(net, device, autocast_type(precision), fold_bn=config.fold_bn, digest=digest)


def describe_teacher(config: TeacherConfig, teacher: Normalized) -> dict[str, Any]:
    """What results say of the teacher: the options, its file's whole checksum and published origin, its normalisation.

    Args:
        config: that it was built from.
        teacher: the net.
    """
    file = None if config.weights == _PRETRAINED else config.weights
    known = identify(file) if file is not None else None
    return {
        **asdict(config),
        "sha256": file_sha256(file) if file is not None else None,
        "known_as": str(known) if known else None,
        "normalisation": teacher.normalisation._asdict(),
    }


def reinitialise(model: nn.Module, seed: int) -> None:
    """Reset convolutions, linear layers and batch norms as torch makes them; all else stays.

    Args:
        model: any net.
        seed: of the new values.
    """
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()


def _given_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalisation | None:
    if mean is None and std is None:
        return None
    means, stds = tuple(mean or ()), tuple(std or ())
    within = all(0 <= value <= 1 for value in means) and all(0 < value <= 1 for value in stds)
    if len(means) != 3 or len(stds) != 3 or not within:
        raise ValueError(
            f"mean {list(means)} and std {list(stds)}: give both, three numbers each, of pixels scaled to 0..1, "
            "such as [0.485, 0.456, 0.406] and [0.229, 0.224, 0.225]"
        )
    return Normalisation(means, stds)


def check_pretrained(name: str, classes: int | None) -> None:
    if not name.startswith("timm:"):
        raise ValueError(f'{name} has no pretrained weights to download: give a file, or a model named "timm:..."')
    import timm

    config = timm.get_pretrained_cfg(name.removeprefix("timm:").removesuffix("_aux"))
    if config is not None and classes is not None and config.num_classes != classes:
        raise ValueError(
            f"{name}'s pretrained weights have {config.num_classes} classes, the data set has {classes}: "
            "give weights trained on it"
        )


def _warn_of_other_view(teacher: Normalized, view: View) -> None:
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
