"""Distillation from a teacher-output cache: what a cache depends on, and passes that are read instead of asked for."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalikd.kd.backbones.layers import NetOutput
from dalikd.kd.known_weights import weights_digest
from dalikd.kd.mixing import Mixed
from dalikd.kd.teacher import BranchOutputs, TeacherPass
from dalikd.pipelines.draw_spec import Batch, BatchPlan
from dalikd.pipelines.hardware import decoding_on
from dalikd.pipelines.sources import Source
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.models import TeacherConfig, build_teacher
from dalikd.trainers.options import AugmentingOptions
from dalikd.trainers.setup import Setup
from dalikd.trainers.teacher_cache.layout import TeacherCache, from_group_picks, unpack_logits
from dalikd.trainers.teacher_step import Branches

__all__ = ["CachedTeacher", "check_cacheable", "logits_of", "open_cached", "run_fingerprint", "teacher_fingerprint"]


class CachedTeacher:
    """Passes of a teacher that is not there: its outputs come from a cache, its images from the same draws.

    Args:
        cache: filled, and made for this run.
        augmenter: makes the candidates.
    """

    def __init__(self, cache: TeacherCache, augmenter: Augmenter) -> None:
        self.cache, self._group, self._branches = cache, augmenter.group, Branches([augmenter])

    def attach(self, plan: BatchPlan) -> dict[str, np.ndarray]:
        """What the cache holds of a microbatch: goes along with the batch."""
        rows = plan.micro.rows  # as drawn: an image that stands in for a bad one has the place of that one
        arrays = self.cache.read(plan.micro.epoch, rows)
        if "picks" in arrays:
            arrays["picks"] = from_group_picks(arrays["picks"], len(rows), self._group)
        return arrays

    def __call__(self, batch: Batch) -> TeacherPass:
        """What the teacher gave for a batch, on the batch's device."""
        classes, picks = self.cache.layout.classes, batch.extras.get("picks")
        logits = augmented = logits_of("logits", batch.extras, classes)
        rows = torch.arange(len(batch), device=logits.device)
        mixed = self._branches.candidates(batch)
        if mixed is None:
            mixed = Mixed(batch.pixels, rows, torch.ones(len(batch), device=logits.device))
        else:
            augmented = logits_of("augmented", batch.extras, classes)
        if picks is not None:
            mixed, rows = mixed.take(picks), picks % len(batch)
        return TeacherPass(NetOutput(logits), (BranchOutputs(mixed, rows, augmented, picks=picks),))

    def describe(self, epochs: int) -> dict[str, Any]:
        """What results.json says of the cache, in a run of so many epochs."""
        layout = self.cache.layout
        summary = f"teacher cache: {layout.epochs} epochs"
        if epochs > layout.epochs:
            summary += ", repeated"
        if layout.storage == "topk":
            summary += f"; top {layout.k} of {layout.classes} logits, T. stddev and entropy are of what they restore"
        teacher = {name: value for name, value in layout.fingerprint.items() if name.startswith("teacher.")}
        return {"summary": summary, "folder": str(self.cache.folder), "storage": layout.storage, **teacher}


def open_cached(options: AugmentingOptions, config: TeacherConfig, setup: Setup, augmenter: Augmenter) -> CachedTeacher:
    """Open the cache that a run names.

    Args:
        options: of the run.
        config: names the cache.
        setup: the data.
        augmenter: makes the candidates.

    Raises:
        ValueError, OSError: there is no such cache, it is not filled, or it was made for another run.
    """
    assert config.cache is not None
    check_cacheable(setup.source, augmenter)
    cache = TeacherCache(Path(config.cache))
    own = {
        **run_fingerprint(options, setup, augmenter),
        **_named_teacher(config, cache.layout.fingerprint, setup.source),
    }
    cache.check_made_for(own, "Set the options to those of the cache, or make another with dalikd cache")
    cache.check_filled()
    return CachedTeacher(cache, augmenter)


def check_cacheable(source: Source, augmenter: Augmenter) -> None:
    """Check that what the teacher gives is a function of epoch and sample.

    Raises:
        ValueError: it depends on the student, or on the order in which containers are read; or there is not one
            augmented image for each original.
    """
    if augmenter.criterion is not None and augmenter.criterion.needs_student:
        raise ValueError(
            f"{augmenter.name} is picked by the student, which changes while it learns: its teacher outputs cannot be "
            "cached; use cutmixpick_teacher, or distil without --teacher.cache"
        )
    if augmenter.criterion is not None and augmenter.n_pick is not None:
        raise ValueError(
            f"--mix.n_pick {augmenter.n_pick}: a teacher cache holds one augmented image for each original; leave "
            "--mix.n_pick out, or distil without --teacher.cache"
        )
    if source.files is None and source.arrays is None:
        raise ValueError(
            f"{source.name} is read in the containers' order, which mix groups follow: its teacher outputs cannot be "
            "cached; use the class folders it was made from"
        )


def run_fingerprint(options: AugmentingOptions, setup: Setup, augmenter: Augmenter) -> dict[str, Any]:
    """What images and outputs depend on besides the teacher. Not the batch size, the processes or the epochs."""
    source, device = setup.source, setup.accelerator.device
    on_gpu = device.type == "cuda"
    decoder = decoding_on(source, device, options.data.decode, options.data.hw_decoder_load).options()
    return {
        "data": source.name,
        "data.images": len(source),
        "data.fingerprint": source.fingerprint,
        **{f"view.{name}": value for name, value in asdict(setup.view).items()},
        "seed": options.seed,
        "augmentation": augmenter.name,
        **{f"mix.{name}": value for name, value in asdict(options.mix).items()},
        "precision": options.precision,
        "decoder": "mixed" if on_gpu else "cpu",
        # a GPU's JPEG engine rounds unlike its other decoder, and windows may differ at their borders
        **({f"data.{name}": used for name, used in decoder.items()} if on_gpu else {"data.hw_decoder_load": None}),
    }


def teacher_fingerprint(config: TeacherConfig, source: Source) -> dict[str, Any]:
    """What the outputs depend on in the teacher. It is built for this, and let go.

    Raises:
        ValueError: as for `build_teacher`.
    """
    teacher = build_teacher(config, source)
    mean, std = teacher.normalisation
    return {
        "teacher.name": config.name,
        "teacher.args": config.args,
        "teacher.weights": weights_digest(teacher.model),
        "teacher.mean": list(mean),
        "teacher.std": list(std),
        "teacher.fold_bn": config.fold_bn,
    }


def logits_of(output: str, columns: dict[str, Tensor], num_classes: int) -> Tensor:
    """One of the teacher's outputs out of a cache's columns, float32 [B, C].

    Args:
        output: a name of CacheLayout.outputs.
        columns: by name, each [B, ...], on any device.
        num_classes: C.
    """
    parts = {name.removeprefix(output): part for name, part in columns.items() if name.startswith(output)}
    return unpack_logits(parts, num_classes)


def _named_teacher(config: TeacherConfig, cached: dict[str, Any], source: Source) -> dict[str, Any]:
    """What a run says of its teacher; with a cache it need not say anything."""
    if config.weights is not None:
        name, args = config.name or cached["teacher.name"], config.args or cached["teacher.args"]
        return teacher_fingerprint(replace(config, name=name, args=args, cache=None), source)
    if config.sha256 is not None:
        raise ValueError("--teacher.sha256 is the checksum of a weights file: give --teacher.weights too, or neither")
    named = {
        "teacher.name": config.name, "teacher.args": config.args, "teacher.mean": config.mean, "teacher.std": config.std
    }  # fmt: skip
    return {name: value for name, value in named.items() if value}
