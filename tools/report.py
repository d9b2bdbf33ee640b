"""What commands print at their end."""

from itertools import count, takewhile
from pathlib import Path
from typing import Any

from accelerate import Accelerator

__all__ = ["evaluation_line", "next_steps", "print_training", "ranking_table", "students_table"]

_TOPS = ("top1", "top5")


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


def print_training(results: dict[str, Any], accelerator: Accelerator) -> None:
    """Last and best epoch of a training run, the weights that these figures are of, and where all lies."""
    if not accelerator.is_main_process:
        return
    if results["last"]["val"] is None:
        told = [f"{name} {value:.4f}" for name, value in results["last"]["train"].items() if value is not None]
        print(f"last epoch ({results['last']['epoch']}): not evaluated, no labelled images; training {', '.join(told)}")
    for name in ("last", "best") if results["best"] else ():
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


def students_table(students: dict[str, dict[str, Any]]) -> str:
    """Several students' last evaluation, as a Markdown table."""
    lines = ["| student | model | loss | top1 | top5 |", "|:--|:--|--:|--:|--:|"]
    for name, results in students.items():
        val = results["last"]["val"]
        figures = ["-"] * 3 if val is None else [f"{val['loss']:.4f}", *(f"{100 * val[top]:.2f} %" for top in _TOPS)]
        lines.append(f"| {name} | {results['model']} | {' | '.join(figures)} |")
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
