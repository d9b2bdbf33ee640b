import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalikd.tools.bench import options as bench_options
from dalikd.tools.bench import record, rounds, step
from dalikd.tools.bench.dispatch import main as bench
from dalikd.tools.bench.rounds import training_loop
from dalikd.tools.cli import parse
from dalikd.trainers.launch import start
from dalikd.trainers.setup import build_distillation


@pytest.fixture
def words(training, teacher) -> list[str]:
    """Two rounds of three steps on real files."""
    return [str(word) for word in (*training, *teacher, "--steps", 3, "--rounds", 2, "--warmup", 2)]


@pytest.fixture
def few_rounds(monkeypatch) -> None:
    monkeypatch.setattr(bench_options, "LEAST_ROUNDS", 2)


def _loop(words: list[str]) -> tuple[Any, Any]:
    options, _ = parse("bench step", words)
    accelerator = start(options.device, options.precision)
    return training_loop(*build_distillation(options, accelerator), options, accelerator), options


@pytest.mark.parametrize(
    ("contention", "loader", "expected"),
    [
        (0.2, 0.5, "the loader"),
        (0.99, 1.09, "the loader"),
        (0.94, 1.11, "contention"),
        (0.96, 1.11, "compute"),
        (1.02, 40.0, "compute"),
    ],
)
def test_the_bound_follows_the_numbers(contention, loader, expected):
    sentence = step.bound(contention, loader)
    assert sentence.startswith(f"Bound by {expected}")
    assert f"{loader:.2f}" in sentence


def test_the_sides_take_turns_and_take_what_they_should(words, monkeypatch):
    """A stops the loader, b throws away as many batches as it takes, and every side comes first once in a while."""
    loop, options = _loop(words)
    taken: list[tuple[str, int]] = []

    def spied(sides: dict[str, Any], rounds: int) -> dict[str, list[float]]:
        def spy(name: str) -> float:
            before = loop.loader.position
            rate = sides[name]()
            taken.append((name, loop.loader.position - before))
            return rate

        return record.alternate({name: lambda name=name: spy(name) for name in sides}, rounds)

    monkeypatch.setattr(step, "alternate", spied)
    closed = []
    close = loop.loader.close
    monkeypatch.setattr(loop.loader, "close", lambda: closed.append(loop.loader.position) or close())
    found = step.measure(loop, options)

    names = ["a", "b", "c", "d", "parts"]
    assert [name for name, _ in taken] == [*names, *names[1:], *names[:1], *names[2:], *names[:2]]
    assert dict(taken) == {"a": 0, "b": 5, "c": 5, "d": 5, "parts": 5}
    assert all(count == dict(taken)[name] for name, count in taken)
    assert len(closed) == 3
    for side in step.SIDES:
        assert len(found.rates[side]) == len(found.rounds[side]) == 2
        assert found.rates[side] == [one.rate for one in found.rounds[side]]
        assert min(found.rates[side]) > 0
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.parts.values())
    assert min(found.flops.values()) > 0
    assert found.warm_up > 0


