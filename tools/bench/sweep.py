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
_HARDWARE_LOADS = (0.0, 0.25, 0.5, 0.65, 0.8, 0.9, 1.0)
_AS_GOOD = 0.98  # of the best median: then the smaller setting is taken


def measure_sweep(loaders: Sequence[str], job: Job, clock: Clock, header: Mapping[str, Any]) -> Record:
    """Try one setting after the other, each with the best of those before, and print the best as config lines.

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
        variant=f"{job.source.name}-{job.view.size}-sweep",
        **header,
    )
    best: dict[str, Any] = {}
    for setting, values in _settings(loader).items():
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
    """A row for each value of a setting."""
    meters = {}
    try:
        for value in values:
            changed = replace(job, **{setting: value})
            meters[value] = Meter(open_side(loader, changed), changed, clock)
        named = {f"{setting} {value}": meter for value, meter in meters.items()}
        rates = alternate(named, clock.rounds, settle)
    finally:
        for meter in meters.values():
            meter.side.close()
    return {
        value: {
            "setting": setting,
            "value": value,
            "images/s": summary(rates[f"{setting} {value}"]),
            "CPU ms/image": summary(meter.cpu[1:]),
        }
        for value, meter in meters.items()
    }
