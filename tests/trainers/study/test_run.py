import json
import threading
from pathlib import Path

import pytest

from dalikd.trainers.loop import Interrupted
from dalikd.trainers.study.plan import Cell
from dalikd.trainers.study.run import Queue, run_cells

CELLS = [
    Cell("teachers/a", "train", {}),
    Cell("students/b", "train", {}),
    Cell("measure/a.json", "measure", {}, ("teachers/a",)),
    Cell("distill/ab", "distill", {}, ("teachers/a",)),
]
SHARDS = {"teachers/a": 1, "students/b": 2, "measure/a.json": 2, "distill/ab": 2}


class _Worker:
    """Notes what it did, and writes the results."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.did = folder, []

    def __call__(self, cell: Cell, resumed: Path | None) -> None:
        self.did.append((cell.name, resumed))
        path = self.folder / cell.result
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"finished": True}))


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


def test_a_cell_that_fails_is_named(tmp_path, accelerator):
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with pytest.raises(ValueError, match="teachers/a: the disk is full"):
        run_cells(_queue(tmp_path), fail, accelerator, 0.01)


def test_a_signal_names_the_cell(tmp_path, accelerator):
    def stop(*_: object) -> None:
        raise Interrupted("stopped by signal 15; go on with --resume somewhere")

    with pytest.raises(Interrupted, match=r"^teachers/a stopped by signal 15; the same command goes on there$"):
        run_cells(_queue(tmp_path), stop, accelerator, 0.01)
