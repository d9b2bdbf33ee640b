from pathlib import Path

import pytest

from dalikd.trainers.study.options import StudyOptions
from dalikd.trainers.study.plan import Axes, deal, plan
from dalikd.trainers.study.ready import read_pairs

FOLDER = Path("out")
AXES = Axes({"flip": False, "cutmixpick_student": True}, (7, 8), (1.0, 2.5))


def _pairs(*pairs, trains=True):
    return read_pairs(
        StudyOptions(pairs=[{"teacher": teacher, "student": student} for teacher, student in pairs]), trains
    )


def test_cells_come_after_what_they_need():
    cells = plan(_pairs(("vgg13", "vgg8"), ({"name": "vgg13", "label": "given", "weights": "x"}, "vgg8")), AXES, FOLDER)
    seen = set()
    for cell in cells:
        assert set(cell.needs) <= seen, cell
        seen.add(cell.name)
    assert len(seen) == len(cells) == 2 + 4 + 4 + 2 * 2 * 2 * 2
    by_name = {cell.name: cell for cell in cells}
    assert by_name["distill/vgg13_vgg8/x2.5/flip/seed8"].needs == ("teachers/vgg13",)
    assert by_name["measure/vgg13_vgg8.json"].needs == ("teachers/vgg13", "students/vgg8/x1/seed7")
    assert by_name["measure/given.json"].needs == ()
    assert by_name["teachers/given.json"].command == "evaluate"


def test_what_pairs_share_is_done_once():
    cells = plan(_pairs(("vgg13", "vgg8"), ("vgg13", "vgg11"), ("wrn_40_2", "vgg8")), AXES, FOLDER)
    names = [cell.name for cell in cells if not cell.name.startswith("distill/")]
    assert [name for name in names if name.startswith("teachers/")] == ["teachers/vgg13", "teachers/wrn_40_2"]
    assert sum(name.startswith("students/vgg8/") for name in names) == 4
    assert [name for name in names if name.startswith("measure/")] == [
        *("measure/vgg13.json", "measure/vgg13_vgg8.json", "measure/vgg13_vgg11.json"),
        *("measure/wrn_40_2.json", "measure/wrn_40_2_vgg8.json"),
    ]


def test_nothing_is_measured_in_vain():
    cells = plan(_pairs(("vgg13", "vgg8")), Axes({"flip": False}, (0,), (1.0,)), FOLDER)
    assert [cell.name for cell in cells if cell.command == "measure"] == ["measure/vgg13.json"]


def test_the_options_of_a_cell_say_where_it_goes():
    student = {"name": "vgg8", "optimizer": {"lr": 0.01}, "args": {"x": 1}}
    cells = {cell.command: cell for cell in plan(_pairs(("vgg13", student)), AXES, FOLDER)}
    assert cells["train"].options(FOLDER) == {
        **{"output": "out/students/vgg8/x2.5/seed8", "model": "vgg8", "model_args": {"x": 1}},
        **{"optimizer.lr": 0.01, "epoch_factor": 2.5, "seed": 8},
    }
    assert cells["measure"].options(FOLDER) == {
        **{"json": "out/measure/vgg13_vgg8.json", "checkpoint": "out/measure/vgg13_vgg8.pt"},
        **{"teacher.name": "vgg13", "teacher.weights": "out/teachers/vgg13/last/student.safetensors"},
        **{"model": "vgg8", "model_args": {"x": 1}, "augmentation": ["cutmixpick_student"]},
        "weights": "out/students/vgg8/x1/seed7/last/student.safetensors",
    }
    assert cells["distill"].result == "distill/vgg13_vgg8/x2.5/cutmixpick_student/seed8/results.json"
    assert cells["measure"].result == "measure/vgg13_vgg8.json"


def test_a_method_may_train_the_student_with_heads():
    methods = {"kd": {}, "hsakd": {"heads": True, "loss": "HSAKD"}, "plain": {"heads": False}}
    axes = Axes({"identity": False}, (0,), (1.0,), methods, stddev=False)
    pairs = _pairs(
        ("vgg13_aux", {"name": "vgg8", "args": {"x": 1}}), ("vgg13_aux", "wrn_16_2"), ("vgg13_aux", "vgg8_aux")
    )
    cells = {cell.name: cell.settings for cell in plan(pairs, axes, FOLDER)}
    models = {
        name.removeprefix("distill/vgg13_aux_"): found["model"] for name, found in cells.items() if "distill" in name
    }
    assert models == {
        f"{student}/x1/identity/{method}/seed0": model
        for student, plain in (("vgg8", "vgg8"), ("wrn_16_2", "wrn_16_2"), ("vgg8_aux", "vgg8_aux"))
        for method, model in (("kd", plain), ("hsakd", f"{student.removesuffix('_aux')}_aux"), ("plain", plain))
    }
    assert not any("heads" in found for found in cells.values())
    made = cells["distill/vgg13_aux_vgg8/x1/identity/hsakd/seed0"]
    assert (made["loss"], made["model_args"], made["teacher.name"]) == ("HSAKD", {"x": 1}, "vgg13_aux")
    assert cells["students/vgg8/x1/seed0"]["model"] == "vgg8"  # labels alone


