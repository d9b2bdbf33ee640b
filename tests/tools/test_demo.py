import json
from pathlib import Path

import pytest
import yaml

from dalikd import configs
from dalikd.tools import demo
from dalikd.trainers.augmentation import PUBLISHED


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
        "3.3 a student with identity",
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
