import json
import os
import pickle
import re
import shlex
import signal
import sys
from argparse import SUPPRESS
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml
from torch.optim import SGD, AdamW

from dalikd.kd.losses import KD
from dalikd.pipelines.data import DataConfig, FilePath
from dalikd.pipelines.objects import Unavailable
from dalikd.tools import convert, correlate, demo, prepare, reference, replay
from dalikd.tools.bench import commands, first_hour, host, loader, machine, record
from dalikd.tools.classes import import_words
from dalikd.tools.cli import build_parser, guarded, parse, run_function
from dalikd.tools.layers import OPTIONS, options_class
from dalikd.tools.signature import expand_path, is_path, option_types
from dalikd.trainers.evaluate import EvaluateOptions
from dalikd.trainers.loop import Interrupted
from dalikd.trainers.measure import MeasureOptions
from dalikd.trainers.renamed import RENAMED
from dalikd.trainers.tasks.distill import DistillOptions
from dalikd.trainers.tasks.probe import ProbeOptions
from dalikd.trainers.tasks.supervised import TrainOptions
from dalikd.trainers.teacher_cache.fill import CacheOptions


def _write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


# --------------------------------------------------------------------------------------------------- options


def _options(command: str) -> list[str]:
    found = {name.removeprefix("--") for action in build_parser(command)._actions for name in action.option_strings}
    return sorted(name for name in found if not name.startswith("-") and not name.endswith("+"))


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
    shown = set(_options(command)) - {"data", "teacher", "schedule"}  # the heads of groups
    assert [name for name in shown if f"--{name}" not in text] == []
    assert text.startswith(f"usage: dalikd {command}")


def test_help_begins_with_what_matters_most(capsys):
    with pytest.raises(SystemExit):
        parse("distill", ["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{title}") for title in ("data: ", "model:", "teacher: ", "method:", "training:", "run:")]
    assert places == sorted(places)


