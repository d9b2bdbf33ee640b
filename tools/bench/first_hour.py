"""`dalikd bench first-hour`: what a new GPU machine is asked first, within nine minutes.

    dalikd bench first-hour                        on pictures drawn for it
    dalikd bench first-hour --root PHOTOS          class folders of photos, 512 or more
    dalikd bench first-hour --device cpu           the same on tiny sizes: only to see that it runs

Each item is a process of its own with a limit of its own. After each one the record is written again, so that nothing
is lost where the time ends; beside it lie each item's own JSON and what it printed. An item that fails or takes too
long stops no other.
"""

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import psutil
import torch

from dalikd.kd.backbones import create_model
from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.hardware import decoding_on
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.tools.bench.images import draw_pictures
from dalikd.tools.bench.machine import device_slug, environment
from dalikd.tools.bench.options import ON_GPU, RESULTS, check_names
from dalikd.tools.bench.record import Record, check_output, load, table, write
from dalikd.tools.bench.tables import medians
from dalikd.tools.cli import run_function
from dalikd.trainers.launch import start
from dalikd.trainers.tracking import write_json

__all__ = ["decoders", "interrupt_and_resume", "main", "read_tests", "run", "stop_and_resume", "versions_and_card"]

_TESTS = Path(__file__).parents[2] / "tests/gpu"
_LOADS = (0.0, 1.0, 0.65)  # all by the CUDA decoder, all that it takes by the JPEG engine, DALI's own default
_RESERVE = 15.0  # seconds: what Python took to start, and what ending a command may take
_LEAST = 5.0  # seconds: with less left an item is not begun
_MOST_MEDIANS = 8  # of a record, in a line
_LAST_LINES = 8
_REPEATED = 20  # times, of which as many end as there is time for
_STOPPED_AT = 20  # steps, or a few more


@dataclass(frozen=True)
class _Item:
    """A command, what it may take, and what it needs.

    Attributes:
        words: what comes after `python`.
        seconds: at most.
        gpus: that it needs.
        dali: whether it needs DALI.
        note: which of its record's notes is shown, if any.
        read: what the output says, where no JSON does.
    """

    words: tuple[str, ...]
    seconds: float
    gpus: int = 0
    dali: bool = True
    note: int | None = None
    read: Callable[[str], str] | None = None


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
    check_output(output)
    names = check_names("--only", only or ["all"], _items(Path(), Path(), device))
    where = start(device, "fp32").device
    output.mkdir(parents=True, exist_ok=True)
    record = Record(
        benchmark="first-hour",
        title="The first hour on a machine",
        environment=environment(where),
        device=device_slug(where),
        config={"root": str(root), "limit": limit, "device": device, "only": only},
        warm_up="as each item's own record says.",
        page_cache="warm.",
        labels=("item",),
    )
    with TemporaryDirectory(prefix="dalikd-bench-") if root is None else nullcontext(root) as folder:
        if root is None:
            count, width, height = (768, 500, 375) if device == "cuda" else (96, 48, 40)
            draw_pictures(Path(folder), count, width, height)
        for name, item in _items(Path(folder), output, device).items():
            if name not in names:
                continue
            record.rows.append({"item": name, **_row(name, item, output, begun + limit - _RESERVE - time.monotonic())})
            write(record, output / "first-hour.json")
            print(f"{name}: {record.rows[-1]['outcome']} {record.rows[-1]['found']}", flush=True)
    print("\n".join(["", table(record.rows), "", f"written: {output / 'first-hour.json'}"]))
    return record


