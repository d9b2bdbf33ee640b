"""Works through the cells of a study: those of one shard, in order, waiting for what other calls make."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dalikd.pipelines.lock import Lease, holder, is_held, take_lock
from dalikd.pipelines.objects import Unavailable
from dalikd.trainers.signals import command_name, say
from dalikd.trainers.stopping import Interrupted
from dalikd.trainers.study.plan import STUDENTS_OF_A_PASS, Cell
from dalikd.trainers.study.state import Record, clear_unsaved, is_done, lock_path, read_record, write_record

__all__ = ["RETRIES", "Queue", "raise_failures", "run_cells"]

#: after so many crashes a cell is tried again; by an engine
RETRIES = 2

_PAUSE = 60.0  # seconds, after an object store has not answered for minutes
_PAUSES = 60  # in a row, before a cell has failed

#: runs a cell; the second argument is the run folder to go on with, or None
RunCell = Callable[[Cell, Path | None], object]
#: runs several cells at once, each with such a folder or None
RunTogether = Callable[[Sequence[tuple[Cell, Path | None]]], object]


class Queue:
    """The cells of one shard, and what is done of all.

    Several calls may work on one folder, whatever their shards: a cell that one has taken is locked for the others.

    Args:
        cells: of the whole study, each after those that it needs.
        folder: of the study.
        shards: the shard of each cell, by its name.
        shard: this one.
        alike: what cells have in common that may be run at once; None: this one is run alone.
        only: names of the own cells; None: all of the shard.
        workers: calls that share the work: they share runs of one teacher pass too.
        engine: whether an engine has started this call: what other calls have failed at is left alone then, and so is
            what has crashed more than `RETRIES` times.

    Attributes:
        folder: of the study.
        own: cells of this call.
        failed: what was wrong with those that failed, by their names.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        folder: Path,
        shards: Mapping[str, int],
        shard: int,
        alike: Callable[[Cell], str | None] = lambda _: None,
        *,
        only: Sequence[str] | None = None,
        workers: int = 1,
        engine: bool = False,
    ) -> None:
        self.folder = folder
        self.own = [cell for cell in cells if shards[cell.name] == shard and (only is None or cell.name in only)]
        self.failed: dict[str, str] = {}
        self._cells, self._shards = {cell.name: cell for cell in cells}, shards
        self._done: set[str] = set()
        self._alike, self._alone = alike, set[str]()
        self._workers, self._engine = workers, engine
        self._taken: dict[str, tuple[IO[str] | Lease, Record, float]] = {}

    def is_done(self, name: str) -> bool:
        """Whether a cell is done, whoever did it; what is done stays so."""
        if name not in self._done and is_done(self.folder, self._cells[name]):
            self._done.add(name)
        return name in self._done

    def left(self) -> list[Cell]:
        """Own cells to do: not done, not failed, and in need of none of those that failed."""
        left, lost = [], set(self.failed)
        for cell in self.own:
            if self.is_done(cell.name):
                lost.discard(cell.name)
                continue
            for name in (cell.name, *cell.needs) if self._engine else ():
                if name not in lost and not self.is_done(name) and (error := self.has_failed(name)):
                    self.failed[name] = error
                    lost.add(name)
            if lost & {cell.name, *cell.needs}:
                lost.add(cell.name)
            else:
                left.append(cell)
        return left

    def has_failed(self, name: str) -> str:
        """What was wrong with a cell that is not tried again; empty: it may be."""
        record = read_record(self.folder, name)
        return record.error or "it failed" if record.state == "failed" else ""

    def ready(self) -> list[Cell]:
        """What is left and has its needs."""
        return [cell for cell in self.left() if all(self.is_done(need) for need in cell.needs)]

    def take(self) -> list[Cell]:
        """The first of them whose needs are there and that no other call has taken, and those that may be run with it;
        locked until `release`. None: wait, or nothing is left."""
        ready = self.ready()
        most = min(STUDENTS_OF_A_PASS, ceil(len(ready) / self._workers))
        taken: list[Cell] = []
        for cell in ready:
            if taken and not self._go_together(taken[0], cell):
                continue
            path = lock_path(self.folder, cell.name)
            lock = take_lock(path, _end)
            if lock is None:
                continue
            if (
                self.is_done(cell.name)  # another call ended it between the look and the lock
                or self._gives_up(cell.name)
                or (taken and not self._go_together(taken[0], cell))
            ):
                lock.close()
                continue
            record = replace(read_record(self.folder, cell.name), state="running", who=holder(path))
            self._taken[cell.name] = lock, record, time.monotonic()
            write_record(self.folder, cell.name, record)
            taken.append(cell)
            if len(taken) == most or self._alike(cell) is None:
                break
        return taken

    def _go_together(self, one: Cell, other: Cell) -> bool:
        alone = self._alone & {one.name, other.name}
        return not alone and self._alike(one) is not None and self._alike(one) == self._alike(other)

    def release(self, state: str = "left", error: str = "", crashes: int = 0) -> None:
        """Let other calls have what was taken, and write down what became of it: what is not done is in that state."""
        for name, (lock, record, begun) in self._taken.items():
            seconds = record.seconds + (time.monotonic() - begun) / len(self._taken)
            record = replace(record, state=state, error=error, seconds=seconds, crashes=record.crashes + crashes)
            try:
                if self.is_done(name):
                    record = replace(record, state="done", error="")
                write_record(self.folder, name, record)
            finally:
                lock.close()
        self._taken.clear()

    def part(self, cells: Sequence[Cell]) -> None:
        """Cells that failed together are run one by one, so that the one that is at fault is found."""
        self._alone.update(cell.name for cell in cells)

    def _gives_up(self, name: str) -> bool:
        """Count a crash of whoever had the cell before: it has ended without a word. Returns whether that was one too
        many. The cell is locked."""
        record = read_record(self.folder, name)
        if record.state == "running":
            error = f"its process was killed, or crashed: {record.who}"
            record = replace(record, state="left", crashes=record.crashes + 1, error=error)
            write_record(self.folder, name, record)
        if record.crashes >= RETRIES:  # once more, alone
            self._alone.add(name)
        if not self._engine or record.crashes <= RETRIES:
            return False
        words = f"crashed {record.crashes} times, last: {record.error}"
        write_record(self.folder, name, replace(record, state="failed", error=words))
        return True

    def settle(self, name: str) -> bool:
        """Count a crash of a cell that nobody works on. Returns whether it may be tried now."""
        lock = take_lock(lock_path(self.folder, name))
        if lock is None:
            return False
        try:
            return not self._gives_up(name)
        finally:
            lock.close()

    def known(self, names: Sequence[str] | None = None) -> list[Any]:
        """What is known of cells, default: of all own ones; it is another after each start, save and end of a run."""
        names = [cell.name for cell in self.own] if names is None else names
        return [self.is_done(name) or read_record(self.folder, name) for name in names]

    def forget(self) -> None:
        """Try again what has failed: with no crash counted yet. What other calls work on is left alone."""
        for cell in self.own:
            record = read_record(self.folder, cell.name)
            if (record.state == "failed" or record.crashes) and not self.is_done(cell.name):
                lock = take_lock(lock_path(self.folder, cell.name))
                if lock is not None:
                    write_record(self.folder, cell.name, replace(record, state="left", crashes=0))
                    lock.close()

    def missing(self) -> list[str]:
        """Names of the cells of all shards that are not done."""
        return [name for name in self._cells if not self.is_done(name)]

    def waits_for(self) -> list[str]:
        """What the shard waits for, in words: own cells that other calls have taken, and cells of other shards."""
        own = {cell.name for cell in self.own}
        needs = dict.fromkeys(need for cell in self.left() for need in cell.needs if not self.is_done(need))
        held = [(cell.name, lock_path(self.folder, cell.name)) for cell in self.ready()]
        # one that nobody holds has only now become ready
        taken = [f"{name} (another call: {holder(path)})" for name, path in held if is_held(path)]
        return taken + [f"{need} (shard {self._shards[need]})" for need in needs if need not in own]


