"""Starts the runs of a study: one worker a GPU of this machine, or jobs of SLURM by submitit. Both are calls of the
same command on the same folder; what is done, and what has failed, stands there and nowhere else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from dalikd.pipelines.files import read_json, write_atomically
from dalikd.trainers.signals import SIGNALS, Stopped, obeying, signal_name
from dalikd.trainers.stopping import STARTED_BY, Interrupted
from dalikd.trainers.study.options import OF_SLURM
from dalikd.trainers.study.plan import STUDENTS_OF_A_PASS, Cell
from dalikd.trainers.study.run import Queue

__all__ = ["Job", "check_slurm", "local_places", "longest_first", "run_local", "run_slurm", "units"]

_STOPPED = {code for number in SIGNALS for code in (128 + number, -number)}
_BARREN = 3  # starts in a row after which nothing has come of it
_LARGEST_ARRAY = 1000  # SLURM's MaxArraySize, as it is unless somebody has changed it
_PARALLEL = 64  # jobs of an array at once
_LOOK = 1.0  # seconds between two looks at what is done

#: starts a process with its own environment; what it prints is added to the file
Start = Callable[[Sequence[str], Mapping[str, str], Path], Any]


# ----------------------------------------------------------------------------------------------------------- the order


def longest_first(cells: Sequence[Cell], work: Mapping[str, float]) -> list[Cell]:
    """By what has to be done one after the other from a cell on: those that others need come before them.

    Args:
        cells: each after those that it needs.
        work: of each, by its name.
    """
    after = dict.fromkeys((cell.name for cell in cells), 0.0)
    for cell in reversed(cells):
        for need in cell.needs:
            after[need] = max(after.get(need, 0.0), after[cell.name] + work[cell.name])
    return sorted(cells, key=lambda cell: -after[cell.name] - work[cell.name])


def units(cells: Sequence[Cell], alike: Callable[[Cell], str | None], parallel: int) -> list[list[Cell]]:
    """Cells that one call does: those that share a teacher pass together, unless fewer calls than `parallel` would be
    left."""
    found: dict[str, list[list[Cell]]] = {}
    most = min(STUDENTS_OF_A_PASS, max(1, ceil(len(cells) / parallel)))
    for cell in cells:
        key = alike(cell)
        parts = found.setdefault(cell.name if key is None else key, [[]])
        if len(parts[-1]) == most:
            parts.append([])
        parts[-1].append(cell)
    return [part for parts in found.values() for part in parts]


# ------------------------------------------------------------------------------------------------------- this machine


def local_places(workers: int | None, *, on_cpu: bool) -> list[dict[str, str]]:
    """Variables of each worker: one GPU of those that this call sees, or its share of the cores.

    Args:
        workers: how many; default: one for each GPU.
        on_cpu: whether no GPU is to be used.

    Raises:
        ValueError: there is no GPU, and nobody says how many workers there are to be.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [] if on_cpu else [str(number) for number in range(torch.cuda.device_count())]
    if gpus and visible:
        gpus = visible.split(",")[: len(gpus)]
    if workers is None and not gpus:
        raise ValueError("--engine local starts one worker for each GPU, and there is none: give --workers 2, or so")
    places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{}]
    count = workers or len(places)
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    return [{"OMP_NUM_THREADS": threads, **os.environ, **places[number % len(places)]} for number in range(count)]


def _start(words: Sequence[str], environment: Mapping[str, str], log: Path) -> Any:
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        command = [sys.executable, "-m", "dalikd.tools.study", *words]
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor
        )
    finally:
        os.close(descriptor)


