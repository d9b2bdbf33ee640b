"""`dalikd bench first-hour`: what a new GPU machine is asked first, within nine minutes.

    dalikd bench first-hour                        on images drawn for it
    dalikd bench first-hour --root PHOTOS          class folders of photos, 512 or more
    dalikd bench first-hour --device cpu           the same on tiny sizes: only to see that it runs

Each item is a process of its own with a limit of its own. After each one the record is written again, so that nothing
is lost where the time ends; beside it lie each item's own JSON and what it printed. An item that fails or takes too
long stops no other.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import psutil
import torch

from dalikd.kd.backbones import create_model
from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.hardware import decoding_on
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.tools.bench.commands import fill
from dalikd.tools.bench.images import draw_images
from dalikd.tools.bench.machine import device_slug, environment
from dalikd.tools.bench.record import RESULTS, Record, check_names, load, medians, table, write
from dalikd.trainers.launch import start
from dalikd.trainers.tracking import check_writable, write_json

__all__ = ["decoders", "interrupt_and_resume", "read_tests", "run", "stop_and_resume", "versions_and_card"]

_TESTS = Path(__file__).parents[2] / "tests/gpu"
_LOADS = (0.0, 1.0, 0.65)  # all by the CUDA decoder, all that it takes by the JPEG engine, DALI's own default
_RESERVE = 15.0  # seconds: what Python took to start, and what ending a command may take
_LEAST = 5.0  # seconds: with less left an item is not begun
_MOST_MEDIANS = 8  # of a record, in a line
_LAST_LINES = 8
_STOPPED_AT = 20  # steps, or a few more

_PYTEST = "-m pytest -o addopts=--import-mode=importlib -p no:xdist -p no:cacheprovider -v -m gpu"
_PICKS = "--augmentation cutmixpick_teacher"
# what words of the items' lines stand for, by device
_WORDS = {
    "cuda": {
        "DATA": "--data.root ROOT --data.train_split . --device cuda",
        "BATCH": "--data.crop random_resized_crop --batch_size 384 --precision bf16 --seconds 0.5",
        "NETS": "DATA --data.val_split . --teacher.name timm:resnet34 --model timm:resnet18 --precision bf16 "
        "--batch_size 384 --compile default",
        "STEPS": "--steps 20 --warmup 4",
        "FEW": "--steps 4",
        "SIDES": "dalikd decode dalikd-mixed decode-mixed",
        "HOST": "",
    },
    "cpu": {
        "DATA": "--data.root ROOT --data.train_split . --data.image_size 32 --device cpu",
        "BATCH": "--data.crop random_resized_crop --batch_size 16 --images 16",
        "NETS": "DATA --data.val_split . --data.threads 1 --teacher.name resnet8 --model resnet8 --batch_size 16 "
        "--mix.group 16",
        "STEPS": "--steps 2 --warmup 2",
        "FEW": "--steps 1",
        "SIDES": "dalikd decode",
        "HOST": "--batch_size 32 --steps 2",
    },
}


class _Item(NamedTuple):
    """A command, what it may take, and what it needs."""

    words: tuple[str, ...]  # what comes after `python`
    seconds: float  # at most
    gpus: int = 0  # that it needs
    dali: bool = True  # whether it needs DALI
    note: int | None = None  # which of its record's notes is shown, if any
    read: Callable[[str], str] | None = None  # what the output tells, where no JSON does


def run(
    root: Path | None = None,
    output: Path = RESULTS / "first-hour",
    limit: float = 540.0,
    device: Literal["cuda", "cpu"] = "cuda",
    only: list[str] | None = None,
) -> Record:
    """Run every item, and write first-hour.json and first-hour.md after each.

    Args:
        root: class folders of photos, at least 512; default: 768 are drawn.
        output: folder of the record, and of what each item writes and prints.
        limit: seconds for all of it.
        device: cuda, or cpu: tiny sizes, which show only that it runs.
        only: items to run; default: every one.

    Raises:
        ValueError: there is no such device or item, or the folder cannot be written.
    """
    begun = time.monotonic()
    names = check_names("--only", only or ["all"], items(Path(), Path(), device))
    where = start(device, "fp32").device
    check_writable("--output", output / "first-hour.json")
    config = {"root": str(root), "limit": limit, "device": device, "only": only}
    record = Record("first-hour", environment=environment(where), device=device_slug(where), config=config)
    output.mkdir(parents=True, exist_ok=True)
    record.title, record.labels = "The first hour on a machine", ("item",)
    record.warm_up, record.page_cache = "as each item's own record tells.", "warm."
    with TemporaryDirectory(prefix="dalikd-bench-") if root is None else nullcontext(root) as folder:
        if root is None:
            count, width, height = (768, 500, 375) if device == "cuda" else (96, 48, 40)
            draw_images(Path(folder), count, width, height)
        for name, item in items(Path(folder), output, device).items():
            if name not in names:
                continue
            record.rows.append({"item": name, **_row(name, item, output, begun + limit - _RESERVE - time.monotonic())})
            write(record, output / "first-hour.json")
            print(f"{name}: {record.rows[-1]['outcome']} {record.rows[-1]['found']}", flush=True)
    print("\n".join(["", table(record.rows), "", f"written: {output / 'first-hour.json'}"]))
    return record


def items(root: Path, output: Path, device: str) -> dict[str, _Item]:
    """The items in their order."""
    words, compiled = {**_WORDS[device], "ROOT": shlex.quote(str(root))}, str(_TESTS / "test_compile_gpu.py")
    little, much = ("8", "16") if device == "cuda" else ("1", "2")

    def bench(seconds: float, item: str, line: str, note: int | None = None) -> dict[str, _Item]:
        command = ("-m", "dalikd.tools.bench", *fill(line, words), "--output", str(output / f"{item}.json"))
        return {item: _Item(command, seconds, note=note)}

    def here(seconds: float, item: str, function: Callable[..., Any], **needs: Any) -> dict[str, _Item]:
        call = f"{function.__name__}({str(output / f'{item}.json')!r}, {str(root)!r}, {device!r})"
        return {item: _Item(("-c", f"from dalikd.tools.bench import first_hour; first_hour.{call}"), seconds, **needs)}

    def tests(seconds: float, item: str, *more: str, dali: bool = False) -> dict[str, _Item]:
        return {item: _Item((*_PYTEST.split(), *more), seconds, gpus=1, dali=dali, read=read_tests)}

    return {
        **here(30, "versions", versions_and_card, dali=False),
        **here(60, "decoders", decoders),
        **bench(60, "windows", "loader DATA BATCH --backends SIDES"),
        **bench(40, "host", "host HOST", note=0),
        **tests(110, "tests", str(_TESTS), "--ignore", compiled),
        **bench(60, f"sweep-{little}", f"loader DATA BATCH --sweep true --data.threads {little}", note=0),
        **bench(60, f"sweep-{much}", f"loader DATA BATCH --sweep true --data.threads {much}", note=0),
        **bench(80, "step-identity", "step NETS --loss.kd_mix_share 0 STEPS", note=0),
        **bench(80, "step-cutmixpick", f"step NETS {_PICKS} STEPS", note=0),
        **tests(60, "recording", "--keep-duplicates", "-k", "recorded_while_dali_works", *[compiled] * 20, dali=True),
        **tests(60, "compile", "-k", "reduce-overhead", compiled),
        **bench(80, "published", "published NETS FEW", note=-1),
        **here(70, "resume", interrupt_and_resume, gpus=2 if device == "cuda" else 0),
    }


def _row(name: str, item: _Item, output: Path, left: float) -> dict[str, Any]:
    """Run an item and tell how it ended: "outcome", "seconds", "found", and of a failure the "last lines"."""
    if reason := _cannot(item, left):
        return {"outcome": f"skipped: {reason}", "seconds": None, "found": ""}
    file, log = output / f"{name}.json", output / f"{name}.log"
    file.unlink(missing_ok=True)
    started, longest = time.monotonic(), min(item.seconds, left)
    code = _run([sys.executable, *item.words], log, longest)
    seconds, text = time.monotonic() - started, log.read_text("utf-8", errors="replace")
    found = item.read(text) if item.read is not None else _read(file, item.note) if file.exists() else ""
    if code == 0:
        return {"outcome": "done", "seconds": seconds, "found": found}
    outcome = f"cut off after {longest:.0f} s" if code is None else f"failed (exit code {code})"
    last = " / ".join(text.strip().splitlines()[-_LAST_LINES:])
    return {"outcome": outcome, "seconds": seconds, "found": found, "last lines": last}


def _cannot(item: _Item, left: float) -> str | None:
    """Why an item is not run, or None."""
    if item.gpus and not torch.cuda.is_available():
        return "needs a GPU"
    if item.gpus > torch.cuda.device_count():
        return f"needs {item.gpus} GPUs, and here is 1"
    if item.dali and not _installed("nvidia", "nvidia.dali"):
        return "no DALI: install nvidia-dali-cuda120 or nvidia-dali-cuda130"
    if item.read is not None and not (_installed("pytest") and _TESTS.is_dir()):
        return "pytest and a clone of dalikd with its tests are needed"
    return "no time left of --limit" if left < _LEAST else None


def _installed(*names: str) -> bool:
    """Whether packages are there; each may lie in the one before."""
    return all(importlib.util.find_spec(name) is not None for name in names)


def _run(command: Sequence[str], log: Path, longest: float) -> int | None:
    """Run a command with its output in a file. None where it took too long: it and its descendants are ended."""
    with log.open("wb") as file:
        process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            return process.wait(longest)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            return None
        finally:
            family = [process, *process.children(recursive=True)] if process.is_running() else []
            for end in (psutil.Process.terminate, psutil.Process.kill):
                for member in family:
                    with suppress(psutil.NoSuchProcess):
                        end(member)
                family = psutil.wait_procs(family, timeout=5)[1]


def _read(file: Path, note: int | None) -> str:
    """What an item's JSON tells, in a line."""
    record = load(file)
    if record is None:
        return json.loads(file.read_text("utf-8"))["found"]
    found = medians(record)
    parts = [f"{'; '.join(found)} {record.plotted}."] if len(found) <= _MOST_MEDIANS else []
    return " ".join([*parts, *([] if note is None else [record.notes[note]])])


