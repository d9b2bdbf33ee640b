from argparse import SUPPRESS
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.optim import SGD, AdamW

from dalikd.kd.losses import KD
from dalikd.tools.cli import OPTIONS, build_parser, guarded, parse
from dalikd.trainers.options import CacheOptions, DistillOptions, EvaluateOptions, MeasureOptions, TrainOptions

RUN = {"config", "print_config", "help", "batch_size", "seed", "device", "precision"}
DATA = {
    "data",
    *(
        f"data.{name}"
        for name in (
            *("name", "root", "train_split", "val_split", "image_size", "limit", "val_limit", "download", "crop"),
            *("padding", "border", "interpolation", "val_resize", "threads", "prefetch", "bad_files"),
            *("hw_decoder_load", "resident", "classes", "class_seed"),
        )
    ),
}
MIX = {
    *("mode", "mix_group", "alpha", "manifold_alpha", "ceiling", "floor", "cutout_side", "patch_side", "mask_cells"),
    *("mask_ratio", "randaugment_ops", "randaugment_magnitude", "mix_n_run", "n_pick", "pick_temperature"),
}
MODEL = {"model", "model_args", "weights"}
TEACHER = {
    *("teacher", "teacher.name", "teacher.weights", "teacher.args", "teacher.sha256", "teacher.mean", "teacher.std"),
    *("teacher.fold_bn", "teacher.cache"),
}
TRAINING = {
    *("reinit", "mean", "std"),
    *("augmentation", "optimizer", "optimizer.help", "epochs", "epoch_factor", "accumulation", "clip"),
    *("no_decay_norms", "ema", "sync_bn", "output", "resume", "overwrite", "log_every", "eval_every"),
    *("compile", "checkpoint_every", "schedule", "schedule.name", "schedule.milestones", "schedule.gamma"),
    *("schedule.warmup_epochs", "schedule.final"),
}
CACHE = {"augmentation", "epochs", "output", "storage", "k", "compile", "verify", "share", "tolerance"}
DISTILLING = {"loss", "loss.help", "joint_forward", "metric", "fix_student", "entropy_log_every"}
DISTILL = RUN | DATA | MIX | MODEL | TRAINING | TEACHER | DISTILLING
STEP = DISTILL - {"resume", "overwrite", "log_every", "eval_every", "checkpoint_every"} | {"steps", "rounds", "warmup"}
MEASURE = RUN | DATA | MIX | MODEL | TEACHER | {"augmentation", "window", "metrics", "images_per_call", "compile"}
MEASURED = {
    *("epochs", "confidence", "stop_confidence", "per_class", "entropy_log", "entropy_log_every", "checkpoint"),
    *("checkpoint_every", "json"),
}
# every option of every command: adding or removing one is a decision
GOLDEN = {
    "train": RUN | DATA | MIX | MODEL | TRAINING | {"label_smoothing"},
    "distill": DISTILL,
    "measure": MEASURE | MEASURED,
    "cache": RUN | DATA | MIX | TEACHER | CACHE,
    "evaluate": RUN | DATA | MODEL | {"mean", "std", "json"},
    "study": {
        *("config", "print_config", "help", "pairs", "augmentation", "seeds", "epoch_factor"),
        *("pair", "shard", "dry_run", "report", "poll_seconds", "output"),
    },
    "bench step": STEP,
    "bench scaling": STEP | {"processes"},
    "bench teacher": MEASURE | {"images", "rounds", "output"},
    "bench passes": MEASURE | {"images", "rounds", "output"},
    "bench published": STEP - {"augmentation"},
}


def _write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


# --------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("command", OPTIONS)
def test_the_options_are_those_written_down(command):
    found = {name for action in build_parser(command)._actions for name in action.option_strings}
    assert {name.removeprefix("--") for name in found if name.startswith("--") and not name.endswith("+")} == GOLDEN[
        command
    ]


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_explained(command):
    for action in build_parser(command)._actions:
        text = (action.help or "").strip()
        assert len(text) > 8, action.option_strings
        assert text != SUPPRESS
    assert build_parser(command).description