def test_heads_are_trained_on_given_weights():
    teacher = {"name": "vgg13_aux", "weights": "file.pt", "freeze_backbone": True, "epochs": 3, "ema": 0.9}
    cells = {cell.name: cell for cell in plan(_pairs((teacher, "vgg8"), trains=False), AXES, FOLDER)}
    made = cells["teachers/vgg13_aux"]
    assert (made.command, made.settings) == (
        "train",
        {"model": "vgg13_aux", "weights": "file.pt", "freeze_backbone": True, "epochs": 3, "ema": 0.9},
    )
    asking = cells["distill/vgg13_aux_vgg8/x1/flip/seed7"]
    assert asking.needs == ("teachers/vgg13_aux",)
    assert asking.settings["teacher.weights"] == "out/teachers/vgg13_aux/last/ema.safetensors"
    (evaluated,) = [
        cell
        for cell in plan(_pairs(({**teacher, "label": "b"}, "vgg8"), ("vgg13_aux", "vgg8")), AXES, FOLDER)
        if cell.name == "teachers/vgg13_aux"
    ]
    assert "weights" not in evaluated.settings  # heads and backbone from nothing, jointly


def test_the_stop_rule_is_left_out_where_there_is_nothing_to_rank():
    def measured(**names):
        cells = plan(_pairs(("vgg13", "vgg8")), Axes(names, (0,), (1.0,)), FOLDER, stops_early=True)
        return {cell.name: cell for cell in cells if cell.command == "measure"}

    cells = measured(flip=False, mixup=False, cutmixpick_student=True)
    assert "stop_confidence" not in cells["measure/vgg13.json"].settings
    assert cells["measure/vgg13_vgg8.json"].settings["stop_confidence"] is None
    assert measured(flip=False)["measure/vgg13.json"].settings["stop_confidence"] is None


def test_averaged_weights_are_used_where_they_are_kept():
    def weights(teacher, ema):
        cells = plan(_pairs((teacher, "vgg8")), Axes({"flip": False}, (0,), (1.0,)), FOLDER, ema)
        return cells[-1].settings["teacher.weights"]

    assert weights("vgg13", 0.0) == "out/teachers/vgg13/last/student.safetensors"
    assert weights("vgg13", 0.9) == "out/teachers/vgg13/last/ema.safetensors"
    assert weights({"name": "vgg13", "ema": 0.9}, 0.0) == "out/teachers/vgg13/last/ema.safetensors"
    assert weights({"name": "vgg13", "ema": 0.0}, 0.9) == "out/teachers/vgg13/last/student.safetensors"
    assert weights({"name": "vgg13", "weights": "file.pt"}, 0.9) == "file.pt"


def test_a_given_teacher_brings_its_normalisation():
    teacher = {"name": "vgg13", "weights": "file.pt", "mean": [0, 0, 0], "std": [1, 1, 1], "sha256": "ab"}
    cells = {cell.command: cell.settings for cell in plan(_pairs((teacher, "vgg8")), AXES, FOLDER)}
    assert (cells["evaluate"]["mean"], cells["evaluate"]["std"]) == ([0, 0, 0], [1, 1, 1])
    assert "sha256" not in cells["evaluate"]
    assert (cells["distill"]["teacher.mean"], cells["measure"]["teacher.sha256"]) == ([0, 0, 0], "ab")


def test_shards_get_alike_amounts():
    costs = {f"cell{number}": float(number) for number in range(20)}
    dealt = deal(costs, 3)
    loads = [sum(costs[name] for name in dealt if dealt[name] == shard) for shard in (1, 2, 3)]
    assert sorted(loads) == [63, 63, 64]
    assert deal(dict(reversed(costs.items())), 3) == dealt
    assert set(deal(costs, 1).values()) == {1}


def test_what_shares_a_teacher_pass_is_dealt_as_one():
    costs = {f"cell{number}": 1.0 for number in range(12)}
    units = {name: None if number > 8 else f"unit{number % 3}" for number, name in enumerate(costs)}
    dealt = deal(costs, 2, units)
    for unit in ("unit0", "unit1", "unit2"):
        assert len({dealt[name] for name in costs if units[name] == unit}) == 1
    assert sorted(list(dealt.values()).count(shard) for shard in (1, 2)) == [6, 6]


@pytest.mark.parametrize("shards", [1, 2, 30])
def test_every_cell_has_one_shard(shards):
    costs = {f"cell{number}": 1.0 for number in range(20)}
    assert deal(costs, shards).keys() == costs.keys()
    assert set(deal(costs, shards).values()) <= set(range(1, shards + 1))
