"""`dalikd measure` against its teacher alone, for each augmentation: what loading, mixing, picking and the metric cost.

Three sides go over the same number of images, with the same teacher calls on batches of the same sizes:

    measure          the command's own loop: loader, mixing, teacher, entropy and choice, T. stddev
    loaded teacher   loader, mixing and teacher; no entropy, no choice, no metric
    teacher alone    the teacher on kept batches of originals and candidates; no loader at all

Where a student scores the candidates, the teacher sees the originals and as many candidates as are picked; the
student's forwards are then a cost of measure alone.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from dalikd.kd.normalize import Normalized
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.data import evaluation_view, open_split, training_view
from dalikd.pipelines.draw_spec import Batch
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.resident import Resident
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.tools.bench.dispatch import Planned
from dalikd.tools.bench.images import describe
from dalikd.tools.bench.machine import device_slug, environment, settle, synchronize
from dalikd.tools.bench.options import ON_GPU, check_alone, check_rounds
from dalikd.tools.bench.record import Record, alternate, check_output, markdown, ratio, summary, write
from dalikd.tools.bench.teacher_options import TeacherOptions, teacher_net
from dalikd.tools.cli import run_command
from dalikd.trainers.augmentation import Augmenter, Branches, augmentation_names
from dalikd.trainers.launch import autocast_type, check_compiler, start
from dalikd.trainers.measure import MeasureOptions, build_scorer, measure_branches
from dalikd.trainers.setup import make_loader, resident_pictures

__all__ = ["Comparison", "images_asked", "main", "open_images", "plan", "run"]

_MEASURE, _LOADED, _ALONE = "measure", "loaded teacher", "teacher alone"
_SHARE = f"{_MEASURE} / {_ALONE}"
_TARGET = 0.95  # of the teacher alone
_KEPT = 4  # batches that the teacher alone is asked about in turn


class _Parts(NamedTuple):
    """What all augmentations share."""

    source: Source
    teacher: Teacher
    student: Normalized | None
    resident: Resident | None
    accelerator: Accelerator


def run(options: TeacherOptions, config: dict[str, Any]) -> Record:
    """Time every augmentation asked for, print and write the table, and return the record.

    Raises:
        ValueError, OSError: the data, the teacher or the sizes are not as they should be; nothing has run then.
    """
    check_rounds(options.rounds)
    check_output(options.folder)
    check_compiler(options.compile)
    accelerator = start(options.device, options.precision)
    check_alone("teacher", accelerator.num_processes)
    names = augmentation_names(options.augmentation)
    source = open_images(options)
    view = training_view(options.data, source)
    augmenters = [Augmenter(name, options, source, view, options.seed) for name in names]
    student = build_scorer(options, source, augmenters)
    net = teacher_net(options, source, evaluation_view(options.data, source))
    autocast = autocast_type(options.precision)
    teacher = Teacher(net, accelerator.device, autocast, fold_bn=options.teacher.fold_bn)
    resident = resident_pictures(source, view, options.data, accelerator)
    parts = _Parts(source, teacher, student, resident, accelerator)
    before = environment(accelerator.device)
    rows = [_row(augmenter, _rates(augmenter, options, parts)) for augmenter in augmenters]
    record = Record(
        benchmark="teacher",
        title=f"dalikd measure against its teacher alone: {options.teacher.name}, {view.size} pixels, "
        f"batch {options.batch_size}, {options.precision}" + (", resident" if options.data.resident else ""),
        environment=before,
        device=device_slug(accelerator.device),
        config=config,
        warm_up="one pass over the images.",
        page_cache="warm; the first pass reads." if source.files is not None else "no files.",
        rows=rows,
        labels=("augmentation",),
        plotted=_SHARE,
        variant=_variant(options, view.size),
        pictures=describe(source),
        notes=_notes(rows, len(source)),
    )
    print(markdown(record))
    print("written:", *write(record, options.folder))
    return record


class Comparison:
    """The three sides for one augmentation. Each goes once over the images and returns originals a second.

    Args:
        augmenter: the augmentation.
        loader: over every row once an epoch (drop_last=False), with the augmenter's draws; at the start of an epoch.
        teacher: frozen.
        accelerator: one process.
        options: window and compilation, as for `measure`.
        student: scores candidates, where the augmentation needs it.
    """

    def __init__(
        self,
        augmenter: Augmenter,
        loader: Loader,
        teacher: Teacher,
        accelerator: Accelerator,
        options: TeacherOptions,
        student: Normalized | None = None,
    ) -> None:
        self._augmenter, self._loader, self._teacher, self._accelerator = augmenter, loader, teacher, accelerator
        self._options, self._student = options, student
        self._ask = _compiled(teacher, options)
        self._kept = [self._seen(batch).clone() for batch in islice(loader, _KEPT)]
        loader.seek(0)

    def timers(self) -> dict[str, Callable[[], float]]:
        """The sides by name."""
        passes = {_MEASURE: self._measure, _LOADED: self._load_and_ask, _ALONE: self._ask_alone}
        return {name: lambda work=work: self._timed(work) for name, work in passes.items()}

    def _timed(self, work: Callable[[], object]) -> float:
        device = self._accelerator.device
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        return len(self._loader.source) / (time.perf_counter() - started)

    def _measure(self) -> None:
        options = MeasureOptions(epochs=1, window=self._options.window, compile=self._options.compile)
        branches = Branches([self._augmenter])
        measure_branches(branches, self._loader, self._teacher, self._accelerator, options, self._student)

    def _load_and_ask(self) -> None:
        for batch in self._loader:
            self._ask(self._seen(batch))

    def _ask_alone(self) -> None:
        batches, rest = divmod(len(self._loader.source), self._loader.sampler.batch_size)
        for images in islice(cycle(self._kept), batches):
            self._ask(images)
        if rest:
            self._ask(self._kept[0][: rest * images_asked(self._augmenter)])

    @torch.no_grad()
    def _seen(self, batch: Batch) -> Tensor:
        """As many pictures as the teacher sees of a batch, made as `measure` makes them: originals, then candidates."""
        candidates = self._augmenter.candidates(batch)
        if candidates is None:
            return batch.pixels
        asked = (images_asked(self._augmenter) - 1) * len(batch)
        return torch.cat((batch.pixels, candidates.images[:asked]))


def images_asked(augmenter: Augmenter) -> int:
    """Pictures that the teacher sees for each original, itself included."""
    if not augmenter.makes_candidates:
        return 1
    criterion = augmenter.criterion
    return 1 + augmenter.runs if criterion is not None and criterion.needs_teacher else 2


def _compiled(teacher: Teacher, options: TeacherOptions) -> Callable[[Tensor], Tensor]:
    if options.compile == "off":
        return teacher
    ask = torch.compile(teacher.__call__, mode=options.compile, dynamic=False)

    def marked(images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return ask(images)

    return marked


def _rates(augmenter: Augmenter, options: TeacherOptions, parts: _Parts) -> dict[str, list[float]]:
    """Originals a second of each side, one number a round."""
    source, accelerator = parts.source, parts.accelerator
    sampler = Sampler(len(source), options.batch_size, options.seed, drop_last=False, group=options.mix_group)
    loader = make_loader(
        source, sampler, augmenter.draw_spec, options.data, accelerator, resident=parts.resident, buffers=2
    )
    comparison = Comparison(augmenter, loader, parts.teacher, accelerator, options, parts.student)
    rates = alternate(comparison.timers(), options.rounds, settle)
    loader.close()
    if options.compile != "off":
        torch.compiler.reset()  # as `measure` does: all augmentations together would pass torch's limit
    return rates


def open_images(options: TeacherOptions) -> Source:
    """As many training images as a round goes over.

    Raises:
        ValueError, OSError: the data are not as they should be, or fewer images are wanted than there are classes.
    """
    source = open_split(options.data, "train", options.seed)
    if options.images < len(source.classes):
        raise ValueError(f"--images {options.images}: give at least one for each of {len(source.classes)} classes")
    return source.limit(options.images, options.seed) if options.images < len(source) else source


def _row(augmenter: Augmenter, rates: Mapping[str, list[float]]) -> dict[str, Any]:
    asked = images_asked(augmenter)
    return {
        "augmentation": augmenter.name,
        "teacher images an original": asked,
        **{f"{name}, originals/s": summary(values) for name, values in rates.items()},
        "measure, teacher images/s": summary([asked * rate for rate in rates[_MEASURE]]),
        f"{_MEASURE} / {_LOADED}": ratio(rates[_MEASURE], rates[_LOADED]),
        _SHARE: ratio(rates[_MEASURE], rates[_ALONE]),
    }


def _notes(rows: Sequence[Mapping[str, Any]], images: int) -> list[str]:
    below = [f"{row['augmentation']} {row[_SHARE]['median']:.3f}" for row in rows if row[_SHARE]["median"] < _TARGET]
    return [
        f"A round is one pass over {images:,} originals. {_ALONE.capitalize()}: the same teacher calls on kept "
        f"batches; {_LOADED}: with loader and mixing, without entropy, choice and T. stddev.",
        f"Wanted: at least {_TARGET} of the teacher alone. "
        + (f"Below it: {', '.join(below)}." if below else "All are."),
    ]


def _variant(options: TeacherOptions, size: int) -> str:
    name = str(options.teacher.name).replace(":", "-").replace("_", "-")
    settings = {options.compile: options.compile != "off", "resident": options.data.resident}
    return "-".join((name, str(size), options.precision, *(name for name, given in settings.items() if given)))


def plan(root: Path) -> list[Planned]:
    """What `dalikd bench all` runs."""
    data = ("--data.root", str(root), "--data.train_split", ".")
    small = ("--teacher.name", "resnet56", "--model", "resnet20", "--data.image_size", "32", "--images", "500")
    large = ("--teacher.name", "timm:resnet34", "--model", "timm:resnet18", *ON_GPU, "--images", "7680")
    return [Planned((*data, *small)), Planned((*data, *large), gpus=1)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("bench teacher", run, argv)


if __name__ == "__main__":
    main()
