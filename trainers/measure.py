"""T. stddev of augmentations: the teacher looks at originals and augmented images, nothing is trained."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from dalikd.kd.goodness import TeacherStddev
from dalikd.kd.normalize import Normalized
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.data import evaluation_view, open_split, training_view
from dalikd.pipelines.loader import Batch, Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.trainers.assembly import make_loader, resident_pictures
from dalikd.trainers.augmentation import Augmenter, augmentation_names
from dalikd.trainers.distill import gather_rows
from dalikd.trainers.launch import model_type
from dalikd.trainers.looking import CompileMode, Looker
from dalikd.trainers.models import build_model, open_teacher
from dalikd.trainers.options import MeasureOptions
from dalikd.trainers.progress import progress
from dalikd.trainers.tracking import versions

__all__ = ["build_scorer", "measure", "measure_all", "results_table"]

_READ_EVERY = 20  # batches between two readings of the running value


def measure_all(options: MeasureOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Measure every augmentation asked for, one pass over the data each.

    Returns:
        "results", a list of what `measure` returns, and what they depend on.

    Raises:
        ValueError, OSError: the data, the teacher or the sizes are not as they should be; nothing has run then.
    """
    names = augmentation_names(options.augmentation)
    _check_sizes(options)
    source = open_split(options.data, "train", options.seed)
    view = training_view(options.data, source)
    seen_in_training = evaluation_view(options.data, source)
    teacher = open_teacher(options.teacher, source, seen_in_training, accelerator.device, options.precision)
    augmenters = [Augmenter(name, options, source, view, options.seed) for name in names]
    student = build_scorer(options, source, augmenters)
    sampler = Sampler(
        len(source), options.batch_size, options.seed, drop_last=False, world=accelerator.num_processes,
        rank=accelerator.process_index, group=options.mix_group,
    )  # fmt: skip
    resident = resident_pictures(source, view, options.data, accelerator)
    results = []
    for augmenter in augmenters:
        loader = make_loader(
            source, sampler, augmenter.draw_spec, options.data, accelerator, resident=resident, buffers=2
        )
        results.append(
            measure(
                augmenter,
                loader,
                teacher,
                accelerator,
                epochs=options.epochs,
                window=options.window,
                student=student,
                compile_mode=options.compile,
            )
        )
        loader.close()
        if options.compile != "off":
            torch.compiler.reset()  # each augmentation is compiled anew: together they would pass torch's limit
    return {
        "results": results,
        **_header(options, source, accelerator, teacher.folded, fresh=student is not None and not options.weights),
    }


