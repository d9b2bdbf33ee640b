"""`bench loader --orders`: what ordering the epochs costs."""

import time
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from typing import Any

from dalikd.pipelines.draws import permutation
from dalikd.pipelines.sampler import Sampler
from dalikd.tools.bench.record import Record, summary

__all__ = ["measure_orders"]


def measure_orders(sizes: Sequence[int], rounds: int, header: Mapping[str, Any]) -> Record:
    """Time and memory of the sampler for data sets of many images, each size in a process of its own."""
    record = Record(
        benchmark="loader",
        title="The sampler: an epoch's order, and the memory of the two orders that it holds",
        warm_up="one order of 1000 rows in each process.",
        page_cache="no files",
        labels=("images",),
        plotted="order of an epoch, s",
        variant="orders",
        **header,
    )
    for size in sizes:
        with get_context("spawn").Pool(1) as pool:
            seconds, held, peak = pool.apply(_order_cost, (size, rounds))
        record.rows.append(
            {
                "images": f"{size:,}",
                "order of an epoch, s": summary(seconds),
                "two orders, MB": held / 1e6,
                "peak while ordering, MB": peak / 1e6,
            }
        )
    record.notes.append(
        "The next epoch's order is made in a thread while an epoch runs; memory is the process's growth."
    )
    return record


def _order_cost(size: int, rounds: int) -> tuple[list[float], int, int]:
    """Seconds of each order; growth of the resident memory, and of its peak, in bytes."""
    import resource

    import psutil

    permutation(0, 0, 1000)
    process = psutil.Process()
    before = process.memory_info().rss
    sampler = Sampler(size, 1)
    sampler.order(0)
    for order in list(sampler._orders.values()):  # the next epoch's is made in a thread
        order.result()
    held = process.memory_info().rss - before
    seconds = []
    for epoch in range(rounds):
        started = time.perf_counter()
        permutation(0, epoch, size)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return seconds, held, peak
