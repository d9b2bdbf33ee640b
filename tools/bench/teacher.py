"""What `dalikd measure` costs. `dalikd bench teacher` compares it, for each augmentation, with its teacher alone.

Three sides have the same teacher calls on batches of the same sizes: measure, the command's own loop; loaded teacher,
without entropy, choice and metric; teacher alone, on kept batches, without loader. Where a student scores candidates,
the teacher sees as many as are picked; the student's forwards are then a cost of measure alone.

`dalikd bench passes` compares one pass for all augmentations with a pass for each: in one pass an image is decoded
once, and the teacher sees the originals, and whatever several augmentations have in common, once.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor

from dalikd.kd.teacher import Teacher
from dalikd.pipelines.draw_spec import Batch
from dalikd.pipelines.loader import Loader
from dalikd.tools.bench.common import TeacherOptions, describe_run, teacher_net
from dalikd.tools.bench.machine import settle
from dalikd.tools.bench.record import Record, alternate, begin, finish, ratio, summary, timed
from dalikd.trainers.augmentation import Augmenter, augmentation_names
from dalikd.trainers.launch import autocast_type, check_compiler, start
from dalikd.trainers.measure import build_scorer, measure_branches
from dalikd.trainers.setup import Setup, open_run
from dalikd.trainers.teacher_step import Branches

_MEASURE, _LOADED, _ALONE = "measure", "loaded teacher", "teacher alone"
_SHARE = f"{_MEASURE} / {_ALONE}"
_ONE, _EACH = "one pass", "a pass each"
_TARGET = 0.95  # of the teacher alone


class Measuring:
    """What `dalikd measure` opens. Raises ValueError, OSError: options, data or nets are not as they should be."""

    def __init__(self, options: TeacherOptions) -> None:
        self.options, self.accelerator = options, start(options.device, options.precision)
        check_compiler(options.compile)
        names, source = augmentation_names(options.augmentation), open_run(options, self.accelerator, "train").source
        if options.images < len(source):
            source = source.limit(options.images, options.seed, option="--images")
        self.setup = Setup(options, self.accelerator, source, source)
        self.augmenters = [self.setup.augmenter(name) for name in names]
        self.student, net = build_scorer(options, source, self.augmenters), teacher_net(options, self.setup)
        precision, folds = autocast_type(options.precision), options.teacher.fold_bn
        self.teacher = Teacher(net, self.accelerator.device, precision, fold_bn=folds)

    def begin(self, benchmark: str, config: dict[str, Any], **known: Any) -> Record:
        """A record of it."""
        record = begin(benchmark, self.options, self.accelerator, config, **known)
        describe_run(record, self.options, self.setup, self.options.teacher.name)
        return record

    def loader(self, branches: Branches) -> Loader:
        """Over every image once an epoch, with the branches' draws."""
        return self.setup.loader(branches.draw_spec, self.setup.sampler(drop_last=False))

    def measure(self, branches: Branches, loader: Loader) -> dict[str, Any]:
        """One pass over the images."""
        return measure_branches(branches, loader, self.teacher, self.accelerator, self.options, self.student)


def run(options: TeacherOptions, config: dict[str, Any]) -> None:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    opened = Measuring(options)
    record = opened.begin("teacher", config, labels=("augmentation",), plotted=_SHARE)
    record.title = f"dalikd measure against its teacher alone: {record.title}"
    for augmenter in opened.augmenters:
        sides, loader = compare(augmenter, opened)
        rates = alternate(sides, options.rounds, settle)
        loader.close()
        if options.compile != "off":
            torch.compiler.reset()  # as `measure` does: all augmentations together would pass torch's limit
        asked = images_asked(augmenter)
        row = {"augmentation": augmenter.name, "teacher images an original": asked}
        row |= {f"{name}, originals/s": summary(values) for name, values in rates.items()}
        row["measure, teacher images/s"] = summary([asked * rate for rate in rates[_MEASURE]])
        row |= {f"{_MEASURE} / {other}": ratio(rates[_MEASURE], rates[other]) for other in (_LOADED, _ALONE)}
        record.rows.append(row)
    shares = {row["augmentation"]: row[_SHARE]["median"] for row in record.rows}
    below = [f"{name} {share:.3f}" for name, share in shares.items() if share < _TARGET]
    record.notes = [
        f"A round is one pass over {len(opened.setup.source):,} originals. Wanted: at least {_TARGET} of the teacher "
        f"alone. {'Below it: ' + ', '.join(below) if below else 'All are'}."
    ]
    finish(record, options)


