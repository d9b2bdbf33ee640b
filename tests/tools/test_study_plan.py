"""What is wrong with a study is said before any work."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dalikd.kd.backbones import create_model
from dalikd.tools import study
from dalikd.tools.cli import parse
from dalikd.tools.study import command_line, read_study
from dalikd.trainers.loop import Loop
from dalikd.trainers.study.plan import Work
from dalikd.trainers.study.ready import make_ready
from dalikd.trainers.study.state import keep_config
from dalikd.trainers.tasks.distill import DistillOptions
from dalikd.trainers.tracking import write_json


@pytest.fixture
def content(tree: Path) -> dict[str, Any]:
    return {
        "data": {"root": str(tree), "image_size": 32, "threads": 1},
        "device": "cpu",
        "batch_size": 16,
        "mix": {"group": 8},
        "epochs": 1,
        "train": {},
        "measure": {"window": 24},
        "study": {"pairs": [{"teacher": "resnet14", "student": "resnet8"}], "augmentation": ["flip"], "seeds": [0]},
    }


def _pairs(*pairs: Any) -> dict[str, Any]:
    return {"study": {"pairs": list(pairs)}}


def _with_heads(methods: dict[str, Any], teacher: Any = "resnet14_aux") -> dict[str, Any]:
    pair = {"teacher": teacher, "student": "resnet8"}
    return {"study": {"pairs": [pair], "augmentation": ["identity"], "methods": methods, "stddev": False}}


def _over(content: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {
        key: {**content.get(key, {}), **change[key]} if isinstance(change.get(key), dict) else change.get(key, value)
        for key, value in {**content, **change}.items()
    }


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"study": {"pairs": []}}, "", "a study needs pairs: give a config with"),
        (_pairs("vgg13/vgg8"), "", "pairs[0] is 'vgg13/vgg8': give {teacher: NET, student: NET}"),
        (_pairs({"teacher": "vgg13"}), "", "pairs[0] is {'teacher': 'vgg13'}: give {teacher: NET, student: NET}"),
        (_pairs({"teacher": 3, "student": "vgg8"}), "", "pairs[0].teacher is 3: give a net's name"),
        (_pairs({"teacher": {"label": "a"}, "student": "vgg8"}), "", "pairs[0].teacher is {'label': 'a'}: give a net"),
        (
            _pairs({"teacher": "resnet14", "student": {"name": "resnet8", "weights": "x"}}),
            "",
            "pairs[0].student: a student starts from nothing",
        ),
        (
            _pairs({"teacher": "resnet14", "student": {"name": "resnet8", "epoch": 3}}),
            "",
            "pairs[0].student.epoch cannot be set here; a net takes name, args, label and options of training",
        ),
        (
            _pairs({"teacher": {"name": "resnet14", "weights": "x", "epochs": 3}, "student": "resnet8"}),
            "",
            "pairs[0].teacher.epochs cannot be set here; a teacher with weights is not trained",
        ),
        (
            _pairs({"teacher": "resnet14", "student": {"name": "resnet8", "seed": 3}}),
            "",
            "pairs[0].student.seed cannot be set here",
        ),
        (
            _pairs({"teacher": {"name": "resnet14", "args": 3}, "student": "resnet8"}),
            "",
            "pairs[0].teacher.args is 3: give a group of options",
        ),
        (_pairs(*2 * [{"teacher": "resnet14", "student": "resnet8"}]), "", "pairs[1]: resnet14/resnet8 is there twice"),
        (
            _pairs(
                {"teacher": "resnet14", "student": "resnet8"},
                {"teacher": {"name": "resnet14", "epochs": 3}, "student": "resnet8"},
            ),
            "",
            "pairs: two teachers are called resnet14: give each net a `label` of its own",
        ),
        (_pairs({"teacher": "resnet15", "student": "resnet8"}), "", 'unknown model "resnet15"'),
        (
            _pairs({"teacher": {"name": "resnet14", "weights": "nowhere.pt"}, "student": "resnet8"}),
            "",
            "pairs[0].teacher: there is no weights file nowhere.pt",
        ),
        (
            _pairs({"teacher": "resnet14", "student": {"name": "resnet8", "optimizer": {"lrr": 1}}}),
            "",
            "lrr",
        ),
        ({"study": {"augmentation": ["flop"]}}, "", 'unknown --augmentation "flop"'),
        ({"study": {"augmentation": ["all", "flip"]}}, "--mix.cutout_side -3", "--mix.cutout_side -3"),
        (
            _pairs({"teacher": "resnet14", "student": "timm:vit_tiny_patch16_224"}),
            "",
            "timm:vit_tiny_patch16_224 cannot take images of 32 x 32 pixels (Input height (32) doesn't match",
        ),
        (
            {"optimizer": {"class_path": "torch.optim.LBFGS", "init_args": {"lr": 1}}},
            "",
            "teachers/resnet14: --optimizer LBFGS cannot do a step of its own on dense gradients",
        ),
        ({"data": {"root": "nowhere"}}, "", "nowhere"),
        ({}, "--data.share 0.01", "--data.share 0.01: imagefolder train keeps no image of the class"),
        ({"batch_size": 20}, "", "20"),
        ({"batch_size": 128}, "", "--batch_size 128 is larger than the data set (99 images)"),
        ({"epochs": 0}, "", "study.yaml: --epochs 0: give at least 1"),
        ({"epoch_factor": 0.1}, "", "students/resnet8/x0.1/seed0: --epochs 1 x --epoch_factor 0.1 is no whole epoch"),
        ({"distill": {"eval_every": 0}}, "", "study.yaml: --eval_every 0: give at least 1"),
        ({"distill": {"ema": 2}}, "", "study.yaml: --ema 2.0: give a decay below 1"),
        ({"distill": {"clip_grad_norm": -1}}, "", "--clip_grad_norm -1.0: give a norm above 0"),
        ({"distill": {"mean": [0, 0, 0]}}, "", "distill/resnet14_resnet8/x1/flip/seed0: mean [0.0, 0.0, 0.0] and std"),
        ({"distill": {"freeze_student": True}}, "", "--freeze_student true observes a student as its weights are"),
        ({"distill": {"sync_bn": True}}, "", "--sync_bn true needs GPUs: leave it out on the CPU"),
        ({"distill": {"precision": "fp16"}}, "", "--precision fp16 needs a GPU"),
        ({"train": {"augmentation": "cutmixpick_teacher"}}, "", "cutmixpick_teacher picks images for distillation"),
        ({"measure": {"window": 25}}, "", "study.yaml: --window 25: give a positive even number"),
        ({"measure": {"images_per_call": 0}}, "", "study.yaml: --images_per_call 0: give at least 1"),
        ({"measure": {"window": 640}}, "", "measure/resnet14.json: 1 epoch(s) of 99 images fill less than two windows"),
        ({"study": {"augmentation": ["patchmix"]}}, "--mix.patch_side 64", "--mix.patch_side 64"),
        ({"teacher": {"mean": [0, 0, 0]}}, "", "pairs[0].teacher: mean [0.0, 0.0, 0.0] and std []: give both"),
        (
            _pairs({"teacher": {"name": "resnet14", "weights": "pretrained"}, "student": "resnet8"}),
            "",
            "pairs[0].teacher: resnet14 has no pretrained weights to download",
        ),
        (
            _pairs({"teacher": {"name": "timm:resnet18", "weights": "pretrained"}, "student": "resnet8"}),
            "--dry_run true",
            "pairs[0].teacher: timm:resnet18's pretrained weights have 1000 classes, the data set has 3",
        ),
        (
            _with_heads({"kd": {"heads": True, "loss": {"class_path": "dalikd.kd.losses.KD"}}}),
            "",
            "distill/resnet14_aux_resnet8/x1/identity/kd/seed0: --loss KD leaves the student's auxiliary heads without",
        ),
        (
            _with_heads({"hsakd": {"loss": {"class_path": "dalikd.kd.losses.HSAKD"}}}),
            "",
            "/hsakd/seed0: the student has no auxiliary heads, the teacher 3",
        ),
        (
            _with_heads({"at": {}, "crd": {}}),
            "",
            "the study has no method 'kd' to compare with: name one with --reference, of at, crd",
        ),
        ({}, "--reference kd", "reference: the study has no method 'kd' to compare with: leave it out"),
        (_with_heads({"hsakd": {"heads": True}}, teacher="resnet14"), "", "3 auxiliary heads, the teacher none"),
        (_with_heads({"hsakd": {"model": "vgg8_aux"}}), "", "methods.hsakd.model cannot be set here; a method takes"),
        (
            _with_heads({"hsakd": {"heads": True}}, teacher={"name": "resnet14_aux", "freeze_backbone": True}),
            "",
            "teachers/resnet14_aux: --freeze_backbone true keeps a backbone as its weights are: give them",
        ),
        ({}, "--pair resnet14/vgg8", "--pair resnet14/vgg8: there is no such pair, there are resnet14/resnet8"),
        ({"epochs": "many"}, "", "epochs"),
        ({}, "--report true", "--report true: there is no study in"),
    ],
)
def test_mistakes_are_named_before_any_work(content, tmp_path, monkeypatch, capsys, change, words, message):
    monkeypatch.setattr(Loop, "step", None)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(_over(content, change)))
    with pytest.raises(SystemExit) as stop:
        study.main(["--config", str(path), "--output", str(tmp_path / "new"), *words.split()])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert error.startswith("dalikd study: error: ")
    assert message in error
    assert not (tmp_path / "new").exists()


def test_a_teacher_needs_weights_or_a_recipe(content, tmp_path):
    del content["train"]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"pairs\[0\]: the teacher resnet14 has no weights, and the config no"):
        make_ready(read_study(["--config", str(path)]))


def test_weights_that_do_not_fit_are_found_before_any_work(content, tmp_path):
    weights = tmp_path / "ten_classes.pt"
    torch.save(create_model("resnet8", 10).state_dict(), weights)
    content["study"]["pairs"] = [{"teacher": {"name": "resnet8", "weights": str(weights)}, "student": "resnet8"}]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"pairs\[0\].teacher: .*ten_classes"):
        make_ready(read_study(["--config", str(path)]))


@pytest.mark.parametrize("teacher", [{"sha256": "00000000"}, {"mean": [0.5, 0.5, 0.5]}])
def test_a_given_teacher_is_built_as_the_runs_build_it(content, tmp_path, teacher):
    weights = tmp_path / "three_classes.pt"
    torch.save(create_model("resnet8", 3).state_dict(), weights)
    given = {"name": "resnet8", "weights": str(weights)}
    path = tmp_path / "study.yaml"
    content["study"]["pairs"] = [{"teacher": given, "student": "resnet8"}]
    path.write_text(yaml.safe_dump(content))
    assert make_ready(read_study(["--config", str(path)])).cells
    content["study"]["pairs"][0]["teacher"] = {**given, **teacher}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=rf"(pairs\[0\].teacher|teachers/resnet8.json): .*({next(iter(teacher))}|SHA)"):
        make_ready(read_study(["--config", str(path)]))


def test_students_of_shares_learn_from_a_teacher_of_all_images(content, tmp_path):
    students = [{"name": "resnet8", "label": f"resnet8-{share}", "data": {"share": share}} for share in (0.5, 1.0)]
    content["study"]["pairs"] = [{"teacher": "resnet14", "student": student} for student in students]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    work = make_ready(read_study(["--config", str(path)])).work
    assert {name.partition("/x")[0]: done.trained for name, done in work.items() if done.trained} == {
        "teachers/resnet14": 96,  # of 99, in batches of 16
        **{f"students/resnet8-{share}": images for share, images in ((0.5, 48), (1.0, 96))},
        **{f"distill/resnet14_resnet8-{share}": 2 * images for share, images in ((0.5, 48), (1.0, 96))},
    }


def test_hsakd_is_a_row_beside_other_methods(content, tmp_path, recwarn):
    """All rows ask one teacher, whose heads are trained on given weights."""
    torch.manual_seed(0)
    torch.save(create_model("resnet14", 3).state_dict(), tmp_path / "plain.pt")
    losses = "dalikd.kd.losses"
    parts = [{"class_path": f"{losses}.HSAKD"}, {"class_path": f"{losses}.AT", "init_args": {"ce_weight": 0}}]
    methods = {
        "kd": {"loss": {"class_path": f"{losses}.KD", "init_args": {"kd_mix_share": 0}}},
        "hsakd": {"heads": True},
        "both": {"heads": True, "loss": {"class_path": f"{losses}.WeightedSum", "init_args": {"losses": parts}}},
    }
    teacher = {"name": "resnet14_aux", "weights": str(tmp_path / "plain.pt"), "freeze_backbone": True, "epochs": 2}
    del content["train"]
    path, folder = tmp_path / "study.yaml", tmp_path / "new"
    path.write_text(yaml.safe_dump(_over(content, _with_heads(methods, teacher))))
    ready = make_ready(read_study(["--config", str(path), "--output", str(folder)]))
    keep_config(folder, ready.reading.config)
    made = {cell.name: parse(cell.command, shlex.split(command_line(ready, cell))[2:])[0] for cell in ready.cells}
    trained = made.pop("teachers/resnet14_aux")
    assert (trained.weights, trained.freeze_backbone, trained.epochs) == (str(tmp_path / "plain.pt"), True, 2)
    assert made.pop("students/resnet8/x1/seed0").model == "resnet8"
    found = {name.split("/")[-2]: (options.model, type(options.loss).__name__) for name, options in made.items()}
    assert found == {
        "kd": ("resnet8", "KD"),
        "hsakd": ("resnet8_aux", "HSAKD"),
        "both": ("resnet8_aux", "WeightedSum"),
    }
    assert {options.teacher.name for options in made.values()} == {"resnet14_aux"}
    assert not [warning for warning in recwarn if "no-op" in str(warning.message)]  # of weights that are read in vain


def test_a_frozen_backbones_weights_are_read_before_any_work(content, tmp_path):
    torch.save(create_model("resnet8", 3).state_dict(), tmp_path / "plain.pt")
    teacher = {"name": "resnet14_aux", "weights": str(tmp_path / "plain.pt"), "freeze_backbone": True}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(_over(content, _with_heads({"hsakd": {"heads": True}}, teacher))))
    with pytest.raises(ValueError, match=r"teachers/resnet14_aux: .*plain.pt"):
        make_ready(read_study(["--config", str(path)]))
    (tmp_path / "plain.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"plain.pt"):
        make_ready(read_study(["--config", str(path)]))


def test_gains_of_methods_are_reported(content, tmp_path, capsys, monkeypatch):
    """Of made-up results, from two references in turn: the folder stays the same study."""
    monkeypatch.setattr(Loop, "step", None)
    loss = {"class_path": "dalikd.kd.losses.KD"}
    methods = {"warm": {"loss": {**loss, "init_args": {"temperature": 9}}}, "kd": {"loss": loss}}
    own = {"augmentation": ["flip", "identity"], "seeds": [0, 1], "methods": methods, "stddev": False}
    path, folder = tmp_path / "study.yaml", tmp_path / "new"
    path.write_text(yaml.safe_dump({**_over(content, {"study": own}), "confidence": 0.9}))
    words = ["--config", str(path), "--output", str(folder)]
    ready = make_ready(read_study(words))
    keep_config(folder, ready.reading.config)
    for cell in ready.cells:
        gain = 0.1 * ("/warm/" in cell.name) + 0.2 * ("/flip/" in cell.name) + 0.05 * cell.settings.get("seed", 0)
        epoch = {"epoch": 1, "val": {"loss": 1.0, "top1": 0.25 + gain, "top5": 1.0}}
        made = {"fingerprint": {"train": "t", "val": "v"}, "versions": {}, "epochs": 1, "last": epoch, "best": epoch}
        write_json(folder / cell.result, made)
    study.main([*words, "--report", "true"])
    assert "table.csv, gains.csv, results.json" in capsys.readouterr().out
    text = (folder / "table.md").read_text()
    assert "\n\n## Where the gains come from\n\nGains in points of top1, last epoch, over the" in text
    assert "| warm | flip | 57.50 | +30.00 ± 0.00 | +10.00 ± 0.00 | +20.00 ± 0.00 | +10.00 ± 0.00 |  | no | 2 |" in text
    assert "![Shares of the gain of each method](plots/gains.png)" in text
    assert (folder / "plots/gains.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "gains.csv").read_text().count("\n") == 1 + 4
    (found,) = json.loads((folder / "results.json").read_text())["gains"]
    assert (found["reference"]["method"], found["confidence"], len(found["cells"])) == ("kd", 0.9, 4)
    study.main([*words, "--report", "true", "--reference", "warm"])
    assert "over the reference: warm, identity, x1." in (folder / "table.md").read_text()


def test_options_for_another_machine_can_be_planned(content, tmp_path, capsys):
    """sync_bn needs GPUs, which the machine that the study is planned on need not have."""
    path, folder = tmp_path / "study.yaml", tmp_path / "new"
    path.write_text(yaml.safe_dump({**content, "sync_bn": True}))
    words = ["--config", str(path), "--output", str(folder), "--dry_run", "true"]
    study.main(words)
    out = capsys.readouterr().out
    assert out.startswith(f"# The commands read {folder}/config.yaml, which the study writes when it starts: it is not")
    assert not folder.exists()
    ready = make_ready(read_study(words))
    keep_config(folder, ready.reading.config)
    study.main(words)
    assert capsys.readouterr().out.startswith("# teachers/resnet14\n")
    moved = tmp_path / "moved"
    moved.symlink_to(content["data"]["root"])
    study.main([*words, "--data.root", str(moved)])
    first = f"# The commands read data from {content['data']['root']}: add --data.root {moved} on this machine.\n"
    assert capsys.readouterr().out.startswith(first)


def test_other_images_than_those_of_the_runs_that_are_done_are_refused(content, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Loop, "step", None)
    path, folder = tmp_path / "study.yaml", tmp_path / "new"
    path.write_text(yaml.safe_dump(content))
    words = ["--config", str(path), "--output", str(folder)]
    ready = make_ready(read_study(words))
    keep_config(folder, ready.reading.config)
    (seen,) = ready.images
    epoch = {"epoch": 1, "val": {"loss": 1.0, "top1": 0.5, "top5": 1.0}}
    made = {"finished": True, "versions": {}, "epochs": 1, "last": epoch, "best": epoch}
    made |= {**seen, "fingerprint": {**seen["fingerprint"], "val": "other"}}
    write_json(folder / "students/resnet8/x1/seed0/results.json", made)
    with pytest.raises(SystemExit):
        study.main(words)
    assert (
        f"fingerprints other: students/resnet8/x1/seed0; {seen['fingerprint']['val']}: data 1 of this machine "
        f"({content['data']['root']})" in capsys.readouterr().err
    )


def test_one_augmentation_is_measured_without_a_stop_rule(content, tmp_path):
    content["study"]["augmentation"] = ["flip", "identity", "cutmixpick_student"]
    content["measure"]["stop_confidence"] = 0.9
    path, folder = tmp_path / "study.yaml", tmp_path / "new"
    path.write_text(yaml.safe_dump(content))
    ready = make_ready(read_study(["--config", str(path), "--output", str(folder)]))
    found = {
        cell.name: ready.reading.read("measure", cell.options(folder))[0].stop_confidence
        for cell in ready.cells
        if cell.command == "measure"
    }
    assert found == {"measure/resnet14.json": 0.9, "measure/resnet14_resnet8.json": None}


def test_a_net_may_have_an_optimizer_of_its_own(content, tmp_path):
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "betas": [0.8, 0.9]}}
    content["study"]["pairs"] = [{"teacher": "resnet14", "student": {"name": "resnet8", "optimizer": optimizer}}]
    path, folder = tmp_path / "study.yaml", tmp_path / "new"
    path.write_text(yaml.safe_dump(content))
    ready = make_ready(read_study(["--config", str(path), "--output", str(folder)]))
    keep_config(folder, ready.reading.config)
    for cell in ready.cells:
        if cell.name.startswith(("students/", "distill/")):
            options, plain = parse(cell.command, shlex.split(command_line(ready, cell))[2:])
            made = options.optimizer([torch.nn.Parameter(torch.zeros(1))])
            assert isinstance(made, torch.optim.AdamW)
            assert (made.defaults["lr"], list(made.defaults["betas"])) == (0.001, [0.8, 0.9])
            assert plain["optimizer"]["class_path"] == "torch.optim.AdamW"


def test_the_command_of_a_cell_has_the_options_of_the_cell(content, tmp_path):
    """Read from the study's own config, as it will lie in its folder."""
    student = {"name": "wrn_16_2", "label": "own name", "args": {"dropout": 0.5}, "optimizer": {"lr": 0.01}, "ema": 0.9}
    teacher = {"name": "resnet14", "schedule": {"milestones": [1, 2]}, "ema": 0.5}
    content["study"] |= {"pairs": [{"teacher": teacher, "student": student}], "augmentation": ["cutmixpick_student"]}
    path, folder = tmp_path / "study.yaml", tmp_path / "new"
    path.write_text(yaml.safe_dump(content))
    ready = make_ready(read_study(["--config", str(path), "--output", str(folder), "--distill.clip_grad_norm", "3"]))
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(ready.reading.config))
    parsed = {}
    for cell in ready.cells:
        words = shlex.split(command_line(ready, cell))
        assert words[0] == "dalikd"
        options, plain = parse(words[1], words[2:])
        assert plain == ready.reading.read(cell.command, cell.options(folder))[1]
        parsed[cell.name] = options
    made, alone, measured, distilled = parsed.values()
    assert (made.schedule.milestones, made.ema, made.clip_grad_norm) == ([1.0, 2.0], 0.5, None)
    assert (alone.model, alone.model_args, alone.ema) == ("wrn_16_2", {"dropout": 0.5}, 0.9)
    assert measured.weights == str(folder / "students/own-name/x1/seed0/last/ema.safetensors")
    assert measured.teacher.weights == str(folder / "teachers/resnet14/last/ema.safetensors")
    assert (distilled.clip_grad_norm, distilled.ema, distilled.teacher.name) == (3.0, 0.9, "resnet14")
    for options in (alone, distilled):
        parameter = torch.nn.Parameter(torch.zeros(1))
        assert options.optimizer([parameter]).defaults["lr"] == 0.01
        assert options.optimizer([parameter]).defaults["momentum"] == 0.9


