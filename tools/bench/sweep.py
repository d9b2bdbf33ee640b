"""`bench loader --sweep`: which threads, prefetch depth and hardware decoder load are best on this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from dalikd.tools.bench.comparison import WARM_UP, Clock, Meter, describe_job
from dalikd.tools.bench.images import describe
from dalikd.tools.bench.machine import cores, settle
from dalikd.tools.bench.record import Record, alternate, summary
from dalikd.tools.bench.sides import Job, open_side
from dalikd.tools.bench.stores import stored_files

__all__ = ["choose", "measure_sweep"]

_PREFETCH = (1, 2, 3, 5)
_HARDWARE_LOADS = (0.0, 1.0)  # at a share between, which decoder a picture meets depends on its batch
_AS_GOOD = 0.98  # of the best median: then the smaller setting is taken


def measure_sweep(
    loaders: Sequence[str], job: Job, clock: Clock, header: Mapping[str, Any], threads: int | None = None
) -> Record:
    """Try one setting after the other, each with the best of those before, and print the best as config lines.

    Args:
        loaders: dalikd-mixed is taken where it is among them.
        job: the work.
        clock: of each measurement.
        header: of the record.
        threads: keep to so many instead of trying.

    Raises:
        ValueError: the pictures are no files, so that nothing is decoded.
    """
    if not stored_files(job.source):
        raise ValueError("--sweep tries how files are decoded, and these pictures lie in memory: give --data.root")
    loader = "dalikd-mixed" if "dalikd-mixed" in loaders else "dalikd"
    record = Record(
        benchmark="loader",
        title=f"{loader}: {describe_job(job)}",
        warm_up=WARM_UP,
        page_cache="warm.",
        pictures=describe(job.source),
        labels=("setting", "value"),
        plotted="images/s",
        variant=f"{job.source.name}-{job.view.size}-sweep" + ("" if threads is None else f"-{threads}-threads"),
        **header,
    )
    best: dict[str, Any] = {} if threads is None else {"threads": threads}
    for setting, values in _settings(loader).items():
        if setting in best:
            continue
        medians = {}
        for value, row in _try(loader, replace(job, **best), setting, values, clock).items():
            record.rows.append(row)
            medians[value] = row["images/s"]["median"]
        best[setting] = choose(medians)
    lines = yaml.safe_dump({"data": best}, sort_keys=False).strip()
    record.notes.append(f"Best here: {', '.join(f'{name} {value}' for name, value in best.items())}.")
    record.notes.append(f"Taken is the smallest setting that reaches {100 * _AS_GOOD:.0f} % of the best median.")
    print(f"the best settings here, as lines of a config:\n\n{lines}\n")
    return record


def choose(medians: Mapping[Any, float]) -> Any:
    """The smallest setting whose images a second come near the best; settings in ascending order."""
    enough = _AS_GOOD * max(medians.values())
    return next(value for value, median in medians.items() if median >= enough)


def _settings(loader: str) -> dict[str, tuple[Any, ...]]:
    most = cores()
    threads = sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, most // 2, most, most + most // 2, 2 * most} - {0})
    settings: dict[str, tuple[Any, ...]] = {
        "threads": tuple(count for count in threads if count <= 2 * most),
        "prefetch": _PREFETCH,
    }
    return settings | ({"hw_decoder_load": _HARDWARE_LOADS} if loader == "dalikd-mixed" else {})


def _try(loader: str, job: Job, setting: str, values: Sequence[Any], clock: Clock) -> dict[Any, dict[str, Any]]:
    """A row for each value of a setting. One pipeline is open at a time: each keeps memory and threads of its own."""
    cpu: dict[Any, list[float]] = {value: [] for value in values}

    def measure(value: Any) -> float:
        changed = replace(job, **{setting: value})
        meter = Meter(open_side(loader, changed), changed, clock)
        try:
            return meter()
        finally:
            meter.side.close()
            cpu[value] += meter.cpu

    rates = alternate({str(value): lambda value=value: measure(value) for value in values}, clock.rounds, settle)
    return {
        value: {
            "setting": setting,
            "value": value,
            "images/s": summary(rates[str(value)]),
            "CPU ms/image": summary(cpu[value][1:]),  # the first is the warm-up
        }
        for value in values
    }
