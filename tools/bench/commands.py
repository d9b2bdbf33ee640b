"""`dalikd bench NAME`: the benchmarks, their command lines, and `dalikd bench all`, which runs them one by one.

A new one is one file with a `run`, one line in _LISTED and, where `all` runs it, one line in _PLANS.
"""

import importlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch

from dalikd.tools.bench.machine import run_process
from dalikd.tools.bench.record import RESULTS, check_names
from dalikd.tools.cli import run_command, run_function
from dalikd.tools.layers import OPTIONS
from dalikd.trainers.tracking import check_writable

_LISTED = """
loader     loader.run            decode and augment: images a second of dalikd's loader and of others at the same work
step       step.run              a training step: real data against resident batches, teacher and student, waits
host       host.run              the main thread in a training step: microseconds of Python an image, operators a step
teacher    teacher.run           dalikd measure against its teacher alone: cost of loading, mixing, picking and metric
passes     teacher.run_passes    dalikd measure: all augmentations in one pass over the data against a pass for each
published  published.run         the training step against the loop of CutMixPick or HSAKD, one ablation at a time
methods    methods.run           the step of each distillation method against its nets alone: time and memory
scaling    scaling.run           one process against several: images a second and efficiency
first-hour first_hour.run        what a new GPU machine is asked first, within nine minutes
all        commands.run_all      those of this machine, one after the other, into one folder
images     machine.repeat_images copies of photos under new names, for a set that exceeds the page cache
tables     record.write_tables   the table of the newest results in docs/benchmarks/README.md
"""
#: name -> MODULE.FUNCTION in this folder, and what it measures.
BENCHMARKS = {name: (place, text) for name, place, text in (line.split(None, 2) for line in _LISTED.splitlines()[1:])}
# What benchmarks start: a process of `scaling`, items of `first-hour`.
_PARTS = {"scaling-worker": "scaling.work", "versions": "first_hour.versions", "decoders": "first_hour.decoders"}

# What `all` runs: GPUs needed, name, options. On a GPU a step of fewer images, or in eager code, is as long as its
# launches take; one row of step is eager, to be compared with. On a CPU nets are small: two processes have half of it.
_PLANS = """
0 loader DATA
0 loader DATA --backends dalikd --augmentations all
0 loader DATA --backends dalikd --sources files webdataset tfrecord
0 loader DATA --sweep true
0 loader DATA --startup 1281167
0 loader --random 50000 --data.image_size 32
0 loader --orders 1281167 14000000
1 loader DATA GPU
1 loader DATA GPU --backends dalikd dalikd-mixed --augmentations all
0 step DATA VAL --data.image_size 224 --teacher.name timm:resnet18 --model timm:resnet10t --batch_size 16 \
    --mix.group 16 --device cpu --steps 4 --warmup 2
1 step DATA VAL --data.image_size 224 LARGE PICKS GPU --compile off
1 step DATA VAL --data.image_size 224 LARGE PICKS GPU --compile max-autotune-no-cudagraphs
1 step DATA VAL --data.image_size 224 LARGE --loss.kd_mix_share 0 GPU --compile max-autotune-no-cudagraphs
1 step DATA VAL --data.image_size 32 WIDE PICKS
1 step DATA VAL --data.image_size 64 WIDE PICKS
0 host DATA
0 methods DATA VAL --data.image_size 32 --teacher.name resnet56 --model resnet20 --device cpu --steps 3 --warmup 1
1 methods DATA VAL --data.image_size 224 LARGE GPU COMPILED
0 teacher DATA --teacher.name resnet56 --model resnet20 --data.image_size 32 --images 500
1 teacher DATA LARGE GPU COMPILED --images 7680
0 passes DATA --teacher.name resnet20 --model resnet8 --data.image_size 64 --images 1000
1 passes DATA LARGE GPU COMPILED --images 7680
0 published DATA VAL --teacher.name resnet56 --model resnet20 --data.image_size 32 --steps 10
1 published DATA VAL LARGE GPU COMPILED
0 scaling DATA VAL --data.image_size 32 --teacher.name resnet56 --model resnet8 PICKS --device cpu --processes 1 2 \
    --steps 10 --warmup 2
2 scaling DATA VAL --data.image_size 224 LARGE PICKS GPU COMPILED --processes 1 2
"""
_WORDS = {
    "GPU": "--device cuda --precision bf16 --batch_size 384",
    "COMPILED": "--compile default",
    "VAL": "--data.val_split .",
    "LARGE": "--teacher.name timm:resnet34 --model timm:resnet18",
    "WIDE": "--teacher.name wrn_40_2 --model wrn_16_2 --device cuda --precision bf16 --batch_size 512 "
    "--data.resident true --compile reduce-overhead",
    "PICKS": "--augmentation cutmixpick_teacher",
}