def test_compiling_is_settled_by_each_cells_own_augmentation(content, tmp_path, monkeypatch):
    """Manifold mixup cannot be compiled; what stands beside it is."""
    monkeypatch.setattr("dalikd.trainers.options.automatic_mode", lambda _: "default")
    content["study"]["augmentation"] = ["mixup", "manifold_mixup"]
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    made = make_ready(read_study(["--config", str(config), "--output", str(tmp_path / "study")]))
    modes = {options.augmentation: options.compile for options in made.kinds if isinstance(options, DistillOptions)}
    assert modes.pop("manifold_mixup") == "off"
    assert set(modes.values()) == {"default"}


def test_students_of_one_pass_share_what_the_teacher_costs(content, tmp_path):
    loss = {"class_path": "dalikd.kd.losses.KD"}
    content["study"]["methods"] = {
        name: {"loss": {**loss, "init_args": {"temperature": heat}}}
        for name, heat in (("kd", 4), ("hot", 8), ("cold", 1))
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    totals = []
    for shared in ("true", "false"):
        words = ["--config", str(path), "--output", str(tmp_path / "new"), "--share_teacher", shared]
        planned = make_ready(read_study(words))
        works = [planned.work[cell.name] for cell in planned.cells if cell.command == "distill"]
        totals.append(sum(works, Work()))
    together, alone = totals
    assert (alone.asked, alone.trained) == (3 * together.asked, together.trained)
    assert 0 < together.flops < alone.flops
