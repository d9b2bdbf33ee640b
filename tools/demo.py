"""`dalikd demo`: teacher, measure, students, ranking, on handwritten digits, in minutes."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dalikd import configs
from dalikd.pipelines.data import FilePath
from dalikd.tools import choose_threads, correlate
from dalikd.tools.cli import parse, run_function
from dalikd.tools.measure import measure
from dalikd.tools.summary import give_json, next_steps, ranking_table, students_table
from dalikd.tools.train import train
from dalikd.trainers.augmentation import augmentation_names, picks_by_student
from dalikd.trainers.launch import Device, Precision, start
from dalikd.trainers.run import Planned, run_students
from dalikd.trainers.stopping import Interrupted
from dalikd.trainers.tracking import RunFolder, write_json

STUDENTS = ["identity", "cutout", "autoaugment", "mixup", "cutmix", "cutmixpick_teacher"]


def run(
    output: Path = Path("runs/demo"),
    augmentation: list[str] = STUDENTS,
    limit: int | None = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    overwrite: bool = False,
    json: Path | None = None,
) -> dict[str, Any]:
    """Train a teacher on handwritten digits, measure all nine augmentations, distil students with several, rank them.

    Args:
        output: folder of everything that is written.
        augmentation: those a student is distilled with, at least three.
        limit: use only so many training images, at least 320: quicker, and less telling.
        device: auto takes the GPU where there is one.
        precision: fp32, tf32, bf16, fp16 or fp64.
        overwrite: replace an earlier demo in the folder.
        json: JSON file for points and coefficients, - for stdout.
    """
    if len(augmentation_names(augmentation)) < 3:
        raise ValueError("--augmentation: name at least three, a correlation needs as many points")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: give at least 320")
    if (output / "points.json").exists() and not overwrite:
        raise ValueError(
            f"{output} holds a demo: name another folder with --output, or replace it with --overwrite true"
        )
    RunFolder(output / "teacher", writes=False).check_new(overwrite)
    common = ["--config", str(Path(configs.__file__).with_name("demo.yaml"))]
    common += ["--device", device, "--precision", precision]
    common += [] if limit is None else ["--data.limit", str(limit)]
    redo = ["--overwrite", str(overwrite).lower()]

    choose_threads()
    print("1. a teacher", flush=True)
    with _begun_anew():
        teacher = train(*parse("train", [*common, "--output", str(output / "teacher"), *redo]))
    weights = ["--teacher.weights", str(output / "teacher/last" / teacher["evaluated"])]
    names = augmentation_names(augmentation)
    calls = {name: [*common, *weights, "--augmentation", name, "--output", str(output / name), *redo] for name in names}
    with _begun_anew(), _other_process(calls) as (here, there):
        print("\n2. how good each augmentation is, by the teacher alone", flush=True)
        measured = measure(*parse("measure", [*common, *weights, "--json", str(output / "measure.json")]))
        stddev = {result["augmentation"]: result["stddev"] for result in measured["results"]}
        if None in stddev.values():
            raise ValueError(f"--limit {limit} fills less than two windows of teacher outputs: give at least 320")
        print(f"\n3. a student with each of {', '.join(names)}", flush=True)
        found = _distil(here) | there()
    students = {name: found[name] for name in names}
    print(students_table(students))
    points = []
    for name, results in students.items():
        val = results["last"]["val"]
        points.append({"da": name, "t_stddev": stddev[name], "s_test_loss": val["loss"], "top1": val["top1"]})
    write_json(output / "points.json", {"points": points})
    print(f"\n4. the ranking, best student first\n{ranking_table(points)}\n")
    result = correlate.run(
        [FilePath(str(output / "points.json"))],
        plot=output / "scatter.png",
        json=output / "correlation.json",
        title="digits",
    )
    print(next_steps(output))
    found = {"points": points, **result}
    give_json(json, found)
    return found


@contextmanager
def _begun_anew() -> Iterator[None]:
    """What runs say of going on is not so of a demo."""
    try:
        yield
    except Interrupted as stop:
        message = f"stopped by signal {stop.signal}; a demo is not gone on with: --overwrite true begins it anew"
        raise Interrupted(message, stop.signal) from None


@contextmanager
def _other_process(
    calls: Mapping[str, list[str]],
) -> Iterator[tuple[dict[str, list[str]], Callable[[], dict[str, dict[str, Any]]]]]:
    """Let half of the students be distilled in another process meanwhile, where torch computes on two threads or more:
    nets as small as these gain little from the second one.

    Args:
        calls: the words of `dalikd distill`, by the augmentation.

    Returns:
        the calls that are left to this process, and what waits for the results of the others, by the augmentation.
    """
    threads, names = torch.get_num_threads(), list(calls)
    words = next(iter(calls.values()))
    alone = threads < 2 or len(names) < 4 or start(*_device(words)).device.type != "cpu"
    here = names if alone else names[: len(names) // 2]
    given = {name: calls[name] for name in names if name not in here}
    if not given:
        yield dict(calls), dict
        return
    context = get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    folder = TemporaryDirectory(prefix="dalikd-")
    process = context.Process(target=_send, args=(sending, given, threads // 2, folder.name), daemon=True)
    process.start()
    sending.close()
    torch.set_num_threads(threads - threads // 2)

    def wait() -> dict[str, dict[str, Any]]:
        try:
            answer = receiving.recv()
        except EOFError:
            process.join()
            raise ValueError(f"the process that distils {', '.join(given)} has ended, as its own line tells") from None
        if isinstance(answer, str):
            raise ValueError(answer)
        return answer

    try:
        yield {name: calls[name] for name in here}, wait
    finally:
        torch.set_num_threads(threads)
        process.kill()
        process.join()
        folder.cleanup()


def _send(sending: Connection, calls: Mapping[str, list[str]], threads: int, folder: str) -> None:
    """In the other process: distil, and send the results or what is to be mended."""
    os.setsid()  # Ctrl-C is for the first process, which ends this one
    tempfile.tempdir = folder  # a process that is killed leaves its files behind
    torch.set_num_threads(threads)
    os.environ["TQDM_DISABLE"] = "1"  # the terminal's line is the first process's
    try:
        sending.send(_distil(calls))
    except (ValueError, OSError) as error:
        sending.send(str(error))


def _distil(calls: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """The results of students, by their augmentations: on one teacher pass, but for those that pick by themselves."""
    runs = {name: Planned(*parse("distill", words)) for name, words in calls.items()}
    accelerator, done = start(*_device(next(iter(calls.values())))), dict[str, dict[str, Any]]()
    shared = [name for name in runs if not picks_by_student(name)]
    for group in filter(None, [shared, *([name] for name in runs if name not in shared)]):
        done |= zip(group, run_students({name: runs[name] for name in group}, accelerator), strict=True)
    return done


def _device(words: list[str]) -> tuple[Any, Any]:
    return words[words.index("--device") + 1], words[words.index("--precision") + 1]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_function("demo", run, argv, lists=("augmentation",))


if __name__ == "__main__":
    main()
