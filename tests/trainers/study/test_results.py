import json

import pytest

from dalikd.kd.correlation import Point, Spread
from dalikd.trainers.study.results import points_of


def test_figures_are_means_over_seeds_with_their_spread(folder, collected):
    results = collected(folder)
    assert (results["complete"], results["missing"]) == (True, [])
    (group,) = results["groups"]
    assert (group["epochs"], group["epoch_factor"]) == (6.0, 2.0)
    assert group["teacher_alone"] == {"loss": 0.5, "top1": 0.75, "top5": 1.0}
    assert group["student_alone"]["last"]["loss"] == {"mean": 9.5, "std": pytest.approx(0.5**0.5), "count": 2}
    row = group["augmentations"][1]
    assert (row["augmentation"], row["t_stddev"], row["t_stderr"], row["t_windows"]) == ("mixup", 0.02, 0.002, 20)
    assert row["last"]["loss"] == {"mean": 2.5, "std": pytest.approx(0.5**0.5), "count": 2}
    assert row["best"]["loss"]["mean"] == 2.0
    assert row["best"]["top1"] == {"mean": 0.75, "std": 0.0, "count": 2}
    assert row["runs"][1] == {
        "seed": 1,
        "last": {"epoch": 6, "loss": 3.0, "top1": 0.5, "top5": 1.0},
        "best": {"epoch": 4, "loss": 2.5, "top1": 0.75, "top5": 1.0},
    }
    for name in ("pearson", "spearman", "kendall"):
        assert group["correlation"][name][0] == pytest.approx(-1)
    assert results["fingerprints"] == {"train": ["t"], "val": ["v"]}
    assert results["runs_on"] == {"versions": [{"torch": "2"}], "processes": [1]}
    json.dumps(results, allow_nan=False)


def test_points_are_last_losses_over_t_stddev(folder, collected):
    points, spreads = points_of(collected(folder)["groups"][0])
    assert points == [Point("flip", 0.03, 1.5), Point("mixup", 0.02, 2.5), Point("cutmix", 0.01, 3.5)]
    assert spreads[0] == Spread(0.003, pytest.approx(0.5**0.5))


def test_gaps_are_left_out_and_named(folder, collected):
    (folder / "distill/vgg13_vgg8/x2/mixup/seed0/results.json").unlink()
    (folder / "distill/vgg13_vgg8/x2/cutmix/seed0/results.json").write_text(json.dumps({"finished": False}))
    (folder / "distill/vgg13_vgg8/x2/cutmix/seed1/results.json").unlink()
    (folder / "teachers/vgg13.json").unlink()
    results = collected(folder)
    (group,) = results["groups"]
    assert len(results["missing"]) == 4
    assert group["teacher_alone"] is None
    assert group["augmentations"][1]["last"]["loss"] == {"mean": 3.0, "std": None, "count": 1}
    assert group["augmentations"][2]["last"] is None
    assert (group["correlation"], group["no_correlation"]) == (None, "2 points: a correlation takes at least 3")


def test_equal_losses_have_no_correlation(folder, collected):
    last = {"epoch": 6, "val": {"loss": 1.0, "top1": 0.5, "top5": 1.0}}
    for path in folder.glob("distill/**/results.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "last": last}))
    group = collected(folder)["groups"][0]
    assert (group["correlation"], group["no_correlation"]) == (None, "all values are equal")


def test_measurements_say_what_they_passed_and_what_they_do_not_tell_apart(folder, collected):
    path = folder / "measure/vgg13.json"
    measured = {"cell": "measure/vgg13.json", "images": 6400, "confidence": 0.95}
    assert collected(folder)["measured"]["measurements"] == [{**measured, "not_told_apart": [["cutmix", "mixup"]]}]
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "separation": None, "stopped": {"confidence": 0.9}}))
    assert collected(folder)["measured"]["measurements"] == [{**measured, "confidence": 0.9, "not_told_apart": None}]


@pytest.mark.parametrize(
    ("name", "fingerprint", "other"),
    [
        ("distill/vgg13_vgg8/x2/mixup/seed0/results.json", {"train": "X", "val": "v"}, "mixup/seed0"),
        ("distill/vgg13_vgg8/x2/mixup/seed0/results.json", {"train": "t", "val": "X"}, "mixup/seed0"),
        ("measure/vgg13.json", "X", "measure/vgg13.json"),
        ("teachers/vgg13.json", "X", "teachers/vgg13.json"),
    ],
)
def test_results_of_other_images_are_refused(folder, collected, name, fingerprint, other):
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), "fingerprint": fingerprint}))
    with pytest.raises(ValueError, match="have different images, by the data's fingerprints") as error:
        collected(folder)
    message = str(error.value)
    assert any(f"X: {prefix}{other}" in message for prefix in ("", "distill/vgg13_vgg8/x2/"))
    assert "students/vgg8/x2/seed0" in message