def read_tests(text: str) -> str:
    """How many tests ended how, and which of them failed; of pytest's output line by line, which may be cut off."""
    ended = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    counts = {word: sum(one == word for _, one in ended) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    bad = dict.fromkeys(name.rpartition("/")[2] for name, one in ended if one in ("FAILED", "ERROR"))
    figures = ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count) or "none ended"
    return f"{figures}{': ' if bad else ''}{', '.join(bad)}"


# --------------------------------------------------------------------------- items that are no command of their own


def versions_and_card(file: str, _root: str, device: Literal["cuda", "cpu"]) -> None:
    """Write what is installed and which GPUs there are."""
    found = environment(start(device, "fp32").device)
    cards = [f"{card['name']}, driver {card['driver_version']}" for card in found.get("gpus", [])] or [found["device"]]
    cuda = f" (CUDA {found['cuda']})" if found.get("cuda") else ""
    decoder = [f"{name} {version}" for name, version in found.items() if "dali" in name or "nvimgcodec" in name]
    sentence = f"torch {found['torch']}{cuda}, {', '.join(decoder)}; {'; '.join(cards)}"
    write_json(Path(file), {"found": sentence, **found})


def decoders(file: str, root: str, device: str) -> None:
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
    for share in _LOADS:
        one, other = pixels(fewer, device, share), pixels(more, device, share)
        away, changes = (one - on_cpu).abs().mean((1, 2, 3)), (one - other).abs().amax((1, 2, 3))
        changed, mean, worst = int((changes > 0).sum()), float(away.mean()), float(away.max())
        loads[str(share)] = {
            "pictures": fewer,
            "changed_with_the_batch": changed,
            "largest_change": float(changes.max()),
            "mean_from_the_cpu": mean,
            "worst_picture_from_the_cpu": worst,
        }
        sentences.append(
            f"load {share:g}: {changed} of {fewer} images change with their batch, {mean:.2f} grey levels from the CPU "
            f"(worst image {worst:.2f})"
        )
    used = decoding_on(source, torch.device(device)).options()
    sentences.append(f"dalikd uses {', '.join(f'{name} {value}' for name, value in used.items())}")
    write_json(Path(file), {"found": "; ".join(sentences), "loads": loads, "used": used})


