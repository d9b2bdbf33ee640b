"""Correlation against published figures; points files; the plot."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Annotation

from dalikd.kd.correlation import Point, correlate, draw, intervals, plot, read_points

FIGURES = json.loads((Path(__file__).parents[1] / "data" / "good_da_points.json").read_text())


def points_of(figure: dict) -> list[Point]:
    return [Point(**point) for point in figure["points"]]


def correlation_of(points: list[Point]):
    return correlate([point.t_stddev for point in points], [point.s_test_loss for point in points])


@pytest.mark.parametrize("name", FIGURES)
def test_published_coefficients_to_the_printed_digits(name: str):
    correlation = correlation_of(points_of(FIGURES[name]))
    for kind, printed in FIGURES[name]["printed"].items():
        value = getattr(correlation, kind)
        assert [round(value.coefficient, 4), round(value.p_value, 4)] == printed


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0], "x has 3 values and y 2"),
        ([1.0, 2.0], [1.0, 2.0], "at least 3"),
        ([], [], "at least 3"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "every value of x"),
        ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0], "every value of y"),
        ([1.0, float("nan"), 3.0], [1.0, 2.0, 3.0], r"x\[1\] is nan"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, float("inf")], r"y\[2\] is inf"),
    ],
)
def test_series_without_a_correlation_are_refused(x: list, y: list, message: str):
    with pytest.raises(ValueError, match=message):
        correlate(x, y)


def test_intervals_are_quantiles_of_the_coefficients_of_resamples():
    x, y = np.array([1.0, 2.0, 2.0, 3.0, 5.0, 4.0]), np.array([2.0, 1.0, 4.0, 4.0, 6.0, 3.0])  # with ties
    drawn = np.random.default_rng(3).multinomial(6, [1 / 6] * 6, 60)
    rows = [np.repeat(np.arange(6), counts) for counts in drawn]
    found = [
        correlate(x[row].tolist(), y[row].tolist()) for row in rows if len(set(x[row])) > 1 and len(set(y[row])) > 1
    ]
    for name, interval in intervals(x.tolist(), y.tolist(), 0.8, resamples=60, seed=3).items():
        coefficients = [getattr(one, name).coefficient for one in found]
        assert interval == pytest.approx(np.quantile(coefficients, [0.1, 0.9]))


def test_few_points_have_no_interval():
    assert intervals([1, 2, 3, 4], [1, 2, 3, 5]) == {}
    with pytest.raises(ValueError, match="confidence is 95: give a share between 0 and 1"):
        intervals([1, 2, 3, 4, 5], [1, 2, 3, 5, 4], 95)


def test_points_are_read(tmp_path: Path):
    path = tmp_path / "points.json"
    path.write_text('{"title": "t", "points": [{"da": "cutmix", "t_stddev": 0.004, "s_test_loss": 1, "color": "red"}]}')
    assert read_points(path) == read_points(str(path)) == [Point("cutmix", 0.004, 1.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", 'no list "points"'),
        ('{"points": {}}', 'no list "points"'),
        ('{"points": [3]}', r"points\[0\] is not an object"),
        ('{"points": [{"t_stddev": 1, "s_test_loss": 1}]}', r"points\[0\]: da is None"),
        (
            '{"points": [{"da": "a", "t_stddev": 1, "s_test_loss": 1}, {"da": "b", "t_stddev": 1}]}',
            r"points\[1\]: s_test",
        ),
        ('{"points": [{"da": "a", "t_stddev": "x", "s_test_loss": 1}]}', r"points\[0\]: t_stddev is 'x'"),
        ('{"points": [{"da": "a", "t_stddev": null, "s_test_loss": 1}]}', r"points\[0\]: t_stddev is None"),
        ('{"points": [{"da": "a", "t_stddev": true, "s_test_loss": 1}]}', r"points\[0\]: t_stddev is True"),
        ('{"points": [{"da": "a", "t_stddev": 1, "s_test_loss": NaN}]}', r"points\[0\]: s_test_loss is nan"),
    ],
)
def test_errors_name_file_point_and_key(tmp_path: Path, content: str, message: str):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_points(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        read_points(tmp_path / "nothing.json")


@pytest.mark.parametrize("name", FIGURES)
def test_names_and_coefficients_are_readable(name: str):
    points = points_of(FIGURES[name])
    axes = draw(points, correlation_of(points), FIGURES[name]["title"]).axes[0]
    texts = [text for text in axes.texts if isinstance(text, Annotation)]
    assert sorted(text.get_text() for text in texts[1:]) == sorted(point.da for point in points)
    assert f"{FIGURES[name]['printed']['pearson'][0]:.4f}" in texts[0].get_text()
    for one, other in itertools.combinations(texts, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent())
    assert (axes.get_xlabel(), axes.get_title()) == ("T. stddev", FIGURES[name]["title"])


def test_the_plot_is_a_png_file(tmp_path: Path):
    points = points_of(FIGURES["vgg13_vgg8_cifar100"])
    plot(points, correlation_of(points), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_plots_without_points_or_folder_are_refused(tmp_path: Path):
    points = points_of(FIGURES["vgg13_vgg8_cifar100"])
    with pytest.raises(ValueError, match="no points"):
        plot([], correlation_of(points), tmp_path / "figure.png")
    with pytest.raises(NotADirectoryError, match="missing"):
        plot(points, correlation_of(points), tmp_path / "missing" / "figure.png")
