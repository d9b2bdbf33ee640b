import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dalikd.kd.backbones import create_model
from dalikd.tools.bench import options as bench_options
from dalikd.tools.bench import scaling
from dalikd.tools.cli import parse


@pytest.fixture
def words(training, teacher) -> list[str]:
    own = ("--processes", "[1, 2]", "--steps", 2, "--warmup", 2, "--rounds", 5)
    return [str(word) for word in (*training, *teacher, *own)]


@pytest.fixture
def two_cores(monkeypatch) -> None:
    monkeypatch.setattr(scaling, "cores", lambda: 2)


def _bound(efficiency: float, exchange: float, wait: float, gpu: bool = True) -> str:
    return scaling.bound(2, efficiency, exchange=exchange, wait=wait, cores_each=1, cores_alone=2, gpu=gpu)


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
def test_the_bound_follows_the_numbers(sentence, expected):
    assert sentence.startswith(expected)


def test_the_cores_are_said_to_be_shared():
    assert "each has 1 where one alone has 2; 0.50 is what sharing them leaves" in _bound(0.5, 0.0, 0.0, gpu=False)


@pytest.mark.parametrize(
    ("processes", "gpus", "message"),
    [
        ([2, 4], None, "--processes 2 4: give 1, which the others are compared with, and more"),
        ([1], None, "give 1"),
        ([1, 0], None, "give 1"),
        ([1, 4], 2, "--processes 4: this machine has 2 GPU"),
    ],
)
def test_numbers_of_processes_that_cannot_be(processes, gpus, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    device = torch.device("cpu" if gpus is None else "cuda")
    with pytest.raises(ValueError, match=message):
        scaling._check_processes(processes, device, 1)


def test_more_processes_than_cores_are_no_mistake_on_a_cpu():
    scaling._check_processes([1, 64], torch.device("cpu"), 1)


def test_under_a_launcher_it_refuses():
    with pytest.raises(ValueError, match="call it without torchrun"):
        scaling._check_processes([1, 2], torch.device("cpu"), 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--processes", "1", "8"], "--processes 8 with --batch_size 16 for each: --batch_size 128 is larger than the"),
        (["--batch_size", "24", "--accumulation", "2"], "--processes 1 with --batch_size 24 for each"),
        (["--rounds", "1"], "--rounds 1"),
    ],
)
def test_a_mistake_ends_in_one_line_before_any_launch(words, wrong, message, monkeypatch, capsys):
    monkeypatch.setattr(scaling.Launches, "__call__", lambda _: pytest.fail("launched"))
    with pytest.raises(SystemExit) as stop:
        scaling.main([*words, *wrong])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("two_cores")
def test_the_record(words, tmp_path, monkeypatch, capsys):
    """Launches that take turns: one process gives 100 images/s, two 110, 121, 132 … after a warm-up."""
    monkeypatch.setattr(bench_options, "LEAST_ROUNDS", 2)
    launched: list[int] = []

    def launch(self: scaling.Launches) -> float:
        launched.append(self.processes)
        rate = 100.0 if self.processes == 1 else 110.0 + 11 * len(self.found)
        times = {"with_exchange": 0.4, "without_exchange": 0.4 if self.processes == 1 else 0.3}
        self.found.append({"torch_threads": self.cores, "wait_share": 0.02, **times})
        return rate

    monkeypatch.setattr(scaling.Launches, "__call__", launch)
    scaling.main([*words, "--rounds", "2", "--output", str(tmp_path / "x.json")])
    assert launched == [1, 2, 2, 1, 1, 2]
    content = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    alone, two = content["rows"]
    assert two["images/s"]["values"] == [121, 132]
    assert two["efficiency"]["values"] == pytest.approx([121 / 200, 132 / 200])
    assert two["gradient exchange %"]["values"] == pytest.approx([25, 25])
    assert two["data wait %"]["values"] == [2, 2]
    assert (two["processes"], two["cores each"], two["torch threads"], two["DALI threads"]) == (2, 1, 1, 1)
    assert (alone["cores each"], alone["gradient exchange %"]) == (2, None)
    assert alone["efficiency"]["values"] == [1, 1]
    assert "Bound by the cores: 2 processes reach 0.63 of 2 times one process" in content["notes"][0]
    assert content["notes"][0] in capsys.readouterr().out
    assert "Not to be relied on" not in " ".join(content["notes"])


@pytest.mark.usefixtures("two_cores")
def test_each_launch_gets_its_share_of_the_cores(words, tmp_path, monkeypatch):
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
    assert own["--batch_size"] == "32"
    assert own["--data.threads"] == "1"
    assert parse("bench scaling", ["--config", own["--config"]])[0].teacher == options.teacher


def test_what_all_runs_can_be_parsed(tmp_path):
    for planned in scaling.plan(tmp_path):
        options, _ = parse("bench scaling", planned.arguments)
        options.check_warm_up()
        assert max(options.processes) <= max(planned.gpus, 2)


@pytest.mark.slow
def test_two_processes_share_a_step(tree, tmp_path):
    weights = tmp_path / "teacher.pt"
    torch.save(create_model("resnet8", 3).state_dict(), weights)
    data = ("--data.root", tree, "--data.image_size", 32, "--device", "cpu", "--batch_size", 16, "--mix.group", 8)
    nets = ("--model", "resnet8", "--teacher.name", "resnet8", "--teacher.weights", weights)
    words = [*data, *nets, "--augmentation", "mixup", "--steps", 2, "--warmup", 2]
    options, config = parse("bench scaling", [str(word) for word in words])
    launches = scaling.Launches(2, options, config, "cpu", Path(tmp_path))
    rate = launches()
    (found,) = launches.found
    assert found["processes"] == 2
    assert found["torch_threads"] == launches.cores
    assert rate == found["images_per_second"] > 0
    assert 0 < found["wait_share"] < 1
    assert min(found["with_exchange"], found["without_exchange"]) > 0
