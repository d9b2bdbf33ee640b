import csv
import io

import pytest

from dalikd.trainers.study.gain_tables import draw_gains, gains_csv, gains_markdown
from dalikd.trainers.study.gains import gains

STDDEV = {"identity": 0.03, "mixup": 0.02, "cutmix": 0.01}


def _top1(method: str, augmentation: str, factor: float, seed: int) -> float:
    """AT adds 2 points and 0.4 with each seed, cutmix 3, length 1, AT with cutmix 4 more; a seed moves all its runs."""
    at, cutmix = method == "at", augmentation == "cutmix"
    return 0.5 + 0.004 * seed + 0.01 * ((2 + 0.4 * seed) * at + 3 * cutmix + (factor == 2.0) + 4 * (at and cutmix))


def _rows(text: str, first: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {first} |")]


def test_the_section_explains_itself_and_shows_every_cell(groups):
    text = gains_markdown(gains(groups(_top1, seeds=(0, 1))), "plots/gains.png")
    assert text.startswith("## Where the gains come from\n")
    assert "over the reference: kd, identity, x1." in text
    assert "averaged over all orders in which they can be changed (Shapley)" in text
    assert "the interaction, is shared equally" in text
    assert "](plots/gains.png)" in text
    assert "### Gains: vgg13 → vgg8" in text
    assert "The reference has 50.20 % top1." in text
    assert "| at | +3.20 ± 0.20 | +5.00 ± 0.00 | +1.00 ± 0.00 |" in text
    assert "| kd |  | +3.00 ± 0.00 | +1.00 ± 0.00 |" in text
    whole = ["at", "cutmix", "x2", "60.40", "+10.20 ± 0.20", "+4.20 ± 0.20", "+5.00 ± 0.00", "+1.00 ± 0.00"]
    assert _rows(text, "at | cutmix | x2") == [[*whole, "+6.20 ± 0.20", "0.021", "yes", "2"]]
    (plain,) = _rows(text, "at | identity | x1")
    assert plain[3:] == ["52.40", "+2.20 ± 0.20", "+2.20 ± 0.20", "", "", "+2.20 ± 0.20", "0.058", "no", "2"]
    assert "that are **not** told apart: at identity x2 at / kd; at identity x1 at / kd." in text
    assert "T. stddev" not in text
    assert "There is one seed" not in text


def test_a_single_factor_has_no_split(groups):
    text = gains_markdown(gains(groups(_top1, augmentations=("identity",), factors=(1.0,), seeds=(0, 1))))
    assert "| method | top1 % | over kd | p, Holm | told apart | seeds |" in text
    assert "| at | 52.40 | +2.20 ± 0.20 | 0.058 | no | 2 |" in text
    assert "No neighbours in the ranking by mean top1 (paired by seed, Holm over the neighbours) are told apart" in text
    assert "Shapley" not in text
    assert "![" not in text
    alone = gains_markdown(gains(groups(_top1, methods=("at",), factors=(1.0,), seeds=(0, 1))))
    assert "| augmentation | top1 % | gain | seeds |" in alone
    assert "| cutmix | 59.40 | +7.00 ± 0.00 | 2 |" in alone
    assert "told apart" not in alone
    assert gains_markdown(gains(groups(_top1, ("at",), ("flip",), (1.0,)))) == ""


def test_one_seed_tells_nothing_apart(groups):
    text = gains_markdown(gains(groups(_top1, seeds=(0,))))
    assert "**There is one seed: no figure has a standard error, and nothing can be told apart.**" in text
    (row,) = _rows(text, "at | cutmix | x2")
    assert row == ["at", "cutmix", "x2", "60.00", "+10.00", "+4.00", "+5.00", "+1.00", "+6.00", "", "no", "1"]


def test_gaps_stay_blank(groups):
    text = gains_markdown(gains(groups(lambda *run: None if run[:2] == ("at", "cutmix") else _top1(*run))))
    (row,) = _rows(text, "at | cutmix | x2")
    assert row == ["at", "cutmix", "x2", *[""] * 8, "0"]
    assert "| at | +3.40 ± 0.20 |  | +1.00 ± 0.00 |" in text
    nothing = gains_markdown(gains(groups(lambda *_: None)))
    assert "The reference has" not in nothing


def test_neighbours_are_chained(groups):
    values = {"a": (0.5, 0.52), "kd": (0.4, 0.44), "c": (0.3, 0.3), "d": (0.1, 0.1), "e": (0.05, 0.0500001)}
    text = gains_markdown(gains(groups(lambda *run: values[run[0]][run[3]], tuple(values), ("flip",), (1.0,), (0, 1))))
    assert "that are **not** told apart: a / kd / c / d." in text
    values = {"a": (0.5, 0.50001), "kd": (0.4, 0.4)}
    text = gains_markdown(gains(groups(lambda *run: values[run[0]][run[3]], tuple(values), ("flip",), (1.0,), (0, 1))))
    assert "(paired by seed, Holm over the neighbours) are all told apart." in text
    assert "| a | 50.00 | +10.00 ± 0.00 | < 0.001 | yes | 2 |" in text


def test_the_regression_is_a_small_table(groups):
    def linear(method: str, augmentation: str, factor: float, seed: int) -> float:
        return 0.7 - (2 if method == "at" else 1) * STDDEV[augmentation] + 0.1 * factor + 0.01 * seed

    found = gains(groups(linear, augmentations=tuple(STDDEV), stddev=STDDEV))
    text = gains_markdown(found)
    assert "| at | -2.00 ± 0.00 | -1.000 | < 0.001 | 6 |" in text
    assert "| *all* | -1.50 ± 0.19 | -0.949 | < 0.001 | 12 |" in text
    assert "| *averaged* | -1.50 ± 0.00 | -1.000 | < 0.001 | 3 |" in text
    few = gains_markdown(gains(groups(_top1, stddev=STDDEV)))
    assert "No regression of the gains on T. stddev: it is known of 2 augmentation(s), it takes three." in few


def test_the_csv_holds_every_figure_and_its_error(groups):
    made = [*groups(_top1, seeds=(0, 1)), *groups(_top1, seeds=(0,), student="wrn")]
    rows = list(csv.DictReader(io.StringIO(gains_csv(gains(made)))))
    assert len(rows) == 16
    row = next(row for row in rows if [*row.values()][1:5] == ["vgg8", "at", "cutmix", "2.0"])
    expected = {"top1": 0.604, "gain": 0.102, "gain_of_method": 0.042, "gain_of_augmentation": 0.05}
    expected |= {"gain_stderr": 0.002, "gain_of_method_stderr": 0.002, "gain_of_length": 0.01, "beside": 0.062}
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected)
    assert float(row["beside_high"]) - float(row["beside"]) == pytest.approx(12.706 * 0.002, rel=1e-4)
    assert (row["gain_seeds"], row["beside_told_apart"], row["top1_seeds"]) == ("2", "True", "2")
    assert float(row["beside_p"]) == pytest.approx(float(row["beside_p_holm"]))
    assert (rows[-1]["student"], rows[-1]["gain_stderr"]) == ("wrn", "")
    (one,) = gains(groups(_top1, augmentations=("identity",)))
    assert "gain_of_augmentation" not in gains_csv([one])


@pytest.mark.filterwarnings("error")
def test_the_plot_has_a_bar_a_factor_and_whiskers_where_there_are_errors(groups):
    made = [*groups(_top1, seeds=(0, 1)), *groups(_top1, seeds=(0, 1), student="wrn")]
    figure = draw_gains(gains(made))
    assert [axes.get_title() for axes in figure.axes] == ["vgg13 → vgg8", "vgg13 → wrn"]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["at", "kd (reference)"]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([3.2, float("nan"), 5.0, 3.0, 1.0, 1.0], nan_ok=True)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["of the method", "of the augmentation", "of the length"]
    figure.savefig(io.BytesIO(), dpi=30)
    for few in (groups(_top1, seeds=(0,)), groups(lambda *_: None), groups(_top1, ("kd",), factors=(1.0,))):
        draw_gains(gains(few)).savefig(io.BytesIO(), dpi=30)
