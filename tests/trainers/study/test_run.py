import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dalikd.pipelines.lock import take_lock
from dalikd.pipelines.objects import Unavailable
from dalikd.trainers.stopping import Interrupted
from dalikd.trainers.study import run
from dalikd.trainers.study.plan import Cell
from dalikd.trainers.study.run import Queue, run_cells
from dalikd.trainers.study.state import read_record
from dalikd.trainers.tracking import write_json

CELLS = [
    Cell("teachers/a", "train", {}),
    Cell("students/b", "train", {}),
    Cell("measure/a.json", "measure", {}, ("teachers/a",)),
    Cell("distill/ab", "distill", {}, ("teachers/a",)),
]
EPOCH = {"epoch": 1, "val": {"loss": 1.0, "top1": 0.5, "top5": 1.0}}
RESULT = {"finished": True, "epochs": 1.0, "last": EPOCH, "best": EPOCH, "versions": {}}
RESULT["fingerprint"] = {"train": "t", "val": "v"}
ROW = {"augmentation": "flip", "stddev": 0.1, "stderr": 0.1, "entropy": 1.0, "windows": 2, "images": 9}
MEASURED = {"results": [ROW], "mode": "per_sample", "mix_group": 8, "window": 9, "epochs": 1, "seed": 0}
MEASURED |= {"precision": "fp32", "confidence": 0.9, "separation": None, "stopped": None}
MEASURED |= {"versions": {}, "fingerprint": "t"}
SHARDS = {"teachers/a": 1, "students/b": 2, "measure/a.json": 2, "distill/ab": 2}


