"""Joins the parts of a run: data, augmentation, loaders, run folder. All is checked before a folder is touched."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from dalikd.kd.entropy_log import EntropyLog, plot_entropies
from dalikd.kd.normalize import Normalized
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.data import DataConfig, as_used, evaluation_view, open_sources, training_view
from dalikd.pipelines.draw_spec import BatchPlan, DrawSpec, View
from dalikd.pipelines.files import write_atomically
from dalikd.pipelines.loader import Loader, can_be_resident, decode_source
from dalikd.pipelines.resident import Resident
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.launch import model_type
from dalikd.trainers.loop import Loop, parameter_groups
from dalikd.trainers.models import build_model, describe_teacher, open_teacher, reinitialise
from dalikd.trainers.options import DistillOptions, RunOptions, TrainingOptions
from dalikd.trainers.resume import identity
from dalikd.trainers.tasks.base import Task
from dalikd.trainers.tasks.distill import Distillation
from dalikd.trainers.teacher_cache.read import CachedLooks, open_cached
from dalikd.trainers.tracking import RunFolder
from dalikd.trainers.trial import check_class_order, try_training

__all__ = [
    "TrainingData",
    "build_distillation",
    "build_student",
    "check_training",
    "make_loader",
    "open_training_data",
    "reading",
    "resident_pictures",
    "run_training",
    "validation_loader",
]

_LARGEST_EVALUATION_BATCH = 256  # a process
_EVALUATION_THREADS = 4  # of DALI, a process on a GPU


@dataclass(frozen=True)
class TrainingData:
    """What a training command reads."""

    train: Source
    val: Source
    view: View
    augmenter: Augmenter
    loader: Loader
    val_loader: Loader
    cached: CachedLooks | None = None


def open_training_data(options: TrainingOptions, accelerator: Accelerator) -> TrainingData:
    """Open the sources, bind the augmentation, make the loaders (nothing is read ahead yet).

    Raises:
        ValueError, OSError: the data or the sizes are not as they should be.
    """
    check_training(options, accelerator)
    train, val = open_sources(options.data, options.seed)
    view = training_view(options.data, train)
    augmenter = Augmenter(options.augmentation, options, train, view, options.seed)
    cached = None
    if isinstance(options, DistillOptions):
        cached = open_cached(options, train, view, augmenter, accelerator.device)
    sampler = Sampler(
        len(train),
        options.batch_size,
        options.seed,
        world=accelerator.num_processes,
        rank=accelerator.process_index,
        accumulation=options.accumulation,
        group=options.mix_group,
        repeat=cached.cache.layout.epochs if cached else None,
    )
    loader = make_loader(
        train,
        sampler,
        augmenter.draw_spec,
        options.data,
        accelerator,
        resident=resident_pictures(train, view, options.data, accelerator),
        buffers=options.accumulation + 1,  # a step holds its microbatches; the next one arrives meanwhile
        attach=cached.attach if cached else None,
    )
    return TrainingData(train, val, view, augmenter, loader, validation_loader(val, options, accelerator), cached)


def validation_loader(source: Source, options: RunOptions, accelerator: Accelerator) -> Loader:
    """Every row once an epoch, in order, shared by all processes."""
    world = accelerator.num_processes
    batch_size = world * min(_LARGEST_EVALUATION_BATCH, -(-len(source) // world))
    sampler = Sampler(
        len(source), batch_size, shuffle=False, drop_last=False, world=world, rank=accelerator.process_index
    )
    view = evaluation_view(options.data, source)
    data = options.data
    if accelerator.device.type == "cuda" and data.threads is None:
        data = replace(data, threads=_EVALUATION_THREADS)  # they would hold the GPU's memory while training goes on
    resident = resident_pictures(source, view, options.data, accelerator) if can_be_resident(view) else None
    return make_loader(source, sampler, DrawSpec(view), data, accelerator, resident=resident, buffers=2)


def make_loader(
    source: Source,
    sampler: Sampler,
    spec: DrawSpec,
    data: DataConfig,
    accelerator: Accelerator,
    *,
    resident: Resident | None = None,
    buffers: int = 0,
    attach: Callable[[BatchPlan], dict[str, np.ndarray]] | None = None,
) -> Loader:
    """A loader on this process's device, with the data options.

    Args:
        source: the pictures.
        sampler: their order.
        spec: views and draws.
        data: how they are read.
        accelerator: gives the device.
        resident: the pictures, where they are kept on the device.
        buffers: sets of fixed buffers that batches on a GPU take turns in; a batch holds until so many less one have
            been taken after it. 0 for batches that own their memory.
        attach: plan -> arrays that go along with the batch.
    """
    return Loader(
        source,
        sampler,
        spec,
        device=accelerator.device,
        resident=resident,
        buffers=buffers if accelerator.device.type == "cuda" else 0,
        attach=attach,
        **reading(data),
    )


def resident_pictures(source: Source, view: View, data: DataConfig, accelerator: Accelerator) -> Resident | None:
    """The decoded pictures on the device, if the options ask for it; pictures that are arrays already need none.

    Raises:
        ValueError: they do not fit into the device's memory, or the view does not start from squares of one size.
    """
    if not data.resident or source.arrays is not None:
        return None
    return decode_source(source, view, device=accelerator.device, **reading(data))


def reading(data: DataConfig) -> dict[str, Any]:
    """The data options that a Loader takes."""
    return {
        "threads": data.threads,
        "prefetch": data.prefetch,
        "hw_decoder_load": data.hw_decoder_load,
        "decode": data.decode,
        "bad_files": data.bad_files,
    }


def build_student(options: TrainingOptions, source: Source):
    """The net that is trained, the same on every process; without gradient where it is fixed.

    Raises:
        ValueError: no or an unknown model, weights that do not fit, or a fixed net without weights.
    """
    if options.model is None:
        raise ValueError("no model given: name its architecture with --model, e.g. --model resnet20")
    fixed = isinstance(options, DistillOptions) and options.fix_student
    if fixed and (options.weights is None or options.reinit):
        raise ValueError(
            "--fix_student true observes a student as its weights are: give them with --weights, without --reinit"
        )
    torch.manual_seed(options.seed)
    student = build_model(
        options.model, source, weights=options.weights, args=options.model_args, mean=options.mean, std=options.std,
        trained=not fixed,
    )  # fmt: skip
    if options.reinit:
        reinitialise(student.model, options.seed)
    return student.requires_grad_(False) if fixed else student


def build_distillation(options: DistillOptions, accelerator: Accelerator) -> tuple[Distillation, TrainingData]:
    """Open the data, build both nets and join them.

    Raises:
        ValueError, OSError: the data, the nets or the sizes are not as they should be.
    """
    data = open_training_data(options, accelerator)
    teacher: Teacher | CachedLooks
    if data.cached is not None:
        teacher = data.cached
    else:
        seen_in_training = data.val_loader.spec.view
        teacher = open_teacher(options.teacher, data.train, seen_in_training, accelerator.device, options.precision)
        check_class_order(
            teacher, f"the teacher {options.teacher.name}", options.teacher.weights, data.val, seen_in_training,
            accelerator.device, **reading(options.data),
        )  # fmt: skip
    student = build_student(options, data.train).to(model_type(options.precision))
    asked = teacher.model if isinstance(teacher, Teacher) else None
    data.augmenter.check_nets(options.compile, ("the teacher", asked), ("the student", student))
    log = EntropyLog(options.entropy_log_every) if options.entropy_log_every else None
    task = Distillation(
        student,
        teacher,
        options.loss,
        data.augmenter,
        accelerator,
        len(data.train.classes),
        joint_forward=options.joint_forward,
        metric=options.metric,
        entropy_log=log,
        compile_mode=options.compile,
        side=data.view.size,
        images=len(data.train),
    )
    return task, data


def run_training(
    task: Task,
    data: TrainingData,
    options: TrainingOptions,
    accelerator: Accelerator,
    command: str,
    config: dict[str, Any],
) -> dict[str, Any]:
    """Train, from the start or from a resumed folder, and write the run folder.

    Returns:
        the content of results.json, with "folder".

    Raises:
        ValueError: the folder is not free, or holds another run.
    """
    if options.resume and options.output and Path(options.output).resolve() != Path(options.resume).resolve():
        raise ValueError(
            f"--resume {options.resume} goes on in that folder, not in --output {options.output}: leave --output out, "
            "or copy the folder and resume the copy"
        )
    student = next(iter(task.nets.values()))
    path = Path(options.resume or options.output or f"runs/{command}-{options.data.name}-{options.model}")
    folder = RunFolder(path, accelerator.is_main_process)
    if options.resume is None:
        folder.check_new(options.overwrite)
    header = {
        "command": command,
        "seed": options.seed,
        "model": options.model,
        "normalisation": student.normalisation._asdict(),
        "augmentation": options.augmentation,
        "mode": options.mode,
        "mix_group": options.mix_group,
        "window": 640,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "data": {
            **as_used(options.data, data.train, accelerator.device),
            "train_images": len(data.train),
            "val_images": len(data.val),
        },
        "class_names": list(data.train.classes),  # index = label
        "fingerprint": {"train": data.train.fingerprint, "val": data.val.fingerprint},
    }
    teacher = getattr(task, "teacher", None)
    if isinstance(teacher, Teacher) and isinstance(options, DistillOptions):
        assert isinstance(teacher.model, Normalized)
        header["teacher"] = describe_teacher(options.teacher, teacher.model)
    if data.cached is not None:
        header["teacher_cache"] = data.cached.describe(round(options.epochs * options.epoch_factor))
        accelerator.print(header["teacher_cache"]["summary"], flush=True)
    contents: dict[str, Any] = {}
    kept = data.cached.cache.layout if data.cached is not None else None
    asked = "from the teacher itself" if kept is None else f"from a cache of {kept.epochs} epochs ({kept.storage})"
    told = {"the teacher's answers come": asked}
    if data.train.arrays is None:
        decoder = "the GPU, --data.hw_decoder_load {hw_decoder_load}, {decode}".format(**header["data"])
        told["images are decoded by"] = "the CPU" if accelerator.device.type == "cpu" else decoder
    if isinstance(task, Distillation):
        contents["the_teacher's_weights_or_normalisation"] = _teacher_digest(task.teacher)
    try_training(
        student,
        lambda net: options.optimizer(parameter_groups(net, options.no_decay_norms)),
        f"--model {options.model}",
        data.view.size,
        len(data.train.classes),
        accelerator,
    )
    loop = Loop(
        task, data.loader, data.val_loader, options, accelerator, folder, header,
        identity(command, config, told, **contents),
    )  # fmt: skip
    if options.resume is not None:
        loop.load()
    folder.start(config, loop.progress.step if options.resume is not None else None)
    accelerator.wait_for_everyone()
    results = loop.run()
    if isinstance(task, Distillation) and task.entropy_log and accelerator.is_main_process:
        write_atomically(path / "entropies.npz", task.entropy_log.save)
        plot_entropies(task.entropy_log, path / "entropies.png", f"{options.augmentation}, {options.model}")
    return {**results, "folder": str(path)}


def _teacher_digest(teacher: Teacher | CachedLooks) -> str:
    """What a teacher's outputs depend on in the teacher; the same whether it is asked or read from a cache."""
    if isinstance(teacher, CachedLooks):
        asked = teacher.cache.layout.fingerprint
        weights, mean, std = (asked[f"teacher.{name}"] for name in ("weights", "mean", "std"))
    else:
        assert isinstance(teacher.model, Normalized)
        weights, (mean, std) = teacher.digest, teacher.model.normalisation
    return " ".join([str(weights), *(f"{value:.6g}" for value in (*mean, *std))])


def check_training(options: TrainingOptions, accelerator: Accelerator) -> None:
    """Check what the options of a training command say beyond their own numbers.

    Raises:
        ValueError: the optimizer cannot work with its numbers, or the device not with an option.
    """
    for name, value in getattr(options.optimizer, "keywords", {}).items():  # those of a class; a function keeps its own
        numbers = [one for one in (value if isinstance(value, tuple | list) else [value]) if isinstance(one, float)]
        if not all(map(math.isfinite, numbers)) or (name == "lr" and numbers and numbers[0] <= 0):
            wanted = "a number above 0" if name == "lr" else "finite numbers"
            raise ValueError(f"--optimizer.{name} {value}: give {wanted}")
    try:
        options.optimizer([nn.Parameter(torch.zeros(1, 1))])
    except ValueError as error:
        raise ValueError(f"--optimizer: {error}") from error
    if options.sync_bn and accelerator.device.type != "cuda":
        raise ValueError("--sync_bn true needs GPUs: leave it out on the CPU")