@pytest.mark.parametrize("command", OPTIONS)
def test_help_shows_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(command, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    shown = GOLDEN[command] - {"data", "teacher", "schedule"}  # the heads of groups
    assert [name for name in shown if f"--{name}" not in text] == []
    assert text.startswith(f"usage: dalikd {command}")


def test_help_of_the_classes_lists_their_options(capsys):
    for option, expected in (
        ("--loss.help", "--loss.init_args.temperature"),
        ("--optimizer.help", "--optimizer.init_args.lr"),
    ):
        name = {"--loss.help": "dalikd.kd.losses.KD", "--optimizer.help": "torch.optim.AdamW"}[option]
        with pytest.raises(SystemExit):
            parse("distill", [f"{option}={name}"])
        assert expected.replace("init_args.", "") in capsys.readouterr().out.replace("init_args.", "")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train", TrainOptions),
        ("distill", DistillOptions),
        ("measure", MeasureOptions),
        ("cache", CacheOptions),
        ("evaluate", EvaluateOptions),
    ],
)
def test_a_bare_command_line_gives_the_defaults(command, expected):
    options, _ = parse(command, [])
    assert type(options) is expected
    defaults = expected()
    for name, value in vars(defaults).items():
        if name not in ("optimizer", "loss"):
            assert getattr(options, name) == value, name


def test_the_default_optimizer_and_loss_are_those_of_the_options(make_parameter):
    options, plain = parse("distill", [])
    ours, theirs = options.optimizer([make_parameter()]), DistillOptions().optimizer([make_parameter()])
    assert type(ours) is type(theirs) is SGD
    assert ours.defaults == theirs.defaults
    assert type(options.loss) is KD
    assert options.loss.weights == KD().weights
    assert plain["optimizer"]["class_path"] == "torch.optim.SGD"


@pytest.fixture
def make_parameter():
    import torch

    return lambda: torch.nn.Parameter(torch.zeros(1))


def test_an_optimizer_is_named_by_its_class(make_parameter):
    arguments = ["--optimizer", "torch.optim.AdamW", "--optimizer.lr", "0.003", "--optimizer.weight_decay", "0.02"]
    optimizer = parse("train", arguments)[0].optimizer([make_parameter()])
    assert isinstance(optimizer, AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.003, 0.02)
    sgd = parse("train", ["--optimizer.lr", "0.5"])[0].optimizer([make_parameter()])
    assert (sgd.defaults["lr"], sgd.defaults["momentum"]) == (0.5, 0.9)


def test_an_optimizer_can_be_fused(make_parameter):
    assert parse("train", ["--optimizer.fused", "true"])[0].optimizer([make_parameter()]).defaults["fused"] is True
    assert parse("train", [])[0].optimizer([make_parameter()]).defaults["fused"] is None


def test_nested_values_and_lists_are_read():
    options, _ = parse(
        "distill",
        [
            *(
                "--teacher.name",
                "vgg13",
                "--teacher.args.x",
                "1",
                "--schedule.milestones",
                "[3, 5]",
                "--data.limit",
                "50",
            ),
            *("--loss.temperature", "2", "--loss.lw_mix", "[1, 0, 0]", "--model_args.dropout", "0.1"),
        ],
    )
    assert (options.teacher.name, options.teacher.args) == ("vgg13", {"x": 1})
    assert options.schedule.milestones == [3.0, 5.0]
    assert options.data.limit == 50
    assert (options.loss.temperature, options.loss.weights["kd_mix"]) == (2.0, 0.0)
    assert options.model_args == {"dropout": 0.1}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["published"]),
        (["--augmentation", "cutmix"], ["cutmix"]),
        (["--augmentation=cutmix,flip"], ["cutmix", "flip"]),
        (["--augmentation", "cutmix", "flip", "mixup", "--epochs", "2"], ["cutmix", "flip", "mixup"]),
        (["--augmentation", "cutmix", "--augmentation", "flip"], ["flip"]),
    ],
)
def test_measure_takes_several_augmentations(arguments, names):
    assert parse("measure", arguments)[0].augmentation == names


