"""A training step measured round by round, its record, and several processes; rounds of a few steps on real files."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalikd.tools.bench import commands, common, record, scaling, step
from dalikd.tools.cli import parse
from dalikd.trainers.launch import start

CONV = 15 * 15 * 8 * 3 * 3 * 3  # multiplications of the small net's convolution, one image of 32 x 32 pixels
LINEAR = 8 * 3


@pytest.fixture
def words(training, teacher) -> list[str]:
    return [str(word) for word in (*training, *teacher, "--steps", 3, "--rounds", 2, "--warmup", 2)]


@pytest.fixture
def make_loop(words):
    def make(*more: object) -> Any:
        options, _ = parse("bench step", [*words, "--teacher.fold_bn", "false", *map(str, more)])
        return common.open_loop(options, start("cpu", "fp32"))[0]

    return make


@pytest.fixture
def slowed(monkeypatch):
    """Time passes only where it is told to: 1 s in the loader, 2 s before the task, 4 s in it, 8 s in the optimizer."""
    clock = [0.0]
    monkeypatch.setattr(step, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def after(function: Any, seconds: float) -> Any:
        def call(*arguments: Any) -> Any:
            clock[0] += seconds
            return function(*arguments)

        return call

    def slow(loop: Any) -> Any:
        monkeypatch.setattr(loop.loader, "next", after(loop.loader.next, 1))
        monkeypatch.setattr(loop.task, "prepare", after(loop.task.prepare, 2))
        monkeypatch.setattr(loop.model, "forward", after(loop.model.forward, 4))
        loop.optimizer.optimizer.register_step_post_hook(lambda *_: clock.__setitem__(0, clock[0] + 8))
        return loop

    return slow


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rounds_and_parts_time_what_they_should(make_loop, slowed, accumulation):
    loop = slowed(make_loop("--accumulation", accumulation))
    found = step.step_round(loop, loop.loader.next, steps=3, warmup=2)
    seconds = 8 + 7 * accumulation
    assert (found.seconds, found.images, found.steps, found.waited) == (
        3 * seconds,
        48,
        [seconds] * 3,
        3 * accumulation,
    )
    assert found.rate == 48 / found.seconds
    assert found.memory > 1 << 20
    assert (loop.progress.step, loop.loader.position) == (5, 5 * accumulation)
    parts = step.parts_round(loop, steps=3, warmup=2)
    assert parts == {"data": accumulation, "teacher": 2 * accumulation, "student": 4 * accumulation, "optimizer": 8}
    assert tuple(parts) == step.PARTS


def test_measuring_leaves_the_loop_as_it_was(make_loop):
    loop = make_loop("--augmentation", "cutmixpick_teacher")
    before = {**vars(loop.task), "_asked": True}, set(vars(loop.loader))  # the teacher, for the first time
    step.step_round(loop, step.keep_batches(loop.loader, 1), 1, 1)
    step.parts_round(loop, 1, 1)
    with pytest.raises(ZeroDivisionError):
        step.step_round(loop, lambda: 1 // 0, 1, 1)
    assert (vars(loop.task), set(vars(loop.loader))) == before
    assert "step" not in vars(loop)


def test_kept_batches_are_the_next_ones_and_operations_are_counted(make_loop, monkeypatch):
    """The teacher sees an original and its two candidates, the student trains on two images.

    Backward through a layer is two products of its size, but nobody asks for the gradient of pixels.
    """
    loop, given = make_loop("--augmentation", "cutmixpick_teacher"), []
    take = loop.loader.next
    monkeypatch.setattr(loop.loader, "next", lambda: given.append(take()) or given[-1])
    kept = step.keep_batches(loop.loader, 2)
    first, second, again = kept(), kept(), kept()
    assert first is again
    for batch, copy in zip(given, (first, second), strict=True):
        assert torch.equal(batch.images, copy.images)
        assert torch.equal(batch.mix[1].lam, copy.mix[1].lam)
        assert batch.images.data_ptr() != copy.images.data_ptr()
    found = step.step_flops(loop, first)
    assert found == {"teacher": 2 * 3 * (CONV + LINEAR), "student": 2 * 2 * (2 * CONV + 3 * LINEAR)}
    assert all(parameter.grad is None for parameter in loop.model.parameters())


def test_a_teacher_without_weights_gets_the_same_fresh_ones_everywhere(training, words, tmp_path):
    options, _ = parse("bench step", [*map(str, training), "--teacher.name", "small"])
    one, other = (torch.load(common.with_weights(options, tmp_path).teacher.weights) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    options, _ = parse("bench step", words)
    assert common.with_weights(options, tmp_path) is options


@pytest.mark.parametrize(
    ("contention", "loader", "expected"),
    [(0.2, 0.5, "the loader"), (0.99, 1.09, "the loader"), (0.94, 1.11, "contention"), (0.96, 1.11, "compute")],
)
def test_the_bound_follows_the_numbers(contention, loader, expected):
    sentence = step.bound(contention, loader)
    assert sentence.startswith(f"Bound by {expected}")
    assert f"{loader:.2f}" in sentence


def test_the_sides_take_turns_and_take_what_they_should(words, make_loop, monkeypatch):
    """A stops the loader, b throws away as many batches as it takes, and every side comes first once in a while."""
    options, _ = parse("bench step", words)
    loop, taken, closed = make_loop(), [], []

    def spied(sides: dict[str, Any], rounds: int) -> dict[str, list[float]]:
        def spy(name: str) -> float:
            before = loop.loader.position
            rate = sides[name]()
            taken.append((name, loop.loader.position - before))
            return rate

        return record.alternate({name: lambda name=name: spy(name) for name in sides}, rounds)

    monkeypatch.setattr(step, "alternate", spied)
    close = loop.loader.close
    monkeypatch.setattr(loop.loader, "close", lambda: closed.append(loop.loader.position) or close())
    flops, found, parts, saves = step.measure(loop, options)
    names = ["a", "b", "c", "d", "parts"]
    assert [name for name, _ in taken] == [*names, *names[1:], *names[:1], *names[2:], *names[:2]]
    assert dict(taken) == {"a": 0, "b": 5, "c": 5, "d": 5, "parts": 5}
    assert all(count == dict(taken)[name] for name, count in taken)
    assert len(closed) == 3
    assert {side: len(them) for side, them in found.items()} == dict.fromkeys("abcd", 2)
    assert not saves
    assert len(parts) == 2
    assert min(flops.values()) > 0


def test_the_command_writes_a_record_and_no_run(words, bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record, out = bench("step", *words)
    assert "Bound by " in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.md", "x.png"]
    assert record.variant == "small-small-32-identity-fp32"
    rows = {row["measured"]: row for row in record.rows}
    for label in (step.SIDES[side] for side in "abcd"):
        assert rows[label]["images/s"]["low"] > 0
        assert 0 < rows[label]["p50 ms"] <= rows[label]["p99 ms"]
    real, alone = rows[step.SIDES["c"]], rows[step.SIDES["a"]]
    ratios = [one / other for one, other in zip(real["images/s"]["values"], alone["images/s"]["values"], strict=True)]
    assert real["of a"]["values"] == ratios
    assert alone["data wait %"]["high"] < real["data wait %"]["high"] < 100
    shares = [rows[f"part of c: {part}"]["part of the step %"]["values"] for part in step.PARTS]
    assert [sum(values) for values in zip(*shares, strict=True)] == pytest.approx([100, 100])
    assert record.config["steps"] == 3
    assert "fresh" not in " ".join(record.notes)


def test_what_keeps_a_run_safe_is_a_side_of_its_own(words, bench):
    """Rounds of 5 steps, with the warm-up: of every fourth step's state, halfway, 6 are saved, the first while warm."""
    record, _ = bench("step", *words, "--checkpoint_every", "4")
    rates = {row["measured"][0]: row["images/s"]["values"] for row in record.rows if "images/s" in row}
    share = sorted(safe / plain for safe, plain in zip(rates["e"], rates["c"], strict=True))
    note = next(note for note in record.notes if note.startswith("e/c, with a checkpoint every 4 steps: "))
    assert f": {sum(share) / 2:.3f} (" in note
    assert re.search(r"for \d+ ms \(median of \d\), \d+ ms at most", note)