def _items(root: Path, output: Path, device: str) -> dict[str, _Item]:
    """The items in their order."""
    on_gpu = device == "cuda"
    data = ("--data.root", str(root), "--data.train_split", ".", "--device", device)
    both = (*data, "--data.val_split", ".")
    if on_gpu:
        nets = ("--teacher.name", "timm:resnet34", "--model", "timm:resnet18", *ON_GPU)
        batch, few = ("--batch_size", "384", "--precision", "bf16"), ("--seconds", "0.5")
        short, shorter = ("--steps", "20", "--warmup", "4"), ("--steps", "4")
    else:
        nets = ("--teacher.name", "resnet8", "--model", "resnet8", "--batch_size", "16", "--mix.group", "16")
        both = (*both, "--data.image_size", "32", "--data.threads", "1")
        batch, few = ("--batch_size", "16", "--data.image_size", "32"), ("--images", "16")
        short, shorter = ("--steps", "2", "--warmup", "2"), ("--steps", "1")

    def bench(name: str, item: str, *words: str) -> tuple[str, ...]:
        return ("-m", f"dalikd.tools.bench.{name}", *words, "--output", str(output / f"{item}.json"))

    def here(function: Callable[..., Any], item: str) -> tuple[str, ...]:
        call = f"{function.__name__}({str(output / f'{item}.json')!r}, {str(root)!r}, {device!r})"
        return ("-c", f"from dalikd.tools.bench import first_hour; first_hour.{call}")

    def tests(*words: str) -> tuple[str, ...]:
        plain = ("-o", "addopts=--import-mode=importlib", "-p", "no:xdist", "-p", "no:cacheprovider", "-v", "-m", "gpu")
        return ("-m", "pytest", *plain, *words)

    sides = ("dalikd", "decode", *(("dalikd-mixed", "decode-mixed") if on_gpu else ()))
    crop = ("--data.crop", "random_resized_crop")
    sweep = (*data, *crop, *batch, *few, "--sweep", "true", "--data.threads")
    plain, picks = ("--loss.lw_mix", "[1, 0, 0]"), ("--augmentation", "cutmixpick_teacher")
    compiled = str(_TESTS / "test_compile_gpu.py")
    recorded = ("--keep-duplicates", "-k", "recorded_while_dali_works", *[compiled] * _REPEATED)
    return {
        "versions": _Item(here(versions_and_card, "versions"), 30, dali=False),
        "decoders": _Item(here(decoders, "decoders"), 60),
        "windows": _Item(bench("loader", "windows", *data, *crop, *batch, *few, "--backends", *sides), 60),
        "host": _Item(bench("host", "host", *(() if on_gpu else ("--batch_size", "32", "--steps", "2"))), 40, note=0),
        "tests": _Item(tests(str(_TESTS), "--ignore", compiled), 110, gpus=1, dali=False, read=read_tests),
        **{
            f"sweep-{threads}": _Item(bench("loader", f"sweep-{threads}", *sweep, str(threads)), 60, note=0)
            for threads in ((8, 16) if on_gpu else (1, 2))
        },
        "step-identity": _Item(bench("step", "step-identity", *both, *nets, *plain, *short), 80, note=0),
        "step-cutmixpick": _Item(bench("step", "step-cutmixpick", *both, *nets, *picks, *short), 80, note=0),
        "recording": _Item(tests(*recorded), 60, gpus=1, read=read_tests),
        "compile": _Item(tests("-k", "reduce-overhead", compiled), 60, gpus=1, dali=False, read=read_tests),
        "published": _Item(bench("published", "published", *both, *nets, *shorter), 80, note=-1),
        "resume": _Item(here(interrupt_and_resume, "resume"), 70, gpus=2 if on_gpu else 0),
    }


def _row(name: str, item: _Item, output: Path, left: float) -> dict[str, Any]:
    """Run an item and say how it ended: "outcome", "seconds", "found", and of a failure the "last lines"."""
    if reason := _cannot(item, left):
        return {"outcome": f"skipped: {reason}", "seconds": None, "found": ""}
    file, log = output / f"{name}.json", output / f"{name}.log"
    file.unlink(missing_ok=True)
    started, longest = time.monotonic(), min(item.seconds, left)
    code = _run([sys.executable, *item.words], log, longest)
    seconds, text = time.monotonic() - started, log.read_text("utf-8", errors="replace")
    outcome = (
        "done" if code == 0 else f"cut off after {longest:.0f} s" if code is None else f"failed (exit code {code})"
    )
    found = item.read(text) if item.read is not None else _read(file, item.note) if file.exists() else ""
    row = {"outcome": outcome, "seconds": seconds, "found": found}
    return row if code == 0 else {**row, "last lines": " / ".join(text.strip().splitlines()[-_LAST_LINES:])}


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
            if process.is_running():
                family = [process, *process.children(recursive=True)]
                for end in (psutil.Process.terminate, psutil.Process.kill):
                    for member in family:
                        with suppress(psutil.NoSuchProcess):
                            end(member)
                    family = psutil.wait_procs(family, timeout=5)[1]


