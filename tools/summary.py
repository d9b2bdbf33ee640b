"""What commands print at their end, and what --json asks for."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import count, takewhile
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator

from dalikd.trainers.tracking import check_writable, write_json

__all__ = [
    "evaluation_line",
    "give_json",
    "json_asked",
    "next_steps",
    "print_training",
    "ranking_table",
    "some",
    "split_lines",
    "students_table",
]

_stdout: list[TextIO] = []  # the JSON's alone, where --json - asks for it


@contextmanager
def json_asked(file: str | Path | None) -> Iterator[None]:
    """Inside of this context `give_json` may be called. With "-" all that is printed meanwhile goes to stderr.

    Args:
        file: what --json names.

    Raises:
        ValueError: it cannot be written.
    """
    if str(file) != "-":
        if file is not None:
            check_writable("--json", Path(file))
        yield
        return
    _stdout.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout.pop()


def give_json(file: str | Path | None, content: dict[str, Any]) -> None:
    """Write JSON to the file that --json names, to stdout for "-"; nothing where it is not asked for."""
    if file is None:
        return
    if str(file) == "-":
        print(json.dumps(content, indent=2, allow_nan=False), file=_stdout[-1] if _stdout else sys.stdout, flush=True)
        return
    write_json(Path(file), content)
    print(f"written: {file}")


def evaluation_line(val: dict[str, Any]) -> str:
    """What `evaluate` has found, in words."""
    replaced = val.get("replaced")  # runs of earlier versions do not say
    note = f"; {replaced} of them stand in for others that cannot be decoded" if replaced else ""
    heads = [
        f"\n  head {number}: class and turn {100 * val[f'head{number}_joint']:.2f} %, class "
        f"{100 * val[f'head{number}_class']:.2f} %"
        for number in takewhile(lambda number: f"head{number}_joint" in val, count(1))
    ]
    return (
        f"top1 {100 * val['top1']:.2f} %, top5 {100 * val['top5']:.2f} %, loss {val['loss']:.4f} "
        f"on {val['images']} images{note}{''.join(heads)}"
    )


def print_training(results: dict[str, Any], accelerator: Accelerator, json: str | None = None) -> None:
    """Last and best epoch of a training run, the weights that these figures are of, and where all lies; the whole of it
    for --json."""
    if not accelerator.is_main_process:
        return
    for name in ("last", "best"):
        val = results[name]["val"]
        for net, figures in val.get("nets", {"": val}).items():
            print(f"{name} epoch ({results[name]['epoch']}){net and f', {net}'}: {evaluation_line(figures)}")
    last = results["last"]
    if last.get("t_stddev") is not None:
        print(f"T. stddev while training: {last['t_stddev']:.6f}")
        for teacher in last.get("teachers", ()):
            print(f"  {teacher['name']} alone: {teacher['t_stddev']:.6f}")
    elif "windows" in last:
        print(f"T. stddev while training: too few windows ({last['windows']} of at least 2; 640 teacher outputs each)")
    print(f"weights: {results['folder']}/last/{results['evaluated']}")
    print(f"run folder: {results['folder']}")
    give_json(json, results)


def students_table(students: dict[str, dict[str, Any]]) -> str:
    """Several students' last evaluation, as a Markdown table."""
    lines = ["| student | model | loss | top1 | top5 |", "|:--|:--|--:|--:|--:|"]
    for name, results in students.items():
        val = results["last"]["val"]
        lines.append(
            f"| {name} | {results['model']} | {val['loss']:.4f} | {100 * val['top1']:.2f} % | "
            f"{100 * val['top5']:.2f} % |"
        )
    return "\n".join(lines)


def ranking_table(points: list[dict[str, Any]]) -> str:
    """Augmentations by the test loss of their students, as a Markdown table."""
    lines = ["| augmentation | T. stddev | student test loss | student top1 |", "|:--|--:|--:|--:|"]
    for point in sorted(points, key=lambda point: point["s_test_loss"]):
        lines.append(
            f"| {point['da']} | {point['t_stddev']:.6f} | {point['s_test_loss']:.4f} | {100 * point['top1']:.2f} % |"
        )
    return "\n".join(lines)