@torch.no_grad()
def measure(
    augmenter: Augmenter,
    loader: Loader,
    teacher: Teacher,
    accelerator: Accelerator,
    *,
    epochs: int,
    window: int,
    student: Normalized | None = None,
    compile_mode: CompileMode = "off",
) -> dict[str, Any]:
    """Measure one augmentation over whole epochs; windows run on across them.

    Args:
        augmenter: the augmentation.
        loader: over every row once an epoch (drop_last=False), with the augmenter's draws.
        teacher: frozen.
        accelerator: whose processes share each batch; the result is that of one process.
        epochs: passes over the data.
        window: teacher outputs in a window (originals and augmented together).
        student: scores candidates, in eval mode; for augmentations that need it.
        compile_mode: of the look.

    Returns:
        "augmentation", "stddev", "stderr", "entropy", "windows", "images" (originals) and the rest of GoodnessResult.
    """
    num_classes = len(loader.source.classes)
    metric = TeacherStddev(num_classes, window, accelerator.device)
    look = Looker(teacher, augmenter, _scorer(student, accelerator), compile_mode)
    bar = progress(accelerator, augmenter.name, total=epochs * len(loader.source), unit="image", leave=False)
    with bar:
        for index, batch in enumerate(_batches(loader, epochs), start=1):
            if compile_mode != "off":
                torch.compiler.cudagraph_mark_step_begin()  # the last batch's look may be overwritten
            if len(batch):
                seen = look(batch)
                outputs = seen.logits, seen.augmented_logits
            else:  # this process has nothing left of the last batch, but takes part in the exchange
                nothing = torch.zeros(0, num_classes, dtype=_logits_type(teacher), device=accelerator.device)
                outputs = nothing, nothing
            metric.update(*gather_rows(accelerator, *_padded(outputs, loader, accelerator), batch.total))
            bar.update(batch.total)
            if index % _READ_EVERY == 0 and not bar.disable:
                bar.set_postfix_str(_running(metric), refresh=False)
    result = metric.compute()
    fields = asdict(result)
    return {"augmentation": augmenter.name, **fields, "images": result.images // 2}


def results_table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, best (lowest) first."""
    rows = sorted(results, key=lambda result: (result["stddev"] is None, result["stddev"]))
    lines = ["| augmentation | T. stddev | std. error | entropy | windows |", "|:--|--:|--:|--:|--:|"]
    for row in rows:
        numbers = (
            _number(row["stddev"], 6),
            _number(row["stderr"], 6),
            _number(row["entropy"], 4),
            str(row["windows"]),
        )
        lines.append(f"| {row['augmentation']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _check_sizes(options: MeasureOptions) -> None:
    if options.epochs < 1:
        raise ValueError(f"--epochs {options.epochs}: give at least 1")
    if options.window < 2 or options.window % 2:
        raise ValueError(f"--window {options.window}: give a positive even number (published: 640)")


def build_scorer(options: MeasureOptions, source: Source, augmenters: list[Augmenter]) -> Normalized | None:
    """The net that scores candidates, in eval mode; fresh from the seed unless weights are given, as published.

    Returns:
        None where no augmentation needs one.

    Raises:
        ValueError: one is needed and not named, or its weights do not fit.
    """
    needing = [augmenter.name for augmenter in augmenters if augmenter.criterion and augmenter.criterion.needs_student]
    if not needing:
        return None
    if options.model is None:
        raise ValueError(
            f"{needing[0]} is scored by a student: name its architecture with --model, and its --weights if it has any"
        )
    torch.manual_seed(options.seed)
    student = build_model(options.model, source, weights=options.weights, args=options.model_args)
    return student.to(model_type(options.precision)).requires_grad_(False)


def _header(
    options: MeasureOptions, source: Source, accelerator: Accelerator, folded: int, fresh: bool
) -> dict[str, Any]:
    return {
        "mode": options.mode,
        "mix_group": options.mix_group,
        "window": options.window,
        "epochs": options.epochs,
        "seed": options.seed,
        "precision": options.precision,
        "compile": options.compile,
        "teacher": {**asdict(options.teacher), "folded_norms": folded},
        "student": options.model,
        "student_weights": "fresh, from the seed" if fresh else options.weights,
        "data": {**asdict(options.data), "images": len(source)},
        "fingerprint": source.fingerprint,
        "processes": accelerator.num_processes,
        "versions": versions(accelerator.device),
    }


def _logits_type(teacher: Teacher) -> torch.dtype:
    return torch.promote_types(next(teacher.model.parameters()).dtype, torch.float32)


def _batches(loader: Loader, epochs: int) -> Iterator[Batch]:
    for _ in range(epochs):
        yield from loader


def _padded(outputs: tuple[Tensor, Tensor], loader: Loader, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Add rows of zeros up to the microbatch's size: all processes exchange the same shape. They are cut off after."""
    missing = loader.sampler.microbatch - len(outputs[0])
    if accelerator.num_processes == 1 or not missing:
        return outputs
    first, second = (functional.pad(rows, (0, 0, 0, missing)) for rows in outputs)
    return first, second


def _scorer(student: Normalized | None, accelerator: Accelerator) -> Callable[[Tensor], Tensor] | None:
    if student is None:
        return None
    frozen = student.to(accelerator.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def score(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return frozen(images)

    return score


def _running(metric: TeacherStddev) -> str:
    result = metric.compute()
    return f"T. stddev {_number(result.stddev, 5)} ± {_number(result.stderr, 5)}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
