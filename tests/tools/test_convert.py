"""Configs of mdistiller become configs that dalikd reads."""

import pytest

from dalikd.kd import losses
from dalikd.kd.losses import Schedule
from dalikd.tools.cli import parse
from dalikd.tools.convert import _LOSSES, convert, main

SOLVER = "{BATCH_SIZE: 128, EPOCHS: 100, LR: 0.2, LR_DECAY_STAGES: [30, 60], LR_DECAY_RATE: 0.2, MOMENTUM: 0.8}"


def _write(folder, text):
    path = folder / "there.yaml"
    path.write_text(text)
    return path


def _converted(folder, text, command="distill"):
    """The options that the result gives."""
    path = folder / "here.yaml"
    path.write_text(convert(_write(folder, text)))
    return parse(command, ["--config", str(path)])


def test_nets_solver_and_loss_are_those_of_the_file(tmp_path, capsys):
    text = (
        "EXPERIMENT: {TAG: x}\nLOG: {WANDB: false}\nDATASET: {TYPE: imagenet, NUM_WORKERS: 32}\n"
        f"DISTILLER: {{TYPE: DKD, TEACHER: ResNet34, STUDENT: ResNet18}}\nSOLVER: {SOLVER}\n"
        "DKD: {CE_WEIGHT: 0.5, BETA: 2.0, T: 1.0, WARMUP: 3}\nKD: {TEMPERATURE: 7}"
    )
    options, plain = _converted(tmp_path, text)
    assert capsys.readouterr().out == (tmp_path / "here.yaml").read_text()
    second = (tmp_path / "here.yaml").read_text().splitlines()[1]
    assert second == "# Not needed here: EXPERIMENT.TAG, LOG.WANDB, DATASET.NUM_WORKERS, KD.TEMPERATURE."
    assert (options.data.name, options.model, options.augmentation) == ("imagenet", "timm:resnet18", "identity")
    assert (options.teacher.name, options.teacher.weights) == ("timm:resnet34.tv_in1k", "pretrained")
    assert (options.batch_size, options.epochs) == (128, 100)
    assert (options.schedule.milestones, options.schedule.gamma) == ([30, 60], 0.2)
    settings = plain["optimizer"]["init_args"]
    assert (settings["lr"], settings["momentum"], settings["weight_decay"]) == (0.2, 0.8, 1e-4)  # its own default
    assert type(options.loss) is losses.DKD
    assert (options.loss.ce_weight, options.loss.alpha, options.loss.beta, options.loss.temperature) == (0.5, 1, 2, 1)
    assert options.loss.kd_weight == Schedule([0, 3], [0, 1])


@pytest.mark.parametrize("method", _LOSSES)
def test_every_method_s_loss_takes_its_options(tmp_path, method):
    values = {"MODE": "relax", "HINT_LAYER": 1, "WARMUP": 5, "WARMUP_EPOCHS": 5, "K": 2}
    groups: dict[str, object] = {}
    for key in _LOSSES[method][1]:
        group, dot, name = key.rpartition(".")
        (groups.setdefault(group, {}) if dot else groups)[name or key] = values.get(key, 3)
    groups |= {"NCE": {"K": 64}} if method == "CRD" else {}
    options, _ = _converted(tmp_path, f"DISTILLER: {{TYPE: {method}}}\n{method}: {groups}")
    loss = options.loss
    assert type(loss).__name__ == _LOSSES[method][0]
    assert (options.model, options.teacher.name) == ("resnet32", "ResNet50")
    assert loss.ce_weight == 3
    if method in ("KD", "DKD"):
        assert loss.shares == {"kd": 1, "ce_mix": 0, "kd_mix": 0}  # the originals count once
    else:
        assert loss.weight == (Schedule([0, 5], [0, 3]) if method == "REVIEWKD" else 3)
    if method == "FITNET":
        assert (loss.student_features, loss.teacher_features) == ([1], [1])


def test_numbers_and_tuples_in_python_s_form_are_read(tmp_path):
    solver = "\n".join(("  LR: 5e-3", "  WEIGHT_DECAY: 1e-4", "  LR_DECAY_STAGES: (30, 60)"))
    options, plain = _converted(
        tmp_path, f"DISTILLER: {{TYPE: CRD}}\nSOLVER:\n{solver}\nCRD: {{NCE: {{TEMPERATURE: 7e-2}}}}"
    )
    assert (plain["optimizer"]["init_args"]["lr"], options.schedule.milestones) == (0.005, [30, 60])
    assert "lr: 0.005\n" in (tmp_path / "here.yaml").read_text()
    assert options.loss.temperature == 0.07


def test_values_that_are_fixed_here_are_taken_as_they_are(tmp_path):
    for method in ("VID: {EPS: 1e-5}", "RKD: {PDIST: {SQUARED: false}}", "REVIEWKD: {STU_PREACT: false}"):
        name = method.partition(":")[0]
        convert(_write(tmp_path, f"DISTILLER: {{TYPE: {name}}}\n{method}"))
    with pytest.raises(ValueError, match=r"no counterpart of REVIEWKD\.STU_PREACT: take it out"):
        convert(_write(tmp_path, "DISTILLER: {TYPE: REVIEWKD}\nREVIEWKD: {STU_PREACT: true}"))


def test_without_a_method_a_net_is_trained(tmp_path):
    options, _ = _converted(tmp_path, "DISTILLER: {STUDENT: wrn_16_2}", "train")
    assert (options.model, options.epochs, options.batch_size) == ("wrn_16_2", 240, 64)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("DKD: {GAMMA: 1}\nDISTILLER: {TYPE: DKD}\nFOO: {BAR: 1}", "DKD.GAMMA, FOO.BAR"),
        ("DISTILLER: {TYPE: SONIC}", "DISTILLER.TYPE SONIC"),
        ("DISTILLER: {STUDENT: ResNet18}", "DISTILLER.STUDENT ResNet18"),
        ("DISTILLER: {TYPE: KD, TEACHER: resnet1}", "DISTILLER.TEACHER resnet1"),
        ("DATASET: {TYPE: tiny_imagenet}", "DATASET.TYPE tiny_imagenet"),
        ("SOLVER: {TRAINER: dot, DOT: {DELTA: 0.1}}", "SOLVER.TRAINER dot, SOLVER.DOT.DELTA"),
        ("SOLVER: {TYPE: AdamW}", "SOLVER.TYPE AdamW"),
    ],
)
def test_what_has_no_counterpart_is_named_in_one_line(tmp_path, capsys, text, named):
    with pytest.raises(SystemExit) as stop:
        main([str(_write(tmp_path, text))])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"there.yaml: dalikd has no counterpart of {named}: take it out or change it" in err


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no config of mdistiller"):
        convert(_write(tmp_path, "- 1"))
