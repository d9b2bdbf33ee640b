"""A study from its config to its tables, whole and interrupted, on tiny nets."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import pytest
import yaml

from dalikd.tools import study
from dalikd.trainers.loop import Loop

pytestmark = pytest.mark.slow  # the study that most tests here share takes ten seconds and more

NAMES = ["identity", "cutmix", "cutmixpick_student"]


class Ended(NamedTuple):
    """How the command ended, and what it printed."""

    code: int
    out: str
    err: str


class Killed(BaseException):
    """Ends a process without a chance to save."""


@pytest.fixture(scope="module")
def config(tree: Path, weights: Path) -> dict[str, Any]:
    """Two pairs that share a student; one teacher is trained, the other has weights."""
    return {
        "data": {"name": "imagefolder", "root": str(tree), "image_size": 32, "threads": 1},
        "device": "cpu",
        "batch_size": 32,
        "epochs": 1,
        "mix": {"mode": "per_batch", "group": 8},
        "schedule": {"name": "cosine"},
        "train": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}},
        "measure": {"window": 24},
        "study": {
            "pairs": [
                {"teacher": {"name": "small", "label": "made", "epochs": 2}, "student": "small"},
                {"teacher": {"name": "small", "label": "given", "weights": str(weights)}, "student": "small"},
            ],
            "augmentation": NAMES,
            "seeds": [3, 4],
        },
    }


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Ended]:
    def run(content: dict[str, Any], *arguments: object) -> Ended:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content))
        capsys.readouterr()
        code = 0
        try:
            study.main(["--config", str(path), *(str(argument) for argument in arguments)])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def finished_once(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(config))
    study.main(["--config", str(path), "--output", str(folder / "study")])
    return folder / "study"


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A finished study, for a test to spoil."""
    return shutil.copytree(finished_once, tmp_path / "study")


def results_of(folder: Path) -> dict[str, Any]:
    """What two equal studies share."""
    results = json.loads((folder / "results.json").read_text())
    assert set(results.pop("runs_on")) == {"versions", "processes"}
    return results


def cells_of(folder: Path) -> set[str]:
    runs = {path.parent.relative_to(folder).as_posix() for path in folder.glob("*/**/results.json")}
    files = {path.relative_to(folder).as_posix() for path in folder.glob("*/**/*.json")}
    return runs | {name for name in files if not name.endswith("results.json")}


# ------------------------------------------------------------------------------------------------ what it does


def test_a_study_trains_measures_and_distils_everything_once(finished_once):
    pairs = ("made_small", "given_small")
    assert cells_of(finished_once) == {
        *("teachers/made", "teachers/given.json", "students/small/x1/seed3", "students/small/x1/seed4"),
        *(f"measure/{name}.json" for name in ("made", "given", *pairs)),
        *(f"distill/{pair}/x1/{name}/seed{seed}" for pair in pairs for name in NAMES for seed in (3, 4)),
    }


def test_cells_get_the_options_that_are_theirs(finished_once):
    def options(name: str) -> dict[str, Any]:
        return yaml.safe_load((finished_once / name / "config.yaml").read_text())

    teacher, alone = options("teachers/made"), options("students/small/x1/seed4")
    distilled = options("distill/made_small/x1/cutmix/seed4")
    assert (teacher["epochs"], alone["epochs"], distilled["epochs"]) == (2, 1, 1)
    assert (teacher["seed"], alone["seed"], distilled["seed"]) == (0, 4, 4)
    assert (teacher["augmentation"], alone["augmentation"], distilled["augmentation"]) == (
        *("identity", "identity", "cutmix"),
    )
    assert teacher["optimizer"]["init_args"]["lr"] == alone["optimizer"]["init_args"]["lr"] == 0.01
    assert distilled["optimizer"]["init_args"]["lr"] == 0.05
    assert distilled["teacher"]["weights"] == str(finished_once / "teachers/made/last/student.safetensors")
    picked = json.loads((finished_once / "measure/made_small.json").read_text())
    assert picked["student_weights"] == str(finished_once / "students/small/x1/seed3/last/student.safetensors")
    assert picked["teacher"]["weights"] == distilled["teacher"]["weights"]
    assert (picked["mode"], picked["window"], picked["seed"]) == ("per_batch", 24, 0)


