"""What a run's first step sees: images under each augmentation, what the teacher gives for them, and the picks."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.mixing import HiddenMix, Mixed
from dalikd.kd.picking import Criterion, entropy
from dalikd.kd.teacher import Branch, Teacher, Teachers, teacher_pass
from dalikd.pipelines.data import FilePath
from dalikd.pipelines.draw_spec import Batch
from dalikd.trainers.augmentation import Augmenter, augmentation_names
from dalikd.trainers.launch import model_type
from dalikd.trainers.loop import step_seed
from dalikd.trainers.models import build_model
from dalikd.trainers.options import FROM_1, AugmentingOptions, check_numbers
from dalikd.trainers.setup import Setup, SeveralTeachers, open_run
from dalikd.trainers.teacher_step import Branches, StudentScores

__all__ = ["Preview", "PreviewOptions", "Row", "Tile", "look"]


_AT_ONCE = 1024  # images that a net sees in a call
_ENDINGS, _FILE = ("", ".png", ".html"), FilePath("preview.png")


@dataclass
class PreviewOptions(SeveralTeachers, AugmentingOptions):
    """Draw the first images of a run under each augmentation, a row each, as a PNG or HTML file. With a teacher each
    image has the class that the teacher gives it and the entropy of its answer, and the picks are framed.

    Images, draws and picks are those of a run's first step, of the same --seed and --data; --batch_size and --compile
    change nothing of them.

    Args:
        augmentation: one or several names, as for measure: "published" for the paper's nine, "all", BASE+CRITERION.
        model: architecture of the student, where one picks (student_entropy, kld).
        model_args: options of that architecture.
        weights: its weights; without them it is a fresh one made from the seed, as at the start of a run.
        images: how many are drawn, the columns.
        output: file to write, .png or .html by its ending; without an ending both.
        json: JSON file for what is drawn but for the images, - for stdout: {"lines", "rows": [{"title", "note",
            "tiles": [{"label", "partner", "answer", "entropy", "right", "picked"}, …]}, …], "files"}.
    """

    augmentation: list[str] = field(default_factory=lambda: ["published"])
    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: FilePath | None = None
    images: int = 8
    output: FilePath = _FILE
    json: FilePath | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for numbers and files that cannot be drawn."""
        super().__post_init__()
        self.check_teachers()
        check_numbers(self, {"images": FROM_1})
        if Path(self.output).suffix not in _ENDINGS:
            raise ValueError(
                f"--output {self.output}: give a file that ends in .png or .html, or without an ending both"
            )


class Tile(NamedTuple):
    """One image, and what is known of it."""

    image: np.ndarray  # uint8 [S, S, 3]
    label: str  # its class; empty: there are no labels
    partner: str = ""  # what is mixed in, with its share; empty: nothing
    answer: str = ""  # the teacher's class for it; empty: there is no teacher
    entropy: float = math.nan  # of the teacher's answer, in nats
    right: bool | None = None  # whether the answer is a class that it shows; None: not known
    picked: bool = False


class Row(NamedTuple):
    """The images under one run of an augmentation, in the order of the columns."""

    title: str
    note: str  # empty: nothing more to tell
    tiles: list[Tile]


class Preview(NamedTuple):
    """All that is drawn: `rows`, first that of the base view; `lines` say what they are of, and what was found."""

    rows: list[Row]
    lines: list[str]