def _end(reason: str) -> None:
    """Another call may have this one's cell: what this one would write now would be a part of its run."""
    say(f"{command_name()}: {reason}: this call ends, so that no run is written by two")
    os._exit(1)


def run_cells(
    queue: Queue,
    run: RunCell,
    accelerator: Accelerator,
    poll_seconds: float,
    together: RunTogether | None = None,
) -> None:
    """Do what is not done yet of one shard. All processes do the same cells; the main one says which.

    A cell that fails does not keep the others from being done; while the object store does not answer, none is tried.
    Several processes stop at once, however: when one of them fails, the others may wait for it inside the run.

    Args:
        queue: of the shard.
        run: does a cell.
        accelerator: joins the processes.
        poll_seconds: between two looks for what another call makes.
        together: does several cells at once, where the queue gives some.

    Raises:
        ValueError: cells failed; names them.
        Unavailable: the object store does not answer several processes.
        Interrupted: a signal came; the state is saved.
    """
    said, pauses = set[str](), 0
    while (step := _agreed(_next_step(queue) if accelerator.is_main_process else None)) is not None:
        if not step:
            _wait(queue, said, accelerator, poll_seconds)
            continue
        number = len(queue.own) - len(queue.left()) + 1
        for place, (cell, resumed) in enumerate(step):
            goes_on = " (goes on)" if resumed else ""
            begin = "\n" if place == 0 else "  on the same teacher pass: "
            accelerator.print(f"{begin}[{number + place}/{len(queue.own)}] {cell.name}{goes_on}", flush=True)
        try:
            _run(step, run, together)
            pauses = 0
        except (ValueError, Unavailable) as error:
            pauses = pauses + 1 if isinstance(error, Unavailable) else 0
            passes = 0 < pauses <= _PAUSES
            queue.release("left" if passes or len(step) > 1 else "failed", str(error))
            if accelerator.num_processes > 1:
                raise
            if passes:
                accelerator.print(f"tried again in {_PAUSE:.0f} s: {error}", flush=True)
                time.sleep(_PAUSE)
                continue
            accelerator.print(f"failed: {error}", flush=True)
            if len(step) == 1:
                queue.failed[step[0][0].name] = str(error)
            else:
                queue.part([cell for cell, _ in step])
        except Exception as error:
            crashed = not isinstance(error, Interrupted)
            queue.release("left", f"{type(error).__name__}: {error}", crashes=int(crashed))
            raise
        finally:
            queue.release()
        accelerator.wait_for_everyone()
    raise_failures(queue)


