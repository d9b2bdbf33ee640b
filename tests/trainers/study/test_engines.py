"""Engines, with processes and jobs that are made up."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalikd.trainers.stopping import Interrupted
from dalikd.trainers.study import engines
from dalikd.trainers.study.engines import (
    Job,
    check_slurm,
    local_places,
    longest_first,
    run_local,
    run_slurm,
    units,
)
from dalikd.trainers.study.plan import Cell
from dalikd.trainers.study.run import Queue
from dalikd.trainers.study.state import Record, read_record, write_record
from dalikd.trainers.tracking import write_json

CELLS = [
    Cell("teachers/a", "train", {}),
    Cell("students/b/x1/seed0", "train", {}),
    Cell("students/b/x1/seed1", "train", {}),
    Cell("measure/a.json", "measure", {}, ("teachers/a",)),
    Cell("distill/a_b/x1/flip/kd/seed0", "distill", {"of": "0"}, ("teachers/a",)),
    Cell("distill/a_b/x1/flip/at/seed0", "distill", {"of": "0"}, ("teachers/a",)),
    Cell("distill/a_b/x1/flip/kd/seed1", "distill", {"of": "1"}, ("teachers/a",)),
]
RESULT: dict[str, Any] = {"finished": True, "epochs": 1.0, "versions": {}, "fingerprint": {"train": "t", "val": "v"}}
RESULT |= {when: {"epoch": 1, "val": {"loss": 1.0, "top1": 0.5, "top5": 1.0}} for when in ("last", "best")}
MEASURED: dict[str, Any] = {
    "mode": "per_sample",
    "precision": "fp32",
    "separation": None,
    "stopped": None,
    "versions": {},
}
MEASURED |= {"confidence": 0.9, "mix_group": 8, "window": 9, "epochs": 1, "seed": 0, "fingerprint": "t"}
MEASURED["results"] = [
    {"augmentation": "flip", "stddev": 0.1, "stderr": 0.1, "entropy": 1.0, "windows": 2, "images": 9},
]
TEACHER, STUDENT = CELLS[0].name, CELLS[1].name


def _alike(cell: Cell) -> str | None:
    return cell.settings.get("of")


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(CELLS, tmp_path / "study", dict.fromkeys((cell.name for cell in CELLS), 1), 1, _alike, engine=True)


def _finish(queue: Queue, *names: str) -> None:
    for cell in queue.own:
        if not names or cell.name in names:
            path = queue.folder / cell.result
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, RESULT if cell.is_run else MEASURED)


def test_what_keeps_others_waiting_longest_comes_first():
    work = {"teachers/a": 1, "students/b/x1/seed0": 9, "students/b/x1/seed1": 12, "measure/a.json": 3}
    work |= {cell.name: 5 + number for number, cell in enumerate(CELLS[4:])}
    found = [cell.name for cell in longest_first(CELLS, work)]
    assert found == [
        *("students/b/x1/seed1", "students/b/x1/seed0", "teachers/a", "distill/a_b/x1/flip/kd/seed1"),
        *("distill/a_b/x1/flip/at/seed0", "distill/a_b/x1/flip/kd/seed0", "measure/a.json"),
    ]
    work["teachers/a"] = 0.0  # as costly as what it is needed for, it comes before it all the same
    found = [cell.name for cell in longest_first([CELLS[0], CELLS[3]], work)]
    assert found == ["teachers/a", "measure/a.json"]


@pytest.mark.parametrize(("parallel", "sizes"), [(1, [1, 1, 1, 1, 2, 1]), (4, [1, 1, 1, 1, 2, 1]), (7, [1] * 7)])
def test_runs_of_one_teacher_pass_are_one_call_unless_workers_would_have_nothing_to_do(parallel, sizes):
    assert [len(unit) for unit in units(CELLS, _alike, parallel)] == sizes


def test_workers_have_a_share_of_the_cores_or_a_gpu(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert [place["OMP_NUM_THREADS"] for place in local_places(3, on_cpu=True)] == ["2"] * 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in local_places(None, on_cpu=False)] == ["5", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in local_places(3, on_cpu=False)] == ["0", "1", "0"]
    with pytest.raises(ValueError, match="one worker for each GPU, and there is none: give --workers 2"):
        local_places(None, on_cpu=True)


# ------------------------------------------------------------------------------------------------------ this machine


class _Process:
    """Ends at once, after it has done something, with an exit code; or, without one, when a signal has come."""

    pid = 4711

    def __init__(self, code: int | None, do: Callable[[], object]) -> None:
        do()
        self._code = code

    def poll(self) -> int | None:
        return self._code

    def send_signal(self, number: int) -> None:
        self._code = 128 + number


def _starting(*lives: tuple[int | None, Callable[[], object]]) -> tuple[Any, list[Any]]:
    started: list[Any] = []

    def start(words: list[str], environment: dict[str, str], log: Path) -> _Process:
        started.append((words, environment["PLACE"]))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"dalikd study: error: {len(started)} is wrong\n")
        return _Process(*lives[len(started) - 1])

    return start, started


def test_a_worker_is_started_again_after_a_crash_and_after_a_signal(queue, capsys):
    def begin() -> None:
        write_record(queue.folder, TEACHER, Record("running"))

    lives = [(-signal.SIGSEGV, begin), (143, lambda: None), (140, lambda: None), (0, lambda: _finish(queue))]
    start, started = _starting(*lives)
    assert run_local(queue, ["--words"], [{"PLACE": "1"}], start) == {"crashes": 1, "signals": 2}
    assert started == [(["--words"], "1")] * 4
    out = capsys.readouterr().out
    assert "worker 4711 was ended by signal 11 (SIGSEGV): started again" in out
    assert "[7/7] distill/a_b/x1/flip/kd/seed1\n" in out


def test_a_worker_is_not_started_again_after_a_mistake_of_the_user(queue):
    start, started = _starting((2, lambda: None), (2, lambda: None))
    message = r"^all workers have ended, and 7 of 7 runs are left: dalikd study: error: 1 is wrong; .* 2 is wrong$"
    with pytest.raises(ValueError, match=message):
        run_local(queue, [], [{"PLACE": "1"}, {"PLACE": "2"}], start)
    assert [place for _, place in started] == ["1", "2"]


def test_a_worker_that_never_begins_is_given_up(queue):
    start, started = _starting(*[(1, lambda: None)] * 3)
    with pytest.raises(ValueError, match=r"a worker crashed 3 times before it did anything: .* 3 is wrong"):
        run_local(queue, [], [{"PLACE": "1"}], start)
    assert len(started) == 3


def test_a_signal_is_handed_on_and_nobody_is_started_again(queue):
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    start, started = _starting((None, lambda: None), (None, stop))
    with pytest.raises(Interrupted, match="stopped by signal 15; the same command goes on") as raised:
        run_local(queue, [], [{"PLACE": "1"}, {"PLACE": "2"}], start)
    assert raised.value.signal == 15
    assert len(started) == 2


# ------------------------------------------------------------------------------------------------------------- SLURM


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's programs, which keep what they are given, and do nothing. Returns the folder of what is submitted."""
    pytest.importorskip("submitit")
    scripts = {
        "sinfo": "echo gpu; echo long",
        "srun": "",
        "squeue": "",
        "sacct": "echo 'JobID|State|NodeList'; echo '1|COMPLETED|'",
        "sbatch": 'n=$(ls "$KEPT" | wc -l); cp "$1" "$KEPT/$n"; [ -z "$REFUSED" ] || { echo "$REFUSED" >&2; exit 1; }\n'
        'echo "Submitted batch job $((n + 1))"',
    }
    (tmp_path / "bin").mkdir()
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "kept").mkdir()
    monkeypatch.setenv("KEPT", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_an_array_for_each_kind_begins_after_those_that_it_needs(queue, cluster):
    given = {"partition": "gpu", "timeout_min": 90, "parallel": 1, "account": "kd", "cpus": 9, "wait": False}
    check_slurm(given)
    assert not run_slurm(queue, ["--config", "a.yaml"], given, _alike, 0.01)
    scripts = [(cluster / str(number)).read_text() for number in range(4)]
    options = [
        {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")}
        for script in scripts
    ]
    shared = {"partition=gpu", "time=90", "account=kd", "cpus-per-task=9", "gpus-per-node=1", "signal=USR2@120"}
    assert all(shared <= found for found in options)
    assert all(re.search(r"^srun .*--cpus-per-task=9 ", script, re.MULTILINE) for script in scripts)
    assert [next((word for word in found if word.startswith("array")), "") for found in options] == [
        *("", "array=0-1%1", "", "array=0-1%1"),
    ]
    after = [next((word for word in found if word.startswith("dependency")), "") for found in options]
    assert after == ["", "", "dependency=afterany:1", "dependency=afterany:1"]
    table = json.loads((queue.folder / ".engine" / "jobs.json").read_text())
    assert table == {
        **{"1": ["teachers/a"], "2_0": ["students/b/x1/seed0"], "2_1": ["students/b/x1/seed1"]},
        **{"3": ["measure/a.json"], "4_0": [cell.name for cell in CELLS[4:6]], "4_1": [CELLS[6].name]},
    }


@pytest.mark.usefixtures("cluster")
def test_jobs_that_are_refused_are_named(queue, monkeypatch):
    monkeypatch.setenv("REFUSED", "sbatch: error: Invalid qos specification")
    with pytest.raises(
        ValueError, match=r"^sbatch refuses the jobs \(.*Invalid qos.*\): see to the options under engine"
    ):
        run_slurm(queue, [], {"qos": "none"}, _alike, 0.01)


@pytest.mark.usefixtures("cluster")
def test_a_partition_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"engine.partition cpu: there is no such partition, there are gpu, long"):
        check_slurm({"partition": "gpu,cpu"})


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs submitit, which is not installed: pip install 'dalikd\[slurm\]'"):
        check_slurm({})
    monkeypatch.setattr(engines, "find_spec", lambda _: True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="there is no sbatch on the PATH: call it on a machine of the cluster"):
        check_slurm({})
    check_slurm({"cluster": "local"})


class _Executor:
    """In place of submitit's: a job does the next thing of a list, at once."""

    lives: list[Callable[[str], int]]
    submitted: list[list[str]]

    def __init__(self, folder: Path, **_: object) -> None:
        self.folder = folder

    def update_parameters(self, **_: object) -> None:
        pass

    def batch(self) -> Any:
        return pytest.MonkeyPatch.context()

    def submit(self, job: Job) -> Any:
        names = job.words[job.words.index("--only") + 1 :]
        self.submitted.append(names)
        code = self.lives.pop(0)(names[0])

        class Ended:
            job_id = str(len(self.submitted))
            paths = type("Paths", (), {"stderr": self.folder / "nothing.err"})

            def done(self) -> bool:
                return True

            def result(self) -> int:
                return code

        return Ended()


def test_jobs_that_crash_are_submitted_again_and_those_that_never_begin_given_up(queue, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr("submitit.AutoExecutor", _Executor)

    def crash(name: str) -> int:
        write_record(queue.folder, name, Record("running", crashes=read_record(queue.folder, name).crashes))
        return 1

    def work(name: str) -> int:
        _finish(queue, name)
        return 0

    _finish(queue, *(cell.name for cell in CELLS[2:]))
    _Executor.submitted = []
    _Executor.lives = [crash, lambda _: 1, crash, lambda _: 1, crash, lambda _: 1]
    assert run_slurm(queue, [], {"cluster": "local", "parallel": 2}, _alike, 0.01)
    assert _Executor.submitted == [[TEACHER], [STUDENT]] * 3
    assert queue.failed[TEACHER].startswith("crashed 3 times, last: its process was killed, or crashed")
    assert queue.failed[STUDENT].startswith(f"{STUDENT}: its job ended before it began: ")
    queue.failed.clear()
    queue.forget()
    _Executor.lives, _Executor.submitted = [work, lambda _: 2], []
    assert run_slurm(queue, [], {"cluster": "local", "parallel": 2}, _alike, 0.01)
    assert (list(queue.failed), len(_Executor.submitted)) == ([STUDENT], 2)  # a mistake would come again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_job_that_was_preempted_calls_submitits_handler(monkeypatch, number):
    class Queued(BaseException):
        pass

    def queue_again(*_: object) -> None:
        raise Queued

    def stop(words: list[str]) -> None:
        assert words == ["--only", "a"]
        raise SystemExit(128 + number)

    monkeypatch.setattr("dalikd.tools.study.main", stop)
    before = signal.signal(signal.SIGUSR2, queue_again)
    try:
        with pytest.raises(Queued):
            Job(["--only", "a"])()
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize(("raised", "code"), [(2, 2), (None, 0), ("a line", 1), (130, 130)])
def test_a_job_gives_its_exit_code(monkeypatch, raised, code):
    def end(_: list[str]) -> None:
        raise SystemExit(raised)

    monkeypatch.setattr("dalikd.tools.study.main", end)
    begun = time.monotonic()
    assert Job([])() == code
    assert time.monotonic() - begun < 30
