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
    assert set(content) == {"pearson", "spearman", "kendall"}
    assert content["spearman"] == pytest.approx([1.0, 0.0])  # the order is the same
    _, stddev, loss = zip(*POINTS, strict=True)
    assert content["pearson"][0] == pytest.approx(np.corrcoef(stddev, loss)[0, 1])
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"pearson  {content['pearson'][0]:8.4f}   p = {content['pearson'][1]:.4g}"
    assert lines[-2:] == [f"plot: {plot}", f"written: {file}"]


def test_writes_nothing_unasked(points, tmp_path, capsys):
    correlate.main([str(points)])
    assert len(capsys.readouterr().out.splitlines()) == 3
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
