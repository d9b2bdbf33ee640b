"""How far a study is, from its folder alone."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dalikd.pipelines.lock import holder, is_held
from dalikd.trainers.study.plan import Cell
from dalikd.trainers.study.state import is_done, lock_path, read_record

__all__ = ["print_status", "study_status"]

_SHOWN = 10  # of those that wait


def study_status(folder: Path, cells: Sequence[Cell], work: Mapping[str, float]) -> dict[str, Any]:
    """What is known of each run, and the time left.

    Args:
        folder: of the study.
        cells: of the study.
        work: of each cell, as far as it is known; in any unit.

    Returns:
        "runs" ("name", "state": done, running, failed or waiting, "who", "error", "at"), "seconds_left" (None: no run
        that is done tells it), "at_once" (runs).

    Raises:
        ValueError: a result cannot be read.
    """
    runs, rates, left, at_once = [], dict[str, list[float]](), list[tuple[str, float]](), 0
    for cell in cells:
        record, path = read_record(folder, cell.name), lock_path(folder, cell.name)
        held, size = is_held(path), work.get(cell.name) or 1.0
        state = "done" if is_done(folder, cell) else "running" if held else "waiting"
        if state == "waiting" and record.state == "failed":
            state = "failed"
        if state == "done" and record.seconds:
            rates.setdefault(cell.command, []).append(record.seconds / size)
        if state in ("running", "waiting"):
            left.append((cell.command, size / 2 if state == "running" else size))  # of those that run, half is done
        at_once += state == "running"
        who = holder(path) if state == "running" else record.who
        runs.append({"name": cell.name, "state": state, "who": who, "error": record.error, "at": record.at})
    everything = [rate for found in rates.values() for rate in found]
    seconds = None
    if everything:
        mean = {command: sum(found) / len(found) for command, found in rates.items()}
        usual = sum(everything) / len(everything)
        seconds = sum(mean.get(command, usual) * size for command, size in left) / max(1, at_once)
    return {"runs": runs, "seconds_left": seconds, "at_once": at_once}


def print_status(folder: Path, status: Mapping[str, Any]) -> None:
    """Print it: what is running, failed and waiting by name."""
    by_state: dict[str, list[dict[str, Any]]] = {"running": [], "failed": [], "waiting": [], "done": []}
    for run in status["runs"]:
        by_state[run["state"]].append(run)
    for state in ("running", "failed", "waiting"):
        shown = by_state[state][: _SHOWN if state == "waiting" else None]
        for run in shown:
            told = {"running": run["who"], "failed": run["error"], "waiting": run["error"] and f"last: {run['error']}"}
            print(f"{state:<8} {run['name']}" + (f": {told[state]}" if told[state] else ""))
        if more := len(by_state[state]) - len(shown):
            print(f"{state:<8} … and {more} more")
    counts = ", ".join(f"{len(by_state[state])} {state}" for state in ("done", "running", "failed", "waiting"))
    line = f"{counts} of {len(status['runs'])} runs in {folder}, {datetime.now():%Y-%m-%d %H:%M}"
    if (seconds := status["seconds_left"]) and len(by_state["running"]) + len(by_state["waiting"]):
        hours, minutes = divmod(max(1, round(seconds / 60)), 60)
        at_once = f"{status['at_once']} at once" if status["at_once"] else "one at a time"
        line += f"; about {f'{hours} h ' if hours else ''}{minutes} min left, {at_once}"
    print(line)