def run_passes(options: TeacherOptions, config: dict[str, Any]) -> None:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    opened, plotted = Measuring(options), f"{_EACH} / {_ONE}, seconds"
    record, augmenters = opened.begin("passes", config, labels=("augmentations",), plotted=plotted), opened.augmenters
    sides = {_ONE: [Branches(augmenters)], _EACH: [Branches([augmenter]) for augmenter in augmenters]}
    loaders = {name: [(branches, opened.loader(branches)) for branches in side] for name, side in sides.items()}

    def seconds(pairs: Sequence[tuple[Branches, Loader]]) -> float:
        return timed(lambda: [opened.measure(*pair) for pair in pairs], opened.accelerator.device)

    found = alternate({name: partial(seconds, of) for name, of in loaders.items()}, options.rounds, settle)
    for _, loader in loaders[_ONE] + loaders[_EACH]:
        loader.close()
    record.title = f"dalikd measure, {len(augmenters)} augmentations: one pass against a pass each; {record.title}"
    row = {"augmentations": str(len(augmenters)), **{f"{name}, seconds": summary(them) for name, them in found.items()}}
    images = {_ONE: 1 + len(sides[_ONE][0].parts), _EACH: sum(map(images_asked, augmenters))}
    row |= {plotted: ratio(found[_EACH], found[_ONE])}
    record.rows = [row | {f"{name}, teacher images an original": count for name, count in images.items()}]
    names = ", ".join(augmenter.name for augmenter in augmenters)
    record.notes = [f"A round goes once over {len(opened.setup.source):,} originals on either side: {names}."]
    finish(record, options)


def compare(augmenter: Augmenter, opened: Measuring) -> tuple[dict[str, Callable[[], float]], Loader]:
    """The three sides for one augmentation, and their loader. Each goes once over the images and returns originals a
    second."""
    branches, mode = Branches([augmenter]), opened.options.compile
    loader, asked, teacher = opened.loader(branches), images_asked(augmenter), opened.teacher.__call__
    if mode != "off":
        teacher = torch.compile(teacher, mode=mode, dynamic=False)

    @torch.no_grad()
    def seen(batch: Batch) -> Tensor:
        """As many images as the teacher sees of a batch, made as `measure` makes them: originals, then candidates."""
        candidates = branches.candidates(batch)
        more = () if candidates is None else (candidates.images[: (asked - 1) * len(batch)],)
        return torch.cat((batch.pixels, *more))

    def answer(batches: Iterable[Tensor]) -> None:
        for images in batches:
            if mode != "off":
                torch.compiler.cudagraph_mark_step_begin()
            teacher(images)

    kept = [seen(batch).clone() for batch in islice(loader, 4)]
    loader.seek(0)
    count, rest = divmod(len(loader.source), loader.sampler.batch_size)
    last = [kept[0][: rest * asked]] if rest else []  # as short as the loader's last one
    passes: dict[str, Callable[[], object]] = {
        _MEASURE: lambda: opened.measure(branches, loader),
        _LOADED: lambda: answer(map(seen, loader)),
        _ALONE: lambda: answer(chain(islice(cycle(kept), count), last)),
    }
    device, originals = opened.accelerator.device, len(loader.source)
    return {name: lambda work=work: originals / timed(work, device) for name, work in passes.items()}, loader


def images_asked(augmenter: Augmenter) -> int:
    """Images that the teacher sees for each original, itself included."""
    if not augmenter.makes_candidates:
        return 1
    criterion = augmenter.criterion
    return 1 + augmenter.runs if criterion is not None and criterion.needs_teacher else 2
