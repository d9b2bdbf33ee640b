import json

import pytest

from dalikd.tools.bench import passes as bench
from dalikd.tools.cli import parse


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(bench, "settle", lambda: None)


@pytest.fixture
def arguments(options, tmp_path):
    own = ["--batch_size", 16, "--mix.group", 8, "--teacher.name", "small", "--output", tmp_path / "out"]
    more = ["--augmentation", "identity", "flip", "cutmix", "cutmixpick_teacher", "--images", 40]
    return [str(word) for word in (*options, *own, *more)]


def test_both_sides_are_timed_and_written(arguments, tmp_path, capsys, monkeypatch):
    measured = []
    original = bench.measure_branches

    def noted(branches, *rest):
        report = original(branches, *rest)
        measured.append([result["augmentation"] for result in report["results"]])
        assert all(result["images"] == 40 for result in report["results"])
        return report

    monkeypatch.setattr(bench, "measure_branches", noted)
    bench.run(*parse("bench passes", arguments))
    (path,) = (tmp_path / "out").glob("*-passes-small-32-fp32-cpu.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["augmentations"] == "4"
    # originals, flip, and two runs of cutmix; alone: 1, 2, 2 and 3
    assert row["one pass, teacher images an original"] == 4
    assert row["a pass each, teacher images an original"] == 8
    assert row["a pass each / one pass, seconds"]["median"] > 0
    names = ["identity", "flip", "cutmix", "cutmixpick_teacher"]
    assert measured.count(names) == 6  # a warm-up and five rounds
    assert measured.count(["flip"]) == 6
    assert len(measured) == 6 * 5
    assert "A round goes once over 40 originals on either side: identity, flip" in capsys.readouterr().out


def test_the_plan_is_made_of_options_that_exist(tmp_path):
    for planned in bench.plan(tmp_path):
        options, _ = parse("bench passes", planned.arguments)
        assert options.augmentation == ["published"]
        assert options.data.root == str(tmp_path)


def test_mistakes_are_told_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*arguments, "--rounds", "3"])
    assert stop.value.code == 2
    assert "--rounds 3: give at least 5" in capsys.readouterr().err
