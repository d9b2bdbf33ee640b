"""A finished study of made-up results."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from dalikd.trainers.study.options import StudyOptions
from dalikd.trainers.study.plan import Axes, Cell, plan
from dalikd.trainers.study.ready import read_pairs
from dalikd.trainers.study.results import collect

PAIRS = read_pairs(
    StudyOptions(pairs=[{"teacher": {"name": "vgg13", "weights": "file.pt"}, "student": "vgg8"}]), trains_teachers=False
)
AXES = Axes({"flip": False, "mixup": False, "cutmix": False}, (0, 1), (2.0,))
CONFIG = {"study": {"seeds": [0, 1], "methods": {}, "stddev": True}}
STDDEV = {"flip": 0.03, "mixup": 0.02, "cutmix": 0.01}


def _val(loss: float, top1: float) -> dict[str, Any]:
    return {"loss": loss, "top1": top1, "top5": 1.0, "images": 9}


def _run(loss: float, top1: float) -> dict[str, Any]:
    return {
        **{"finished": True, "epochs": 6.0, "processes": 1, "versions": {"torch": "2"}},
        "fingerprint": {"train": "t", "val": "v"},
        "last": {"epoch": 6, "val": _val(loss, top1)},
        "best": {"epoch": 4, "val": _val(loss - 0.5, top1 + 0.25)},
    }


def _measured() -> dict[str, Any]:
    rows = [
        {"augmentation": name, "stddev": value, "stderr": value / 10, "entropy": 1.5, "windows": 20, "images": 6400}
        for name, value in STDDEV.items()
    ]
    settings = {"mode": "per_batch", "mix_group": 64, "window": 640, "epochs": 10, "seed": 0, "precision": "fp32"}
    pairs = [{"a": "cutmix", "b": "mixup", "separated": False}, {"a": "mixup", "b": "flip", "separated": True}]
    found = {"separation": {"pairs": pairs}, "confidence": 0.95, "stopped": None}
    return {**settings, **found, "results": rows, "versions": {"torch": "2"}, "fingerprint": "t"}


def _result(cell: Cell) -> dict[str, Any]:
    """Losses 1, 2, 3 for flip, mixup, cutmix with seed 0, and one more with seed 1."""
    if cell.command == "evaluate":
        return {**_val(0.5, 0.75), "versions": {"torch": "2"}, "fingerprint": "v"}
    if cell.command == "measure":
        return _measured()
    if cell.command == "train":
        return _run(9.0 + cell.settings["seed"], 0.25)
    return _run([*STDDEV].index(cell.settings["augmentation"]) + 1.0 + cell.settings["seed"], 0.5)


@pytest.fixture
def folder(tmp_path) -> Path:
    """All results of the plan."""
    for cell in plan(PAIRS, AXES, tmp_path):
        (tmp_path / cell.result).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / cell.result).write_text(json.dumps(_result(cell)))
    return tmp_path


@pytest.fixture
def collected() -> Callable[[Path], dict[str, Any]]:
    return lambda folder: collect(PAIRS, AXES, plan(PAIRS, AXES, folder), folder, CONFIG)


@pytest.fixture
def groups() -> Callable[..., list[dict[str, Any]]]:
    """Groups of a study of methods, from top1 by (method, augmentation, factor, seed); None: the run is missing."""

    def build(
        top1: Callable[[str, str, float, int], float | None],
        methods: tuple[str, ...] = ("at", "kd"),
        augmentations: tuple[str, ...] = ("cutmix", "identity"),
        factors: tuple[float, ...] = (2.0, 1.0),
        seeds: tuple[int, ...] = (3, 4),
        stddev: dict[str, float] | None = None,
        student: str = "vgg8",
    ) -> list[dict[str, Any]]:
        def row(method: str, name: str, factor: float) -> dict[str, Any]:
            found = {seed: top1(method, name, factor, seed) for seed in seeds}
            runs = [{"seed": seed, "last": {"top1": value}} for seed, value in found.items() if value is not None]
            last = {"top1": {"mean": mean(run["last"]["top1"] for run in runs)}} if runs else None
            return {"augmentation": name, "t_stddev": stddev and stddev[name], "last": last, "runs": runs}

        return [
            {"teacher": "vgg13", "student": student, "method": method, "epoch_factor": factor}
            | {"augmentations": [row(method, name, factor) for name in augmentations]}
            for factor in factors
            for method in methods
        ]

    return build