class _Worker:
    """Notes what it did, and writes the results."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.did = folder, []

    def __call__(self, cell: Cell, resumed: Path | None) -> None:
        self.did.append((cell.name, resumed))
        path = self.folder / cell.result
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, RESULT if cell.is_run else MEASURED)  # whole or not at all, as the commands write it


def _queue(folder: Path, shard: int = 1, shards: dict[str, int] | None = None) -> Queue:
    return Queue(CELLS, folder, shards or dict.fromkeys(SHARDS, 1), shard)


def test_all_cells_are_done_in_order(tmp_path, accelerator, capsys):
    worker = _Worker(tmp_path)
    queue = _queue(tmp_path)
    run_cells(queue, worker, accelerator, 0.01)
    assert worker.did == [(cell.name, None) for cell in CELLS]
    assert queue.missing() == []
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert printed == [f"[{number}/4] {cell.name}" for number, cell in enumerate(CELLS, start=1)]


def test_what_is_done_is_left_alone_and_what_has_a_state_goes_on(tmp_path, accelerator, capsys):
    _Worker(tmp_path)(CELLS[0], None)
    state = tmp_path / "distill/ab/last/trainer.pt"
    state.parent.mkdir(parents=True)
    state.touch()
    worker = _Worker(tmp_path)
    run_cells(_queue(tmp_path), worker, accelerator, 0.01)
    assert worker.did == [("students/b", None), ("measure/a.json", None), ("distill/ab", tmp_path / "distill/ab")]
    assert "[4/4] distill/ab (goes on)" in capsys.readouterr().out


def test_a_shard_does_what_it_can_and_waits_for_the_rest(tmp_path, accelerator, capsys):
    worker = _Worker(tmp_path)
    thread = threading.Thread(target=run_cells, args=(_queue(tmp_path, 2, SHARDS), worker, accelerator, 0.01))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert worker.did == [("students/b", None)]
    first = _Worker(tmp_path)
    queue = _queue(tmp_path, 1, SHARDS)
    run_cells(queue, first, accelerator, 0.01)
    thread.join(10)
    assert not thread.is_alive()
    assert first.did == [("teachers/a", None)]
    assert [name for name, _ in worker.did] == ["students/b", "measure/a.json", "distill/ab"]
    assert capsys.readouterr().out.count("waiting for teachers/a (shard 1)") == 1
    assert queue.missing() == []


# ------------------------------------------------------------------------------------------------ several calls


def _lock(folder: Path, name: str) -> Any:
    lock = take_lock(folder / ".locks" / f"{name}.lock")
    assert lock is not None
    return lock


def test_what_another_call_works_on_is_left_alone_and_waited_for(tmp_path, accelerator, capsys):
    live = tmp_path / "teachers/a/log.jsonl"  # of a run without a state, which would be removed
    live.parent.mkdir(parents=True)
    live.touch()
    lock, worker = _lock(tmp_path, "teachers/a"), _Worker(tmp_path)
    thread = threading.Thread(target=run_cells, args=(_queue(tmp_path), worker, accelerator, 0.01))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert [name for name, _ in worker.did] == ["students/b"]
    assert live.exists()
    _Worker(tmp_path)(CELLS[0], None)
    lock.close()
    thread.join(10)
    assert not thread.is_alive()
    assert [name for name, _ in worker.did] == ["students/b", "measure/a.json", "distill/ab"]
    out = capsys.readouterr().out
    assert out.count("waiting for") == out.count("waiting for teachers/a (another call: process ") == 1


def test_a_cell_that_another_call_gave_up_is_taken_over(tmp_path, accelerator):
    lock, worker = _lock(tmp_path, "teachers/a"), _Worker(tmp_path)
    thread = threading.Thread(target=run_cells, args=(_queue(tmp_path), worker, accelerator, 0.01))
    thread.start()
    while not worker.did:
        thread.join(0.01)
    lock.close()
    thread.join(10)
    assert [name for name, _ in worker.did] == ["students/b", "teachers/a", "measure/a.json", "distill/ab"]


def test_calls_that_start_at_once_do_each_cell_once(tmp_path, accelerator):
    workers = [_Worker(tmp_path) for _ in range(3)]

    def slowly(worker: _Worker, cell: Cell, resumed: Path | None) -> None:
        time.sleep(0.02)
        worker(cell, resumed)

    threads = [
        threading.Thread(
            target=run_cells,
            args=(_queue(tmp_path), lambda *cell, worker=worker: slowly(worker, *cell), accelerator, 0.005),
        )
        for worker in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    did = [name for worker in workers for name, _ in worker.did]
    assert sorted(did) == sorted(cell.name for cell in CELLS)


def test_a_cell_ended_by_another_call_meanwhile_is_not_taken(tmp_path, monkeypatch):
    def late(path: Path, _lost: Any) -> Any:
        if path.stem == "a":
            _Worker(tmp_path)(CELLS[0], None)
        return take_lock(path)

    monkeypatch.setattr("dalikd.trainers.study.run.take_lock", late)
    queue = _queue(tmp_path)
    assert [cell.name for cell in queue.take()] == ["students/b"]
    assert take_lock(tmp_path / ".locks/students/b.lock") is None
    queue.release()
    for name in ("teachers/a", "students/b"):
        _lock(tmp_path, name).close()


# ----------------------------------------------------------------------------------------------- one teacher pass


STUDENTS = [Cell(f"distill/{name}", "distill", {"of": name[0]}, ("teachers/a",)) for name in ("a1", "b1", "a2", "a3")]


def _sharing(folder: Path) -> Queue:
    cells = [CELLS[0], *STUDENTS]
    return Queue(cells, folder, {cell.name: 1 for cell in cells}, 1, lambda cell: cell.settings.get("of"))


def test_students_alike_are_done_at_once_but_for_those_that_others_do(tmp_path, accelerator, capsys):
    worker, together = _Worker(tmp_path), []
    _Worker(tmp_path)(STUDENTS[2], None)  # done before

    def do(step: Any) -> None:
        together.append([cell.name for cell, _ in step])
        for cell, resumed in step:
            worker(cell, resumed)

    run_cells(_sharing(tmp_path), worker, accelerator, 0.01, do)
    assert together == [["distill/a1", "distill/a3"]]
    assert [name for name, _ in worker.did] == ["teachers/a", "distill/a1", "distill/a3", "distill/b1"]
    assert "on the same teacher pass: [4/5] distill/a3" in capsys.readouterr().out
    for cell in STUDENTS:
        _lock(tmp_path, cell.name).close()


def test_what_fails_together_is_tried_one_by_one(tmp_path, accelerator):
    worker = _Worker(tmp_path)

    def alone(cell: Cell, resumed: Path | None) -> None:
        if cell.name == "distill/a2":
            raise ValueError("the loss is nan")
        worker(cell, resumed)

    def do(step: Any) -> None:
        worker(*step[0])
        raise ValueError("one of them: the loss is nan")

    with pytest.raises(ValueError, match=r"1 of 5 runs failed.*distill/a2: the loss is nan"):
        run_cells(_sharing(tmp_path), alone, accelerator, 0.01, do)
    assert [name for name, _ in worker.did] == ["teachers/a", "distill/a1", "distill/b1", "distill/a3"]


# ------------------------------------------------------------------------------------------------------ failures


class _Failing(_Worker):
    """Fails at some cells."""

    def __init__(self, folder: Path, *names: str) -> None:
        super().__init__(folder)
        self.names = names

    def __call__(self, cell: Cell, resumed: Path | None) -> None:
        if cell.name in self.names:
            raise OSError("the disk is full")
        super().__call__(cell, resumed)


def test_a_cell_that_fails_keeps_no_other_from_being_done(tmp_path, accelerator, capsys):
    worker = _Failing(tmp_path, "teachers/a")
    with pytest.raises(
        ValueError,
        match=r"^1 of 4 runs failed \(2 more need what they make\), the same command tries them again: "
        r"teachers/a: the disk is full$",
    ):
        run_cells(_queue(tmp_path), worker, accelerator, 0.01)
    assert [name for name, _ in worker.did] == ["students/b"]
    assert "failed: teachers/a: the disk is full\n" in capsys.readouterr().out
    again = _Worker(tmp_path)
    run_cells(_queue(tmp_path), again, accelerator, 0.01)
    assert [name for name, _ in again.did] == ["teachers/a", "measure/a.json", "distill/ab"]


class _Unanswered(_Worker):
    """Whose object store does not answer, so many times for each cell."""

    def __init__(self, folder: Path, times: int) -> None:
        super().__init__(folder)
        self.times = dict.fromkeys(SHARDS, times)

    def __call__(self, cell, resumed):
        self.times[cell.name] -= 1
        if self.times[cell.name] >= 0:
            raise Unavailable("s3://a cannot be read", answered=self.times[cell.name] > 1)
        super().__call__(cell, resumed)


def test_while_a_store_does_not_answer_no_cell_fails(tmp_path, accelerator, capsys, monkeypatch):
    monkeypatch.setattr(run, "_PAUSE", 0.01)
    monkeypatch.setattr(run, "_PAUSES", 3)
    worker = _Unanswered(tmp_path, 3)
    run_cells(_queue(tmp_path), worker, accelerator, 0.01)
    assert [name for name, _ in worker.did] == ["teachers/a", "students/b", "measure/a.json", "distill/ab"]
    assert capsys.readouterr().out.count("s: teachers/a: s3://a cannot be read\n") == 3  # and for each of the others
    with pytest.raises(ValueError, match=r"^2 of 4 runs failed \(2 more .*: teachers/a: s3://a cannot be read; stud"):
        run_cells(_queue(tmp_path / "other"), _Unanswered(tmp_path / "other", 4), accelerator, 0.01)


def test_all_cells_that_fail_are_listed(tmp_path, accelerator):
    worker = _Failing(tmp_path, "students/b", "distill/ab")
    with pytest.raises(ValueError, match=r"^2 of 4 runs failed, the .*: students/b: the .* full; distill/ab: the "):
        run_cells(_queue(tmp_path), worker, accelerator, 0.01)
    assert [name for name, _ in worker.did] == ["teachers/a", "measure/a.json"]


def test_several_processes_stop_at_the_first_failure(tmp_path):
    """The others may wait inside the run for the one that failed."""
    lines: list[str] = []
    accelerator = SimpleNamespace(
        is_main_process=True, num_processes=2, print=lambda *line, **_: lines.append(*line), wait_for_everyone=None
    )
    worker = _Failing(tmp_path, "teachers/a")
    with pytest.raises(ValueError, match=r"^teachers/a: the disk is full$"):
        run_cells(_queue(tmp_path), worker, cast(Any, accelerator), 0.01)
    assert worker.did == []
    _lock(tmp_path, "teachers/a").close()


def test_a_signal_names_the_cell(tmp_path, accelerator):
    def stop(*_: object) -> None:
        raise Interrupted("stopped by signal 15; go on with --resume somewhere", 15)

    message = r"^teachers/a stopped by signal 15; the same command goes on there$"
    with pytest.raises(Interrupted, match=message) as raised:
        run_cells(_queue(tmp_path), stop, accelerator, 0.01)
    assert raised.value.signal == 15
    _lock(tmp_path, "teachers/a").close()


# ------------------------------------------------------------------------------------------------------- engines


def _engine_queue(folder: Path) -> Queue:
    return Queue(CELLS, folder, dict.fromkeys(SHARDS, 1), 1, engine=True)


def test_a_run_whose_process_is_gone_is_tried_twice_more(tmp_path):
    """The record says that it runs, and nobody has its lock."""
    for crashes in range(3):
        queue = _engine_queue(tmp_path)
        assert queue.take()[0].name == "teachers/a"
        assert read_record(tmp_path, "teachers/a").crashes == crashes
        for lock, *_ in queue._taken.values():  # as a kill would
            lock.close()
    queue = _engine_queue(tmp_path)
    assert [cell.name for cell in queue.take()] == ["students/b"]
    queue.release()
    error = queue.has_failed("teachers/a")
    assert error.startswith(f"crashed 3 times, last: its process was killed, or crashed: process {os.getpid()} on ")
    assert [cell.name for cell in queue.left()] == ["students/b"]
    assert [cell.name for cell in _queue(tmp_path).take()] == ["teachers/a"]  # without an engine it is tried again


def test_what_another_call_has_failed_at_is_left_alone_until_it_is_forgotten(tmp_path, accelerator):
    with pytest.raises(ValueError, match="1 of 4 runs failed"):
        run_cells(_engine_queue(tmp_path), _Failing(tmp_path, "teachers/a"), accelerator, 0.01)
    worker = _Worker(tmp_path)
    with pytest.raises(ValueError, match=r"1 of 4 runs failed \(2 more .*: teachers/a: the disk is full"):
        run_cells(_engine_queue(tmp_path), worker, accelerator, 0.01)
    assert worker.did == []
    queue = _engine_queue(tmp_path)
    queue.forget()
    run_cells(queue, worker, accelerator, 0.01)
    assert [name for name, _ in worker.did] == ["teachers/a", "measure/a.json", "distill/ab"]


def test_a_fault_counts_as_a_crash_and_a_signal_does_not(tmp_path, accelerator):
    def fail(*_: object) -> None:
        raise RuntimeError("a fault of dalikd")

    def stop(*_: object) -> None:
        raise Interrupted("stopped by signal 15; go on", 15)

    for work in (fail, stop):
        with pytest.raises((RuntimeError, Interrupted)):
            run_cells(_engine_queue(tmp_path), work, accelerator, 0.01)
    record = read_record(tmp_path, "teachers/a")
    assert (record.state, record.crashes) == ("left", 1)
    assert record.error == "Interrupted: teachers/a stopped by signal 15; the same command goes on there"
    assert _engine_queue(tmp_path).settle("teachers/a")


def test_only_some_runs_are_done_and_what_they_need_is_waited_for(tmp_path, accelerator, capsys):
    queue = Queue(CELLS, tmp_path, dict.fromkeys(SHARDS, 1), 1, only=["distill/ab"], engine=True)
    worker = _Worker(tmp_path)
    thread = threading.Thread(target=run_cells, args=(queue, worker, accelerator, 0.01))
    thread.start()
    thread.join(0.2)
    assert worker.did == []
    _Worker(tmp_path)(CELLS[0], None)
    thread.join(10)
    assert [name for name, _ in worker.did] == ["distill/ab"]
    assert "[1/1] distill/ab" in capsys.readouterr().out


def test_workers_share_the_runs_of_a_teacher_pass(tmp_path):
    cells = [CELLS[0], *STUDENTS]
    shards = {cell.name: 1 for cell in cells}
    _Worker(tmp_path)(CELLS[0], None)
    two = [
        Queue(cells, tmp_path, shards, 1, lambda cell: cell.settings.get("of"), workers=2, engine=True)
        for _ in range(2)
    ]
    taken = [[cell.name for cell in queue.take()] for queue in two]
    assert taken == [["distill/a1", "distill/a2"], ["distill/b1"]]
    for queue in two:
        queue.release()