def _read(file: Path, note: int | None) -> str:
    """What an item's JSON says, in a line."""
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
    """Decode the same pictures in two batch compositions, at each load of the JPEG engine, and on the CPU.

    Pixels that change with the neighbours of a picture come from a batch that two decoders share.
    """
    source = open_source("imagefolder", root, "train", split=".")
    fewer, more, side = (32, 48, 224) if device == "cuda" else (8, 12, 32)
    view = View(side, "random_resized_crop")

    def pixels(size: int, where: str, load: float | None = None) -> torch.Tensor:
        loader = Loader(
            source, Sampler(len(source), size), DrawSpec(view), device=where, threads=4, hw_decoder_load=load
        )
        images = loader.next().images[:fewer].cpu().float()
        loader.close()
        return images

    on_cpu, loads, sentences = pixels(fewer, "cpu"), {}, []
    for load_ in _LOADS:
        one, other = pixels(fewer, device, load_), pixels(more, device, load_)
        away = (one - on_cpu).abs().mean((1, 2, 3))
        changed = int(((one - other).abs().amax((1, 2, 3)) > 0).sum())
        loads[str(load_)] = {
            "pictures": fewer,
            "changed_with_the_batch": changed,
            "largest_change": float((one - other).abs().max()),
            "mean_from_the_cpu": float(away.mean()),
            "worst_picture_from_the_cpu": float(away.max()),
        }
        sentences.append(
            f"load {load_:g}: {changed} of {fewer} pictures change with their batch, "
            f"{float(away.mean()):.2f} grey levels from the CPU (worst picture {float(away.max()):.2f})"
        )
    used = decoding_on(source, torch.device(device)).options()
    sentences.append(f"dalikd uses {', '.join(f'{name} {value}' for name, value in used.items())}")
    write_json(Path(file), {"found": "; ".join(sentences), "loads": loads, "used": used})


def interrupt_and_resume(file: str, root: str, device: str) -> None:
    """Distil on two processes, stop the launcher by SIGTERM on the way, and go on.

    Raises:
        RuntimeError: nothing was saved, or the run did not come to its end.
    """
    folder = Path(file).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    teacher, student, sizes = "timm:resnet34", "timm:resnet18", ("--batch_size", "128", "--epochs", "60")
    if device == "cpu":
        teacher = student = "resnet8"
        sizes = ("--batch_size", "16", "--epochs", "20", "--mix.group", "8", "--data.image_size", "32")
    classes = len(open_source("imagefolder", root, "train", split=".").classes)
    torch.save(create_model(teacher, classes).state_dict(), folder / "teacher.pt")
    data = ("--data.root", root, "--data.train_split", ".", "--data.val_split", ".", "--data.threads", "2")
    nets = ("--teacher.name", teacher, "--teacher.weights", str(folder / "teacher.pt"), "--model", student)
    more = ("--device", device, "--augmentation", "cutmixpick_teacher", "--eval_every", "1000", "--compile", "off")
    found = stop_and_resume(
        [*data, *nets, *sizes, *more, "--overwrite", "true"], folder / "run", psutil.Process.terminate
    )
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
    log = run_folder / "log.jsonl"
    log.unlink(missing_ok=True)
    first = psutil.Popen([*distill, *words, "--log_every", "10", "--output", str(run_folder)])
    while first.poll() is None and _last_step(log) < _STOPPED_AT:
        time.sleep(0.05)
    seen = _last_step(log)
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


def _last_step(log: Path) -> int:
    lines = log.read_text("utf-8").splitlines() if log.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return steps[-1] if steps else 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("bench first-hour", run, argv, lists=("only",))


if __name__ == "__main__":
    main()