class _Worker:
    """A place where one process after the other works.

    Args:
        environment: of its processes.
        log: what they print to.
        start: starts one.
    """

    def __init__(self, environment: Mapping[str, str], log: Path, start: Callable[["_Worker"], Any]) -> None:
        self.environment, self.log, self._start = {**environment, STARTED_BY: str(os.getpid())}, log, start
        self.process: Any = None  # None: it has ended, and is not started again
        self.last = ""  # why it is not started again
        self._before: object = None  # what was known of the study when it was started
        self._barren = 0  # starts in a row of which nothing has come

    def begin(self, queue: Queue) -> None:
        self._before = queue.known()
        self.process = self._start(self)

    def send(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def look(self, queue: Queue, restarts: Counter[str], *, again: bool) -> None:
        """Start it again, if its process has ended and there is reason to."""
        if self.process is None or (code := self.process.poll()) is None:
            return
        ended, self.process = self.process, None
        if code in (0, 2) or not again:  # nothing is left for it; or a mistake of the user, which would come again
            self.last = _last_line(self.log) if code else ""
            return
        stopped = code in _STOPPED
        self._barren = 0 if stopped or queue.known() != self._before else self._barren + 1
        if self._barren == _BARREN:
            self.last = f"a worker crashed {_BARREN} times before it did anything: {_last_line(self.log)}"
            return
        how = f"was ended by signal {-code} ({signal_name(-code)})" if code < 0 else f"has ended with exit code {code}"
        print(f"worker {ended.pid} {how}: started again ({self.log})", flush=True)
        restarts["signals" if stopped else "crashes"] += 1
        self.begin(queue)


def run_local(
    queue: Queue, words: Sequence[str], places: Sequence[Mapping[str, str]], start: Start = _start
) -> Counter[str]:
    """Let workers do what is left of a study. One that has crashed, or was stopped by a signal from elsewhere, is
    started again; a signal to this process is handed on to all of them.

    Args:
        queue: of the whole study.
        words: that follow `dalikd study` in a worker.
        places: the environment of each worker.
        start: starts one.

    Returns:
        how many were started again after "crashes" and after "signals".

    Raises:
        ValueError: all workers have ended, and something is left that has not failed.
        Interrupted: a signal came; the workers have saved what they did.
    """
    folder, restarts, told, handed = queue.folder / ".engine", Counter[str](), _Told(queue), False
    logs = [folder / f"worker{number}.log" for number in range(1, len(places) + 1)]
    crew = [
        _Worker(place, log, lambda worker: start(words, worker.environment, worker.log))
        for place, log in zip(places, logs, strict=True)
    ]
    print(f"{len(crew)} workers, which print to {folder}/worker*.log", flush=True)
    with obeying("note") as asked:
        try:
            for worker in crew:
                worker.begin(queue)
            while any(worker.process is not None for worker in crew):
                for worker in crew if asked.number and not handed else ():
                    worker.send(asked.number)
                handed = bool(asked.number)
                for worker in crew:
                    worker.look(queue, restarts, again=not asked.number)
                told.look()
                time.sleep(_LOOK / 10)
        except Stopped as stopped:
            for worker in crew:
                worker.send(stopped.signal)
            raise
    told.look(now=True)
    if asked.number:
        raise Interrupted(f"stopped by signal {asked.number}; the same command goes on", asked.number)
    if left := queue.left():
        why = "; ".join(dict.fromkeys(worker.last for worker in crew if worker.last)) or f"see {folder}"
        raise ValueError(f"all workers have ended, and {len(left)} of {len(queue.own)} runs are left: {why}")
    return restarts


def _last_line(log: Path) -> str:
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{log} tells nothing"


@dataclass
class _Told:
    """Prints a line for each run that is done, or has failed."""

    queue: Queue
    names: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    at: float = 0.0

    def __post_init__(self) -> None:
        self.names = {cell.name for cell in self.queue.own if self.queue.is_done(cell.name)}

    def look(self, *, now: bool = False) -> None:
        """At most once a second."""
        if not now and time.monotonic() - self.at < _LOOK:
            return
        self.queue.left()
        for cell in self.queue.own:
            if cell.name not in self.names and self.queue.is_done(cell.name):
                self.names.add(cell.name)
                print(f"[{len(self.names)}/{len(self.queue.own)}] {cell.name}", flush=True)
        for name in self.queue.failed.keys() - self.failed - self.names:
            self.failed.add(name)
            print(f"failed: {self.queue.failed[name]}", flush=True)
        self.at = time.monotonic()


# -------------------------------------------------------------------------------------------------------------- SLURM


class Job:
    """What a job runs: a call of `dalikd study`. A pre-empted one has saved its state, and is queued again.

    Args:
        words: that follow `dalikd study`.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)

    def __call__(self) -> int:
        """Returns the exit code; a crash ends the process, or raises what it has raised."""
        try:
            resolve_name("dalikd.tools.study").main(self.words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if code in _STOPPED and code != 128 + signal.SIGINT:
                # the state is saved: now submitit's own handler, which dalikd had in its hands, queues the job again
                os.kill(os.getpid(), getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"))
                time.sleep(60)
            return code
        return 0

    def checkpoint(self) -> Any:
        """For submitit: what goes on in the job's next life."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_slurm(given: Mapping[str, Any]) -> None:
    """Find out before any work whether jobs can be submitted.

    Raises:
        ValueError: submitit, SLURM or the partition is missing; names the fix.
    """
    if find_spec("submitit") is None:
        raise ValueError("--engine slurm needs submitit, which is not installed: pip install 'dalikd[slurm]'")
    if given.get("cluster") == "local":
        return
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise ValueError(
                f"--engine slurm: there is no {program} on the PATH: call it on a machine of the cluster that submits "
                "jobs, or use --engine local or list"
            )
    partition = given.get("partition")
    if partition is not None and shutil.which("sinfo") is not None:
        asked = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, check=False)
        there = sorted(set(asked.stdout.split()))
        missing = [name for name in partition.split(",") if name not in there]
        if asked.returncode == 0 and missing:
            raise ValueError(f"engine.partition {missing[0]}: there is no such partition, there are {', '.join(there)}")


