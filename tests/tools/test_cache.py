"""`dalikd cache` from the command line, and `dalikd distill` that reads what it has written."""

import json

import numpy as np
import pytest
import yaml

from dalikd.tools.cli import parse
from dalikd.trainers.teacher_cache.layout import TeacherCache


@pytest.fixture
def caching(tree, data_options, teacher):
    """99 images, two epochs of picks."""
    sizes = ["--batch_size", 48, "--mix.group", 8, "--epochs", 2]
    return [*data_options(tree), *teacher, *sizes, "--augmentation", "cutmixpick_teacher"]


def _flip(folder):
    path = folder / "epoch-0001" / "augmented.npy"
    rows = np.load(path)
    rows[50, 1] = -rows[50, 1] - 1
    np.save(path, rows)


def test_fill_verify_and_distil(command, caching, training, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    filled = command("cache", *caching, "--output", cache, "--json", tmp_path / "filled.json")
    assert (filled.code, filled.err) == (0, "")
    told = {"folder": str(cache), "epochs": 2, "images": 99, "storage": "float32"}
    assert json.loads((tmp_path / "filled.json").read_text()) == told
    first, last, _ = filled.out.splitlines()
    assert first.startswith(f"teacher cache {cache}: 2 epoch(s) of 99 images, float32: 0.01 MiB, ")
    assert last == f"finished; read it with: dalikd distill --teacher.cache {cache}"

    verified = command("cache", "--verify", cache, "--share", 1)
    assert (verified.code, verified.err) == (0, "")
    lines = verified.out.splitlines()
    assert lines[0] == f"198 images of the teacher cache {cache} (float32)"
    assert lines[2:] == [
        "other picks now: 0",
        "the cache agrees with its teacher (tolerance 0.001 of logits, 1 % of the picks)",
    ]

    pick = ["--augmentation", "cutmixpick_teacher", "--epochs", 3]
    trained = command("distill", *training, *pick, "--teacher.cache", cache, "--output", run)
    assert (trained.code, trained.err) == (0, "")
    assert trained.out.splitlines()[0] == "teacher cache: 2 epochs, repeated"
    results = json.loads((run / "results.json").read_text())
    assert results["teacher_cache"]["summary"] == "teacher cache: 2 epochs, repeated"
    assert results["steps"] == 18

    _flip(cache)
    spoilt = command("cache", f"--verify={cache}", "--share", 1)
    assert spoilt.code == 2
    assert "augmented.npy" in spoilt.err
    (cache / "epoch-0001" / "checksums.json").unlink()  # as of a cache that was written before there were any
    spoilt = command("cache", f"--verify={cache}", "--share", 1, "--json", "-")
    found = json.loads(spoilt.out)
    assert (spoilt.code, found["passes"], found["rows"]) == (1, False, 198)
    assert found["differences"]["logits"]["max"] > 0.001
    assert spoilt.err.splitlines()[-1].startswith("the cache DIFFERS from its teacher (tolerance 0.001 of logits")
    assert command("cache", "--verify", cache, "--share", 1, "--tolerance", 99).code == 0


def test_a_resumed_run_reads_its_cache(command, caching, training, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    command("cache", *caching, "--output", cache)
    pick = ["--augmentation", "cutmixpick_teacher", "--teacher.cache", cache]
    whole = tmp_path / "whole"
    assert command("distill", *training, *pick, "--epochs", 4, "--output", whole).code == 0
    assert command("distill", *training, *pick, "--epochs", 2, "--output", run).code == 0
    ended = command("distill", "--resume", run, "--epochs", 4)
    assert (ended.code, "the teacher's answers" in ended.out) == (0, False)
    ours, theirs = (json.loads((folder / "results.json").read_text())["last"] for folder in (run, whole))
    assert ours == theirs
    assert command("cache", *caching, "--epochs", 3, "--output", cache).code == 0
    ended = command("distill", "--resume", run, "--epochs", 5)
    said = "the teacher's answers come from a cache of 3 epochs (float32), before from a cache of 2 epochs (float32)"
    assert (ended.code, said in ended.out) == (0, True)


def test_top_k_is_judged_by_probabilities(command, caching, tmp_path):
    cache = tmp_path / "cache"
    assert command("cache", *caching, "--storage", "topk", "--k", 2, "--output", cache).code == 0
    assert TeacherCache(cache).layout.k == 2
    assert not (cache / "epoch-0000" / "logits.npy").exists()
    verified = command("cache", "--verify", cache, "--share", 0.2)
    assert verified.code == 0
    assert verified.out.splitlines()[-1] == (
        "the cache agrees with its teacher (tolerance 0.001 of probabilities, 1 % of the picks)"
    )


def test_verifying_takes_the_options_of_the_cache(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"mix_group": 32, "seed": 9, "output": "elsewhere"}))
    options, plain = parse("cache", ["--verify", str(tmp_path), "--seed", "4"])
    assert (options.mix.group, options.seed, options.verify, options.output) == (32, 4, str(tmp_path), str(tmp_path))
    assert "verify" not in plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "new", "--augmentation", "cutmixpick_student"], "its teacher outputs cannot be cached"),
        ([], "no folder given: name one for the teacher cache with --output"),
        (["--output", "new", "--teacher.cache", "old"], "--teacher.cache is read by dalikd distill"),
        (["--output", "new", "--data.name", "svnh"], "data.name"),
        (["--verify", "nothing"], "--verify nothing: there is no teacher cache (nothing/config.yaml is missing)"),
        (["--verify"], "--verify needs a value"),
    ],
)
def test_mistakes_are_one_line(command, caching, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    ended = command("cache", *caching, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("dalikd cache: error: ")
    assert ended.err.count("\n") == 1
    assert message in ended.err
    assert not (tmp_path / "new").exists()


def test_distil_refuses_what_does_not_match(command, caching, training, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    command("cache", *caching, "--output", cache)
    ended = command("distill", *training, "--seed", 1, "--teacher.cache", cache, "--output", run)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"dalikd distill: error: the teacher cache {cache} was made for another run: ")
    assert "seed: cache has 0, this run has 1; augmentation: cache has cutmixpick_teacher, this run has identity. " in (
        ended.err
    )
    assert not run.exists()


def test_measure_has_no_use_for_a_cache(command, options, tmp_path):
    ended = command("measure", *options, "--teacher.cache", tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert "--teacher.cache is read by dalikd distill alone" in ended.err