def test_the_results_are_those_of_the_cells(finished_once, weights):
    results = results_of(finished_once)
    assert (results["complete"], results["missing"]) == (True, [])
    assert {key: results["measured"][key] for key in ("mode", "mix_group", "window", "seed")} == {
        **{"mode": "per_batch", "mix_group": 8, "window": 24, "seed": 0},
    }
    groups = [(group["teacher"], group["student"], group["epoch_factor"]) for group in results["groups"]]
    assert groups == [("made", "small", 1.0), ("given", "small", 1.0)]
    group = results["groups"][1]
    given = json.loads((finished_once / "teachers/given.json").read_text())
    assert group["teacher_alone"] == {key: given[key] for key in ("loss", "top1", "top5")}
    row = group["augmentations"][1]
    measured = json.loads((finished_once / "measure/given.json").read_text())["results"][1]
    assert [row["augmentation"], row["t_stddev"], row["t_stderr"], row["t_entropy"], row["t_windows"]] == [
        *("cutmix", measured["stddev"], measured["stderr"], measured["entropy"], measured["windows"]),
    ]
    runs = [
        json.loads((finished_once / f"distill/given_small/x1/cutmix/seed{seed}/results.json").read_text())
        for seed in (3, 4)
    ]
    for when in ("last", "best"):
        losses = [run[when]["val"]["loss"] for run in runs]
        assert [run[when]["loss"] for run in row["runs"]] == losses
        assert row[when]["loss"] == {"mean": mean(losses), "std": stdev(losses), "count": 2}
    assert results["groups"][0]["student_alone"] == group["student_alone"]
    assert results["config"]["study"]["pairs"][1]["teacher"]["weights"] == str(weights)
    assert len(results["fingerprints"]["train"]) == len(results["fingerprints"]["val"]) == 1


def test_tables_and_plots_are_written(finished_once):
    text = (finished_once / "table.md").read_text()
    for part in (
        "*teacher*",
        "*student alone*",
        "| cutmixpick_student |",
        "windows of 24 teacher outputs",
        "per_batch",
    ):
        assert part in text
    rows = list(csv.DictReader((finished_once / "table.csv").open()))
    assert [row["row"] for row in rows] == 2 * ["teacher", "student alone", *NAMES]
    for group in results_of(finished_once)["groups"]:
        plot = f"plots/{group['teacher']}_small-x1.png"
        assert (finished_once / plot).read_bytes().startswith(b"\x89PNG")
        assert f"]({plot})" in text
        assert set(group["correlation"]) == {"pearson", "spearman", "kendall"}


def test_a_finished_study_is_not_done_again(finished, config, call, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("config.yaml")}
    monkeypatch.setattr(Loop, "step", _raise_killed)
    (finished / "table.md").unlink()
    ended = call(config, "--output", finished)
    assert (ended.code, ended.err) == (0, "")
    assert "written: " in ended.out
    assert (finished / "table.md").exists()
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("config.yaml")}


# -------------------------------------------------------------------------------------------------- interrupted


def _raise_killed(*_: Any) -> None:
    raise Killed