def interrupt_and_resume(file: str, root: str, device: str) -> None:
    """Distil on two processes, stop the launcher by SIGTERM on the way, and go on."""
    folder = Path(file).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    teacher, student, sizes = "timm:resnet34", "timm:resnet18", "--batch_size 128 --epochs 60"
    if device == "cpu":
        teacher = student = "resnet8"
        sizes = "--batch_size 16 --epochs 20 --mix.group 8 --data.image_size 32"
    classes = len(open_source("imagefolder", root, "train", split=".").classes)
    torch.save(create_model(teacher, classes).state_dict(), folder / "teacher.pt")
    words = {"ROOT": shlex.quote(root), "WEIGHTS": shlex.quote(str(folder / "teacher.pt"))}
    line = (
        "--data.root ROOT --data.train_split . --data.val_split . --data.threads 2 "
        f"--teacher.name {teacher} --teacher.weights WEIGHTS --model {student} {sizes} {_PICKS} "
        f"--device {device} --eval_every 1000 --compile off --overwrite true"
    )
    found = stop_and_resume(fill(line, words), folder / "run", psutil.Process.terminate)
    sentence = "SIGTERM after step {seen}: saved at step {saved}, gone on to step {steps}, training loss {loss:.4f}"
    write_json(Path(file), {"found": sentence.format(**found), **found})