def test_a_config_of_distill_is_taken_without_its_run_folder(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "model: resnet8\noutput: runs/mine\nlog_every: 7\nepochs: 3\nsteps: 9\n"
        "train:\n  epochs: 5\n"
        "distill:\n  epochs: 4\n  mix: {group: 32}\n  output: runs/other\n  overwrite: true\n"
        "bench step:\n  rounds: 8\n"
    )
    options, plain = parse("bench step", ["--config", str(config), "--warmup", "0"])
    assert (options.model, options.epochs, options.mix.group, options.steps) == ("resnet8", 4, 32, 9)
    assert (options.rounds, options.output) == (8, None)
    assert options.counts == (9, 2)  # what lies ready must not count
    assert "overwrite" not in plain
    assert parse("bench scaling", ["--config", str(config)])[0].rounds == 5


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("step", ["--steps", 0], "--steps 0: give at least 1"),
        ("step", ["--rounds", 1], "--rounds 1: give at least 2"),
        ("step", ["--resume", "runs/x"], "--resume"),
        ("step", ["--output", f"{__file__}/x"], "--output"),
        ("step", ["--teacher.name", "vgg99"], "vgg99"),
        ("scaling", ["--processes", 2, 4], "--processes 2 4: give 1, which the others are compared with, and more"),
        ("scaling", ["--processes", 1, 0], "give 1"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(words, name, wrong, message, monkeypatch, refused):
    monkeypatch.setattr(scaling, "launch", lambda *_: pytest.fail("launched"))
    assert message in refused(name, *words, *wrong)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_loaders_calls_are_timed_where_they_wait(on_gpu):
    """On a GPU they return before its work is done."""
    one = step.Round(seconds=3.0, images=48, steps=[1.0, 1.0, 1.0], waited=0.5, memory=1 << 20)
    rounds = {side: [one, one._replace(seconds=6.0)] for side in step.SIDES}
    rows = step.rows(rounds, [dict.fromkeys(step.PARTS, 0.25)] * 2, 5e9, on_gpu=on_gpu)
    assert [row["p99 ms"] for row in rows[:4]] == [1000, 1000, 1000, None if on_gpu else 1000]
    assert rows[0]["TFLOP/s"]["values"] == [16 * 5e9 / 1e12, 8 * 5e9 / 1e12]
    assert rows[0]["memory MiB"] == 1


def test_processes_take_turns(words, bench, monkeypatch):
    """One process gives 100 images/s, two 110, 121, 132 … after a warm-up."""
    monkeypatch.setattr(scaling, "cores", lambda: 2)
    launched: list[int] = []

    def launch(processes: int, _options: Any, _config: Any, _folder: Any, found: list[dict[str, Any]]) -> float:
        launched.append(processes)
        times = {"with_exchange": 0.4, "without_exchange": 0.4 if processes == 1 else 0.3}
        found.append({"torch_threads": 2 // processes, "wait_share": 0.02, **times})
        return 100.0 if processes == 1 else 99.0 + 11 * len(found)

    monkeypatch.setattr(scaling, "launch", launch)
    record, out = bench("scaling", *words)
    assert launched == [1, 2, 2, 1, 1, 2]
    alone, two = record.rows
    assert two["images/s"]["values"] == [121, 132]
    assert two["efficiency"]["values"] == pytest.approx([121 / 200, 132 / 200])
    assert two["gradient exchange %"]["values"] == pytest.approx([25, 25])
    assert two["data wait %"]["values"] == [2, 2]
    assert (two["processes"], two["cores each"], two["torch threads"], two["DALI threads"]) == (2, 1, 1, 1)
    assert (alone["cores each"], alone["gradient exchange %"], alone["efficiency"]["values"]) == (2, None, [1, 1])
    assert "2 processes reach 0.63 of 2 times one process; each has 1 cores where one alone has 2" in record.notes[0]
    assert record.notes[0] in out


def test_each_launch_has_its_share_of_the_cores_and_finds_what_its_worker_wrote(words, tmp_path, monkeypatch):
    """Here one process without a launcher, in place of two."""
    monkeypatch.setattr(scaling, "cores", lambda: 2)
    options, config = parse("bench scaling", words)
    options.data.threads, found, seen, code = None, [], {}, 0

    def started(command: list[str], _: float, env: dict[str, str], stderr: Any, **__: Any) -> int:
        seen.update(zip(command[-6::2], command[-5::2], strict=True), threads=env["OMP_NUM_THREADS"])
        monkeypatch.setenv(scaling._FILE, env[scaling._FILE])
        if not code:
            commands.main([*command[command.index("scaling-worker") :], "--batch_size", "16"])
        stderr.write(b"x: dalikd bench scaling: error: no such thing\nmore")
        return code

    monkeypatch.setattr(scaling, "run_process", started)
    assert scaling.launch(2, options, config, tmp_path, found) == found[0]["images_per_second"] > 0
    assert (seen["--batch_size"], seen["--data.threads"], seen["threads"]) == ("32", "1", "1")
    assert 0 < found[0]["wait_share"] < 1
    assert min(found[0]["with_exchange"], found[0]["without_exchange"]) > 0
    code = 2
    with pytest.raises(ValueError, match=r"^2 processes failed: no such thing$"):
        scaling.launch(2, options, config, tmp_path, found)