def next_steps(folder: Path) -> str:
    """What a newcomer does after the demo."""
    teacher = "runs/train-imagefolder-resnet20/last/student.safetensors"
    data = "--data.name imagefolder --data.root DATA --data.image_size 32"
    return (
        f"\neverything is in {folder}: each run's config.yaml, log.jsonl and results.json, and TensorBoard curves\n"
        "A few short runs on one small data set rank loosely; T. stddev is a statistic, and so is a student's loss.\n\n"
        "next, on your own images (DATA/train/<class>/*.jpg, DATA/val/<class>/*.jpg):\n"
        f"  dalikd train   {data} --model resnet20 --epochs 60\n"
        f"  dalikd measure {data} --teacher.name resnet20 --teacher.weights {teacher} --model resnet8\n"
        f"  dalikd distill {data} --teacher.name resnet20 --teacher.weights {teacher} --model resnet8 "
        "--augmentation cutmixpick_teacher --epochs 60\n"
        f"  tensorboard --logdir {folder}"
    )


def split_lines(role: str, split: dict[str, Any]) -> list[str]:
    """What doctor has found of a split."""
    classes, sizes, images = split["classes"], split["sizes"], split["images"]
    few, many = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
    weight = "" if split["bytes"] is None else f", {split['bytes'] / 1e6:,.1f} MB"
    lines = [
        f"{role} ({split['split']}): {some(images)} of {some(len(classes), 'class', 'classes')}{weight}",
        f"  smallest class {few} ({classes[few]:,}), largest {many} ({classes[many]:,})",
    ]
    if "smallest" in sizes:
        smallest, median, largest = (
            "{1:,g} x {0:,g}".format(*sizes[which]) for which in ("smallest", "median", "largest")
        )
        below = f"{sizes['below']:,} below the training size of {sizes['training_size']}"
        lines.append(f"  width x height: smallest {smallest}, median {median}, largest {largest}; {below}")
    lines.append(f"  {_counted(split['formats'])}; {_counted(split['modes'])}")
    turned = {key: count for key, count in split["orientations"].items() if key not in ("0", "1")}
    if turned:
        lines.append(
            f"  {some(sum(turned.values()))} with an EXIF orientation, which training leaves alone: {_counted(turned)}"
        )
    lines += [f"  {note}" for note in split["notes"] if "left out" not in note]
    wrong = split["wrong_endings"]
    if wrong:
        lines.append(f"  {some(len(wrong))} with another ending than the content, which counts: {_few(wrong)}")
    for kind, text in (("left_out", "left out for their ending"), ("no_data", "passed over, and no class")):
        found = {ending: len(paths) for ending, paths in split[kind].items()}
        if found:
            first = next(iter(split[kind].values()))[0]
            lines.append(f"  {text}: {_counted(found)}, such as {first}")
    if split["bytes"] is None and "in memory" in split["formats"]:
        return lines
    looked = images - split["known"]
    speed = f" in {split['seconds']:.1f} s: {looked / split['seconds']:,.0f} images/s" if looked else ""
    busy = sum(split["seconds_of_processes"].values())
    shares = ", ".join(f"{what} {spent / busy:.0%}" for what, spent in split["seconds_of_processes"].items() if busy)
    lines.append(f"  {split['known']:,} were known, {looked:,} looked at{speed}{f' ({shares})' if shares else ''}")
    return lines


def some(count: int, one: str = "image", many: str = "") -> str:
    """A count with its noun; `many` is its plural, where an s does not make it."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _few(items: Sequence[dict[str, str]]) -> str:
    more = f" and {len(items) - 3:,} more" if len(items) > 3 else ""
    return ", ".join(f"{item['path']} ({item['format']})" for item in items[:3]) + more
