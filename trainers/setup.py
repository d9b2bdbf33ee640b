"""What a command works on: data, views and devices, opened once; and what is built for them."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from dalikd.kd.teacher import Teacher, Teachers
from dalikd.pipelines.data import DataConfig, evaluation_view, open_sources, open_split, training_view
from dalikd.pipelines.draw_spec import Batch, BatchPlan, DrawSpec, View
from dalikd.pipelines.loader import Loader, can_be_resident, decode_source
from dalikd.pipelines.resident import Resident
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.launch import autocast_type
from dalikd.trainers.models import TeacherConfig, open_teacher, teacher_classes
from dalikd.trainers.options import ABOVE_0, AugmentingOptions, NumberRange, RunOptions, check_numbers
from dalikd.trainers.teacher_cache.layout import TeacherCache
from dalikd.trainers.trial import (
    CHANCE_IMAGES,
    ask,
    check_chance,
    check_class_order,
    knows_its_classes,
    some_of_each,
    try_net,
)

__all__ = ["Setup", "SeveralTeachers", "open_run", "reading"]

_LARGEST_EVALUATION_BATCH = 256  # a process
_EVALUATION_THREADS = 4  # of DALI, a process on a GPU


def open_run(options: RunOptions, accelerator: Accelerator, split: Literal["both", "train", "val"] = "both") -> "Setup":
    """Open the data of a command; what was left out of them is printed.

    Args:
        options: of the command.
        accelerator: its device and processes.
        split: which one it reads.

    Raises:
        ValueError: the data set is not as it should be, or its splits have different classes.
        FileNotFoundError: a folder or file is missing.
    """
    if split == "both" or (split == "train" and options.data.name == "images"):
        source, val = open_sources(options.data, options.seed)
        if not source.labelled:
            source = replace(source, classes=val.classes if val.labelled else _classes_of_teacher(options))
        return Setup(options, accelerator, source, val if val.labelled else source)
    source = open_split(options.data, split, options.seed)
    return Setup(options, accelerator, source, source)


def _classes_of_teacher(options: RunOptions) -> tuple[str, ...]:
    """Of images without labels; none where no teacher is named, which is told where one is needed."""
    config: TeacherConfig = next(iter(getattr(options, "teachers", ())), getattr(options, "teacher", TeacherConfig()))
    if config.cache is not None and (config.name is None or config.weights is None):
        return tuple(map(str, range(TeacherCache(Path(config.cache)).layout.classes)))
    return () if config.name is None else teacher_classes(config)


@dataclass
class SeveralTeachers:
    """One teacher, or several that answer as one.

    Args:
        teacher: the net that is asked.
        teachers: several nets that are asked at once, in place of the one: a list of what the options of --teacher say,
            [{name: resnet56, weights: a.pt}, {name: wrn_40_2, weights: b.pt}]. Their answer is a weighted mean of their
            logits, which is the geometric mean of their distributions at every temperature; T. stddev of a run is also
            that of each.
        teacher_weights: of the teachers in that mean, a number above 0 for each; what counts is their ratio. Default:
            equal.
        teacher_ensemble: mean: the same weights for all images; entropy: multiplied by exp(-H) for each image, where H
            is the entropy of the teacher's distribution, so that a teacher which is sure counts more.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: list[TeacherConfig] = field(default_factory=list)
    teacher_weights: list[float] | None = None
    teacher_ensemble: Literal["mean", "entropy"] = "mean"

    def check_teachers(self) -> None:
        """Raises ValueError for teachers that do not go together."""
        count = len(self.teachers)
        if count and any(config.cache is not None for config in (self.teacher, *self.teachers)):
            raise ValueError("a teacher cache holds the answers of one teacher: leave it out, or --teachers")
        if count and self.teacher != TeacherConfig():
            raise ValueError(
                "--teacher and --teachers are both given: name one teacher with --teacher.name and so on, or all of "
                "several in --teachers"
            )
        if not count and self.teacher_ensemble != "mean":
            raise ValueError(f"--teacher_ensemble {self.teacher_ensemble} weighs several teachers: name --teachers")

        def fit(weights: list[float]) -> bool:
            return len(weights) == count and all(map(ABOVE_0.fits, weights))

        words = f"a number above 0 for each of --teachers, {count} in all"
        check_numbers(self, {"teacher_weights": NumberRange(fit, words)})


