"""`dalikd measure`: all augmentations in one pass over the data against a pass for each of them.

Both sides end in the same figures. In one pass a picture is read and decoded once, and the teacher sees the originals,
and whatever several augmentations have in common, once.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dalikd.kd.teacher import Teacher
from dalikd.pipelines.data import evaluation_view, training_view
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.tools.bench.dispatch import Planned
from dalikd.tools.bench.images import describe
from dalikd.tools.bench.machine import device_slug, environment, settle, synchronize
from dalikd.tools.bench.options import ON_GPU, check_alone, check_rounds
from dalikd.tools.bench.record import Record, alternate, check_output, markdown, ratio, summary, write
from dalikd.tools.bench.teacher import images_asked, open_images
from dalikd.tools.bench.teacher_options import TeacherOptions, teacher_net
from dalikd.tools.cli import run_command
from dalikd.trainers.augmentation import Augmenter, Branches, augmentation_names
from dalikd.trainers.launch import autocast_type, check_compiler, start
from dalikd.trainers.measure import build_scorer, measure_branches
from dalikd.trainers.setup import make_loader, resident_pictures

__all__ = ["main", "plan", "run"]

_ONE, _EACH = "one pass", "a pass each"
_RATIO = f"{_EACH} / {_ONE}, seconds"


def run(options: TeacherOptions, config: dict[str, Any]) -> Record:
    """Time both sides, print and write the table, and return the record.

    Raises:
        ValueError, OSError: the data, the teacher or the sizes are not as they should be; nothing has run then.
    """
    check_rounds(options.rounds)
    check_output(options.folder)
    check_compiler(options.compile)
    accelerator = start(options.device, options.precision)
    check_alone("passes", accelerator.num_processes)
    names = augmentation_names(options.augmentation)
    source = open_images(options)
    view = training_view(options.data, source)
    augmenters = [Augmenter(name, options, source, view, options.seed) for name in names]
    student = build_scorer(options, source, augmenters)
    net = teacher_net(options, source, evaluation_view(options.data, source))
    teacher = Teacher(net, accelerator.device, autocast_type(options.precision), fold_bn=options.teacher.fold_bn)
    resident = resident_pictures(source, view, options.data, accelerator)
    sampler = Sampler(len(source), options.batch_size, options.seed, drop_last=False, group=options.mix.group)

    def opened(branches: Branches) -> Loader:
        return make_loader(source, sampler, branches.draw_spec, options.data, accelerator, resident=resident, buffers=2)

    sides = {_ONE: [Branches(augmenters)], _EACH: [Branches([augmenter]) for augmenter in augmenters]}
    loaders = {name: [opened(branches) for branches in side] for name, side in sides.items()}

    def timer(name: str) -> Callable[[], float]:
        def timed() -> float:
            synchronize(accelerator.device)
            started = time.perf_counter()
            for branches, loader in zip(sides[name], loaders[name], strict=True):
                measure_branches(branches, loader, teacher, accelerator, options, student)
            synchronize(accelerator.device)
            return time.perf_counter() - started

        return timed

    before = environment(accelerator.device)
    seconds = alternate({name: timer(name) for name in sides}, options.rounds, settle)
    for loader in (loader for side in loaders.values() for loader in side):
        loader.close()
    record = Record(
        benchmark="passes",
        title=f"dalikd measure, {len(names)} augmentations: one pass against a pass each; {options.teacher.name}, "
        f"{view.size} pixels, batch {options.batch_size}, {options.precision}"
        + (", resident" if options.data.resident else ""),
        environment=before,
        device=device_slug(accelerator.device),
        config=config,
        warm_up="one pass over the images for each side.",
        page_cache="warm; the first pass reads." if source.files is not None else "no files.",
        rows=[_row(augmenters, seconds)],
        labels=("augmentations",),
        plotted=_RATIO,
        variant="-".join((str(options.teacher.name).replace(":", "-"), str(view.size), options.precision)),
        pictures=describe(source),
        notes=[f"A round goes once over {len(source):,} originals on either side: {', '.join(names)}."],
    )
    print(markdown(record))
    print("written:", *write(record, options.folder))
    return record


def _row(augmenters: Sequence[Augmenter], seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "augmentations": str(len(augmenters)),
        **{f"{name}, seconds": summary(values) for name, values in seconds.items()},
        _RATIO: ratio(seconds[_EACH], seconds[_ONE]),
        f"{_ONE}, teacher images an original": 1 + len(Branches(augmenters).parts),
        f"{_EACH}, teacher images an original": sum(images_asked(augmenter) for augmenter in augmenters),
    }


def plan(root: Path) -> list[Planned]:
    """What `dalikd bench all` runs."""
    data = ("--data.root", str(root), "--data.train_split", ".")
    small = ("--teacher.name", "resnet20", "--model", "resnet8", "--data.image_size", "64", "--images", "1000")
    large = ("--teacher.name", "timm:resnet34", "--model", "timm:resnet18", *ON_GPU, "--images", "7680")
    return [Planned((*data, *small)), Planned((*data, *large), gpus=1)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("bench passes", run, argv)


if __name__ == "__main__":
    main()