def planned(root: Path, only: Sequence[str] | None = None) -> list[tuple[int, str, list[str]]]:
    """What `all` runs on class folders with photos: GPUs needed, name, options."""
    words = {**_WORDS, "DATA": shlex.join(["--data.root", str(root), "--data.train_split", "."])}
    lines = [fill(line, words) for line in _PLANS.strip().splitlines()]
    names = list(dict.fromkeys(name for _, name, *_ in lines))
    wanted = check_names("--only", only or names, names)
    return [(int(gpus), name, more) for wish in wanted for gpus, name, *more in lines if name == wish]


def fill(line: str, words: Mapping[str, str]) -> list[str]:
    """The words of a line; some of them stand for others."""
    return [one for word in shlex.split(line) for one in (fill(words[word], words) if word in words else [word])]


def run_all(root: Path, output: Path = RESULTS, only: list[str] | None = None, dry: bool = False) -> None:
    """Run every benchmark's plan for this machine, each command in a process of its own.

    A command that needs more GPUs than there are is named and not run. One that fails does not stop the others.

    Args:
        root: class folders of photos; on a GPU at least 512 of them, better more than the page cache holds (copy them
            with dalikd bench images).
        output: folder of all that is written.
        only: benchmarks to run; default: every one.
        dry: list the commands and run nothing.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root} is not a folder: name one that holds class folders with photos")
    check_writable("--output", output / "x.json")
    there, failed = torch.cuda.device_count(), []
    for gpus, name, options in planned(root, only):
        command = ["-m", "dalikd.tools.bench", name, *options, "--output", str(output)]
        line = f"python {shlex.join(command)}"
        missing = f"not run, as it needs {gpus} GPU(s) and this machine has {there}: " if gpus > there else ""
        print(missing + line, flush=True)
        if not (dry or missing) and run_process([sys.executable, *command]) != 0:
            failed.append(line)
    if failed:
        raise ValueError(f"{len(failed)} of the benchmarks failed: {'; '.join(failed)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dalikd bench NAME …`."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: dalikd bench NAME [options]\n\nbenchmarks:")
        print("\n".join(f"  {known:<10} {text}" for known, (_, text) in BENCHMARKS.items()))
        print("\ndalikd bench NAME --help explains every option of a benchmark.")
        sys.exit(0)
    places = {known: place for known, (place, _) in BENCHMARKS.items()} | _PARTS
    if name not in places:
        print(f"dalikd bench: error: unknown benchmark {name}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        sys.exit(2)
    module, _, attribute = places[name].partition(".")
    function = getattr(importlib.import_module(f"dalikd.tools.bench.{module}"), attribute)
    command = f"bench {name.removesuffix('-worker')}"
    if command in OPTIONS:
        run_command(command, function, arguments)
        return
    hints: dict[str, Any] = get_type_hints(function)
    options = hints.get("options")  # a class, where the function takes it in place of options of its own
    fields = get_type_hints(options) if options else hints
    lists = [option for option, hint in fields.items() if "list[" in str(hint)]
    run_function(command, function, arguments, options=options, lists=lists, positional=name == "images")
