"""What a report compares: settings, their names, intervals, curves and times."""

import json

import pytest

from dalikd.trainers.report.compare import compare_runs, curves, describe, figure, seconds_of
from dalikd.trainers.runs import find_runs


@pytest.fixture
def read(tmp_path):
    return lambda: find_runs([tmp_path])


def test_settings_are_named_by_what_differs(make_run, write_measurement, read):
    other = {"class_path": "dalikd.kd.losses.KD", "init_args": {"kd_weight": 0.5}}
    for seed in (0, 1):
        make_run(f"a{seed}", "flip", seed)
        make_run(f"b{seed}", "flip", seed, config={"loss": other})
        make_run(f"c{seed}", "mixup", seed, config={"epochs": 4.0}, results={"epochs": 4.0})
    write_measurement({"flip": 0.02, "mixup": None})
    settings, _ = compare_runs(read())
    assert [(one.name, len(one.runs), one.stddev and one.stddev["stddev"]) for one in settings] == [
        ("KD (kd_weight 0.9) · 2 epochs · flip", 2, 0.02),
        ("KD (kd_weight 0.5) · 2 epochs · flip", 2, 0.02),
        ("KD (kd_weight 0.9) · 4 epochs · mixup", 2, None),
    ]


def test_what_one_run_alone_has_needs_no_name_where_others_tell_it_apart(make_run, read):
    make_run("a", "flip")
    make_run("b", results={"command": "train", "teacher": None})
    assert [one.parts for one in compare_runs(read())[0]] == [{"method": "KD"}, {"method": "labels alone"}]


def test_a_student_whose_fresh_weights_are_of_the_seed_itself_has_no_name_for_it(make_run, read):
    for seed in (0, 1):
        make_run(f"a{seed}", seed=seed)
        make_run(f"b{seed}", seed=seed, config={"init_seed": 7})
        make_run(f"c{seed}", seed=seed, config={"init_seed": 8})
    assert [one.parts["init_seed"] for one in compare_runs(read())[0]] == ["", "init_seed 7", "init_seed 8"]


def test_a_teacher_among_the_runs_is_known_by_its_weights(make_run, read):
    make_run("a", "flip")
    make_run("t", results={"command": "train", "teacher": None, "sha256": {"last/student.safetensors": "abc"}})
    found = compare_runs(read())
    assert [[run.folder.name for one in part for run in one.runs] for part in found] == [["a"], ["t"]]


def test_runs_that_are_evaluated_on_other_images_or_twice_are_refused(make_run, read):
    make_run("a")
    make_run("b", results={"data": {"name": "digits"}, "fingerprint": {"train": "d", "val": "e"}})
    with pytest.raises(ValueError, match=r"on other images: data.name is imagefolder in .*a, digits in .*b"):
        compare_runs(read())
    make_run("b")
    with pytest.raises(ValueError, match=r"a and .*b are one run, with seed 0: leave one out"):
        compare_runs(read())


UNLABELLED = {"data": {"name": "images"}, "fingerprint": {"train": "i", "val": None}, "best": {}}
UNLABELLED |= {"last": {"epoch": 2, "train": {"loss": 3.0, "agreement": 0.25}, "val": None, "t_stddev": None}}


def test_runs_without_labelled_images_stand_beside_those_that_were_evaluated(make_run, read):
    """Those that are evaluated on the images of others are compared with them, whatever they are trained on."""
    make_run("a", "flip")
    beside = {"data": {"name": "images", "val_root": "x"}, "fingerprint": {"train": "i", "val": "v"}}
    make_run("b", "flip", config={"data": {"name": "images", "root": "r", "val_root": "x"}}, results=beside)
    for seed in (0, 1):
        make_run(f"c{seed}", "flip", seed, config={"data": {"name": "images", "root": "r"}}, results=UNLABELLED)
    settings, _ = compare_runs(read())
    assert [(one.name, one.evaluated) for one in settings] == [
        ("data.name imagefolder", True),
        ("data.name images", True),
        ("data.name images", False),
    ]
    first, _, last = map(describe, settings)
    assert (first["last"]["top1"]["mean"], first["train"]) == (0.5, {})
    assert (last["last"], last["best"], last["train"]) == (None, None, {"loss": 3.0, "agreement": 0.25})
    assert [run["seed"] for run in last["runs"]] == [0, 1]


def test_intervals_are_over_seeds_or_else_over_images(make_run, read):
    for seed, top1 in enumerate((0.4, 0.5, 0.6)):
        make_run(f"a{seed}", seed=seed, top1=top1, loss=1.0)
    (setting,), _ = compare_runs(read())
    found = figure(setting, "top1")
    half = 4.302653 * 0.1 / 3**0.5  # Student's t of 2 degrees of freedom
    assert found == pytest.approx((0.5, 0.5 - half, 0.5 + half, "seeds"))
    assert figure(setting, "loss") == (1.0, None, None, "")  # equal in all: nothing to tell the spread by
    one = figure(setting._replace(runs=setting.runs[1:2]), "top1")
    assert one == pytest.approx((0.5, 0.43136, 0.56864, "images"), abs=1e-5)  # Wilson's of 100 of 200
    assert figure(setting._replace(runs=setting.runs[:1]), "loss").kind == ""


def test_curves_are_means_over_seeds_and_have_few_points(make_run, read):
    for seed in (0, 1):
        folder = make_run(f"a{seed}", seed=seed, loss=1.0 + seed)
    (setting,), _ = compare_runs(read())
    found = curves(setting)
    assert list(found) == ["train loss", "train kd", "val loss", "val top1", "val top5"]
    assert found["val loss"] == [(1.0, 1.5, 1.0, 2.0), (2.0, 1.5, 1.0, 2.0)]
    lines = [{"step": step, "epoch": step / 10, "train": {"loss": float(step), "kd": None}} for step in range(1, 500)]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    points = curves(setting._replace(runs=find_runs([folder]).runs))
    assert list(points) == ["train loss"]
    assert len(points["train loss"]) == 120
    assert points["train loss"][-1] == pytest.approx((49.9, 499, 499, 499))


def test_seconds_are_those_of_the_steps(make_run, read):
    make_run("a")
    (run,) = read().runs
    assert seconds_of(run) == (32.0, 8.0, 0.0)  # 20 steps of 16 images at 10 a second, a quarter of it waited
    assert seconds_of(run._replace(log=[{**line, "teacher_share": 0.5} for line in run.log])) == (32.0, 8.0, 16.0)
    assert seconds_of(run._replace(log=[])) is None
