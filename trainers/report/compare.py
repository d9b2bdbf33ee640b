"""What a report compares: runs that differ in the seed alone are one setting, and settings are ranked."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from dalikd.trainers.runs import FIGURES, Found, Run, check_images, differences, is_evaluated, measured_for
from dalikd.trainers.study.gains import compare

__all__ = ["Figure", "Setting", "compare_runs", "curves", "describe", "figure", "seconds_of", "trained"]

#: options whose part in a setting's name has a name of its own
_NAMED = ("augmentation", "command", "model", "model_args", "teacher", "teachers", "loss", "epochs", "epoch_factor")
_CONFIDENCE = 0.95
_MOST_POINTS = 120  # of a curve


class Setting(NamedTuple):
    """Runs that differ in the seed alone.

    Attributes:
        parts: what tells it from the others, by what it is called: augmentation, method, student, teacher, epochs, and
            options by their dotted names. All settings have the same ones.
        runs: of each seed one.
        stddev: of the augmentation as measured: "stddev", "stderr", "windows"; None: it was not.
    """

    parts: dict[str, str]
    runs: list[Run]
    stddev: dict[str, Any] | None

    @property
    def name(self) -> str:
        """What tells it from the others, in words."""
        return " · ".join(filter(None, self.parts.values())) or self.runs[0].folder.name

    @property
    def evaluated(self) -> bool:
        """Whether all of its runs were evaluated; else there is no `figure`."""
        return all(is_evaluated(run.results) for run in self.runs)


class Figure(NamedTuple):
    """A figure over the runs of a setting, with the interval of 95 % and what that is of.

    Attributes:
        mean: over the seeds.
        low: end of the interval; None: there is none.
        high: its other end.
        kind: "seeds" (Student's t over the seeds), "images" (Wilson's of the accuracy on so many images), or "".
    """

    mean: float
    low: float | None = None
    high: float | None = None
    kind: str = ""


def figure(setting: Setting, name: str, when: str = "last") -> Figure:
    """A figure of the validation images: "loss", "top1" or "top5", of the last or the best epoch."""
    values = [run.results[when]["val"][name] for run in setting.runs]
    found = compare(values, _CONFIDENCE)
    if found["low"] is not None:
        return Figure(mean(values), found["low"], found["high"], "seeds")
    if len(values) > 1 or name == "loss":
        return Figure(mean(values))
    low, high = _wilson(values[0], setting.runs[0].results[when]["val"].get("images", 0))
    return Figure(values[0], low, high, "images") if low is not None else Figure(values[0])


def _wilson(share: float, count: int) -> tuple[float | None, float | None]:
    """Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927."""
    from scipy import stats

    if not count:
        return None, None
    z = float(stats.norm.ppf((1 + _CONFIDENCE) / 2))
    center, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (center - half) / (1 + z * z / count), (center + half) / (1 + z * z / count)


def compare_runs(found: Found) -> tuple[list[Setting], list[Setting]]:
    """What is compared, and those whose weights teach others among the runs; where all do, they are compared.

    Raises:
        ValueError: the runs were evaluated on other images, or two are of one setting and seed.
    """
    runs = found.runs
    check_images({str(run.folder): run.results for run in runs}, "these runs")
    _check_validation(runs)
    teachers = [one for run in runs for one in run.results.get("teachers") or [run.results.get("teacher") or {}]]
    asked = {one.get("sha256") for one in teachers} - {None}
    teach = [run for run in runs if asked & set((run.results.get("sha256") or {}).values())]
    others = [run for run in runs if not any(run is other for other in teach)]
    return _join_seeds(others or teach, found.measurements), _join_seeds(teach if others else [], {})


def _join_seeds(runs: Sequence[Run], measurements: Mapping[Path, Mapping[str, Any]]) -> list[Setting]:
    """Join the runs of each setting, in the order in which they were found.

    Raises:
        ValueError: two runs are of one setting and seed.
    """
    parts = _parts(runs)
    joined: dict[tuple[bool, tuple[str, ...]], list[Run]] = {}
    for run, part in zip(runs, parts, strict=True):
        same = joined.setdefault((is_evaluated(run.results), tuple(part.values())), [])
        for other in same:
            if other.results["seed"] == run.results["seed"]:
                raise ValueError(
                    f"{other.folder} and {run.folder} are one run, with seed {run.results['seed']}: leave one out"
                )
        same.append(run)
    if not runs:
        return []
    told = [values for _, values in joined]
    columns = dict(zip(parts[0], zip(*told, strict=True), strict=True))
    named = {name: values for name, values in columns.items() if len({*values} - {""}) > 1}
    # what some have, and others have not, tells them apart
    if len({*zip(*named.values(), strict=True)}) < len({*told}):
        named = {name: values for name, values in columns.items() if len({*values}) > 1}
    return [
        Setting({name: values[place] for name, values in named.items()}, same, _stddev(same, measurements))
        for place, same in enumerate(joined.values())
    ]


def _check_validation(runs: Sequence[Run]) -> None:
    seen = {run.results["fingerprint"]["val"]: run for run in reversed(runs) if is_evaluated(run.results)}
    if len(seen) > 1:
        second, first = [*seen.values()][-2:]
        left, right = first.results["data"], second.results["data"]
        names = ("name", "val_split", "val_root", "classes", "class_seed", "val_limit")
        name = next((key for key in names if left.get(key) != right.get(key)), "root")
        raise ValueError(
            f"these runs cannot be compared, they are evaluated on other images: data.{name} is {left.get(name)} in "
            f"{first.folder}, {right.get(name)} in {second.folder}: make a report of each"
        )


def _parts(runs: Sequence[Run]) -> list[dict[str, str]]:
    """What each run is, by what it is called. Options that runs of one command differ in have their own names."""
    others: dict[str, list[str]] = {}
    for command in dict.fromkeys(run.results["command"] for run in runs):
        places = [index for index, run in enumerate(runs) if run.results["command"] == command]
        for name, values in differences([runs[index] for index in places]).items():
            if name.partition(".")[0] not in _NAMED:
                column = others.setdefault(name, [""] * len(runs))
                for index, value in zip(places, values, strict=True):
                    if (name, value) != ("init_seed", None):  # such a student's weights are of the run's own seed
                        column[index] = f"{name} {'off' if value is None else _shown(value)}"
    methods, teachers = _methods(runs), [_teacher(run) for run in runs]
    full = len({teacher.split(" ")[0] for teacher in teachers}) == len(set(teachers))
    return [
        {
            "teacher": teacher.split(" ")[0] if full else teacher,
            "student": _model(run),
            "method": method,
            "epochs": f"{run.results['epochs']:g} epochs",
            **{name: values[index] for name, values in others.items()},
            "augmentation": str(run.results.get("augmentation") or "")
            if run.results["command"] == "distill" or run.results.get("augmentation") != "identity"
            else "",
        }
        for index, (run, method, teacher) in enumerate(zip(runs, methods, teachers, strict=True))
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _model(run: Run) -> str:
    args = run.config.get("model_args")
    return str(run.results["model"]) + (f" {json.dumps(args)}" if args else "")


def _teacher(run: Run) -> str:
    several = run.results.get("teachers") or [run.results.get("teacher")]
    return " + ".join(
        f"{one.get('name')} {str(one.get('sha256') or one.get('weights'))[:8]}" for one in several if one is not None
    )


def _methods(runs: Sequence[Run]) -> list[str]:
    """The name in a study, or the loss's class; losses of one name that differ have their options beside it."""
    names, options = [], []
    for run in runs:
        loss = run.config.get("loss") or {}
        kind = str(loss.get("class_path", "")).rpartition(".")[2] if isinstance(loss, Mapping) else str(loss)
        command = {"train": "labels alone", "distill": ""}.get(run.results["command"], run.results["command"])
        names.append(run.method or command or kind)
        inner = (
            (loss.get("init_args") or {}) if isinstance(loss, Mapping) and run.results["command"] == "distill" else {}
        )
        options.append({name: json.dumps(value, sort_keys=True) for name, value in inner.items()})
    found = []
    for name, own in zip(names, options, strict=True):
        alike = [other for other, one in zip(options, names, strict=True) if one == name]
        differ = [key for key in own if any(other.get(key) != own[key] for other in alike)]
        shown = ", ".join(f"{key} {own[key]}" if len(own[key]) < 40 else f"other {key}" for key in differ)
        found.append(f"{name} ({shown})" if shown else name)
    return found