@torch.no_grad()
def look(options: PreviewOptions, accelerator: Accelerator) -> Preview:
    """Make the images of a run's first step, and ask the teacher about them.

    Raises:
        ValueError, OSError: the data, the augmentations or the nets are not as they should be.
    """
    if accelerator.num_processes > 1:
        raise ValueError("preview draws the images of one process: start it without a launcher")
    group = options.mix.group  # partners and picks are of whole groups
    options = replace(options, batch_size=group * -(-options.images // group))
    names = augmentation_names(options.augmentation)
    setup = open_run(options, accelerator, "train")
    augmenters = [setup.augmenter(name) for name in names if name != "identity"]
    branches = Branches(augmenters or [setup.augmenter("identity")])
    loader = setup.loader(branches.draw_spec, setup.sampler(drop_last=False))
    if options.teachers:
        teacher = setup.teachers(options, warn=True)
    else:
        teacher = None if options.teacher.name is None else setup.teacher(options.teacher, warn=True)
    student, asked = _student(options, setup, augmenters), _named(options, teacher)
    for augmenter in augmenters:
        augmenter.check_nets("off", *((f"the teacher {name}", net) for name, net in asked), ("the student", student))
    batch = loader.next()
    loader.close()
    runs = branches.make(batch.pixels, batch.augmented_pixels, batch.mix)
    found, picks = _ask(teacher, student, batch, runs, branches, setup)

    logits, *of_runs = (None if teacher is None else of for of in found)
    base = Mixed(batch.pixels, torch.arange(len(batch)), torch.ones(len(batch)))
    rows = [Row("base view", "identity: what every augmentation is made of", _tiles(base, logits, (), batch, setup))]
    for augmenter, branch in zip(augmenters, branches.branches, strict=False):
        for place, run in enumerate(branch.runs):
            title, note = augmenter.name, "mixed inside the nets, shown as they enter" if augmenter.mixes_hidden else ""
            if branch.criterion is not None:
                title += f", run {place + 1} of {len(branch.runs)}"
                picked = augmenter.name in picks
                note = "framed: picked" if picked else _missing(branch.criterion, student, teacher)
            own = [pick - place * len(batch) for pick in picks.get(augmenter.name, ())]
            rows.append(Row(title, note, _tiles(runs[run], of_runs[run], own, batch, setup)))
    rows = [row._replace(tiles=row.tiles[: options.images]) for row in rows]
    return Preview(rows, _lines(options, setup, asked, logits, batch.labels))


def _named(options: PreviewOptions, teacher: Teacher | Teachers | None) -> list[tuple[str, Normalized]]:
    """The teachers' nets, each with its name."""
    opened = () if teacher is None else teacher.teachers if isinstance(teacher, Teachers) else (teacher,)
    configs = options.teachers or [options.teacher]
    return [
        (str(config.name), one.model)
        for config, one in zip(configs, opened, strict=False)
        if isinstance(one.model, Normalized)
    ]


def _ask(
    teacher: Teacher | Teachers | None,
    student: Normalized | None,
    batch: Batch,
    runs: Sequence[Mixed],
    branches: Branches,
    setup: Setup,
) -> tuple[list[Tensor], dict[str, list[int]]]:
    """What the teacher gives for originals and runs, and the picks of those augmentations whose nets are there."""

    def nobody(pixels: Tensor, hidden: HiddenMix | None = None) -> Tensor:  # noqa: ARG001
        """In place of a teacher that is not asked: nothing is read off it."""
        return pixels.new_zeros((len(pixels), 1), dtype=torch.float32)

    named = zip((augmenter.name for augmenter in branches.augmenters), branches.branches, strict=True)
    picking = [
        (name, branch)
        for name, branch in named
        if branch.criterion and not _missing(branch.criterion, student, teacher)
    ]
    by_teacher = {name: branch for name, branch in picking if branch.criterion and not branch.criterion.needs_student}
    group = branches.augmenters[0].group
    ask = partial(teacher_pass, group=group, images_per_call=_AT_ONCE)
    each = [Branch((number,)) for number in range(len(runs))]
    found = ask(teacher or nobody, batch.pixels, runs, [*each, *by_teacher.values()])
    picks = {name: of.picks for name, of in zip(by_teacher, found.branches[len(runs) :], strict=True)}
    for name, branch in picking:
        if name in by_teacher or student is None or branch.criterion is None:
            continue
        # by itself, as in a run: batch statistics are of one augmentation's pool
        torch.manual_seed(step_seed(setup.options.seed, 0, 0))
        scores = StudentScores(student, setup.accelerator, group, len(branch.runs))
        answer = teacher if teacher is not None and branch.criterion.needs_teacher else nobody
        picks[name] = ask(answer, batch.pixels, runs, [branch], student=scores).branches[0].picks
    logits = [found.originals.logits, *(of.logits for of in found.branches[: len(runs)])]
    return logits, {name: rows.tolist() for name, rows in picks.items() if rows is not None}


def _tiles(mixed: Mixed, logits: Tensor | None, picked: Collection[int], batch: Batch, setup: Setup) -> list[Tile]:
    """The images of a run, and what is known of each; logits are the teacher's [B, C]."""
    names, labelled, labels = setup.source.classes, setup.source.labelled, batch.labels.tolist()
    images = mixed.images.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    answers = zip(logits.argmax(1).tolist(), entropy(logits).tolist(), strict=True) if logits is not None else ()
    tiles = []
    for row, (image, answer) in enumerate(zip_longest(images, answers)):
        partner, share, shown = int(mixed.partner[row]), 1 - float(mixed.lam[row]), {labels[row]}
        tile = Tile(image, names[labels[row]] if labelled else "", picked=row in picked)
        if partner != row and share > 0:
            shown = {labels[partner]} | ({labels[row]} if share < 1 else set())
            what = names[labels[partner]] if labelled else f"image {partner + 1}"
            tile = tile._replace(partner=f"{100 * share:.0f} % {what}")
        if answer is not None:
            right = answer[0] in shown if labelled else None
            tile = tile._replace(answer=names[answer[0]], entropy=answer[1], right=right)
        tiles.append(tile)
    return tiles


def _student(options: PreviewOptions, setup: Setup, augmenters: Sequence[Augmenter]) -> Normalized | None:
    """The student as a run begins with it, where one picks; None: nobody names one."""
    picking = any(one.criterion is not None and one.criterion.needs_student for one in augmenters)
    if options.model is None or not picking:
        return None
    torch.manual_seed(options.seed)
    net = build_model(options.model, setup.source, weights=options.weights, args=options.model_args, trained=True)
    setup.check_net(net.eval(), f"--model {options.model}", None, setup.view)
    return net.to(setup.accelerator.device, model_type(options.precision), memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def _missing(criterion: Criterion, student: Normalized | None, teacher: Teacher | Teachers | None) -> str:
    """Why nothing can be picked; empty: it can."""
    wanted = ["--teacher.name"] if criterion.needs_teacher and teacher is None else []
    wanted += ["--model"] if criterion.needs_student and student is None else []
    return f"no picks without {' and '.join(wanted)}" if wanted else ""


def _lines(
    options: PreviewOptions,
    setup: Setup,
    asked: Sequence[tuple[str, Normalized]],
    logits: Tensor | None,
    labels: Tensor,
) -> list[str]:
    """What the images are of, and how the teacher does on all of the base view's, those that are not drawn too."""
    source, view = setup.source, setup.view
    where = f"in {source.files.root}" if source.files is not None else source.split
    counted = f"{len(source):,} images, {len(source.classes)} classes" if source.classes else f"{len(source):,} images"
    lines = [
        f"{source.name} {where}: {counted}; {view.crop} to {view.size} pixels, seed {options.seed}; "
        f"the data's {_statistics(source.mean, source.std)}"
    ]
    if logits is None:
        return lines
    said = "; ".join(f"teacher {name}, which normalises by {_statistics(*net.normalisation)}" for name, net in asked)
    said += "; together" if len(asked) > 1 else ""
    most = math.log(max(1, len(source.classes)))
    found = [f"mean entropy {float(entropy(logits).mean()):.2f} of at most {most:.2f} nats"]
    if source.labelled:
        right = int((logits.argmax(1) == labels).sum())
        found.insert(0, f"right on {right} of {len(labels)} images of the base view")
    return [*lines, f"{said}: {'; '.join(found)}"]


def _statistics(mean: Sequence[float], std: Sequence[float]) -> str:
    mean_words, std_words = (", ".join(f"{value:.3f}" for value in values) for values in (mean, std))
    return f"mean {mean_words}, std {std_words}"
