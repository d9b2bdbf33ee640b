"""Works through the cells of a study: those of one shard, in order, waiting for what other calls make."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dalikd.pipelines.lock import holder, take_lock
from dalikd.trainers.stopping import Interrupted
from dalikd.trainers.study.plan import STUDENTS_OF_A_PASS, Cell
from dalikd.trainers.study.state import clear_unsaved, is_done

__all__ = ["Queue", "run_cells"]

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

    Attributes:
        folder: of the study.
        own: cells of this shard.
        failed: what was wrong with those that failed, by their names.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        folder: Path,
        shards: Mapping[str, int],
        shard: int,
        alike: Callable[[Cell], str | None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.own = [cell for cell in cells if shards[cell.name] == shard]
        self.failed: dict[str, str] = {}
        self._cells, self._shards = {cell.name: cell for cell in cells}, shards
        self._done: set[str] = set()
        self._alike, self._alone = alike, set[str]()
        self._locks: list[IO[str]] = []

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
            elif lost & {cell.name, *cell.needs}:
                lost.add(cell.name)
            else:
                left.append(cell)
        return left

    def take(self) -> list[Cell]:
        """The first of them whose needs are there and that no other call has taken, and those that may be run with it;
        locked until `release`. None: wait, or nothing is left."""
        taken: list[Cell] = []
        for cell in self._ready():
            if taken and not self._go_together(taken[0], cell):
                continue
            lock = take_lock(self._lock_path(cell))
            if lock is None:
                continue
            if self.is_done(cell.name):
                lock.close()  # another call ended it between the look and the lock
                continue
            self._locks.append(lock)
            taken.append(cell)
            if len(taken) == STUDENTS_OF_A_PASS or self._alike(cell) is None:
                break
        return taken

    def _go_together(self, one: Cell, other: Cell) -> bool:
        alone = self._alone & {one.name, other.name}
        return not alone and self._alike(one) is not None and self._alike(one) == self._alike(other)

    def release(self) -> None:
        """Let other calls have what was taken."""
        while self._locks:
            self._locks.pop().close()

    def part(self, cells: Sequence[Cell]) -> None:
        """Cells that failed together are run one by one, so that the one that is at fault is found."""
        self._alone.update(cell.name for cell in cells)

    def missing(self) -> list[str]:
        """Names of the cells of all shards that are not done."""
        return [name for name in self._cells if not self.is_done(name)]

    def waits_for(self) -> list[str]:
        """What the shard waits for, in words: own cells that other calls have taken, and cells of other shards."""
        own = {cell.name for cell in self.own}
        needs = dict.fromkeys(need for cell in self.left() for need in cell.needs if not self.is_done(need))
        held = [(cell.name, holder(self._lock_path(cell))) for cell in self._ready()]
        taken = [f"{name} (another call: {who})" for name, who in held if who]  # else it has only now become ready
        return taken + [f"{need} (shard {self._shards[need]})" for need in needs if need not in own]

    def _ready(self) -> list[Cell]:
        return [cell for cell in self.left() if all(self.is_done(need) for need in cell.needs)]

    def _lock_path(self, cell: Cell) -> Path:
        """Outside of the run folder, which is removed and made anew while the lock is held."""
        return self.folder / ".locks" / f"{cell.name}.lock"


def run_cells(
    queue: Queue,
    run: RunCell,
    accelerator: Accelerator,
    poll_seconds: float,
    together: RunTogether | None = None,
) -> None:
    """Do what is not done yet of one shard. All processes do the same cells; the main one says which.

    A cell that fails does not keep the others from being done. Several processes stop at once, however: when one of
    them fails, the others may wait for it inside the run.

    Args:
        queue: of the shard.
        run: does a cell.
        accelerator: joins the processes.
        poll_seconds: between two looks for what another call makes.
        together: does several cells at once, where the queue gives some.

    Raises:
        ValueError: cells failed; names them.
        Interrupted: a signal came; the state is saved.
    """
    said: set[str] = set()
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
        except ValueError as error:
            if accelerator.num_processes > 1:
                raise
            accelerator.print(f"failed: {error}", flush=True)
            if len(step) == 1:
                queue.failed[step[0][0].name] = str(error)
            else:
                queue.part([cell for cell, _ in step])
        finally:
            queue.release()
        accelerator.wait_for_everyone()
    _raise_failures(queue)


def _next_step(queue: Queue) -> list[tuple[Cell, Path | None]] | None:
    """The next cells, each with the run folder that it goes on with; no cell: wait; None: nothing is left."""
    taken = [(cell, clear_unsaved(queue.folder, cell)) for cell in queue.take()]
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
    except (ValueError, OSError) as error:
        raise ValueError(f"{cell.name}: {error}") from error


def _raise_failures(queue: Queue) -> None:
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
