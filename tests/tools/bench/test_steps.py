"""A training step measured round by round, its record, and several processes; rounds of a few steps on real files."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalikd.kd.backbones import create_model
from dalikd.kd.checkpoints import load_weights
from dalikd.tools.bench import common, record, rounds, scaling, step
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
def loop(make_loop) -> Any:
    return make_loop("--augmentation", "cutmixpick_teacher")


@pytest.fixture
def slowed(monkeypatch):
    """Time passes only where it is told to: 1 s in the loader, 2 s before the task, 4 s in it, 8 s in the optimizer."""
    clock = [0.0]
    monkeypatch.setattr(rounds, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def after(function: Any, seconds: float) -> Any:
        def call(*arguments: Any) -> Any:
            clock[0] += seconds
            return function(*arguments)

        return call

    def slow(loop: Any) -> None:
        monkeypatch.setattr(loop.loader, "next", after(loop.loader.next, 1))
        monkeypatch.setattr(loop.task, "prepare", after(loop.task.prepare, 2))
        monkeypatch.setattr(loop.model, "forward", after(loop.model.forward, 4))
        loop.optimizer.optimizer.register_step_post_hook(lambda *_: clock.__setitem__(0, clock[0] + 8))

    return slow


# --------------------------------------------------------------------------------------------------- rounds


def test_a_round_times_the_steps_and_what_they_wait(loop, slowed):
    slowed(loop)
    found = rounds.step_round(loop, loop.loader.next, steps=3, warmup=2)
    assert (found.seconds, found.images, found.steps, found.waited) == (45, 48, [15, 15, 15], 3)
    assert (found.rate, found.wait_share) == (48 / 45, 3 / 45)
    assert found.memory > 1 << 20
    assert loop.progress.step == loop.loader.position == 5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_parts_of_a_step(make_loop, slowed, accumulation):
    loop = make_loop("--accumulation", accumulation)
    slowed(loop)
    found = rounds.parts_round(loop, steps=3, warmup=2)
    assert found == {"data": accumulation, "teacher": 2 * accumulation, "student": 4 * accumulation, "optimizer": 8}
    assert tuple(found) == rounds.PARTS
    assert loop.progress.step == 5


def test_the_loader_alone_takes_the_batches_of_the_steps(make_loop, slowed):
    loop = make_loop("--accumulation", 2)
    slowed(loop)
    found = rounds.loader_round(loop, steps=3, warmup=2)
    assert (found.seconds, found.images, found.steps) == (6, 48, [2, 2, 2])
    assert (loop.loader.position, loop.progress.step) == (10, 0)


def test_measuring_leaves_the_loop_as_it_was(loop):
    loader, before = loop.loader, {**vars(loop.task), "_asked": True}  # the teacher, for the first time
    rounds.step_round(loop, rounds.replayed(rounds.keep_batches(loader, 1)), 1, 1)
    rounds.parts_round(loop, 1, 1)
    with pytest.raises(ZeroDivisionError):
        rounds.step_round(loop, lambda: 1 // 0, 1, 1)
    assert loop.loader is loader
    assert vars(loop.task) == before
    assert not loop.optimizer.optimizer._optimizer_step_pre_hooks


def test_kept_batches_are_the_next_ones_in_memory_of_their_own(loop, monkeypatch):
    given = []
    take = loop.loader.next
    monkeypatch.setattr(loop.loader, "next", lambda: given.append(take()) or given[-1])
    kept = rounds.keep_batches(loop.loader, 2)
    for batch, copy in zip(given, kept, strict=True):
        assert torch.equal(batch.images, copy.images)
        assert torch.equal(batch.mix[1].lam, copy.mix[1].lam)
        assert batch.images.data_ptr() != copy.images.data_ptr()
        assert batch.total == copy.total
    take_kept = rounds.replayed(kept)
    assert [take_kept() is batch for batch in (*kept, kept[0])] == [True] * 3


def test_operations_of_an_image(loop):
    """The teacher sees an original and its two candidates, the student trains on two images.

    Backward through a layer is two products of its size, but nobody asks for the gradient of pixels.
    """
    found = rounds.step_flops(loop, rounds.keep_batches(loop.loader, 1)[0])
    assert found == {"teacher": 2 * 3 * (CONV + LINEAR), "student": 2 * 2 * (2 * CONV + 3 * LINEAR)}
    assert all(parameter.grad is None for parameter in loop.model.parameters())


def test_a_teacher_without_weights_gets_the_same_fresh_ones_everywhere(training, teacher, tmp_path):
    options, _ = parse("bench step", [*map(str, training), "--teacher.name", "small"])
    nets = [create_model("small", 3) for _ in range(2)]
    for net in nets:
        load_weights(net, common.with_weights(options, tmp_path).teacher.weights)
    assert torch.equal(nets[0].conv.weight, nets[1].conv.weight)
    options, _ = parse("bench step", [str(word) for word in (*training, *teacher)])
    assert common.with_weights(options, tmp_path) is options


# ------------------------------------------------------------------------------------------------ bench step


@pytest.mark.parametrize(
    ("contention", "loader", "expected"),
    [(0.2, 0.5, "the loader"), (0.99, 1.09, "the loader"), (0.94, 1.11, "contention"), (0.96, 1.11, "compute")],
)
def test_the_bound_follows_the_numbers(contention, loader, expected):
    sentence = step.bound(contention, loader)
    assert sentence.startswith(f"Bound by {expected}")
    assert f"{loader:.2f}" in sentence


def test_the_sides_take_turns_and_take_what_they_should(words, monkeypatch):
    """A stops the loader, b throws away as many batches as it takes, and every side comes first once in a while."""
    options, _ = parse("bench step", words)
    loop, _ = common.open_loop(options, start("cpu", "fp32"))
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
        assert len(found.rounds[side]) == 2
        assert found.rates[side] == [one.rate for one in found.rounds[side]]
    assert len(found.parts) == 2
    assert min(found.flops.values()) > 0
    assert found.warm_up > 0


@pytest.mark.usefixtures("few_rounds")
def test_the_command_writes_a_record_and_no_run(words, bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record, out = bench("step", *words)
    assert "Bound by " in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.md", "x.png"]
    assert record.stem.endswith("-step-small-small-32-identity-fp32-cpu")
    rows = {row["measured"]: row for row in record.rows}
    for label in step.SIDES.values():
        assert rows[label]["images/s"]["low"] > 0
        assert 0 < rows[label]["p50 ms"] <= rows[label]["p99 ms"]
    real, alone = rows[step.SIDES["c"]], rows[step.SIDES["a"]]
    ratios = [one / other for one, other in zip(real["images/s"]["values"], alone["images/s"]["values"], strict=True)]
    assert real["of a"]["values"] == ratios
    assert alone["data wait %"]["high"] < real["data wait %"]["high"] < 100
    shares = [rows[f"part of c: {part}"]["part of the step %"]["values"] for part in step.PARTS]
    assert [sum(values) for values in zip(*shares, strict=True)] == pytest.approx([100, 100])
    assert record.config["steps"] == 3
    assert record.page_cache.endswith("of a sample of 99 files lay in memory at the start.")
    assert "fresh" not in " ".join(record.notes)


def test_a_config_of_distill_is_taken_without_its_run_folder(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "model: resnet8\noutput: runs/mine\nlog_every: 7\nepochs: 3\nsteps: 9\n"
        "train:\n  epochs: 5\n"
        "distill:\n  epochs: 4\n  mix: {group: 32}\n  output: runs/other\n  overwrite: true\n"
        "bench step:\n  rounds: 8\n"
    )
    options, plain = parse("bench step", ["--config", str(config)])
    assert (options.model, options.epochs, options.mix.group, options.steps) == ("resnet8", 4, 32, 9)
    assert (options.rounds, options.output) == (8, None)
    assert "overwrite" not in plain
    assert parse("bench scaling", ["--config", str(config)])[0].rounds == 5


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("step", ["--steps", 0], "--steps 0: give at least 1"),
        ("step", ["--rounds", 3], "--rounds 3: give at least 5"),
        ("step", ["--warmup", 1], "--warmup 1 counts batches that were made ahead"),
        ("step", ["--resume", "runs/x"], "--resume"),
        ("step", ["--output", f"{__file__}/x"], "--output"),
        ("step", ["--teacher.name", "vgg99"], "vgg99"),
        ("scaling", ["--processes", 1, 8], "--processes 8 with --batch_size 16 for each: --batch_size 128 is larger"),
        ("scaling", ["--batch_size", 24, "--accumulation", 2], "--processes 1 with --batch_size 24 for each"),
        ("scaling", ["--processes", 2, 4], "--processes 2 4: give 1, which the others are compared with, and more"),
        ("scaling", ["--processes", 1], "give 1"),
        ("scaling", ["--processes", 1, 0], "give 1"),
        ("scaling", ["--rounds", 1], "--rounds 1"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(words, name, wrong, message, monkeypatch, refused):
    monkeypatch.setattr(scaling.Launches, "__call__", lambda _: pytest.fail("launched"))
    assert message in refused(name, *words, "--rounds", 5, *wrong)


@pytest.mark.parametrize(("on_gpu", "timed"), [(False, True), (True, False)])
def test_the_loaders_calls_are_timed_where_they_wait(words, on_gpu, timed):
    """On a GPU they return before its work is done. Rates that should be alike and are not are told."""
    options, _ = parse("bench step", words)
    one = rounds.Round(seconds=3.0, images=48, steps=[1.0, 1.0, 1.0], waited=0.5, memory=1 << 20)
    rates = {side: [100.0, 210.0] for side in step.SIDES}
    parts = [dict.fromkeys(step.PARTS, 0.25)] * 2
    found = step.Measured(rates, {side: [one, one] for side in rates}, parts, {"teacher": 2e9, "student": 3e9}, 1.0)
    rows = step.rows(found, 3, 1, on_gpu=on_gpu)
    assert [row["p99 ms"] for row in rows[:4]] == [1000, 1000, 1000, 1000 if timed else None]
    assert rows[0]["TFLOP/s"]["values"] == [100 * 5e9 / 1e12, 210 * 5e9 / 1e12]
    notes = " ".join(step.notes(found, options))
    assert "varied by a factor of 2.1, so" in notes
    assert "2.00 GFLOP of the teacher and 3.00 of the student" in notes


# --------------------------------------------------------------------------------------------- bench scaling


def _bound(efficiency: float, exchange: float, wait: float, gpu: bool = True) -> str:
    figures = {"efficiency": efficiency, "gradient exchange %": 100 * exchange, "data wait %": 100 * wait}
    most = {name: {"median": value} for name, value in figures.items()} | {"processes": 2, "cores each": 1}
    return scaling.bound({"cores each": 2}, most, gpu=gpu)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (_bound(0.97, 0.2, 0.3), "Nothing bounds it: 2 processes reach 0.97 of 2 times one process."),
        (_bound(0.97, 0.2, 0.3, gpu=False), "2 processes reach 0.97 of 2 times one process, on the same cores"),
        (_bound(0.51, 0.04, 0.0, gpu=False), "Bound by the cores: 2 processes reach 0.51"),
        (_bound(0.6, 0.1, 0.3), "Bound by the loader"),
        (_bound(0.6, 0.3, 0.1), "Bound by the exchange of gradients"),
        (_bound(0.6, 0.01, 0.02), "Bound by what the processes share"),
    ],
)
def test_what_bounds_processes_follows_the_numbers(sentence, expected):
    assert sentence.startswith(expected)


def test_processes_have_a_gpu_each_and_no_launcher(words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options, _ = parse("bench scaling", [*words, "--processes", "1", "4"])
    with pytest.raises(ValueError, match="--processes 4: this machine has 2 GPU"):
        scaling.check_processes(options, 99, torch.device("cuda"), 1)
    with pytest.raises(ValueError, match="call it without torchrun"):
        scaling.check_processes(options, 99, torch.device("cpu"), 2)
    scaling.check_processes(options, 99, torch.device("cpu"), 1)  # more than cores


@pytest.mark.usefixtures("few_rounds")
def test_processes_take_turns(words, bench, monkeypatch):
    """One process gives 100 images/s, two 110, 121, 132 … after a warm-up."""
    monkeypatch.setattr(scaling, "cores", lambda: 2)
    launched: list[int] = []

    def launch(self: scaling.Launches) -> float:
        launched.append(self.processes)
        rate = 100.0 if self.processes == 1 else 110.0 + 11 * len(self.found)
        times = {"with_exchange": 0.4, "without_exchange": 0.4 if self.processes == 1 else 0.3}
        self.found.append({"torch_threads": self.cores, "wait_share": 0.02, **times})
        return rate

    monkeypatch.setattr(scaling.Launches, "__call__", launch)
    record, out = bench("scaling", *words)
    assert launched == [1, 2, 2, 1, 1, 2]
    alone, two = record.rows
    assert two["images/s"]["values"] == [121, 132]
    assert two["efficiency"]["values"] == pytest.approx([121 / 200, 132 / 200])
    assert two["gradient exchange %"]["values"] == pytest.approx([25, 25])
    assert two["data wait %"]["values"] == [2, 2]
    assert (two["processes"], two["cores each"], two["torch threads"], two["DALI threads"]) == (2, 1, 1, 1)
    assert (alone["cores each"], alone["gradient exchange %"], alone["efficiency"]["values"]) == (2, None, [1, 1])
    assert "Bound by the cores: 2 processes reach 0.63 of 2 times one process" in record.notes[0]
    assert record.notes[0] in out


def test_each_launch_gets_its_share_of_the_cores(words, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "cores", lambda: 2)
    options, config = parse("bench scaling", words)
    options.data.threads = None
    seen: dict[str, Any] = {}

    def started(command: list[str], env: dict[str, str], **_: Any) -> Any:
        seen.update(command=command, threads=env["OMP_NUM_THREADS"])
        return scaling.subprocess.CompletedProcess(command, 2, "", "dalikd bench scaling: error: no such thing\nmore")

    monkeypatch.setattr(scaling.subprocess, "run", started)
    with pytest.raises(ValueError, match=r"^2 processes failed: no such thing$"):
        scaling.Launches(2, options, config, "cpu", tmp_path)()
    assert seen["threads"] == "1"
    own = dict(zip(seen["command"][-8::2], seen["command"][-7::2], strict=True))
    assert (own["--batch_size"], own["--data.threads"]) == ("32", "1")
    assert parse("bench scaling", ["--config", own["--config"]])[0].teacher == options.teacher


@pytest.mark.slow
def test_two_processes_share_a_step(tree, tmp_path):
    data = ("--data.root", tree, "--data.image_size", 32, "--device", "cpu", "--batch_size", 16, "--mix.group", 8)
    nets = ("--model", "resnet8", "--teacher.name", "resnet8", "--augmentation", "mixup", "--steps", 2, "--warmup", 2)
    options, config = parse("bench scaling", [str(word) for word in (*data, *nets)])
    launches = scaling.Launches(2, options, config, "cpu", tmp_path)
    rate = launches()
    (found,) = launches.found
    assert (found["processes"], found["torch_threads"]) == (2, launches.cores)
    assert rate == found["images_per_second"] > 0
    assert 0 < found["wait_share"] < 1
    assert min(found["with_exchange"], found["without_exchange"]) > 0