def run_slurm(
    queue: Queue,
    words: Sequence[str],
    given: Mapping[str, Any],
    alike: Callable[[Cell], str | None],
    poll_seconds: float,
) -> bool:
    """Submit what is left of a study, and follow it to its end: jobs that have crashed are submitted again.

    What waits for others is submitted too, an array for teachers, students alone, measurements and students each, which
    begins when the arrays that it needs have ended. submitit's local executor, for trials, knows no dependencies: there
    what is ready is submitted, so many jobs at once as `parallel` allows.

    Args:
        queue: of the whole study.
        words: that follow `dalikd study` in a job, before --only.
        given: the options of the engine.
        alike: what cells have in common that one job does.
        poll_seconds: between two looks.

    Returns:
        whether the end was waited for.

    Raises:
        ValueError: the jobs are refused.
        Interrupted: a signal came; the jobs go on.
    """
    local, folder = given.get("cluster") == "local", queue.folder / ".engine"
    parallel = given.get("parallel", (os.cpu_count() or 1) if local else _PARALLEL)
    jobs, told, all_of_it = _Jobs(folder, given, words, local), _Told(queue), not local
    with obeying("note") as asked:
        while left := queue.left():
            if asked.number:
                words_of_it = "the jobs go on: --status true shows them, and the same command follows them"
                raise Interrupted(f"stopped by signal {asked.number}; {words_of_it}", asked.number)
            jobs.clear(queue)
            there = {name for names, _, _ in jobs.live for name in names}
            todo = [cell for cell in (left if all_of_it else queue.ready()) if cell.name not in there]
            new = units([cell for cell in todo if queue.settle(cell.name)], alike, parallel)
            jobs.submit(new[: parallel - len(jobs.live)] if local else new, queue)
            all_of_it = False
            told.look(now=True)
            if not given.get("wait", True):
                return False
            time.sleep(poll_seconds)
    told.look(now=True)
    return True