@pytest.mark.usefixtures("few_rounds")
def test_the_command_writes_strict_json_and_no_run(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench(["step", *words, "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "Bound by " in out
    assert not (tmp_path / "runs").exists()
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".md", ".png"]
    (path,) = (tmp_path / "out").glob("*.json")
    assert path.name.endswith("-step-small-small-32-identity-fp32-cpu.json")
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    rows = {row["measured"]: row for row in content["rows"]}
    for label in step.SIDES.values():
        assert rows[label]["images/s"]["repetitions"] == 2
        assert rows[label]["images/s"]["low"] > 0
        assert 0 < rows[label]["p50 ms"] <= rows[label]["p99 ms"]
    real, alone = rows[step.SIDES["c"]], rows[step.SIDES["a"]]
    ratios = [one / other for one, other in zip(real["images/s"]["values"], alone["images/s"]["values"], strict=True)]
    assert real["of a"]["values"] == ratios
    assert alone["data wait %"]["high"] < real["data wait %"]["high"] < 100
    shares = [rows[f"part of c: {part}"]["part of the step %"]["values"] for part in step.PARTS]
    assert [sum(values) for values in zip(*shares, strict=True)] == pytest.approx([100, 100])
    assert content["config"]["steps"] == 3
    assert content["page_cache"].endswith("of a sample of 99 files lay in memory at the start.")
    assert "fresh" not in " ".join(content["notes"])


def test_a_config_of_distill_is_taken_without_its_run_folder(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "model: resnet8\noutput: runs/mine\nlog_every: 7\nepochs: 3\nsteps: 9\n"
        "train:\n  epochs: 5\n"
        "distill:\n  epochs: 4\n  mix_group: 32\n  output: runs/other\n  overwrite: true\n"
        "bench step:\n  rounds: 8\n"
    )
    options, plain = parse("bench step", ["--config", str(config)])
    assert (options.model, options.epochs, options.mix_group, options.steps) == ("resnet8", 4, 32, 9)
    assert options.rounds == 8
    assert options.folder == Path("runs/bench")
    assert "overwrite" not in plain
    assert parse("bench scaling", ["--config", str(config)])[0].rounds == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--steps", "0"], "--steps 0: give at least 1"),
        (["--rounds", "3"], "--rounds 3: give at least 5"),
        (["--warmup", "1", "--rounds", "5"], "--warmup 1 counts batches that were made ahead"),
        (["--resume", "runs/x"], "--resume"),
        (["--output", f"{__file__}/x", "--rounds", "5"], "--output"),
        (["--teacher.name", "vgg99", "--rounds", "5"], "vgg99"),
    ],
)
def test_a_mistake_ends_in_one_line(words, wrong, message, capsys):
    with pytest.raises(SystemExit) as stop:
        step.main([*words, *wrong])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("dalikd bench step: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_key_of_a_config_is_named_with_its_file(tmp_path, capsys):
    config = tmp_path / "recipe.yaml"
    config.write_text("bench step:\n  stepps: 3\n")
    with pytest.raises(SystemExit):
        step.main(["--config", str(config)])
    error = capsys.readouterr().err
    assert f"{config}: unknown key bench step.stepps; did you mean" in error
    assert "steps" in error


@pytest.mark.parametrize(("highest", "told"), [(110.0, False), (210.0, True)])
def test_a_noisy_machine_is_told(words, highest, told):
    options, _ = parse("bench step", words)
    rates = {side: [100.0, highest] for side in step.SIDES}
    found = step.Measured(rates, rounds={}, parts={}, flops={"teacher": 2e9, "student": 3e9}, warm_up=1.0)
    notes = " ".join(step._notes(found, options, on_gpu=False))
    assert ("varied by a factor of 2.1, so" in notes) == told
    assert "2.00 GFLOP of the teacher and 3.00 of the student" in notes


@pytest.mark.parametrize(("device", "told"), [("cpu", True), ("cuda", False)])
def test_the_loaders_calls_are_timed_where_they_wait(words, device, told):
    """On a GPU they return before its work is done."""
    options, _ = parse("bench step", words)
    one = rounds.Round(seconds=3.0, images=48, steps=[1.0, 1.0, 1.0], waited=0.5, memory=1 << 20)
    taken, rates = {side: [one, one] for side in step.SIDES}, {side: [16.0, 16.0] for side in step.SIDES}
    found = step.Measured(rates, taken, {}, {"teacher": 1e9, "student": 1e9}, warm_up=1.0)
    accelerator: Any = SimpleNamespace(device=torch.device(device), num_processes=1)
    rows = {row["measured"]: row for row in step._rows(found, options, accelerator)}
    assert [rows[step.SIDES[side]]["p99 ms"] for side in "acd"] == [1000, 1000, 1000 if told else None]
    assert ("none of the loader alone" in " ".join(step._notes(found, options, on_gpu=device == "cuda"))) != told


def test_what_all_runs_can_be_parsed(tmp_path):
    for planned in step.plan(tmp_path):
        options, _ = parse("bench step", planned.arguments)
        options.check_warm_up()
        assert options.batch_size % options.mix_group == 0
        assert (options.device == "cuda") == bool(planned.gpus)
