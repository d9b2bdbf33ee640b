"""`dalikd bench first-hour`: what a new GPU machine is asked first, within nine minutes.

Each item is a process of its own with a limit of its own. After each one the record is written again, so that nothing
is lost where the time ends; beside it lie each item's own JSON and what it printed. An item that fails or takes too
long stops no other; the command then ends with an error that names it.
"""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch

from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.files import read_json
from dalikd.pipelines.hardware import decoding_on
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.tools.bench.commands import fill
from dalikd.tools.bench.machine import device_slug, draw_images, environment, run_process
from dalikd.tools.bench.record import RESULTS, Record, check_names, load, table, write
from dalikd.tools.summary import give_json
from dalikd.trainers.launch import start
from dalikd.trainers.tracking import check_writable, write_json

_TESTS = Path(__file__).parents[2] / "tests/gpu"
_RESERVE = 15.0  # seconds: what Python took to start, and what ending a command may take
_LEAST = 5.0  # seconds: with less left an item is not begun
# Seconds at most, item, kind and number of its record's note that is shown, words.
_ITEMS = """
30 versions own versions --device DEVICE
60 decoders bench decoders --root ROOT --device DEVICE
60 windows bench loader DATA BATCH --backends SIDES
40 host bench:0 host HOST
110 tests tests TESTS --ignore COMPILE
60 sweep-LITTLE bench:0 loader DATA BATCH --sweep true --data.threads LITTLE
60 sweep-MUCH bench:0 loader DATA BATCH --sweep true --data.threads MUCH
80 step-identity bench:0 step NETS --loss.kd_mix_share 0 STEPS
80 step-cutmixpick bench:0 step NETS --augmentation cutmixpick_teacher STEPS
60 recording tests --keep-duplicates -k recorded_while_dali_works COMPILES
60 compile tests -k reduce-overhead COMPILE
80 published bench:-1 published NETS FEW
70 resume tests -k a_signal_stops PROCESSES
"""
# what words of the items stand for, by device
_WORDS = {
    "cuda": {
        "BATCH": "--batch_size 384 --precision bf16 --seconds 0.5",
        "NETS": "DATA --data.val_split . --teacher.name timm:resnet34 --model timm:resnet18 --precision bf16 "
        "--batch_size 384 --compile default",
        "STEPS": "--steps 20 --warmup 4",
        "FEW": "--steps 4",
        "SIDES": "dalikd decode dalikd-mixed decode-mixed",
        "HOST": "",
        "LITTLE": "8",
        "MUCH": "16",
    },
    "cpu": {
        "BATCH": "--data.image_size 32 --batch_size 16 --images 16",
        "NETS": "DATA --data.val_split . --data.image_size 32 --data.threads 1 --teacher.name resnet8 --model resnet8 "
        "--batch_size 16 --mix.group 16",
        "STEPS": "--steps 2 --warmup 2",
        "FEW": "--steps 1",
        "SIDES": "dalikd decode",
        "HOST": "--batch_size 32 --steps 2",
        "LITTLE": "1",
        "MUCH": "2",
    },
}
_SHARED = {
    "DATA": "--data.root ROOT --data.train_split . --data.crop random_resized_crop --device DEVICE",
    "COMPILE": f"{_TESTS}/test_compile_gpu.py",
    "COMPILES": "COMPILE " * 20,
    "TESTS": str(_TESTS),
    "PROCESSES": f"{_TESTS}/test_processes_gpu.py",
    "PYTEST": "-m pytest -o addopts=--import-mode=importlib -p no:xdist -p no:cacheprovider -v -m gpu",
}


class Item(NamedTuple):
    """A command."""

    seconds: float  # at most
    kind: str  # what it needs and tells: bench (perhaps with the number of a note), tests, own
    words: Sequence[str]  # what comes after `python`


