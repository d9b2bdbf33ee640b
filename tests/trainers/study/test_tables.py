import csv
import io

import pytest

from dalikd.trainers.study.tables import csv_table, markdown


def test_gaps_are_shown(folder, collected):
    (folder / "distill/vgg13_vgg8/x2/mixup/seed0/results.json").unlink()
    for seed in (0, 1):
        (folder / f"distill/vgg13_vgg8/x2/cutmix/seed{seed}/results.json").unlink()
    (folder / "teachers/vgg13.json").unlink()
    results = collected(folder)
    text = markdown(results, "title", {})
    assert "**Not complete: 4 runs are missing:** `teachers/vgg13.json`" in text
    assert "2 points: a correlation takes at least 3" in text
    assert "| mixup | 0.020000 ± 0.002000 | 20 | 3.0000 | 50.00 | 2.5000 | 75.00 | 1 |" in text
    assert "| cutmix | 0.010000 ± 0.001000 | 20 |  |  |  |  | 0 |" in text


def test_the_table_reads_from_the_lowest_t_stddev_up(folder, collected):
    text = markdown(collected(folder), "A study", {0: "plots/a.png"})
    assert text.startswith("# A study\n")
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert rows[-5:] == ["| *teacher*", "| *student alone*", "| cutmix", "| mixup", "| flip"]
    assert "| flip | 0.030000 ± 0.003000 | 20 | 1.5000 ± 0.7071 | 50.00 ± 0.00 | 1.0000 ± 0.7071 |" in text
    assert "| *teacher* |  |  | 0.5000 | 75.00 |" in text
    assert "| vgg13 / vgg8 | 6 (x2) | 3 | -1.000 (p < 0.001) |" in text
    assert "windows of 640 teacher outputs, after 6,400 original images, per_batch, mix group 64" in text
    assert "mean ± standard deviation over the seeds 0, 1" in text
    assert "(plots/a.png)" in text
    assert "Not complete" not in text


def test_the_csv_holds_every_figure(folder, collected):
    rows = list(csv.DictReader(io.StringIO(csv_table(collected(folder)))))
    assert [row["row"] for row in rows] == ["teacher", "student alone", "flip", "mixup", "cutmix"]
    mixup = rows[3]
    assert [mixup[key] for key in ("teacher", "student", "epoch_factor", "epochs", "seeds")] == [
        *("vgg13", "vgg8", "2.0", "6.0", "2"),
    ]
    assert [float(mixup[key]) for key in ("t_stddev", "loss_last_mean", "top1_best_mean")] == [0.02, 2.5, 0.75]
    assert float(mixup["loss_best_std"]) == pytest.approx(0.5**0.5)
    assert (rows[0]["loss_last_mean"], rows[0]["t_stddev"], rows[1]["t_windows"]) == ("0.5", "", "")


def test_figures_of_students_with_heads_are_explained(folder, collected):
    results = collected(folder)
    text = "auxiliary heads; the figures are of their own logits"
    assert text not in markdown(results, "title", {})
    methods = {"kd": {}, "hsakd": {"heads": True}, "hsakd_at": {"heads": True}, "none": {"heads": False}}
    results["config"] = {"study": {**results["config"]["study"], "methods": methods}}
    assert f"Students of hsakd, hsakd_at are trained with {text}." in markdown(results, "title", {})


def _explained(results, *measurements):
    results["measured"]["measurements"] = [
        dict(zip(("cell", "images", "confidence", "not_told_apart"), one, strict=True)) for one in measurements
    ]
    return markdown(results, "title", {})


def test_neighbours_that_are_not_told_apart_are_named(folder, collected):
    results = collected(folder)
    level = "ranking by T. stddev"
    assert (
        f"Neighbours in a measurement's {level} that are not told apart at 95 % confidence: cutmix / mixup "
        "(`measure/vgg13.json`)." in markdown(results, "title", {})
    )
    text = _explained(
        *(results, ("a", 500, 0.99, [["x", "y"], ["y", "z"]]), ("b", 64000, 0.99, [["u", "v"]])),
        *(("c", 1000, 0.99, []), ("d", 1000, 0.99, None)),
    )
    assert "told apart at 99 % confidence: x / y, y / z (`a`); u / v (`b`)." in text
    assert "after 500 to 64,000 original images" in text
    text = _explained(results, ("a", 500, 0.999, []), ("b", 500, 0.999, None))
    assert f"All neighbours in each measurement's {level} are told apart at 99.9 % confidence." in text
    assert "after 500 original images" in text
    assert "eighbours" not in _explained(results, ("a", 500, 0.95, None))