# --------------------------------------------------------------------------------------------------- configs


def test_configs_are_read_in_order_and_the_command_line_wins(tmp_path):
    first = _write(tmp_path / "1.yaml", {"epochs": 1, "batch_size": 1, "seed": 1, "data": {"root": "a", "limit": 1}})
    second = _write(tmp_path / "2.yaml", {"batch_size": 2, "seed": 2, "data": {"limit": 2}})
    options, _ = parse("train", ["--config", first, f"--config={second}", "--seed", "3"])
    assert (options.epochs, options.batch_size, options.seed) == (1, 2, 3)
    assert (options.data.root, options.data.limit) == ("a", 2)


def test_options_before_a_config_are_overridden_by_it(tmp_path):
    config = _write(tmp_path / "1.yaml", {"seed": 1})
    assert parse("train", ["--seed", "3", "--config", config])[0].seed == 1


def test_a_section_wins_for_its_command(tmp_path):
    config = _write(
        tmp_path / "1.yaml",
        {
            "epochs": 10,
            "data": {"name": "digits", "limit": 100},
            "train": {"epochs": 20, "model": "resnet20", "data": {"limit": 50}},
            "measure": {"epochs": 2, "augmentation": "flip"},
            "distill": {"loss": {"class_path": "dalikd.kd.losses.KD", "init_args": {"temperature": 2.0}}},
        },
    )
    trained, distilled, measured = (parse(name, ["--config", config])[0] for name in ("train", "distill", "measure"))
    assert (trained.epochs, trained.model, trained.data.limit, trained.data.name) == (20, "resnet20", 50, "digits")
    assert (distilled.epochs, distilled.model, distilled.data.limit) == (10, None, 100)
    assert distilled.loss.temperature == 2.0
    assert (measured.epochs, measured.augmentation) == (2, ["flip"])


def test_options_of_sibling_commands_are_ignored(tmp_path):
    content = {
        "teacher": {"name": "vgg13"},
        "window": 64,
        "label_smoothing": 0.1,
        "json": "x.json",
        "joint_forward": True,
    }
    config = _write(tmp_path / "1.yaml", {**content, "seed": 5})
    for command in OPTIONS.keys() - {"study"}:
        assert parse(command, ["--config", config])[0].seed == 5
    assert parse("study", ["--config", config])[0].seeds == [0, 1, 2]
    assert parse("distill", ["--config", config])[0].teacher.name == "vgg13"
    assert parse("train", ["--config", config])[0].label_smoothing == 0.1


def test_one_name_is_enough_for_a_list(tmp_path):
    assert parse("measure", ["--config", _write(tmp_path / "1.yaml", "augmentation: cutmix")])[0].augmentation == [
        "cutmix"
    ]


def test_an_empty_config_changes_nothing(tmp_path):
    assert parse("train", ["--config", _write(tmp_path / "1.yaml", "# nothing\n")])[0].epochs == 240
    assert parse("train", ["--config", _write(tmp_path / "1.yaml", "train:\n")])[0].epochs == 240