def stop_and_resume(
    words: Sequence[str], run_folder: Path, stop: Callable[[psutil.Process], None], processes: int = 2
) -> dict[str, Any]:
    """Distil under torchrun, have it stopped once 20 steps are done, and go on to the end.

    Args:
        words: options of `dalikd distill`, without the run folder; of many more steps.
        run_folder: of the run.
        stop: stops the launcher, or one of its children.
        processes: how many.

    Returns:
        the steps "seen" before it was stopped, "saved", and in the end ("steps"); the training "loss" then.

    Raises:
        RuntimeError: nothing was saved, or the run did not come to its end.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    distill = [sys.executable, *launcher, "-m", "dalikd.tools.distill"]
    log, seen = run_folder / "log.jsonl", 0
    log.unlink(missing_ok=True)
    first = psutil.Popen([*distill, *words, "--log_every", "10", "--output", str(run_folder)])
    while first.poll() is None and seen < _STOPPED_AT:
        time.sleep(0.05)
        lines = log.read_text("utf-8").splitlines() if log.exists() else []
        seen = max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    if first.poll() is None:
        stop(first)
    code, state = first.wait(), run_folder / "last/trainer.pt"
    if not state.exists():
        raise RuntimeError(f"stopped after step {seen} the run ended with exit code {code}, and nothing was saved")
    saved = torch.load(state, map_location="cpu", weights_only=False)["step"]
    subprocess.run([*distill, "--resume", str(run_folder)], check=True)
    results = json.loads((run_folder / "results.json").read_text("utf-8"))
    if not results["finished"] or not _STOPPED_AT <= saved < results["steps"]:
        raise RuntimeError(f"the run was saved at step {saved} and ended at {results['steps']}: not a stop on the way")
    return {"seen": seen, "saved": saved, "steps": results["steps"], "loss": results["last"]["train"]["loss"]}