def _spoil(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def test_a_study_cut_off_again_and_again_ends_the_same(finished, finished_once, config, call, monkeypatch, capsys):
    """A teacher of six steps and two epochs is killed before its first state and in the second epoch, a measurement
    before its end; a student's run is stopped by a signal."""
    weights = (finished / "teachers/made/last/student.safetensors").read_bytes()
    measurement, student = "measure/made.json", "distill/made_small/x1/cutmix/seed4"
    for name in ("teachers/made", measurement, student):
        _spoil(finished, name)
    stepping = Loop.step

    def cut_off(what: str, replacement: Callable[..., None]) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(what, replacement)
            with pytest.raises(Killed):
                call(config, "--output", finished)
        return capsys.readouterr().out

    def killing(step: int) -> Callable[..., None]:
        return lambda loop, *batches: _raise_killed() if loop.progress.step == step else stepping(loop, *batches)

    for step in (2, 4):
        out = cut_off("dalikd.trainers.loop.Loop.step", killing(step))
        assert "[18/20] teachers/made\n" in out
        (finished / "teachers/made/config.yaml").write_text("")  # as a kill while it is written anew would leave it
    out = cut_off("dalikd.tools.measure.give_json", _raise_killed)
    assert "[18/20] teachers/made (goes on)" in out
    assert (finished / "teachers/made/last/student.safetensors").read_bytes() == weights
    assert not (finished / measurement).exists()
    assert (finished / measurement).with_suffix(".pt").exists()

    def stopped(loop: Loop, *batches: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        stepping(loop, *batches)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", stopped)
        ended = call(config, "--output", finished)
    assert ended.code == 128 + signal.SIGTERM
    assert ended.err == f"dalikd study: {student} stopped by signal 15; the same command goes on there\n"
    ended = call(config, "--output", finished)
    assert (ended.code, ended.err) == (0, "")
    assert f"{student} (goes on)" in ended.out
    assert results_of(finished)["groups"] == results_of(finished_once)["groups"]


def test_what_is_missing_is_said(finished, finished_once, config, call):
    for name in ("measure/made.json", "distill/given_small/x1/identity/seed4"):
        _spoil(finished, name)
    ended = call(config, "--output", finished, "--report", "true")
    assert (ended.code, ended.err) == (0, "")
    assert "**Not complete: 2 runs are missing:** `measure/made.json`" in ended.out
    results, all_of_it = results_of(finished), results_of(finished_once)
    assert not results["complete"]
    made, given = results["groups"]
    assert [row["t_windows"] for row in made["augmentations"][:2]] == [None, None]
    assert made["no_correlation"] == "1 points: a correlation takes at least 3"
    assert given["augmentations"][0]["last"]["loss"]["count"] == 1
    assert given["augmentations"][1:] == all_of_it["groups"][1]["augmentations"][1:]
    assert "| | | | 1 |" not in ended.out
    assert (finished / "table.md").read_text() in ended.out


# ------------------------------------------------------------------------------------------------------ growth


def test_a_finished_study_grows(finished, finished_once, config, call):
    """What is there stays as it is; a new augmentation is measured by itself."""
    before = {
        path: path.stat().st_mtime_ns for path in [*finished.glob("*/**/results.json"), *finished.glob("*/*.json")]
    }
    own = {
        **config["study"],
        "augmentation": [*NAMES, "flip"],
        "pairs": config["study"]["pairs"][1:],
    }
    refused = call({**config, "study": own}, "--output", finished)
    assert refused.code == 2
    assert "holds a study with study.pairs: " in refused.err
    own["pairs"] = config["study"]["pairs"]
    planned = call({**config, "study": own}, "--output", finished, "--dry_run", "true")
    assert "20 of 26 runs are done" in planned.out
    assert "# measure/2/given.json\n" in planned.out
    assert not (finished / "plans.yaml").exists()
    ended = call({**config, "study": own}, "--output", finished)
    assert (ended.code, ended.err) == (0, "")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert cells_of(finished) - cells_of(finished_once) == {
        *("measure/2/made.json", "measure/2/given.json"),
        *(f"distill/{pair}/x1/flip/seed{seed}" for pair in ("made_small", "given_small") for seed in (3, 4)),
    }
    results = results_of(finished)
    assert results["complete"]
    added = [(len(plan["runs"]), plan["added"].get("augmentation")) for plan in results["plans"]]
    assert added == [(20, None), (6, ["flip"])]
    assert set(results["plans"][0]["runs"]) == cells_of(finished_once)
    rows = {row["augmentation"]: row for row in results["groups"][1]["augmentations"]}
    assert rows["flip"]["t_windows"] is not None
    old = {row["augmentation"]: row for row in results_of(finished_once)["groups"][1]["augmentations"]}
    assert {name: rows[name] for name in NAMES} == old
    assert "## When the runs came\n" in ended.out
    assert "| augmentation: flip | 6 |" in ended.out


# ------------------------------------------------------------------------------------------------------ engines


def test_a_list_has_a_command_for_each_run_in_an_order_that_works(config, call, finished, tmp_path):
    """Only of those that are left; and each does its run alone."""
    new = call(config, "--output", tmp_path / "new", "--engine", "list")
    assert (new.code, new.err) == (0, "")
    assert not (tmp_path / "new").exists()
    words = [shlex.split(line) for line in new.out.splitlines()]
    names = [line[line.index("--only") + 1] for line in words]
    assert len(words) == len(set(names)) == 20
    waiting = [bool(re.match(r"distill/made|measure/(made|given_small)", name)) for name in names]
    assert waiting == [False] * 11 + [True] * 9
    lost = "distill/given_small/x1/cutmix/seed4"
    result = finished / lost / "results.json"
    kept = json.loads(result.read_text())
    shutil.rmtree(finished / lost)
    (line,) = call(config, "--output", finished, "--engine", "list").out.splitlines()
    assert line.startswith("dalikd study --config ")
    assert line.endswith(f"--engine worker --only {lost}")
    study.main(shlex.split(line)[2:])
    assert json.loads(result.read_text())["last"] == kept["last"]


def test_how_far_a_study_is(config, call, finished, tmp_path):
    shutil.rmtree(finished / "distill/given_small/x1/cutmix/seed4")
    elsewhere = {**config, "data": {**config["data"], "root": str(tmp_path / "not on this machine")}}
    ended = call(elsewhere, "--output", finished, "--status", "true")
    assert (ended.code, ended.err) == (0, "")
    waiting, line = ended.out.splitlines()
    assert waiting == "waiting  distill/given_small/x1/cutmix/seed4"
    assert re.match(r"19 done, 0 running, 0 failed, 1 waiting of 20 runs in .*; about 1 min left, one at a time$", line)
    ended = call(config, "--output", tmp_path / "new", "--status", "true")
    assert ended.code == 2
    assert "--status true: there is no study in " in ended.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["local"], "--engine local starts one worker for each GPU, and there is none: give --workers 2, or so"),
        (["ray"], "--engine ray: there are local, slurm, list, worker"),
        (["slurm", "--shard", "1/2"], "--engine slurm deals all runs itself: leave --shard 1/2 out"),
        (["slurm", "--engine.timeout_min", "soon"], "engine.timeout_min is 'soon': give int"),
        (["slurm", "--engine.parallel", "0"], "engine.parallel is 0: give a number above 0"),
        (["slurm", "--engine.cluster", "pbs"], "engine.cluster is pbs: give slurm, or local"),
        (["slurm"], "--engine slurm: there is no sbatch on the PATH: "),
        (["local", "--workers", "0"], "--workers 0: give a whole number above 0"),
        (["list", "--workers", "2"], "--workers 2: it is for --engine local"),
        (["worker", "--only", "teachers/none"], "--only teachers/none: there is no such run"),
    ],
)
def test_an_engine_that_cannot_work_is_named_before_any_work(config, call, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("dalikd.trainers.study.engines.find_spec", lambda _: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = call(config, "--output", tmp_path / "new", "--engine", *words)
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------ pairs, shards


def test_one_pair_alone(finished, config, call):
    ended = call(config, "--output", finished, "--pair", "given/small", "--dry_run", "true")
    assert "teachers/made" not in ended.out
    assert "distill/given_small" in ended.out
    assert "11 of 11 runs are done" in ended.out


def test_a_plan_names_each_run_its_command_and_the_work(config, call, tmp_path):
    folder = tmp_path / "new"
    ended = call(config, "--output", folder, "--dry_run", "true", "--shard", "1/2")
    assert (ended.code, ended.err) == (0, "")
    assert not folder.exists()
    assert (
        f"dalikd distill --config {folder}/config.yaml --output {folder}/distill/given_small/x1/cutmix/seed4 "
        f"--model small --teacher.name small --teacher.weights {config['study']['pairs'][1]['teacher']['weights']} "
        "--augmentation cutmix --epoch_factor 1.0 --seed 4\n"
    ) in ended.out
    # 99 images: 96 in whole batches of 32; two images of each, for cutmix and the picks
    trained, asked = 4 * 96 * (1 + 2 + 2), 4 * 96 * (1 + 2 + 2)
    totals = {line.split(" | ")[0]: line for line in ended.out.splitlines() if line.startswith("| ")}
    assert f"| distill | 12 | {trained:,} | {asked:,} | {4 * 2 * 96:,} | {12 * 30:,} |" in totals["| distill"]
    assert f"| measure | 4 | 0 | {2 * 99 * (2 + 2):,} | {2 * 2 * 99:,} | 0 |" in totals["| measure"]
    assert f"| train | 3 | {96 * (2 + 1 + 1):,} | 0 | 0 | {30 * 4:,} |" in totals["| train"]
    assert "| evaluate | 1 | 0 | 0 | 0 | 30 |" in totals["| evaluate"]
    assert {"| all", "| shard 1/2", "| shard 2/2"} <= totals.keys()
    assert "0 of 20 runs are done." in ended.out


def test_methods_are_compared(call, config, weights, tmp_path):
    """By several losses, on the same images in the same order, on one teacher pass, which changes nothing; their table
    is ordered by accuracy."""
    folder, kd = tmp_path / "out", "dalikd.kd.losses.KD"
    methods = {"kd": {"loss": {"class_path": kd}}, "ce": {"loss": {"class_path": kd, "init_args": {"kd_weight": 0.0}}}}
    pairs = [{"teacher": {"name": "small", "label": "given", "weights": str(weights)}, "student": "small"}]
    own = {"pairs": pairs, "augmentation": ["flip"], "seeds": [3], "methods": methods, "stddev": False}
    content = {**{key: config[key] for key in ("data", "device", "batch_size", "epochs", "mix")}, "study": own}
    ended = call(content, "--output", folder)
    assert (ended.code, ended.err) == (0, "")
    results = json.loads((folder / "results.json").read_text())
    assert [group["method"] for group in results["groups"]] == ["ce", "kd"]
    assert results["measured"] == {}
    runs = [folder / f"distill/given_small/x1/flip/{name}/seed3" for name in methods]
    read = [yaml.safe_load((run / "config.yaml").read_text())["loss"]["init_args"]["kd_weight"] for run in runs]
    assert read == [0.9, 0.0]
    text = (folder / "table.md").read_text()
    assert "## Methods: given → small" in text
    assert "| kd | flip |" in text
    assert "T. stddev" not in text
    assert call(content, "--output", folder).out.count("| kd | flip |") == 1
    assert ended.out.count("on the same teacher pass: ") == 1
    alone = call(content, "--output", tmp_path / "alone", "--share_teacher", "false")
    assert "on the same teacher pass: " not in alone.out
    assert results_of(tmp_path / "alone")["groups"] == results["groups"]
    for run in runs:
        saved = Path("last") / "student.safetensors"
        assert (run / saved).read_bytes() == (tmp_path / "alone" / run.relative_to(folder) / saved).read_bytes()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"a b": {}}, "methods: 'a b': {}: give names of letters and digits"),
        ({"kd": {"seed": 3}}, "methods.kd.seed cannot be set here; a method takes options of distill"),
        ({"kd": {"loss": {"class_path": "dalikd.kd.losses.Nothing"}}}, "Nothing"),
    ],
)
def test_bad_methods_are_named(call, config, tmp_path, methods, message):
    ended = call({**config, "study": {**config["study"], "methods": methods}}, "--output", tmp_path / "out")
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "out").exists()