def _stddev(runs: Sequence[Run], measurements: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any] | None:
    """As it was measured over most images; else as the runs themselves have, the mean over the seeds."""
    name, rows = runs[0].results.get("augmentation"), []
    for measurement in measurements.values():
        scorer = measurement.get("student")
        if measured_for(runs[0], measurement) is None and scorer in (None, runs[0].results["model"]):
            rows += [row for row in measurement["results"] if row["augmentation"] == name and row["stddev"] is not None]
    if rows:
        row = max(rows, key=lambda row: row["images"])
        return {key: row[key] for key in ("stddev", "stderr", "windows")} | {"from": "measured"}
    own = [run.results["last"].get("t_stddev") for run in runs]
    if not own or not all(isinstance(value, int | float) for value in own):
        return None
    return {"stddev": mean(own), "stderr": None, "windows": None, "from": "while training"}


def trained(setting: Setting, name: str) -> float | None:
    """A term of training in the last epoch, the mean over the seeds; None: not all runs have a finite one."""
    terms = [run.results["last"].get("train") or {} for run in setting.runs]
    values = [value for one in terms if isinstance(value := one.get(name), int | float)]
    return mean(values) if len(values) == len(terms) else None


def describe(setting: Setting) -> dict[str, Any]:
    """A setting as plain values; "last" and "best" are null where it was not evaluated."""
    figures: dict[str, Any] = dict.fromkeys(("last", "best"))
    for when in figures if setting.evaluated else ():
        figures[when] = {name: figure(setting, name, when)._asdict() for name in FIGURES}
    runs = [{"folder": str(run.folder), "seed": run.results["seed"]} for run in setting.runs]
    train = {name: value for name in ("loss", "agreement", "top1") if (value := trained(setting, name)) is not None}
    return {"name": setting.name, **setting._asdict(), "runs": runs, "train": train, **figures}


