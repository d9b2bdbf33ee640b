"""Works through the cells of a study: those of one shard, in order, waiting for what other shards make."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dalikd.trainers.loop import Interrupted
from dalikd.trainers.study.plan import Cell
from dalikd.trainers.study.state import clear_unsaved, is_done

__all__ = ["Queue", "run_cells"]

#: runs a cell; the second argument is the run folder to go on with, or None
RunCell = Callable[[Cell, Path | None], object]


class Queue:
    """The cells of one shard, and what is done of all.

    Args:
        cells: of the whole study, each after those that it needs.
        folder: of the study.
        shards: the shard of each cell, by its name.
        shard: this one.
    """

    def __init__(self, cells: Sequence[Cell], folder: Path, shards: Mapping[str, int], shard: int) -> None:
        self.folder = folder
        self.own = [cell for cell in cells if shards[cell.name] == shard]
        self._cells, self._shards = {cell.name: cell for cell in cells}, shards
        self._done: set[str] = set()

    def is_done(self, name: str) -> bool:
        """Whether a cell is done, whoever did it; what is done stays so."""
        if name not in self._done and is_done(self.folder, self._cells[name]):
            self._done.add(name)
        return name in self._done

    def left(self) -> list[Cell]:
        """Own cells that are not done."""
        return [cell for cell in self.own if not self.is_done(cell.name)]

    def ready(self) -> Cell | None:
        """The first of them whose needs are there."""
        return next((cell for cell in self.left() if all(self.is_done(need) for need in cell.needs)), None)

    def missing(self) -> list[str]:
        """Names of the cells of all shards that are not done."""
        return [name for name in self._cells if not self.is_done(name)]

    def waits_for(self) -> str:
        """What the shard waits for, in words."""
        needs = dict.fromkeys(need for cell in self.left() for need in cell.needs if not self.is_done(need))
        return ", ".join(f"{need} (shard {self._shards[need]})" for need in needs)


def run_cells(queue: Queue, run: RunCell, accelerator: Accelerator, poll_seconds: float) -> None:
    """Do what is not done yet of one shard. All processes do the same cells; the main one says which.

    Args:
        queue: of the shard.
        run: does a cell.
        accelerator: joins the processes.
        poll_seconds: between two looks for what another shard makes.

    Raises:
        ValueError: a cell failed; names it.
        Interrupted: a signal came; the state is saved.
    """
    said = False
    while (step := _agreed(_next_step(queue) if accelerator.is_main_process else None)) is not None:
        cell, resumed = step
        if cell is None:
            if not said:
                accelerator.print(f"waiting for {queue.waits_for()}", flush=True)
            said = True
            time.sleep(poll_seconds)
            continue
        number = len(queue.own) - len(queue.left()) + 1
        goes_on = " (goes on)" if resumed else ""
        accelerator.print(f"\n[{number}/{len(queue.own)}] {cell.name}{goes_on}", flush=True)
        _run(cell, resumed, run)
        accelerator.wait_for_everyone()


def _next_step(queue: Queue) -> tuple[Cell | None, Path | None] | None:
    """The next cell and the run folder that it goes on with; no cell: wait; None: all is done."""
    if not queue.left():
        return None
    cell = queue.ready()
    return cell, None if cell is None else clear_unsaved(queue.folder, cell)


def _run(cell: Cell, resumed: Path | None, run: RunCell) -> None:
    try:
        run(cell, resumed)
    except Interrupted as stop:
        reason = str(stop).partition(";")[0]
        raise Interrupted(f"{cell.name} {reason}; the same command goes on there") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{cell.name}: {error}") from error


def _agreed(value: Any) -> Any:
    """The main process's value, on every process."""
    values = [value]
    broadcast_object_list(values)
    return values[0]
