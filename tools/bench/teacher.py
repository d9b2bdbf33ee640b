"""What `dalikd measure` costs. `dalikd bench teacher` compares it, for each augmentation, with its teacher alone.

Three sides go over the same number of images, with the same teacher calls on batches of the same sizes:

    measure          the command's own loop: loader, mixing, teacher, entropy and choice, T. stddev
    loaded teacher   loader, mixing and teacher; no entropy, no choice, no metric
    teacher alone    the teacher on kept batches of originals and candidates; no loader at all

Where a student scores the candidates, the teacher sees the originals and as many candidates as are picked; the
student's forwards are then a cost of measure alone.

`dalikd bench passes` compares one pass for all augmentations with a pass for each. Both sides end in the same figures.
In one pass an image is read and decoded once, and the teacher sees the originals, and whatever several augmentations
have in common, once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from dalikd.pipelines.draw_spec import Batch
from dalikd.pipelines.loader import Loader
from dalikd.tools.bench.common import Measuring, TeacherOptions, open_measuring
from dalikd.tools.bench.images import describe
from dalikd.tools.bench.machine import settle
from dalikd.tools.bench.record import Record, alternate, begin, finish, ratio, summary, timed
from dalikd.trainers.augmentation import Augmenter
from dalikd.trainers.launch import start
from dalikd.trainers.teacher_step import Branches

__all__ = ["Comparison", "images_asked", "open_record", "run", "run_passes"]

_MEASURE, _LOADED, _ALONE = "measure", "loaded teacher", "teacher alone"
_SHARE = f"{_MEASURE} / {_ALONE}"
_ONE, _EACH = "one pass", "a pass each"
_TARGET = 0.95  # of the teacher alone
_KEPT = 4  # batches that the teacher alone is asked about in turn


def open_record(benchmark: str, options: TeacherOptions, config: dict[str, Any]) -> tuple[Record, Measuring]:
    """What both benchmarks share.

    Raises:
        ValueError, OSError: the data, the teacher or the sizes are not as they should be; nothing has run then.
    """
    accelerator = start(options.device, options.precision)
    record = begin(benchmark, options, accelerator, config)
    opened = open_measuring(options, accelerator)
    size, name = opened.setup.view.size, str(options.teacher.name).replace(":", "-").replace("_", "-")
    settings = {options.compile: options.compile != "off", "resident": options.data.resident}
    given = [one for one, is_given in settings.items() if is_given]
    record.variant = "-".join((name, str(size), options.precision, *given))
    record.title = f"{options.teacher.name}, {size} pixels, batch {options.batch_size}, "
    record.title += ", ".join([options.precision, *given])
    record.pictures = describe(opened.setup.source)
    record.warm_up = "one pass over the images for each side."
    record.page_cache = "warm; the first pass reads." if opened.setup.source.files is not None else "no files."
    return record, opened


def run(options: TeacherOptions, config: dict[str, Any]) -> Record:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    record, opened = open_record("teacher", options, config)
    for augmenter in opened.augmenters:
        comparison = Comparison(augmenter, opened)
        rates = alternate(comparison.sides(), options.rounds, settle)
        comparison.loader.close()
        if options.compile != "off":
            torch.compiler.reset()  # as `measure` does: all augmentations together would pass torch's limit
        asked = images_asked(augmenter)
        record.rows.append(
            {
                "augmentation": augmenter.name,
                "teacher images an original": asked,
                **{f"{name}, originals/s": summary(values) for name, values in rates.items()},
                "measure, teacher images/s": summary([asked * rate for rate in rates[_MEASURE]]),
                f"{_MEASURE} / {_LOADED}": ratio(rates[_MEASURE], rates[_LOADED]),
                _SHARE: ratio(rates[_MEASURE], rates[_ALONE]),
            }
        )
    record.title = f"dalikd measure against its teacher alone: {record.title}"
    record.labels, record.plotted = ("augmentation",), _SHARE
    shares = {row["augmentation"]: row[_SHARE]["median"] for row in record.rows}
    below = [f"{name} {share:.3f}" for name, share in shares.items() if share < _TARGET]
    record.notes = [
        f"A round is one pass over {len(opened.setup.source):,} originals. Wanted: at least {_TARGET} of the teacher "
        f"alone. {'Below it: ' + ', '.join(below) if below else 'All are'}."
    ]
    return finish(record, options)


def run_passes(options: TeacherOptions, config: dict[str, Any]) -> Record:
    """Measure, print and write. Raises ValueError, OSError: options, data or nets that are not as they should be."""
    record, opened = open_record("passes", options, config)
    augmenters = opened.augmenters
    sides = {_ONE: [Branches(augmenters)], _EACH: [Branches([augmenter]) for augmenter in augmenters]}
    loaders = {name: [(branches, opened.loader(branches)) for branches in side] for name, side in sides.items()}

    def seconds(pairs: Sequence[tuple[Branches, Loader]]) -> float:
        return timed(lambda: [opened.measure(*pair) for pair in pairs], opened.setup.accelerator.device)

    found = alternate({name: lambda of=of: seconds(of) for name, of in loaders.items()}, options.rounds, settle)
    for _, loader in loaders[_ONE] + loaders[_EACH]:
        loader.close()
    record.title = f"dalikd measure, {len(augmenters)} augmentations: one pass against a pass each; {record.title}"
    record.labels, record.plotted = ("augmentations",), f"{_EACH} / {_ONE}, seconds"
    record.rows = [
        {
            "augmentations": str(len(augmenters)),
            **{f"{name}, seconds": summary(values) for name, values in found.items()},
            record.plotted: ratio(found[_EACH], found[_ONE]),
            f"{_ONE}, teacher images an original": 1 + len(sides[_ONE][0].parts),
            f"{_EACH}, teacher images an original": sum(map(images_asked, augmenters)),
        }
    ]
    names = ", ".join(augmenter.name for augmenter in augmenters)
    record.notes = [f"A round goes once over {len(opened.setup.source):,} originals on either side: {names}."]
    return finish(record, options)


class Comparison:
    """The three sides for one augmentation. Each goes once over the images and returns originals a second."""

    def __init__(self, augmenter: Augmenter, opened: Measuring) -> None:
        self._augmenter, self._opened = augmenter, opened
        self._branches = Branches([augmenter])
        self.loader = opened.loader(self._branches)
        self._ask: Callable[[Tensor], Tensor] = opened.teacher
        self._compiled = opened.options.compile != "off"
        if self._compiled:
            self._ask = torch.compile(opened.teacher.__call__, mode=opened.options.compile, dynamic=False)
        self._kept = [self._seen(batch).clone() for batch in islice(self.loader, _KEPT)]
        self.loader.seek(0)

    def sides(self) -> dict[str, Callable[[], float]]:
        """The sides by name."""
        images, device = len(self.loader.source), self._opened.setup.accelerator.device
        passes: dict[str, Callable[[], object]] = {
            _MEASURE: lambda: self._opened.measure(self._branches, self.loader),
            _LOADED: lambda: self._answer(self._seen(batch) for batch in self.loader),
            _ALONE: lambda: self._answer(self._kept_images()),
        }
        return {name: lambda work=work: images / timed(work, device) for name, work in passes.items()}

    def _answer(self, batches: Iterable[Tensor]) -> None:
        for images in batches:
            if self._compiled:
                torch.compiler.cudagraph_mark_step_begin()
            self._ask(images)

    def _kept_images(self) -> Iterator[Tensor]:
        """As many as the loader gives, the last batch shorter where its is."""
        batches, rest = divmod(len(self.loader.source), self.loader.sampler.batch_size)
        yield from islice(cycle(self._kept), batches)
        if rest:
            yield self._kept[0][: rest * images_asked(self._augmenter)]

    @torch.no_grad()
    def _seen(self, batch: Batch) -> Tensor:
        """As many images as the teacher sees of a batch, made as `measure` makes them: originals, then candidates."""
        candidates = self._branches.candidates(batch)
        if candidates is None:
            return batch.pixels
        asked = (images_asked(self._augmenter) - 1) * len(batch)
        return torch.cat((batch.pixels, candidates.images[:asked]))


def images_asked(augmenter: Augmenter) -> int:
    """Images that the teacher sees for each original, itself included."""
    if not augmenter.makes_candidates:
        return 1
    criterion = augmenter.criterion
    return 1 + augmenter.runs if criterion is not None and criterion.needs_teacher else 2