def _next_step(queue: Queue) -> list[tuple[Cell, Path | None]] | None:
    """The next cells, each with the run folder that it goes on with; no cell: wait; None: nothing is left."""
    try:
        taken = [(cell, clear_unsaved(queue.folder, cell)) for cell in queue.take()]
    except BaseException:
        queue.release()
        raise
    return taken if taken or queue.left() else None


def _wait(queue: Queue, said: set[str], accelerator: Accelerator, seconds: float) -> None:
    """Wait, and say what for, once for each thing."""
    if accelerator.is_main_process:
        new = [thing for thing in queue.waits_for() if thing not in said]
        said.update(new)
        if new:
            print(f"waiting for {', '.join(new)}", flush=True)
    time.sleep(seconds)


def _run(step: Sequence[tuple[Cell, Path | None]], run: RunCell, together: RunTogether | None) -> None:
    cell = step[0][0]
    try:
        if len(step) == 1 or together is None:
            run(*step[0])
        else:
            together(step)
    except Interrupted as stop:
        reason = str(stop).partition(";")[0]
        raise Interrupted(f"{cell.name} {reason}; the same command goes on there", stop.signal) from None
    except Unavailable as error:
        raise Unavailable(f"{cell.name}: {error}", error.answered) from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{cell.name}: {error}") from error


def raise_failures(queue: Queue) -> None:
    """Raises ValueError: own cells have failed; names them."""
    if not queue.failed:
        return
    lost = sum(cell.name not in queue.failed and not queue.is_done(cell.name) for cell in queue.own)
    more = f" ({lost} more need what they make)" if lost else ""
    raise ValueError(
        f"{len(queue.failed)} of {len(queue.own)} runs failed{more}, the same command tries them again: "
        + "; ".join(queue.failed.values())
    )


def _agreed(value: Any) -> Any:
    """The main process's value, on every process."""
    values = [value]
    broadcast_object_list(values)
    return values[0]