def test_the_resolved_config_gives_the_same_run(tmp_path):
    arguments = ["--model", "vgg8", "--optimizer", "AdamW", "--data.limit", "9", "--clip", "1"]
    _, plain = parse("distill", [*arguments, "--overwrite", "true", "--output", "x"])
    again, same = parse("distill", ["--config", _write(tmp_path / "config.yaml", plain)])
    assert same == plain
    assert (again.model, again.data.limit, again.clip, again.overwrite) == ("vgg8", 9, 1.0, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch: 3", "1.yaml: unknown key epoch; did you mean epochs"),
        ("zzz: 3", "1.yaml: unknown key zzz"),
        ("distill: {epoch: 3}", "1.yaml: unknown key distill.epoch; did you mean epochs"),
        ("measure: {epoch: 3}", "1.yaml: unknown key measure.epoch; did you mean epochs"),
        ("data: {nmae: x}", "1.yaml: Group 'data' does not accept option 'nmae'"),
        ("loss: {init_args: {temprature: 3}}", "(?s)1.yaml: .*'temprature'"),
        ("optimizer: {class_path: torch.optim.Nope}", "(?s)1.yaml: .*'Nope'"),
        ("loss: {class_path: dalikd.kd.losses.Nope}", "(?s)1.yaml: .*Nope"),
        ("epochs: many", '1.yaml: Parser key "epochs"'),
        ("distill: 3", "1.yaml: distill must hold options as `name: value` lines"),
        ("train: [a]", "1.yaml: train must hold options as `name: value` lines"),
        ("- epochs", "1.yaml must hold options as `name: value` lines"),
        ("epochs: [", "1.yaml is not YAML: "),
    ],
)
def test_a_wrong_config_is_named_with_its_key(tmp_path, content, message):
    good = _write(tmp_path / "0.yaml", {"epochs": 1})
    with pytest.raises(ValueError, match=message):
        parse("distill", ["--config", good, "--config", _write(tmp_path / "1.yaml", content), "--seed", "1"])


def test_a_wrong_argument_is_not_blamed_on_a_config(tmp_path):
    good = _write(tmp_path / "0.yaml", {"epochs": 1})
    with pytest.raises(ValueError, match=r'^Parser key "epochs"'):
        parse("train", ["--config", good, "--epochs", "many"])


def test_missing_values_and_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--config nowhere.yaml: no such file"):
        parse("train", ["--config", "nowhere.yaml"])
    with pytest.raises(FileNotFoundError, match=rf"--config {tmp_path}: no such file"):
        parse("train", ["--config", str(tmp_path)])
    for option in ("--config", "--resume"):
        with pytest.raises(ValueError, match=f"{option} needs a value"):
            parse("train", [option])
    with pytest.raises(ValueError, match="--augmentation needs at least one value"):
        parse("measure", ["--augmentation", "--epochs", "3"])


def test_resuming_reads_the_folders_config_first(tmp_path):
    _write(tmp_path / "config.yaml", {"epochs": 7, "seed": 3, "output": "elsewhere"})
    options, _ = parse("train", ["--resume", str(tmp_path), "--seed", "4"])
    assert (options.epochs, options.seed, options.resume, options.output) == (7, 4, str(tmp_path), str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"there is no run .*nowhere/config.yaml is missing"):
        parse("train", ["--resume", "nowhere"])


# --------------------------------------------------------------------------------------------------- failing


def test_errors_become_one_line(capsys):
    with pytest.raises(SystemExit) as stop, guarded("train"):
        raise ValueError("first line\n  second line")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "dalikd train: error: first line second line\n"


def test_an_error_without_words_names_its_kind(capsys):
    with pytest.raises(SystemExit), guarded("train"):
        raise FileNotFoundError
    assert capsys.readouterr().err == "dalikd train: error: FileNotFoundError\n"


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("DALIKD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="inside"), guarded("train"):
        raise ValueError("inside")


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(AssertionError), guarded("train"):
        raise AssertionError


def test_another_optimizer_has_its_own_defaults():
    built = parse("train", ["--optimizer", "AdamW"])[0].optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert built.defaults["lr"] == AdamW([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"]
    assert built.defaults["weight_decay"] == AdamW([torch.nn.Parameter(torch.zeros(1))]).defaults["weight_decay"]
    before = parse("train", ["--optimizer.lr", "0.02", "--optimizer", "AdamW"])[0].optimizer(
        [torch.nn.Parameter(torch.zeros(1))]
    )
    assert (before.defaults["lr"], before.defaults["weight_decay"]) == (0.02, built.defaults["weight_decay"])
    named = parse("train", ["--optimizer", "SGD", "--optimizer.lr", "0.2"])[0].optimizer(
        [torch.nn.Parameter(torch.zeros(1))]
    )
    assert (named.defaults["lr"], named.defaults["momentum"]) == (0.2, 0.9)
