"""The command line. Importing it, before torch, prepares a process that runs a command."""

import functools
import os
import sys
import time
from pathlib import Path

from dalikd.trainers.signals import prepare_process

prepare_process()  # before torch: its import takes seconds

# OpenMP's threads spin while they wait for work. Beside another busy process they would take its cores, and the step
# waits for a thread that has none; so they spin shortly and then sleep. Whoever says something else is heard.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"}:
    os.environ["GOMP_SPINCOUNT"] = "1000"


def _busy() -> tuple[float, float]:
    """Seconds of now, and those that all cores have worked for others than this process; 0 where Linux does not say."""
    try:
        user, nice, system, _idle, _wait, *interrupts = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    except (OSError, ValueError):
        return time.monotonic(), 0.0
    ticks = sum(map(int, (user, nice, system, *interrupts)))
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


_AT_START = _busy()


@functools.cache  # not by its own name, which is a command's
def choose_threads() -> None:
    """Leave the cores to others that they have been working on while torch was loaded: with a thread that has no core
    of its own, torch is several times slower than without it. For one process that nobody has told its threads."""
    if "OMP_NUM_THREADS" in os.environ or os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        return
    import torch

    (started, before), (now, after) = _AT_START, _busy()
    taken = (after - before) / max(now - started, 0.1)  # cores
    threads = max(1, round((os.cpu_count() or 1) - taken))
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)
        print(
            f"dalikd: other processes keep {taken:.1f} of {os.cpu_count()} cores busy: torch computes with {threads} "
            "thread(s); set OMP_NUM_THREADS to choose yourself",
            file=sys.stderr,
        )