# ---------------------------------------------------------------------------------------------- curves and time


def curves(setting: Setting) -> dict[str, list[tuple[float, float, float, float]]]:
    """Every term over the epochs, by its name: epoch, mean, lowest and highest value over the seeds.

    Terms of training are means over the steps since the line before; those of the validation images, and figures of the
    task, are of an epoch's end. Long curves are read at 120 places.
    """
    each = [_terms(run) for run in setting.runs]
    found = {}
    for name in dict.fromkeys(name for terms in each for name in terms):
        lines = [np.array(terms[name]) for terms in each if name in terms]
        epochs = np.unique(np.concatenate([line[:, 0] for line in lines]))
        if len(epochs) > _MOST_POINTS:
            epochs = np.linspace(epochs[0], epochs[-1], _MOST_POINTS)
        values = np.array([np.interp(epochs, line[:, 0], line[:, 1]) for line in lines])
        rows = np.stack([epochs, values.mean(0), values.min(0), values.max(0)], axis=1)
        found[name] = [tuple(row) for row in rows.tolist()]
    return found


def _terms(run: Run) -> dict[str, list[tuple[float, float]]]:
    terms: dict[str, list[tuple[float, float]]] = {}
    for line in run.log:
        epoch = line.get("epoch")
        if not isinstance(epoch, int | float):
            continue
        own = {name: value for name, value in line.items() if name not in _NO_TERMS}
        for name, value in _numbers(own):
            terms.setdefault(name, []).append((float(epoch), value))
    return terms


_NO_TERMS = ("step", "epoch", "epoch_train", "lr", "images_per_second", "data_wait_share", "teacher_share")
_NO_FIGURES = ("images", "replaced", "windows", "nets")


def _numbers(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in content.items():
        if isinstance(value, Mapping) and name not in _NO_FIGURES:
            found += _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in _NO_FIGURES:
            found += [(prefix + name, float(value))] if math.isfinite(value) else []
    return found


def seconds_of(run: Run) -> tuple[float, float, float] | None:
    """Seconds of training, and those of them that were waited for data and went to the teacher, 0 where an earlier
    version has logged none; None: the log does not hold them."""
    total, waited, asked, step, batch = 0.0, 0.0, 0.0, 0, run.results["batch_size"]
    for line in run.log:
        speed, share, teacher = (line.get(f) for f in ("images_per_second", "data_wait_share", "teacher_share"))
        if isinstance(speed, int | float) and isinstance(share, int | float) and speed > 0:
            seconds = max(line["step"] - step, 0) * batch / speed
            total, waited, step = total + seconds, waited + share * seconds, line["step"]
            asked += teacher * seconds if isinstance(teacher, int | float) else 0
    return (total, waited, asked) if total else None