@dataclass(frozen=True)
class Setup:
    """The data of a command on its devices.

    Attributes:
        options: of the command.
        accelerator: its device and processes.
        source: the images that it trains on, measures or evaluates.
        val: the images that a net is evaluated on; the same where one split is read, or where there are none with
            labels.
    """

    options: RunOptions
    accelerator: Accelerator
    source: Source
    val: Source
    _teachers: dict[str, Teacher] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def view(self) -> View:
        """What training sees."""
        return training_view(self.options.data, self.source)

    @cached_property
    def val_view(self) -> View:
        """What evaluation sees, and a teacher has seen in its training."""
        return evaluation_view(self.options.data, self.val)

    def augmenter(self, name: str) -> Augmenter:
        """An augmentation by its name.

        Raises:
            ValueError: an unknown name, or options that do not fit.
        """
        assert isinstance(self.options, AugmentingOptions)
        return Augmenter(name, self.options.mix, self.source, self.view, self.options.seed)

    def sampler(self, *, accumulation: int = 1, drop_last: bool = True, repeat: int | None = None) -> Sampler:
        """The order of the images in each epoch, shuffled, and this process's share of it.

        Args:
            accumulation: batches of an optimizer step.
            drop_last: leave out the images of the last step that are too few.
            repeat: epochs after which the first one's order comes again.
        """
        options, accelerator = self.options, self.accelerator
        assert isinstance(options, AugmentingOptions)
        return Sampler(
            len(self.source),
            options.batch_size,
            options.seed,
            world=accelerator.num_processes,
            rank=accelerator.process_index,
            accumulation=accumulation,
            group=options.mix.group,
            repeat=repeat,
            drop_last=drop_last,
        )

    def loader(
        self,
        spec: DrawSpec,
        sampler: Sampler | None = None,
        *,
        accumulation: int = 1,
        repeat: int | None = None,
        attach: Callable[[BatchPlan], dict[str, np.ndarray]] | None = None,
    ) -> Loader:
        """Training batches; nothing is read ahead yet.

        Args:
            spec: views and draws.
            sampler: order of the images; default: that of training, without the images that fill no step.
            accumulation: batches of an optimizer step, which are held together.
            repeat: epochs after which the first one's order comes again.
            attach: plan -> arrays that go along with a batch.

        Raises:
            ValueError: the batch size does not fit data, processes or mix groups; or images that are to be kept on the
                device do not fit into its memory.
        """
        sampler = sampler or self.sampler(accumulation=accumulation, repeat=repeat)
        # a step holds its batches; the next one arrives meanwhile
        return self._loader(self.source, sampler, spec, self.options.data, buffers=accumulation + 1, attach=attach)

    def val_loader(self) -> Loader:
        """Every image of the validation split once an epoch, in order, shared by all processes."""
        data, accelerator = self.options.data, self.accelerator
        world = accelerator.num_processes
        batch_size = world * min(_LARGEST_EVALUATION_BATCH, -(-len(self.val) // world))
        sampler = Sampler(
            len(self.val), batch_size, shuffle=False, drop_last=False, world=world, rank=accelerator.process_index
        )
        if accelerator.device.type == "cuda" and data.threads is None:
            data = replace(data, threads=_EVALUATION_THREADS)  # they would hold the GPU's memory while training goes on
        keep = can_be_resident(self.val_view)
        return self._loader(self.val, sampler, DrawSpec(self.val_view), replace(data, resident=data.resident and keep))

    def teacher(self, config: TeacherConfig, *, warn: bool = False) -> Teacher:
        """A frozen teacher on this process's device, whose weights are for these classes in their order. They are kept
        in the compute type of mixed precision where its answers stay the same. Asked for again, it is the same one.

        Args:
            config: of the teacher.
            warn: say why its answers for the images would be refused, and go on with it.

        Raises:
            ValueError: it is not named, its weights do not fit, it cannot take such images or answers with NaN, or is
                right by chance alone.
        """
        if (known := self._teachers.get(str(config))) is not None:
            return known
        device, precision, view = self.accelerator.device, self.options.precision, self.val_view
        teacher, name = open_teacher(config, self.source, view, device, precision), f"the teacher {config.name}"
        try_net(teacher, name, view.size, len(self.source.classes), device)
        noise = torch.randint(0, 256, (2, view.size, view.size, 3), generator=torch.Generator().manual_seed(0))
        cast = teacher.cast_weights(noise.byte().to(device).permute(0, 3, 1, 2))
        if not cast and autocast_type(precision) and os.environ.get("RANK", "0") == "0":
            print(
                f"dalikd: {name} keeps its weights in float32 under --precision {precision}: its answers would be "
                "others",
                flush=True,
            )
        try:
            self._check_class_order(teacher, name, config.weights)
            if config.verify:
                self._check_chance(teacher, name)
        except ValueError as error:
            if not warn:
                raise
            print(f"dalikd: a run would be refused: {error}", file=sys.stderr, flush=True)
        self._teachers[str(config)] = teacher
        return teacher

    def teachers(self, options: SeveralTeachers, *, warn: bool = False) -> Teachers:
        """The teachers of `options.teachers`, as one; each as `teacher` gives it."""
        opened = []
        for number, config in enumerate(options.teachers, start=1):
            try:
                opened.append(self.teacher(config, warn=warn))
            except ValueError as error:
                raise ValueError(f"--teachers, entry {number}: {error}") from error
        names, by_entropy = [str(config.name) for config in options.teachers], options.teacher_ensemble == "entropy"
        return Teachers(opened, names, options.teacher_weights, by_entropy=by_entropy)

    def check_net(self, net: Callable[[Tensor], Tensor], name: str, weights: str | None, view: View) -> None:
        """Check that a net can take the images, and that its weights are for these classes in their order.

        Args:
            net: pixels -> logits.
            name: for messages.
            weights: its weights file, "pretrained", or None.
            view: of the images that it takes.

        Raises:
            ValueError: it cannot, or they are not.
        """
        try_net(net, name, view.size, len(self.source.classes), self.accelerator.device)
        self._check_class_order(net, name, weights)

    def _check_class_order(self, net: Callable[[Tensor], Tensor], name: str, weights: str | None) -> None:
        if knows_its_classes(weights) or not self.val.labelled:
            return
        batch = self._first_batch(some_of_each(self.val, self.val_view.size, self.accelerator.device))
        check_class_order(net, name, weights, self.val, batch.pixels, batch.labels.cpu().numpy())

    def _check_chance(self, net: Callable[[Tensor], Tensor], name: str) -> None:
        """With one batch out of the whole validation split."""
        if not self.val.labelled:
            if os.environ.get("RANK", "0") == "0":
                print(f"dalikd: {name} is not verified: there are no labelled images", flush=True)
            return
        if len(self.val) < CHANCE_IMAGES:
            return
        batch = self.some_val_images(CHANCE_IMAGES)
        with torch.no_grad():
            answers = ask(net, batch.pixels, name).argmax(1)
        check_chance(answers.cpu().numpy(), batch.labels.cpu().numpy(), name, self.val)

    def some_val_images(self, count: int) -> Batch:
        """Images out of the whole validation split, 256 at most, as evaluation sees them; of shards the first ones."""
        rows = np.linspace(0, len(self.val) - 1, min(count, len(self.val))).astype(int)
        return self._first_batch(self.val if self.val.shards is not None else self.val.take(rows))

    def _first_batch(self, source: Source) -> Batch:
        """The first images of a data set, 256 at most, as evaluation sees them."""
        sampler = Sampler(len(source), min(len(source), 256), shuffle=False, drop_last=False)
        device = self.accelerator.device
        loader = Loader(source, sampler, DrawSpec(self.val_view), device=device, **reading(self.options.data))
        batch = loader.next()
        loader.close()
        return batch

    def _loader(
        self, source: Source, sampler: Sampler, spec: DrawSpec, data: DataConfig, buffers: int = 2, attach: Any = None
    ) -> Loader:
        device = self.accelerator.device
        resident: Resident | None = None
        if data.resident and source.arrays is None:  # images that are arrays are in memory anyway
            resident = decode_source(source, spec.view, device=device, **reading(self.options.data))
        return Loader(
            source,
            sampler,
            spec,
            device=device,
            resident=resident,
            buffers=buffers if device.type == "cuda" else 0,
            attach=attach,
            **reading(data),
        )


def reading(data: DataConfig) -> dict[str, Any]:
    """The data options that a Loader takes."""
    return {
        "threads": data.threads,
        "prefetch": data.prefetch,
        "hw_decoder_load": data.hw_decoder_load,
        "decode": data.decode,
        "bad_files": data.bad_files,
        "bad_files_limit": data.bad_files_limit,
    }