def test_the_config_is_printed(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("train", ["--config", _write(tmp_path / "1.yaml", {"epochs": 7}), "--print_config", "--seed", "3"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["epochs"], printed["seed"], printed["optimizer"]["class_path"]) == (7, 3, "torch.optim.SGD")


def test_benchmarks_are_imported_for_their_own_keys_alone(tmp_path, start_forked):
    """A config may hold options of any command; the benchmarks' need not be loaded for that."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from dalikd.tools.cli import parse; print(parse('train', sys.argv[1:])[0].seed, "
        "any(name.startswith('dalikd.tools.bench') for name in sys.modules))"
    )
    contents = [{"seed": 3, "window": 64, "teacher": {"name": "vgg13"}}, {"seed": 4, "steps": 3}]
    calls = [
        start_forked(tmp_path / str(number), script, "--config", _write(tmp_path / f"{number}.yaml", content))
        for number, content in enumerate(contents)
    ]
    assert [call.end().split() for call in calls] == [["3", "False"], ["4", "True"]]


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
        ("probe", ProbeOptions),
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
    assert (options.loss.kd_weight, options.loss.shares) == (0.9, KD().shares)
    assert plain["optimizer"]["class_path"] == "torch.optim.SGD"


@pytest.mark.parametrize("words", [[], ["--optimizer", "AdamW", "--optimizer", "SGD"]])
def test_an_options_class_may_have_an_optimizer_of_its_own(make_parameter, words):
    """Others keep theirs, also where they come later."""
    for command, expected in (("probe", ProbeOptions), ("train", TrainOptions)):
        found, own = parse(command, words)[0].optimizer([make_parameter()]), expected().optimizer([make_parameter()])
        assert found.defaults == own.defaults
    assert parse("probe", ["--optimizer.lr", "0.5"])[0].optimizer([make_parameter()]).defaults["nesterov"] is True


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
            *("--loss.temperature", "2", "--loss.kd_mix_share", "0", "--model_args.dropout", "0.1"),
        ],
    )
    assert (options.teacher.name, options.teacher.args) == ("vgg13", {"x": 1})
    assert options.schedule.milestones == [3.0, 5.0]
    assert options.data.limit == 50
    assert (options.loss.temperature, options.loss.shares["kd_mix"]) == (2.0, 0.0)
    assert options.model_args == {"dropout": 0.1}


LISTS = [
    (["--schedule.milestones", "30", "60"], "--schedule.milestones '[30, 60]'"),
    (["--schedule.milestones=30", "60"], "--schedule.milestones '[30, 60]'"),
    (["--schedule.milestones", "30"], "--schedule.milestones '[30]'"),
    (["--mean", "0.5,", "0.5,", "0.5"], "--mean '[0.5, 0.5, 0.5]'"),
    (["--teacher.std", "0.2", "0.2", "0.2"], "--teacher.std '[0.2, 0.2, 0.2]'"),
    (["--optimizer", "AdamW", "--optimizer.betas", "0.9", "0.99"], "--optimizer.betas '[0.9, 0.99]'"),
]


@pytest.mark.parametrize(("arguments", "written"), LISTS)
def test_a_list_of_words_is_shown_how_it_is_written(arguments, written):
    with pytest.raises(ValueError, match="a list is one value, in brackets and quotes: " + re.escape(written) + "$"):
        parse("distill", arguments)
    option, value = shlex.split(written)
    before = [] if "betas" not in option else ["--optimizer", "AdamW"]
    parse("distill", [*before, option, value])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.root", "my", "images"], "--data.root my images: --data.root takes one value; put quotes around"),
        (["--epochs", "3", "4"], "--epochs 3 4: --epochs takes one value"),
        (["--optimizer", "lamb"], "^--optimizer lamb: there is no such class; give its whole path"),
        (["--optimizer"], "--optimizer.*expected one argument"),
        (["--no_such_option", "3", "4"], "unrecognized arguments: --no_such_option 3 4"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, arguments, message):
    good = _write(tmp_path / "0.yaml", {"model": "resnet8"})
    with pytest.raises(ValueError, match=message):
        parse("distill", ["--config", good, *arguments])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["published"]),
        (["--augmentation", '["cutmix", "flip"]'], ["cutmix", "flip"]),
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
    arguments = ["--model", "vgg8", "--optimizer", "AdamW", "--data.limit", "9", "--clip_grad_norm", "1"]
    _, plain = parse("distill", [*arguments, "--overwrite", "true", "--output", "x"])
    again, same = parse("distill", ["--config", _write(tmp_path / "config.yaml", plain)])
    assert same == plain
    assert (again.model, again.data.limit, again.clip_grad_norm, again.overwrite) == ("vgg8", 9, 1.0, False)


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


YAML_WORDS = [
    ("compile: off", "1.yaml: compile: YAML reads off as false; put it in quotes, compile: 'off'"),
    ("device: on", "device: 'on'"),
    ("data: {root: 2012}", "1.yaml: data.root: YAML reads 2012 as a number; put it in quotes, root: '2012'"),
    ("data: {val_split: no}", "val_split: 'no'"),
    ("output: 2026-11-26", "1.yaml: output: YAML reads 2026-11-26 as a date; put it in quotes, output: '2026-11-26'"),
    ("output: ~", "1.yaml: output: YAML reads ~ as nothing; put it in quotes, output: '~'"),
    ("model: 1e5", "model: '1e5'"),
    ("augmentation: no", "augmentation: 'no'"),
    ("measure: {augmentation: [cutmix, off]}", "1.yaml: measure.augmentation: YAML reads off as false"),
    (
        "schedule: {milestones: 30, 60}",
        "1.yaml: schedule.milestones is 30, 60: a list is written in brackets, .*[30, 60]",
    ),
    ("schedule:\n  milestones: 30, 60", "milestones: [30, 60]"),
    ("mean: 0.5", "1.yaml: mean is 0.5: a list is written in brackets, mean: [0.5]"),
    ("optimizer: {init_args: {betas: 0.9, 0.99}}", "init_args.betas is 0.9, 0.99: .*, betas: [0.9, 0.99]"),
]


@pytest.mark.parametrize(("content", "message"), YAML_WORDS)
def test_what_yaml_does_not_read_as_it_is_meant_is_shown_how_it_is_written(tmp_path, content, message):
    names = [_write(tmp_path / f"{number}.yaml", text) for number, text in enumerate(("epochs: 1", content, "seed: 1"))]
    pattern = message.replace("[", r"\[").replace("]", r"\]")
    for command in ("distill", "measure"):
        with pytest.raises(ValueError, match=pattern):
            parse(command, [word for name in names for word in ("--config", name)])


def test_words_in_quotes_and_numbers_with_an_exponent_are_what_they_are(tmp_path):
    config = _write(tmp_path / "1.yaml", 'output: "1e5"\ndata: {root: "2012", val_split: "no"}\nclip_grad_norm: 1e-3\n')
    options, plain = parse("train", ["--config", config])
    assert (options.output, options.data.root, options.data.val_split, options.clip_grad_norm) == (
        "1e5",
        "2012",
        "no",
        1e-3,
    )
    assert parse("train", ["--config", _write(tmp_path / "2.yaml", plain)])[1] == plain


@pytest.mark.parametrize("bad", ["ema: 2", "loss: {init_args: {temperature: 0}}", "epochs: many"])
def test_of_several_configs_the_wrong_one_is_named(tmp_path, bad):
    names = [_write(tmp_path / f"{number}.yaml", text) for number, text in enumerate(("ema: 0.5", bad, "seed: 1"))]
    with pytest.raises(ValueError, match=r"^\S*/1.yaml: "):
        parse("distill", [word for name in names for word in ("--config", name)])


# ----------------------------------------------------------------------------------------------------- paths

#: every option that is a path
PATHS = {
    "data.val_root",
    *("data.root", "data.classes", "weights", "teacher.weights", "teacher.cache", "output", "resume", "verify", "json"),
    *("run", "students", "checkpoint", "entropy_log", "points", "file", "plot", "root", "folder", "target", "manifest"),
    *("readme", "page", "data.cache"),
}
#: the options of commands that share no configs
ALONE = {
    "prepare": prepare.PrepareOptions,
    "correlate": correlate.run,
    "demo": demo.run,
    "convert": convert.convert,
    "replay": replay.replay,
    "bench loader": loader.LoaderOptions,
    "bench host": host.HostOptions,
    "bench first-hour": first_hour.run,
    "bench all": commands.run_all,
    "bench images": machine.repeat_images,
    "bench tables": record.write_tables,
    "reference": reference.write_reference,
}


@pytest.mark.parametrize("command", [*OPTIONS, *ALONE])
def test_every_option_of_a_file_or_folder_is_a_path(command):
    """Told by its help, so that no later one stays a plain text: its type is FilePath, or Path."""
    component = ALONE.get(command) or options_class(command)
    types = option_types(component)
    assert {name for name in types if is_path(types[name])} == PATHS & types.keys()
    told = {action.dest: action.help or "" for action in build_parser(command, component)._actions}
    texts = {name for name in types if types[name] in (str, str | None)}
    about_files = {name for name in texts if re.search(r"\b(file|folder|path)s?\b", told[name])}
    assert about_files <= {"data.train_split", "data.val_split", "teacher.sha256", "shard"}


@pytest.mark.parametrize("command", OPTIONS)
def test_paths_know_the_home_folder_and_variables(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "/some/place")
    monkeypatch.delenv("NOWHERE", raising=False)
    names = sorted(PATHS & option_types(options_class(command)).keys() - {"resume", "verify"})
    options, plain = parse(command, [word for name in names for word in (f"--{name}", "${PLACE}/x")])
    assert {attrgetter(name)(options) for name in names} == {"/some/place/x"}
    assert "PLACE" not in yaml.safe_dump(plain)
    in_config = [name for name in names if name not in ("output", "json")]  # of which benchmarks leave a run's alone
    options, _ = parse(command, ["--config", _write(tmp_path / "1.yaml", dict.fromkeys(in_config, "~/x"))])
    assert {attrgetter(name)(options) for name in in_config} <= {f"{tmp_path}/x"}
    with pytest.raises(ValueError, match=rf"--{names[-1]} \$NOWHERE/x: the environment variable NOWHERE is not set"):
        parse(command, [f"--{names[-1]}", "$NOWHERE/x"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~", "/home/me"),
        ("~/x", "/home/me/x"),
        ("$PLACE/x", "/some/place/x"),
        ("a/${PLACE}b~", "a//some/placeb~"),
        ("../x", "../x"),
        ("./~", "./~"),
        ("pretrained", "pretrained"),
        ("$NOWHERE/x", "--json $NOWHERE/x: the environment variable NOWHERE is not set"),
        ("${PLACE:-x}", "--json ${PLACE:-x}: the environment variable PLACE:-x is not set"),
        ("~no one/x", "--json ~no one/x: there is no such home folder; a file of that name is ./~no one/x"),
    ],
)
def test_a_path_is_what_a_shell_makes_of_it(monkeypatch, given, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "/some/place")
    monkeypatch.delenv("NOWHERE", raising=False)
    if expected.startswith("--"):
        with pytest.raises(ValueError, match=re.escape(expected)):
            expand_path("--json", given)
    else:
        assert expand_path("--json", given) == expected


def test_folders_that_are_gone_on_with_and_configs_are_paths_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _write(tmp_path / "config.yaml", {"epochs": 7})
    for command, option in (("train", "resume"), ("cache", "verify")):
        options, _ = parse(command, [f"--{option}", "~"])
        assert (options.epochs, getattr(options, option), options.output) == (7, str(tmp_path), str(tmp_path))
    assert parse("train", ["--config", "${HOME}/config.yaml"])[0].epochs == 7
    with pytest.raises(ValueError, match=r"--config \$NOWHERE/x: the environment variable NOWHERE is not set"):
        parse("train", ["--config", "$NOWHERE/x"])


@dataclass
class Own:
    """Options of a command that shares none.

    Args:
        names: of things.
        counts: of them.
        place: a folder.
        data: a group.
    """

    names: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    place: Path = Path()
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if 0 in self.counts:
            raise ValueError("--counts must be\nabove 0")


def test_a_command_that_shares_no_configs_has_the_same_rules(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = _write(tmp_path / "own.yaml", {"counts": [3], "place": "~/a", "data": {"root": "~/b"}})
    found: list[Own] = []
    words = ["--config", "~/own.yaml", "--names", "x", "y,z", "--counts", "1", "2"]
    run_function("some", found.append, words, options=Own, lists=("names", "counts"))
    assert (found[0].names, found[0].counts) == (["x", "y", "z"], [1, 2])
    assert (found[0].place, found[0].data.root) == (tmp_path / "a", f"{tmp_path}/b")
    _write(tmp_path / "off.yaml", "data: {val_split: off}")
    for words, message in (
        (["--config", config, "--counts", "0"], "--counts must be above 0"),
        (["--config", "~/off.yaml"], f"{tmp_path}/off.yaml: data.val_split: YAML reads off as false"),
        (["--naems", "1"], "--naems"),
        (["--names"], "--names needs at least one value"),
        (["--place", "$NOWHERE"], "--place $NOWHERE: the environment variable NOWHERE is not set"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_function("some", print, words, options=Own, lists=("names", "counts"))
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1)
        assert error.startswith("dalikd some: error: ")
        assert message in error


def test_a_function_takes_words_by_their_places():
    found = []

    def command(points: Path, plot: Path | None = None) -> None:
        """Says what it was given."""
        found.append((points, plot))

    run_function("some", command, ["--plot", "out.png", "points.json"], positional=True)
    assert found == [(Path("points.json"), Path("out.png"))]

    def several(files: list[FilePath], plot: Path | None = None) -> None:
        """Says what it was given."""
        found.append((files, plot))

    words = ["a, [b]", "--plot", "out.png", "c", "d"]
    run_function("some", several, words, lists=("files",), positional=True)
    assert found[1] == (["a, [b]", "c", "d"], Path("out.png"))


# --------------------------------------------------------------------------------------------------- classes

SGD_LR_005 = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.07, "momentum": 0.8}}
ADAMW_LR_01 = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}


@pytest.mark.parametrize(
    ("configs", "words", "name", "lr", "weight_decay", "said"),
    [
        ([{"optimizer": {"class_path": "torch.optim.AdamW"}}], "", "AdamW", 0.001, 0.01, ""),
        ([{"optimizer": "AdamW"}], "", "AdamW", 0.001, 0.01, ""),
        ([ADAMW_LR_01], "", "AdamW", 0.01, 0.01, ""),
        ([], "--optimizer AdamW", "AdamW", 0.001, 0.01, ""),
        ([], "--optimizer.lr 0.02 --optimizer AdamW", "AdamW", 0.02, 0.01, ""),
        ([], "--optimizer=AdamW --optimizer.lr=0.02", "AdamW", 0.02, 0.01, ""),
        ([], "--optimizer SGD --optimizer.lr 0.2", "SGD", 0.2, 5e-4, ""),
        ([SGD_LR_005], "--optimizer AdamW", "AdamW", 0.001, 0.01, "--optimizer AdamW: lr 0.07, momentum 0.8 of "),
        ([SGD_LR_005], "--optimizer torch.optim.AdamW --optimizer.lr 0.2", "AdamW", 0.2, 0.01, "lr 0.07, momentum 0.8"),
        ([ADAMW_LR_01], "--optimizer SGD", "SGD", 0.05, 5e-4, "lr 0.01 of torch.optim.AdamW"),
        ([ADAMW_LR_01], "--optimizer torch.optim.adamw.AdamW", "AdamW", 0.01, 0.01, ""),
        ([SGD_LR_005, ADAMW_LR_01], "", "AdamW", 0.01, 0.01, "1.yaml: optimizer torch.optim.AdamW: lr 0.07, momentum"),
        ([SGD_LR_005, "AdamW"], "", "AdamW", 0.001, 0.01, "0.yaml) no longer hold, AdamW has its own defaults"),
        ([{"lr": 0.3}, "AdamW"], "", "AdamW", 0.001, 0.01, "lr 0.3 of torch.optim.SGD"),
        (["AdamW", {"lr": 0.3}], "", "AdamW", 0.3, 0.01, ""),
        ([SGD_LR_005, {"lr": 0.3}], "", "SGD", 0.3, 5e-4, ""),
    ],
)
def test_another_class_has_its_own_defaults(
    tmp_path, monkeypatch, capsys, configs, words, name, lr, weight_decay, said
):
    """What was given for the class before does not hold for it, and that is said in one line."""
    monkeypatch.setattr("dalikd.tools.classes._SAID", set())
    files = [
        _write(tmp_path / f"{number}.yaml", content if "optimizer" in content else {"optimizer": content})
        for number, content in enumerate(configs)
    ]
    options, plain = parse("train", [*(word for file in files for word in ("--config", file)), *words.split()])
    built = options.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (type(built).__name__, built.defaults["lr"], built.defaults["weight_decay"]) == (name, lr, weight_decay)
    assert plain["optimizer"]["init_args"]["lr"] == lr
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == bool(said)


def test_a_section_may_name_another_class(tmp_path, capsys):
    config = _write(tmp_path / "1.yaml", {"optimizer": SGD_LR_005, "train": {"optimizer": "Adagrad"}})
    for _ in range(2):
        assert parse("train", ["--config", config])[1]["optimizer"]["init_args"]["lr"] == 0.01
    assert parse("distill", ["--config", config])[1]["optimizer"]["init_args"]["lr"] == 0.07
    assert capsys.readouterr().err.count("lr 0.07, momentum 0.8 of torch.optim.SGD") == 1  # once in a process


class OtherLoss(KD):
    """Another loss.

    Args:
        temperature: of both nets.
    """

    def __init__(self, temperature: float = 1.5) -> None:
        super().__init__(temperature=temperature)


def test_another_loss_has_its_own_defaults(tmp_path, capsys):
    config = _write(tmp_path / "1.yaml", {"loss": {"init_args": {"temperature": 7.0, "ce_weight": 0.5}}})
    words = ["--import", OtherLoss.__module__, "--loss", f"{OtherLoss.__module__}.OtherLoss"]
    options, _ = parse("distill", ["--config", config, *words])
    assert (type(options.loss), options.loss.temperature) == (OtherLoss, 1.5)
    assert "ce_weight 0.5, temperature 7.0 of dalikd.kd.losses.KD" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- a task


@dataclass
class OwnTask(TrainOptions):
    """A way to train from outside the package.

    Args:
        rounds: of something.
    """

    rounds: int = 3


@pytest.mark.parametrize("named_in", ["line", "file", "section", "resumed"])
def test_an_options_class_is_named_by_its_class_path(tmp_path, named_in):
    task = {"task": f"{OwnTask.__module__}.OwnTask"}
    words = ["--task", task["task"]] if named_in == "line" else []
    content = {"rounds": 5, **{"file": task, "section": {"train": task}, "resumed": task}.get(named_in, {})}
    config = _write(tmp_path / "config.yaml", content)
    read = ["--resume", str(tmp_path)] if named_in == "resumed" else ["--config", config]
    options, plain = parse("train", [*read, *words, "--seed", "4", "--import", OwnTask.__module__])
    assert (type(options), options.rounds, options.seed) == (OwnTask, 5, 4)
    assert (plain["task"], plain["rounds"]) == (task["task"], 5)


def test_a_task_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"1\.yaml: task is \{.*: give the class path of an"):
        parse("train", ["--config", _write(tmp_path / "1.yaml", {"task": {"a": 1}})])


def test_the_last_task_that_is_named_holds():
    words = ["--import", __name__, "--task", f"{__name__}.OwnTask"]
    words += ["--task", "dalikd.trainers.tasks.supervised.TrainOptions"]
    assert type(parse("train", words)[0]) is TrainOptions
    assert "task" not in parse("train", [])[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task nowhere.Task", "--task nowhere.Task: there is no such class (No module named 'nowhere')"),
        ("--task os.path.join", "--task os.path.join: os has no class for this place; give another"),
        (
            "--task torch.nn.Module",
            "--task torch.nn.Module: give a class that is made from dalikd.trainers.tasks.base",
        ),
        ("--rounds 3", "unrecognized arguments: --rounds 3"),
    ],
)
def test_a_task_that_is_none_is_named(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse("train", words.split())


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module in the working folder, which `python -m` would find, and what leaves a trace when it is imported."""
    (tmp_path / "own_losses.py").write_text(
        "from pathlib import Path\nfrom dalikd.kd.losses import KD\n\n"
        f"Path({str(tmp_path / 'trace')!r}).touch()\n\n\nclass Loss(KD):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path / "trace"
    sys.modules.pop("own_losses", None)


_NESTED = {"class_path": "WeightedSum", "init_args": {"losses": [{"class_path": "own_losses.Loss"}]}}


@pytest.mark.parametrize("content", ["own_losses.Loss", {"class_path": "own_losses.Loss"}, _NESTED])
@pytest.mark.parametrize("in_file", [True, False])
def test_a_class_path_runs_no_code_that_is_not_installed_or_asked_for(tmp_path, own_module, content, in_file):
    words = ["--loss", content if isinstance(content, str) else json.dumps(content)]
    if in_file:
        words = ["--config", _write(tmp_path / "1.yaml", {"loss": content})]
    with pytest.raises(
        ValueError, match=r"own_losses\.Loss: own_losses is of no installed .* give --import own_losses"
    ):
        parse("distill", words)
    assert not own_module.exists()


def test_a_module_that_is_asked_for_is_imported(own_module, monkeypatch):
    monkeypatch.setattr("dalikd.tools.classes._TRUSTED", {})
    options, plain = parse("distill", ["--import", "own_losses", "--loss", "own_losses.Loss"])
    assert type(options.loss).__module__ == "own_losses"
    assert own_module.exists()
    assert "import" not in plain
    assert import_words() == ["--import", "own_losses"]  # of the same call in another process
    with pytest.raises(ValueError, match=r"--import no_such_module: ModuleNotFoundError"):
        parse("distill", ["--import", "no_such_module"])


@pytest.mark.usefixtures("own_module")
def test_a_package_that_is_worked_on_in_the_working_folder_is_installed(tmp_path, monkeypatch):
    described = tmp_path / "site" / "own_losses-1.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: own_losses\nVersion: 1\n")
    (described / "top_level.txt").write_text("own_losses\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    for url, installed in ((f"file://{tmp_path}/elsewhere", False), (f"file://{tmp_path}", True)):
        (described / "direct_url.json").write_text(json.dumps({"dir_info": {"editable": True}, "url": url}))
        if installed:
            assert type(parse("distill", ["--loss", "own_losses.Loss"])[0].loss).__module__ == "own_losses"
        else:
            with pytest.raises(ValueError, match="own_losses is of no installed package"):
                parse("distill", ["--loss", "own_losses.Loss"])


def test_a_config_file_cannot_ask_for_an_import(tmp_path, own_module):
    with pytest.raises(ValueError, match="import"):
        parse("distill", ["--config", _write(tmp_path / "1.yaml", {"import": "own_losses"})])
    assert not own_module.exists()


@pytest.mark.parametrize("path", ["subprocess.Popen", "os.system", "builtins.eval", "functools.partial"])
@pytest.mark.parametrize("option", ["optimizer", "loss", "model_args", "teacher.args"])
def test_what_is_no_optimizer_or_loss_is_not_called(tmp_path, option, path):
    trace = tmp_path / "trace"
    call = {"class_path": path, "init_args": {"args": ["touch", str(trace)], "command": f"touch {trace}"}}
    for value in (call, {"a": call}) if "args" in option else (call,):
        for words in (["--config", _write(tmp_path / "1.yaml", {option: value})], [f"--{option}", json.dumps(value)]):
            with pytest.raises(ValueError, match=r"has no class for this place|to an option that takes no class"):
                parse("distill", words)
    assert not trace.exists()


# -------------------------------------------------------------------------------------------------- renamed options


@pytest.fixture
def renamed(monkeypatch):
    for old, new in (
        ("batch", "batch_size"),
        ("folder", "data.root"),
        ("loss.temp", "loss.temperature"),
        ("data.size", "data.image_size"),
        ("lw", "each loss has a weight of its own now, such as --loss.ce_weight"),
    ):
        monkeypatch.setitem(RENAMED, old, new)


@pytest.mark.usefixtures("renamed")
@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ({}, "--batch 3", "^--batch is now --batch_size$"),
        ({}, "--loss.temp 3", "^--loss.temp is now --loss.temperature$"),
        ({}, "--loss.init_args.temp 3", "^--loss.temp is now --loss.temperature$"),
        ({}, "--lw=3", "^--lw: each loss has a weight of its own now"),
        ({"batch": 3}, "", r"^\S*/1.yaml: batch is now batch_size$"),
        ({"distill": {"folder": "x"}}, "", r"^\S*/1.yaml: distill.folder is now distill.data.root$"),
        ({"data": {"size": 3}}, "", "1.yaml: data.size is now data.image_size"),
        ({"data.size": 3}, "", "1.yaml: data.size is now data.image_size"),
        ({"loss": {"temp": 3}}, "", "1.yaml: loss.temp is now loss.temperature"),
        ({"loss": {"init_args": {"temp": 3}}}, "", "1.yaml: loss.temp is now loss.temperature"),
        ({"measure": {"batch": 3}}, "", "1.yaml: measure.batch is now measure.batch_size"),
        ({"lw": [1]}, "", "1.yaml: lw: each loss has a weight"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(tmp_path, content, words, message):
    with pytest.raises(ValueError, match=message):
        parse("distill", ["--config", _write(tmp_path / "1.yaml", content), *words.split()])


@pytest.mark.usefixtures("renamed")
def test_a_folder_of_an_earlier_version_goes_on(tmp_path):
    loss = {"class_path": "dalikd.kd.losses.KD", "init_args": {"temp": 3.0}}
    _write(tmp_path / "config.yaml", {"batch": 8, "folder": "x", "data": {"size": 48, "limit": 5}, "loss": loss})
    options, plain = parse("distill", ["--resume", str(tmp_path)])
    assert (options.batch_size, options.data.root, options.data.image_size, options.data.limit) == (8, "x", 48, 5)
    assert options.loss.temperature == 3.0
    assert not {"batch", "folder"} & plain.keys()
    _write(tmp_path / "config.yaml", {"lw": [1]})
    with pytest.raises(ValueError, match=r"config.yaml: lw: each loss has a weight of its own"):
        parse("distill", ["--resume", str(tmp_path)])


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


@pytest.mark.parametrize(("answered", "code"), [(True, 75), (False, 2)])
def test_a_store_that_has_answered_may_do_so_again(capsys, answered, code):
    with pytest.raises(SystemExit) as stop, guarded("train"):
        raise pickle.loads(pickle.dumps(Unavailable("s3://a: b fails", answered)))  # as from a process of prepare
    assert (stop.value.code, capsys.readouterr().err) == (code, "dalikd train: error: s3://a: b fails\n")


def test_a_signal_is_one_line_and_its_own_exit_code(capsys, tmp_path):
    def ended(stop: Callable[[], object]) -> object:
        with pytest.raises(SystemExit) as exit, guarded("prepare"), TemporaryDirectory(dir=tmp_path):
            stop()
        assert list(tmp_path.iterdir()) == []
        return exit.value.code

    def press_ctrl_c() -> None:
        raise KeyboardInterrupt

    def interrupt(number: int) -> None:
        raise Interrupted("stopped by a signal", number)

    handler = signal.getsignal(signal.SIGTERM)
    assert ended(press_ctrl_c) == 130
    assert capsys.readouterr().err == "dalikd prepare: stopped (Ctrl-C)\n"
    assert ended(lambda: signal.raise_signal(signal.SIGTERM)) == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert capsys.readouterr().err == "dalikd prepare: stopped by signal 15 (SIGTERM)\n"
    assert ended(lambda: signal.raise_signal(signal.SIGHUP)) == 129
    assert ended(lambda: signal.raise_signal(signal.SIGUSR2)) == 140
    assert capsys.readouterr().err.count("\n") == 2
    assert ended(lambda: interrupt(signal.SIGINT)) == 130
    assert capsys.readouterr().err == "dalikd prepare: stopped by a signal\n"


def test_of_several_processes_one_says_that_they_stop(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop, guarded("train"):
        raise KeyboardInterrupt
    assert (stop.value.code, capsys.readouterr().err) == (130, "")


def test_a_command_without_reader_ends_in_silence_and_any_other_broken_pipe_does_not(capsys):
    own, (reading, writing) = os.dup(1), os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    try:
        with pytest.raises(SystemExit) as stop, guarded("methods"):
            os.write(1, b"what `| head` has not waited for")
    finally:
        os.dup2(own, 1)
    assert (stop.value.code, capsys.readouterr().err) == (141, "")
    with pytest.raises(SystemExit) as stop, guarded("methods"):
        os.write(writing, b"to somebody else")
    assert (stop.value.code, capsys.readouterr().err) == (2, "dalikd methods: error: [Errno 32] Broken pipe\n")


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("DALIKD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="inside"), guarded("train"):
        raise ValueError("inside")


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(AssertionError), guarded("train"):
        raise AssertionError
