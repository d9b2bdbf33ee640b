"""How a study's config files and arguments become one config."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dalikd.tools.study import read_study
from dalikd.trainers.study.state import check_config, first_difference

ROOT = Path(__file__).parents[2]
PAIRS = [{"teacher": "vgg13", "student": "vgg8"}]


def _write(path: Path, content: Any) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def read(tmp_path):
    """Reads some configs, then arguments."""

    def call(*contents: dict[str, Any], words: str = ""):
        paths = [_write(tmp_path / f"{number}.yaml", content) for number, content in enumerate(contents)]
        return read_study([word for path in paths for word in ("--config", path)] + words.split())

    return call


def test_a_study_has_its_own_options_and_shares_the_others(read):
    options, shared, _, _, trains = read(
        {
            "data": {"name": "digits"},
            "data.limit": 50,
            "epochs": 3,
            "seeds": 5,
            "teacher": {"fold_bn": False},
            "measure": {"epochs": 2},
            "evaluate": None,
            "bench step": {"steps": 3},
            "steps": 4,
            "study": {"pairs": PAIRS, "augmentation": "cutmix", "epoch_factor": [1, 4]},
        }
    )
    assert (options.pairs, options.seeds, options.augmentation) == (PAIRS, [5], ["cutmix"])
    assert (options.epoch_factor, options.shard, trains) == ([1.0, 4.0], "1/1", False)
    data, teacher = {"name": "digits", "limit": 50}, {"fold_bn": False}
    assert shared == {
        "train": {"data": data, "epochs": 3},
        "evaluate": {"data": data},
        "measure": {"data": data, "teacher": teacher, "epochs": 2},
        "distill": {"data": data, "epochs": 3, "teacher": teacher},
    }


def test_an_engine_has_its_name_and_its_options_in_several_places(read):
    first = {"study": {"pairs": PAIRS, "engine": {"partition": "gpu", "timeout_min": 60, "account": "kd"}}}
    study = read(first, {"engine": {"name": "slurm"}}, words="--engine.timeout_min 90 --engine list")
    assert study.options.engine_options() == {"name": "list", "partition": "gpu", "timeout_min": 90, "account": "kd"}
    same = read({"study": {"pairs": PAIRS}}, words="--json - --only a --status true")
    assert study.config == same.config  # the same study, whoever starts its runs or asks for it
    alone = read(first)
    assert alone.options.engine_name() is None


def test_arguments_reach_study_and_cells(read):
    options, shared, _, _, trains = read(
        {"epochs": 3, "train": {"epochs": 9, "ema": 0.5}, "study": {"pairs": PAIRS, "seeds": [1]}},
        words="--seeds 4 5 --augmentation flip,cutmix mixup --epoch_factor=2 --data.root DATA --data.limit 7 "
        "--measure.epochs 2 --epochs 4 --train.epochs=6 --shard 2/3 --output 07 --dry_run true --pair a/b",
    )
    assert (options.seeds, options.augmentation) == ([4, 5], ["flip", "cutmix", "mixup"])
    assert (options.epoch_factor, options.shard, options.output) == ([2.0], "2/3", "07")
    assert (options.dry_run, options.pair, options.pairs, trains) == (True, ["a/b"], PAIRS, True)
    data = {"root": "DATA", "limit": 7}
    assert shared == {
        "train": {"data": data, "epochs": 6, "ema": 0.5},
        "evaluate": {"data": data},
        "measure": {"data": data, "epochs": 2},
        "distill": {"data": data, "epochs": 4},
    }


def test_later_files_win_even_over_earlier_sections(read):
    shared = read(
        {"epochs": 3, "data": {"limit": 1, "root": "a"}, "train": {"epochs": 9, "data": {"limit": 2, "val_limit": 3}}},
        {"epochs": 4, "data": {"limit": 5}},
    ).shared
    assert shared["train"] == {"epochs": 4, "data": {"limit": 5, "root": "a", "val_limit": 3}}
    assert shared["distill"] == {"epochs": 4, "data": {"limit": 5, "root": "a"}}


SGD = "torch.optim.SGD"
ADAMW = "torch.optim.AdamW"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"class_path": SGD, "init_args": {"lr": 1}}, {"class_path": ADAMW}, (ADAMW, 0.001, 0.01)),
        (
            {"class_path": ADAMW, "init_args": {"lr": 1, "weight_decay": 2}},
            {"class_path": ADAMW, "init_args": {"lr": 3}},
            (ADAMW, 3, 2),
        ),
        ({"class_path": ADAMW, "init_args": {"weight_decay": 1}}, {"lr": 2}, (ADAMW, 2, 1)),
        (ADAMW, {"lr": 2}, (ADAMW, 2, 0.01)),
        ({"class_path": SGD}, ADAMW, (ADAMW, 0.001, 0.01)),
        ({"lr": 1}, {"weight_decay": 2}, (SGD, 1, 2)),
    ],
)
def test_classes_are_merged_with_their_options(read, old, new, expected):
    optimizer = read({"optimizer": old}, {"optimizer": new}).shared["train"]["optimizer"]
    inner = optimizer["init_args"]
    assert (optimizer["class_path"], inner["lr"], inner["weight_decay"]) == expected


def test_classes_in_pairs_stay_plain(read):
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "betas": [0.8, 0.9]}}
    pairs = [{"teacher": "vgg13", "student": {"name": "vgg8", "optimizer": optimizer}}]
    assert read({"study": {"pairs": pairs}}).options.pairs == pairs
    assert read({}, words='--pairs [{"teacher":"a","student":"b"}]').options.pairs == [{"teacher": "a", "student": "b"}]


def test_paths_of_study_cells_and_nets_are_expanded(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "/some/place")
    student = {"name": "vgg8", "data": {"classes": "~/c.txt"}}
    pairs = [{"teacher": {"name": "vgg13", "weights": "~/t.pt"}, "student": student}]
    options, shared, *_ = read(
        {"data": {"root": "~/d"}, "train": {"data": {"classes": "$PLACE/c"}}, "study": {"pairs": pairs}},
        words="--output ~/s --measure.entropy_log ${PLACE}/e",
    )
    assert options.output == f"{tmp_path}/s"
    assert options.pairs == [
        {
            "teacher": {"name": "vgg13", "weights": f"{tmp_path}/t.pt"},
            "student": {"name": "vgg8", "data": {"classes": f"{tmp_path}/c.txt"}},
        }
    ]
    assert shared["train"] == {"data": {"root": f"{tmp_path}/d", "classes": "/some/place/c"}}
    assert shared["measure"] == {"data": {"root": f"{tmp_path}/d"}, "entropy_log": "/some/place/e"}
    lost = [{"teacher": {"name": "vgg13", "weights": "$NOWHERE/t.pt"}, "student": "vgg8"}]
    with pytest.raises(ValueError, match=r"pairs\[0\].teacher.weights \$NOWHERE/t.pt: the environment variable"):
        read({"study": {"pairs": lost}})


@pytest.mark.parametrize(
    ("words", "expected", "said"),
    [
        (
            "--optimizer AdamW",
            (ADAMW, 0.001),
            "command line: optimizer AdamW: lr 0.07, momentum 0.8 of torch.optim.SGD",
        ),
        ("--optimizer AdamW --optimizer.lr 0.2", (ADAMW, 0.2), "lr 0.07"),
        ("--optimizer.lr 0.2 --optimizer AdamW", (ADAMW, 0.2), "lr 0.07"),
        ("--optimizer.lr 0.2", (SGD, 0.2), ""),
        ("--optimizer torch.optim.SGD", (SGD, 0.07), ""),
    ],
)
def test_another_class_leaves_the_options_of_the_one_before(read, monkeypatch, capsys, words, expected, said):
    monkeypatch.setattr("dalikd.tools.classes._SAID", set())
    config = {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.07, "momentum": 0.8}}}
    optimizer = read(config, words=words).shared["distill"]["optimizer"]
    assert (optimizer["class_path"], optimizer["init_args"]["lr"]) == expected
    assert optimizer["init_args"].get("momentum", 0.8) == 0.8
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == bool(said)


def test_a_later_class_goes_before_an_earlier_section(read, monkeypatch, capsys):
    monkeypatch.setattr("dalikd.tools.classes._SAID", set())
    shared = read({"train": {"optimizer": {"momentum": 0.8}}}, {"optimizer": "AdamW"}).shared
    assert {shared[command]["optimizer"]["class_path"] for command in ("train", "distill")} == {ADAMW}
    assert "1.yaml: optimizer AdamW: momentum 0.8 of torch.optim.SGD" in capsys.readouterr().err
    shared = read(
        {"train": {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.07, "momentum": 0.8}}}},
        {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2}}},
    ).shared
    inner = shared["train"]["optimizer"]["init_args"]
    assert (inner["lr"], inner["momentum"]) == (0.2, 0.8)
    assert shared["distill"]["optimizer"]["init_args"]["momentum"] == 0.9
    assert capsys.readouterr().err == ""


def test_words_stay_words(read):
    words = "--data.val_split no --data.root 2012 --train.device cpu --clip_grad_norm 1e-3 --measure.checkpoint null"
    shared = read({}, words=words).shared
    assert shared["train"] == {"data": {"val_split": "no", "root": "2012"}, "device": "cpu", "clip_grad_norm": 1e-3}
    assert shared["measure"] == {"data": {"val_split": "no", "root": "2012"}}


def test_the_config_of_a_study_is_read_again_as_the_same(read, tmp_path):
    optimizer = {"class_path": "AdamW", "init_args": {"lr": 0.2, "betas": [0.8, 0.9]}}
    written = {"data.root": "~/x", "epochs": 3, "train": {"optimizer": optimizer}, "study": {"pairs": PAIRS}}
    study = read(written, words="--measure.window 64 --output elsewhere --pair a/b")
    path = Path(_write(tmp_path / "config.yaml", study.config))
    assert study.reread(path) == study.config
    # as an earlier version wrote it: what was given, and no more
    old = {"data": {"root": "~/x"}, "epochs": 3, "train": {"optimizer": optimizer}, "measure": {"window": 64}}
    own = {"pairs": PAIRS, "augmentation": ["published"], "seeds": [0, 1, 2], "epoch_factor": [1.0]}
    own |= {"methods": {}, "stddev": True}
    old |= {"mix_group": 8}
    pairs = [{"teacher": "vgg13", "student": {"name": "vgg8", "clip": 1}}]
    _write(path, {**old, "study": {**own, "pairs": pairs}})
    assert study.reread(path)["distill"]["mix"] == {"group": 8}
    assert study.reread(path)["study"]["pairs"][0]["student"] == {"name": "vgg8", "clip_grad_norm": 1}
    with pytest.raises(ValueError, match=r"config.yaml: mix_group is now mix.group"):
        read_study(["--config", str(path)])
    with pytest.raises(ValueError, match=r"0.yaml: pairs\[0\].student.clip is now clip_grad_norm"):
        read({"study": {"pairs": pairs}})
    del old["mix_group"]
    _write(path, {**old, "study": own})
    assert study.reread(path) == study.config
    check_config(tmp_path, study.config, study.reread)
    other = read(written, words="--measure.window 32").config
    with pytest.raises(ValueError, match=r"holds a study with measure.window: 64, now it is 32: give the same"):
        check_config(tmp_path, other, study.reread)


def test_help_is_shown(capsys):
    with pytest.raises(SystemExit) as stop:
        read_study(["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: dalikd study")


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ({}, "--epoch 3", "command line: unknown key epoch; did you mean epochs"),
        ({}, "--measure.epoch 3", "command line: unknown key measure.epoch; did you mean epochs"),
        ({}, "--train 3", "--train: options begin with --, and have a value"),
        ({}, "epochs 3", "epochs: options begin with --, and have a value"),
        ({}, "--epochs", "--epochs needs a value"),
        ({}, "--seeds --epochs 3", "--seeds needs at least one value"),
        ({}, "--train.schedule.milestones 3 4", "--train.schedule.milestones '[3, 4]'"),
        ({}, "--epochs 3 4", "--epochs takes one value"),
        ({"study": {"pair": [False]}}, "", "0.yaml: study.pair: YAML reads false as false; put it in quotes"),
        ({}, "--config nowhere.yaml", "nowhere.yaml: no such file"),
        ({"epoch": 3}, "", "0.yaml: unknown key epoch; did you mean epochs"),
        ({"study": {"seed": 3}}, "", "0.yaml: unknown key study.seed; did you mean seeds"),
        ({"seeds": ["a"]}, "", "seeds"),
        ({"seeds": []}, "", "seeds is empty: give at least one"),
        ({}, "--seeds 1 2 1", "seeds: 1 is there twice"),
        ({}, "--seeds -1", "seeds: -1 is no seed, give whole numbers from 0"),
        ({}, "--augmentation flip flip", "augmentation: flip is there twice"),
        ({"epoch_factor": []}, "", "epoch_factor is empty"),
        ({"epoch_factor": 0}, "", "epoch_factor: 0 must be above 0"),
        ({}, "--poll_seconds 0", "--poll_seconds 0: give seconds above 0"),
        ({"engine": ["local"]}, "", "0.yaml: engine is ['local']: give its name, or {name: slurm"),
        ({}, "--shard 3/2", "--shard 3/2: the number must lie between 1 and 2"),
        ({}, "--shard 0/2", "--shard 0/2: the number must lie between 1 and 2"),
        ({}, "--shard 2", "--shard 2: give number/count, such as 2/8"),
        ({"model": "vgg8"}, "", "0.yaml: model is no option of a study: nets are named in `pairs`"),
        ({"train": {"weights": "x"}}, "", "0.yaml: train.weights is no option of a study: nets are named in `pairs`"),
        ({"study": {"pairs": {"teacher": "a"}}}, "", "0.yaml: pairs is {'teacher': 'a'}: give a list of {teacher: NET"),
        ({"teacher": {"sha256": "x"}}, "", "teacher.sha256 is no option of a study: teachers stand in `pairs`"),
        ({"teacher": {"name": "x"}}, "", "teacher.name is no option of a study: teachers stand in `pairs`"),
        ({"distill": {"output": "x"}}, "", "distill.output is no option of a study: it has a folder, --output"),
        ({"overwrite": True}, "", "overwrite is no option of a study"),
        ({"measure": {"augmentation": "x"}}, "", "measure.augmentation is no option of a study: name them under"),
    ],
)
def test_mistakes_are_named(read, content, words, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(content, words=words)
    assert message in " ".join(str(error.value).split())


@pytest.mark.parametrize(
    "path",
    [ROOT / "docs/guides/studies.md", *(ROOT / "configs").rglob("*study.yaml")],
    ids=lambda path: path.parent.name,
)
def test_documented_commands_of_one_folder_are_of_one_study(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folders: dict[str, dict[str, Any]] = {}
    commands = re.findall(
        r"^(?:#   )?.*dalikd(?:\.tools\.| )study (--config [^#\n]+)", path.read_text("utf-8"), re.MULTILINE
    )
    assert len(commands) > 1
    for words in commands:
        study = read_study(words.split())
        first = folders.setdefault(study.options.output or words.split()[1], study.config)
        assert first_difference(first, study.config) is None, words
