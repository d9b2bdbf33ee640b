import json
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from dalikd import configs
from dalikd.tools import demo
from dalikd.trainers.augmentation import PUBLISHED
from dalikd.trainers.stopping import Interrupted


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The demo's own config with small nets, one epoch and few images."""
    config = yaml.safe_load(Path(configs.__file__).with_name("demo.yaml").read_text("utf-8"))
    config["data"] |= {"val_limit": 30, "threads": 1}
    config |= {"model": "small", "mix": {"group": 32}, "batch_size": 32}
    config["teacher"]["name"] = config["train"]["model"] = "small"
    for command in ("train", "measure", "distill"):
        config[command]["epochs"] = 1
    config["measure"]["window"] = 32
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setenv("DALIKD_CACHE", str(tmp_path / "cache"))
    return ["--output", str(tmp_path / "demo"), "--limit", "96", "--device", "cpu"]


@pytest.mark.slow
def test_the_demo_shows_the_whole_job(tiny, tmp_path, capsys):
    students = ["cutmix", "flip", "identity"]
    demo.main([*tiny, "--augmentation", json.dumps(students)])
    out, folder = capsys.readouterr().out, tmp_path / "demo"
    for heading in (
        "1. a teacher",
        "2. how good each augmentation is",
        "3. a student with each of cutmix, flip, identity",
        "4. the ranking",
    ):
        assert heading in out
    points = json.loads((folder / "points.json").read_text())["points"]
    assert [point["da"] for point in points] == students
    measured = json.loads((folder / "measure.json").read_text())["results"]
    stddev = {result["augmentation"]: result["stddev"] for result in measured}
    assert list(stddev) == list(PUBLISHED)
    for point in points:
        assert point["t_stddev"] == stddev[point["da"]]
        results = json.loads((folder / point["da"] / "results.json").read_text())
        assert point["s_test_loss"] == results["last"]["val"]["loss"]
        assert results["data"]["train_images"] == 96
    assert json.loads((folder / "correlation.json").read_text()).keys() > {"pearson", "spearman", "kendall"}
    assert (folder / "scatter.png").read_bytes().startswith(b"\x89PNG")
    assert "dalikd train   --data.name imagefolder" in out

    with pytest.raises(SystemExit) as stop:
        demo.main(tiny)
    assert stop.value.code == 2
    assert "--overwrite true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"), [(["flip", "mixup"], "at least three"), (["flip", "mixup", "flop"], '"flop"')]
)
def test_what_cannot_be_ranked_is_refused_at_once(tiny, tmp_path, capsys, names, message):
    with pytest.raises(SystemExit) as stop:
        demo.main([*tiny, "--augmentation", json.dumps(names)])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert message in error
    assert not (tmp_path / "demo").exists()


@pytest.fixture
def two_threads(monkeypatch):
    """As on two cores; the other process is a copy of this one, so that it has what a test puts in its place."""
    chosen = []
    monkeypatch.setattr(demo.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(demo.torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(demo, "get_context", lambda _: multiprocessing.get_context("fork"))
    return chosen


def _calls(names: str) -> dict[str, list[str]]:
    return {name: ["--device", "cpu", "--precision", "fp32"] for name in names}


def test_half_of_the_students_are_distilled_beside_the_others(two_threads, monkeypatch):
    monkeypatch.setattr(demo, "_distil", lambda calls: {name: {"of": name} for name in calls})
    with demo._other_process(_calls("abcde")) as (here, there):
        assert list(here) == ["a", "b"]
        assert there() == {name: {"of": name} for name in "cde"}
    assert two_threads == [1, 2]
    with demo._other_process(_calls("abc")) as (here, there):
        assert (list(here), there()) == (["a", "b", "c"], {})
    assert multiprocessing.active_children() == []


def test_ctrl_c_is_for_the_first_process_and_nothing_is_left(two_threads, monkeypatch, tmp_path):  # noqa: ARG001
    began = tmp_path / "began"

    def distil(_):
        path = tempfile.mkdtemp()
        began.write_text(f"{os.getpgid(0)} {path}")
        signal.pause()

    monkeypatch.setattr(demo, "_distil", distil)
    with demo._other_process(_calls("abcd")):
        while not began.exists() or " " not in began.read_text():
            time.sleep(0.01)
        group, path = began.read_text().split()
        assert int(group) != os.getpgid(0)
        assert Path(path).is_dir()
    assert not Path(path).parent.exists()
    assert multiprocessing.active_children() == []


def test_what_is_stopped_says_how_to_begin_anew():
    message = r"^stopped by signal 2; a demo is not gone on with: --overwrite true begins it anew$"
    with pytest.raises(Interrupted, match=message), demo._begun_anew():
        raise Interrupted("go on with --resume RUN", signal.SIGINT)


@pytest.mark.parametrize("words", ["--limit 5", "the process that distils c, d has ended, as its own line tells"])
def test_what_the_other_process_meets_is_told_here(two_threads, monkeypatch, words):  # noqa: ARG001
    def distil(_):
        if words.startswith("--"):
            raise ValueError(words)
        os._exit(3)

    monkeypatch.setattr(demo, "_distil", distil)
    with pytest.raises(ValueError, match=f"^{words}$"), demo._other_process(_calls("abcd")) as (_, there):
        there()
    assert multiprocessing.active_children() == []
