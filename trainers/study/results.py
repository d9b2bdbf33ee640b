"""What a study found: its cells' results put together, mean and standard deviation over the seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dalikd.kd.correlation import FEWEST_POINTS, Point, Spread, correlate
from dalikd.trainers.runs import FIGURES, check_images
from dalikd.trainers.study.options import Pair
from dalikd.trainers.study.plan import Axes, Cell, alone_name, distill_name, measure_name, teacher_name
from dalikd.trainers.study.state import read_result

__all__ = ["collect", "points_of"]

_MEASURED = ("stddev", "stderr", "entropy", "windows")
_SETTINGS = ("mode", "mix_group", "window", "epochs", "seed", "precision")

_Results = Mapping[str, dict[str, Any] | None]


def collect(
    pairs: Sequence[Pair], axes: Axes, cells: Sequence[Cell], folder: Path, config: dict[str, Any]
) -> dict[str, Any]:
    """Read what is done.

    Args:
        pairs: of the study.
        axes: of the study.
        cells: of the study.
        folder: of the study.
        config: of the study, kept in the results.

    Returns:
        the content of results.json: "groups" (a pair at a length of training by a method each), "complete", "missing"
        and what they depend on. Two studies that did the same differ in "runs_on" alone.

    Raises:
        ValueError: a result cannot be read, or results are of other images than others.
    """
    done: _Results = {cell.name: read_result(folder, cell) for cell in cells}
    check_images(done)
    return {
        "complete": all(result is not None for result in done.values()),
        "missing": [name for name, result in done.items() if result is None],
        "measured": _measured(done),
        "groups": [
            _group(pair, factor, method, axes, done)
            for pair in pairs
            for factor in axes.factors
            for method in axes.methods
        ],
        "last_and_best": "last: the last epoch; best: the epoch with the highest top1 on the validation split itself",
        "fingerprints": {split: _distinct(_fingerprints(done, split)) for split in ("train", "val")},
        "config": config,
        "runs_on": {
            "versions": _distinct(result["versions"] for result in done.values() if result),
            "processes": _distinct(result.get("processes") for result in done.values() if result),
        },
    }


def points_of(group: dict[str, Any]) -> tuple[list[Point], list[Spread]]:
    """The points of a group's scatter plot, where T. stddev and students are there, and their error bars."""
    rows = [row for row in group["augmentations"] if row["t_stddev"] is not None and row["last"] is not None]
    losses = [row["last"]["loss"] for row in rows]
    points = [Point(row["augmentation"], row["t_stddev"], loss["mean"]) for row, loss in zip(rows, losses, strict=True)]
    return points, [Spread(row["t_stderr"], loss["std"]) for row, loss in zip(rows, losses, strict=True)]


def _group(pair: Pair, factor: float, method: str, axes: Axes, done: _Results) -> dict[str, Any]:
    rows = [_row(pair, factor, name, method, axes, done) for name in axes.augmentations]
    alone = _over_seeds({seed: done[alone_name(pair.student, factor, seed)] for seed in axes.seeds})
    group = {
        "teacher": pair.teacher.label,
        "student": pair.student.label,
        "epoch_factor": factor,
        "method": method,
        "epochs": next((row["epochs"] for row in [*rows, alone] if row["epochs"] is not None), None),
        "teacher_alone": _teacher(done[teacher_name(pair.teacher)]),
        "student_alone": alone,
        "augmentations": rows,
    }
    return group | _correlated(group)


def _row(pair: Pair, factor: float, name: str, method: str, axes: Axes, done: _Results) -> dict[str, Any]:
    generation = next(number for number, names in enumerate(axes.measured()) if name in names)
    measured = done[measure_name(pair, axes.augmentations[name], generation)] if axes.stddev else None
    by_name = {result["augmentation"]: result for result in measured["results"]} if measured else {}
    figures = by_name.get(name, dict.fromkeys(_MEASURED))
    runs = {seed: done[distill_name(pair, factor, name, seed, method)] for seed in axes.seeds}
    return {"augmentation": name, **{f"t_{key}": figures[key] for key in _MEASURED}, **_over_seeds(runs)}


def _over_seeds(runs: Mapping[int, dict[str, Any] | None]) -> dict[str, Any]:
    """Last and best epoch over the runs that are done."""
    found = {seed: result for seed, result in runs.items() if result is not None}
    each = [
        {"seed": seed, **{when: _epoch(result[when]) for when in ("last", "best")}} for seed, result in found.items()
    ]
    return {
        "epochs": next((result["epochs"] for result in found.values()), None),
        **{when: _summary([run[when] for run in each]) for when in ("last", "best")},
        "runs": each,
    }


def _epoch(entry: dict[str, Any]) -> dict[str, Any]:
    return {"epoch": entry["epoch"], **{name: entry["val"][name] for name in FIGURES}}


def _summary(epochs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not epochs:
        return None
    return {name: _spread([epoch[name] for epoch in epochs]) for name in FIGURES}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and unbiased standard deviation, which a single value has none of."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "count": len(values)}


def _teacher(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """A teacher's figures: of its weights, that is the last epoch where it was trained here."""
    if result is None:
        return None
    val = result["last"]["val"] if "last" in result else result
    return {name: val[name] for name in FIGURES}


def _correlated(group: dict[str, Any]) -> dict[str, Any]:
    """The three coefficients with their p-values, or why there are none."""
    points, _ = points_of(group)
    stddevs, losses = [point.t_stddev for point in points], [point.s_test_loss for point in points]
    if len(points) < FEWEST_POINTS:
        reason = f"{len(points)} points: a correlation takes at least {FEWEST_POINTS}"
    elif min(stddevs) == max(stddevs) or min(losses) == max(losses):
        reason = "all values are equal"
    elif not all(math.isfinite(value) for value in (*stddevs, *losses)):
        reason = "a value is not finite"
    else:
        found = correlate(stddevs, losses)
        return {"correlation": {name: list(value) for name, value in found._asdict().items()}, "no_correlation": None}
    return {"correlation": None, "no_correlation": reason}


def _measured(done: _Results) -> dict[str, Any]:
    """How T. stddev was measured: what all measurements share, and what each of them passed and told apart."""
    reports = {name: result for name, result in done.items() if result and "results" in result}
    if not reports:
        return {}
    shared = next(iter(reports.values()))
    return {
        **{key: shared[key] for key in _SETTINGS},
        "measurements": [_measurement(name, report) for name, report in reports.items()],
    }


def _measurement(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """Original images passed, and the neighbours in the ranking that are not told apart; None: none are compared."""
    found, stopped = report["separation"], report["stopped"]
    return {
        "cell": name,
        "images": report["results"][0]["images"],
        "confidence": stopped["confidence"] if stopped else report["confidence"],
        "not_told_apart": found and [[pair["a"], pair["b"]] for pair in found["pairs"] if not pair["separated"]],
    }


def _fingerprints(done: _Results, split: str) -> Iterable[str]:
    """Of the data that nets were trained and evaluated on; with --data.limit or --data.share each seed has its own."""
    runs = [result for name, result in done.items() if result and not name.endswith(".json")]
    return (result["fingerprint"][split] for result in runs)


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value is not None and value not in found:
            found.append(value)
    return found