class _Jobs:
    """Jobs of a study that have not ended, and how they are submitted. Which these are stands in jobs.json too, so that
    another call follows them; where that is lost, a job too many finds that its runs are done."""

    def __init__(self, folder: Path, given: Mapping[str, Any], words: Sequence[str], local: bool) -> None:
        import submitit

        self._words, self._table = list(words), folder / "jobs.json"
        self._executor = submitit.AutoExecutor(
            folder, cluster="local" if local else "slurm", slurm_max_num_timeout=30, local_max_num_timeout=30
        )
        rest = {name: value for name, value in given.items() if name not in {*OF_SLURM, "name"}}
        self._executor.update_parameters(
            name="dalikd-study",
            timeout_min=given.get("timeout_min", 720),
            gpus_per_node=given.get("gpus", 0 if local else 1) or None,
            cpus_per_task=given.get("cpus"),
            slurm_srun_args=[f"--cpus-per-task={given['cpus']}"] if "cpus" in given else None,  # srun inherits none
            mem_gb=given.get("mem_gb"),
            slurm_partition=given.get("partition"),
            slurm_setup=given.get("setup"),
            slurm_array_parallelism=given.get("parallel", _PARALLEL),
            slurm_signal_delay_s=given.get("signal_delay_s", 120),
            slurm_additional_parameters=rest,
        )
        self._rest, self._local = rest, local
        self.live: list[tuple[list[str], Any, Any]] = []  # names of its runs, it, and what was known then
        for number, names in (read_json(self._table) if self._table.is_file() and not local else {}).items():
            self.live.append((names, submitit.SlurmJob(folder, number, tasks=[0]), {}))
        self._barren: Counter[str] = Counter()

    def clear(self, queue: Queue) -> None:
        """Forget jobs that have ended. Runs of which some in a row have ended before they began are given up."""
        for names, job, before in [entry for entry in self.live if entry[1].done()]:
            code = 1
            with suppress(Exception):  # what a job has raised stands in its log, and its runs tell what became of them
                code = job.result()
            for name in names:
                nothing = name in before and queue.known([name]) == before[name]
                self._barren[name] = self._barren[name] + 1 if nothing else 0
                if nothing and (code == 2 or self._barren[name] == _BARREN):
                    queue.failed[name] = f"{name}: its job ended before it began: {_last_line(job.paths.stderr)}"
        self.live = [entry for entry in self.live if not entry[1].done()]

    def submit(self, new: Sequence[Sequence[Cell]], queue: Queue) -> None:
        """Submit jobs, an array for those of one kind, to begin when those that it needs have ended, well or not: what
        has failed is seen in the folder.

        Raises:
            ValueError: sbatch refuses them.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        kinds: dict[str, list[Sequence[Cell]]] = {}
        for unit in new:
            kinds.setdefault(unit[0].name.partition("/")[0], []).append(unit)
        arrays: dict[str, set[str]] = {}
        for names, job, _ in self.live:
            arrays.setdefault(names[0].partition("/")[0], set()).add(job.job_id.partition("_")[0])
        for kind in sorted(kinds, key=["teachers", "students", "measure", "distill"].index):
            needs = {need for unit in kinds[kind] for cell in unit for need in cell.needs if not queue.is_done(need)}
            after = sorted(set().union(*(arrays.get(need.partition("/")[0], set()) for need in needs)))
            rest = {**self._rest, **({"dependency": f"afterany:{':'.join(after)}"} if after else {})}
            self._executor.update_parameters(slurm_additional_parameters=rest)
            for begin in range(0, len(kinds[kind]), _LARGEST_ARRAY):
                part = kinds[kind][begin : begin + _LARGEST_ARRAY]
                names = [[cell.name for cell in unit] for unit in part]
                known = [{name: queue.known([name]) for name in each} for each in names]
                try:
                    with self._executor.batch():
                        jobs = [self._executor.submit(Job([*self._words, "--only", *each])) for each in names]
                except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
                    words = " ".join(str(error).split())
                    raise ValueError(f"sbatch refuses the jobs ({words}): see to the options under engine:") from error
                self.live += list(zip(names, jobs, known, strict=True))
                arrays.setdefault(kind, set()).update(job.job_id.partition("_")[0] for job in jobs)
                print(f"submitted {len(jobs)} jobs ({kind}): {jobs[0].job_id}, …", flush=True)
        if new and not self._local:
            table = {job.job_id: names for names, job, _ in self.live}
            write_atomically(self._table, json.dumps(table).encode(), sync=False)
