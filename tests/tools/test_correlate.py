import json

import numpy as np
import pytest

from dalikd.tools import correlate

POINTS = [("flip", 0.030, 1.30), ("mixup", 0.020, 1.22), ("cutmix", 0.010, 1.20), ("cutout", 0.028, 1.25)]


@pytest.fixture
def points(tmp_path):
    path = tmp_path / "points.json"
    rows = [{"da": name, "t_stddev": stddev, "s_test_loss": loss} for name, stddev, loss in POINTS]
    path.write_text(json.dumps({"points": rows}))
    return path


def test_prints_and_writes_coefficients_and_a_plot(points, tmp_path, capsys):
    plot, file = tmp_path / "new" / "scatter.png", tmp_path / "new" / "out.json"
    correlate.main([str(points), "--plot", str(plot), "--json", str(file), "--title", "tiny"])
    content = json.loads(file.read_text())
    assert set(content) == {"pearson", "spearman", "kendall", "intervals", "confidence"}
    assert content["intervals"] == {}
    assert content["spearman"] == pytest.approx([1.0, 0.0])  # the order is the same
    _, stddev, loss = zip(*POINTS, strict=True)
    assert content["pearson"][0] == pytest.approx(np.corrcoef(stddev, loss)[0, 1])
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"pearson  {content['pearson'][0]:8.4f}   p = {content['pearson'][1]:.4g}"
    assert lines[3] == "no intervals: 4 points are too few to be drawn anew, give at least 5"
    assert lines[-2:] == [f"plot: {plot}", f"written: {file}"]


def test_writes_nothing_unasked(points, tmp_path, capsys):
    correlate.main([str(points)])
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["points.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["points.json"]),
        ("{", ["points.json"]),
        ('{"points": []}', ["3"]),
        ('{"points": [{"da": "a", "t_stddev": 1}]}', ["points.json", "s_test_loss"]),
    ],
)
def test_wrong_points_are_one_line(points, capsys, content, words):
    points.unlink() if content is None else points.write_text(content)
    with pytest.raises(SystemExit) as stop:
        correlate.main([str(points)])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert [word for word in words if word not in error] == []


# ----------------------------------------------------------------------------------------------------- run folders


STDDEV = {"flip": 0.05, "mixup": 0.03, "cutmix": 0.01, "cutout": 0.04, "identity": 0.06}
TEACHER = {"name": "resnet20", "weights": "t.safetensors", "sha256": "abc"}


@pytest.fixture
def students(make_run, write_measurement, tmp_path):
    """Two seeds of five augmentations whose mean loss is 100 times T. stddev, and what was measured."""
    for name, stddev in STDDEV.items():
        for seed in (0, 1):
            make_run(f"{name}-{seed}", augmentation=name, seed=seed, loss=100 * stddev + seed - 0.5, top1=stddev)
    return ["--measure", str(write_measurement(STDDEV)), *(str(path) for path in sorted(tmp_path.glob("*-[01]")))]


def refused(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        correlate.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    return error


def test_runs_are_means_over_seeds(students, tmp_path, capsys):
    file, plot = tmp_path / "out.json", tmp_path / "out.png"
    correlate.main([*students, "--json", str(file), "--plot", str(plot)])
    content = json.loads(file.read_text())
    assert content["pearson"][0] == pytest.approx(1)  # of single seeds it would be less
    assert content["intervals"]["spearman"] == pytest.approx([1, 1])
    assert plot.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("5 augmentations, 10 runs, seeds 0, 1: ")
    assert out[1].endswith("   95 % interval 1.0000 to 1.0000")
    correlate.main([*students, "--value", "accuracy", "--epoch", "best", "--json", str(file)])
    assert json.loads(file.read_text())["pearson"][0] == pytest.approx(-1)  # top1 of the best epoch is 1 - stddev


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"model": "resnet20"}}, "model differs: resnet8 in "),
        ({"config": {"schedule": {"name": "cosine", "final": 0.1}}}, "schedule.final differs: "),
        ({"results": {"teacher": {**TEACHER, "sha256": "xyz"}}}, "teacher differs: resnet20 abc in "),
        ({"results": {"fingerprint": {"train": "other", "val": "v"}}}, "different images"),
        ({"results": {"finished": False, "steps": 7}}, "flip-0 is not finished, 7 steps are done: go on with it by"),
        ({"results": {"last": {}}}, "flip-0/results.json: last.epoch is missing: the run is damaged"),
        ({"results": {"seed": 1}}, "flip-0 and "),
        ({"results": {"last": {"epoch": 2, "val": None}, "best": {}}}, "flip-0 was not evaluated, it had no labelled"),
        ({"augmentation": "same"}, "no T. stddev of same"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(students, make_run, capsys, change, words):
    make_run("flip-0", **{"augmentation": "flip", "seed": 0, "loss": 1.0} | change)
    error = refused(capsys, students)
    assert words in error
    assert "flip-0" in error


def test_a_measurement_of_something_else_is_refused(students, write_measurement, capsys):
    write_measurement(STDDEV, teacher={**TEACHER, "sha256": "xyz"})
    assert "was measured with the teacher resnet20 xyz" in refused(capsys, students)
    write_measurement(STDDEV, mix={"group": 32})
    assert "--mix.group 32" in refused(capsys, students)
    write_measurement(STDDEV, fingerprint="other")
    assert "measurement and runs have different images" in refused(capsys, students)
    write_measurement(dict.fromkeys(STDDEV))
    assert "too few windows" in refused(capsys, students)


def test_too_few_points_are_said(students, capsys):
    assert "a correlation of 2 points says nothing: give at least 3" in refused(capsys, students[:4] + students[5:6])


def test_folders_without_a_measurement_and_the_other_way_round(students, points, tmp_path, capsys):
    assert "need --measure FILE" in refused(capsys, students[2:])
    assert "--value and --epoch" in refused(capsys, [points, "--value", "accuracy"])
    assert "no such folder" in refused(capsys, [*students, tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    assert "empty holds no finished run" in refused(capsys, [*students[:2], tmp_path / "empty"])