def run(
    root: Path | None = None,
    output: Path = RESULTS / "first-hour",
    limit: float = 540.0,
    device: Literal["cuda", "cpu"] = "cuda",
    only: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Run every item, and write first-hour.json and first-hour.md after each.

    Args:
        root: class folders of photos, at least 512; default: 768 are drawn.
        output: folder of the record, and of what each item writes and prints.
        limit: seconds for all of it.
        device: cuda, or cpu: tiny sizes, which show only that it runs.
        only: items to run; default: every one.
        json: file for the record, - for stdout.

    Raises:
        ValueError: there is no such device or item, the folder cannot be written, or an item has not ended well.
    """
    begun = time.monotonic()
    names = check_names("--only", only or ["all"], items(Path(), Path(), device))
    where = start(device, "fp32").device
    check_writable("--output", output / "first-hour.json")
    output.mkdir(parents=True, exist_ok=True)
    record = Record("first-hour", "The first hour on a machine", environment(where), device_slug(where))
    record.config, record.labels = {"root": str(root), "limit": limit, "device": device, "only": only}, ("item",)
    record.warm_up, record.page_cache = "as each item's own record tells.", "warm."
    with TemporaryDirectory(prefix="dalikd-bench-") if root is None else nullcontext(root) as folder:
        if root is None:
            draw_images(Path(folder), *((768, 500, 375) if device == "cuda" else (96, 48, 40)))
        for name, item in items(Path(folder), output, device).items():
            if name in names:
                left = begun + limit - _RESERVE - time.monotonic()
                record.rows.append({"item": name, **_row(name, item, output, left)})
                write(record, output / "first-hour.json")
                print(f"{name}: {record.rows[-1]['outcome']} {record.rows[-1]['found']}", flush=True)
    print(f"\n{table(record.rows)}\n\nwritten: {output / 'first-hour.json'}", flush=True)
    give_json(json, asdict(record))
    if bad := [f"{row['item']} {row['outcome']}" for row in record.rows if "last lines" in row]:
        raise ValueError(f"{len(bad)} of {len(record.rows)} items did not end well: {'; '.join(bad)}")


def items(root: Path, output: Path, device: str) -> dict[str, Item]:
    """The items in their order."""
    words = {**_SHARED, **_WORDS[device], "ROOT": shlex.quote(str(root)), "DEVICE": device}
    found: dict[str, Item] = {}
    for line in _ITEMS.replace("LITTLE", words["LITTLE"]).replace("MUCH", words["MUCH"]).strip().splitlines():
        seconds, name, kind, *rest = fill(line, words)
        if kind != "tests":
            rest = ["-m", "dalikd.tools.bench", *rest, "--output", str(output / f"{name}.json")]
        found[name] = Item(float(seconds), kind, fill("PYTEST", words) + rest if kind == "tests" else rest)
    return found


def _row(name: str, item: Item, output: Path, left: float) -> dict[str, Any]:
    """Run an item and tell how it ended: "outcome", "seconds", "found", and of a failure the "last lines"."""
    if reason := _cannot(item, left):
        return {"outcome": f"skipped: {reason}", "seconds": None, "found": ""}
    file, log = output / f"{name}.json", output / f"{name}.log"
    file.unlink(missing_ok=True)
    started, longest = time.monotonic(), min(item.seconds, left)
    code = _run([sys.executable, *item.words], log, longest)
    seconds, text = time.monotonic() - started, log.read_text("utf-8", errors="replace")
    found = read_tests(text) if item.kind == "tests" else _read(file, item.kind) if file.exists() else ""
    if code == 0:
        return {"outcome": "done", "seconds": seconds, "found": found}
    outcome = f"cut off after {longest:.0f} s" if code is None else f"failed (exit code {code})"
    last = " / ".join(text.strip().splitlines()[-8:])
    return {"outcome": outcome, "seconds": seconds, "found": found, "last lines": last}


def _cannot(item: Item, left: float) -> str | None:
    """Why an item is not run, or None."""
    if item.kind == "tests" and not torch.cuda.is_available():
        return "needs a GPU"
    if item.kind == "tests" and (find_spec("pytest") is None or not _TESTS.is_dir()):
        return "pytest and a clone of dalikd with its tests are needed"
    if item.kind.startswith("bench") and not (find_spec("nvidia") and find_spec("nvidia.dali")):
        return "no DALI: install nvidia-dali-cuda120 or nvidia-dali-cuda130"
    return "no time left of --limit" if left < _LEAST else None


def _run(command: Sequence[str], log: Path, longest: float) -> int | None:
    """Run a command with its output in a file. None where it took too long: it and its descendants are ended."""
    with log.open("wb") as file:
        return run_process(command, longest, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def _read(file: Path, kind: str) -> str:
    """What an item's JSON tells, in a line."""
    record = load(file)
    if record is None:
        return read_json(file)["found"]
    note = kind.partition(":")[2]
    parts = [f"{record.medians}."] if len(record.shown) <= 8 else []
    return " ".join([*parts, *([record.notes[int(note)]] if note else [])])


def read_tests(text: str) -> str:
    """How many tests ended how, and which of them failed; of pytest's output line by line, which may be cut off."""
    ended = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    counts = {word: sum(one == word for _, one in ended) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    bad = dict.fromkeys(name.rpartition("/")[2] for name, one in ended if one in ("FAILED", "ERROR"))
    figures = ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count) or "none ended"
    return f"{figures}{': ' if bad else ''}{', '.join(bad)}"


def versions(output: Path, device: Literal["cuda", "cpu"]) -> None:
    """Write what is installed and which GPUs there are."""
    found = environment(start(device, "fp32").device)
    cards = [f"{card['name']}, driver {card['driver_version']}" for card in found.get("gpus", [])] or [found["device"]]
    named = [f"{name} {found[name]}" for name in ("torch", "cuda", "dali", "nvimgcodec") if name in found]
    write_json(output, {"found": f"{', '.join(named)}; {'; '.join(cards)}", **found})


def decoders(output: Path, root: Path, device: Literal["cuda", "cpu"]) -> None:
    """Decode the same images in two batch compositions, at each load of the JPEG engine, and on the CPU.

    Pixels that change with the neighbours of an image come from a batch that two decoders share.
    """
    source = open_source("imagefolder", root, "train", split=".")
    fewer, more, side = (32, 48, 224) if device == "cuda" else (8, 12, 32)

    def pixels(size: int, where: str, load: float | None = None) -> torch.Tensor:
        spec, sampler = DrawSpec(View(side, "random_resized_crop")), Sampler(len(source), size)
        with closing(Loader(source, sampler, spec, device=where, threads=4, hw_decoder_load=load)) as loader:
            return loader.next().images[:fewer].cpu().float()

    on_cpu, loads, sentences = pixels(fewer, "cpu"), {}, []
    for share in (0.0, 1.0, 0.65):  # all by the CUDA decoder, all that it takes by the JPEG engine, DALI's own default
        one, other = pixels(fewer, device, share), pixels(more, device, share)
        away, changes = (one - on_cpu).abs().mean((1, 2, 3)), (one - other).abs().amax((1, 2, 3))
        found = {"images": fewer, "changed_with_the_batch": int((changes > 0).sum())}
        found |= {"largest_change": float(changes.max()), "mean_from_the_cpu": float(away.mean())}
        loads[str(share)] = found | {"worst_image_from_the_cpu": float(away.max())}
        sentences.append(
            f"load {share:g}: {found['changed_with_the_batch']} of {fewer} images change with their batch, "
            f"{away.mean():.2f} grey levels from the CPU (worst image {away.max():.2f})"
        )
    used = decoding_on(source, torch.device(device)).options()
    sentences.append(f"dalikd uses {', '.join(f'{name} {value}' for name, value in used.items())}")
    write_json(output, {"found": "; ".join(sentences), "loads": loads, "used": used})
