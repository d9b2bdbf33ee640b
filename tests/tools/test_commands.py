"""What the commands print and write when all goes well."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dalikd.kd.backbones import create_model
from dalikd.kd.checkpoints import load_weights
from dalikd.kd.entropy_log import EntropyLog
from dalikd.kd.known_weights import file_sha256
from dalikd.trainers.augmentation import PUBLISHED


def test_train_then_evaluate_gives_the_same_figures(command, training, options, tmp_path):
    run, report = tmp_path / "run", tmp_path / "report.json"
    trained = command("train", *training, "--augmentation", "mixup", "--label_smoothing", 0.1, "--output", run)
    assert (trained.code, trained.err) == (0, "")
    assert trained.out.splitlines()[0].startswith("last epoch (2): top1 ")
    assert trained.out.splitlines()[-1] == f"run folder: {run}"

    results = json.loads((run / "results.json").read_text())
    assert results["command"] == "train"
    assert (results["finished"], results["steps"], results["epochs"], results["seed"]) == (True, 12, 2.0, 0)
    assert (results["augmentation"], results["mode"], results["mix_group"]) == ("mixup", "per_sample", 8)
    assert (results["data"]["train_images"], results["data"]["val_images"]) == (99, 30)
    assert set(results["fingerprint"]) == {"train", "val"}
    assert results["processes"] == 1
    assert set(results["last"]) == {"epoch", "train", "val"}
    assert set(results["last"]["train"]) == {"loss", "top1"}
    assert yaml.safe_load((run / "config.yaml").read_text())["label_smoothing"] == 0.1

    weights = run / "last" / "student.safetensors"
    assert load_file(weights).keys() == create_model("small", 3).state_dict().keys()
    evaluated = command("evaluate", *options, "--weights", weights, "--json", report)
    assert evaluated.code == 0
    found = json.loads(report.read_text())
    for key, value in results["last"]["val"].items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    assert found["fingerprint"] == results["fingerprint"]["val"]
    figures = f"top1 {100 * found['top1']:.2f} %, top5 100.00 %, loss {found['loss']:.4f}"
    assert evaluated.out == f"{figures} on 30 images\nwritten: {report}\n"


def test_probe_takes_the_net_of_a_run_and_prints_both_figures(command, tree, data_options, tmp_path, monkeypatch):
    """The folder's name, and its config, say which net it is: a run of it is probed by that alone, too."""
    monkeypatch.chdir(tmp_path)
    short = [*data_options(tree), "--batch_size", 32, "--mix.group", 8, "--epochs", 1]
    assert command("train", *short, "--model", "resnet8", "--output", "source").code == 0
    ended = command("probe", *short, "--run", "source")
    assert (ended.code, ended.err) == (0, "")
    run = tmp_path / "runs" / "probe-imagefolder-resnet8"
    results = json.loads((run / "results.json").read_text())
    last = results["last"]
    assert set(last) == {"epoch", "train", "val", "knn"}
    top1, knn = f"{100 * last['val']['top1']:.2f} %", f"{100 * last['knn']:.2f} %"
    assert ended.out.splitlines()[-3:] == [
        "run folder: runs/probe-imagefolder-resnet8",
        f"linear probe: top1 {top1}, of a linear classifier on the frozen features of resnet8",
        f"k-NN: top1 {knn}, of a vote of the 20 nearest training images",
    ]
    source = "source/last/student.safetensors"
    assert results["backbone"] == {"weights": source, "sha256": file_sha256(source), "known_as": None}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["run"], config["model"], config["weights"]) == (None, "resnet8", source)
    before, after = load_file(source), load_file(run / "last" / "student.safetensors")
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"fc.weight", "fc.bias"}

    again = command("probe", *short, "--run", run, "--knn", 0, "--output", "again")
    assert again.out.splitlines()[-1].startswith("linear probe: top1 ")
    assert command("probe", "--resume", "again", "--epochs", 2).code == 0


def test_distill_streams_the_metric(command, training, teacher, weights, tmp_path):
    run = tmp_path / "run"
    arguments = ["--augmentation", "cutmixpick_teacher", "--mix.mode", "per_batch", "--loss.ce_mix_share", "0.5"]
    arguments += ["--entropy_log_every", "20"]
    ended = command("distill", *training, *teacher, *arguments, "--epochs", 8, "--output", run)
    assert (ended.code, ended.err) == (0, "")
    last = json.loads((run / "results.json").read_text())["last"]
    assert set(last["train"]) == {"loss", "ce", "kd", "ce_mix", "kd_mix", "top1"}
    assert last["windows"] == 8 * 6 * 16 * 2 // 640
    assert last["t_stddev"] > 0
    assert last["t_entropy"] > 0
    assert f"T. stddev while training: {last['t_stddev']:.6f}" in ended.out
    assert EntropyLog.load(run / "entropies.npz").arrays()["steps"].tolist() == [0, 20, 40]
    assert (run / "entropies.png").stat().st_size > 10_000
    student = create_model("small", 3)
    load_weights(student, run / "last" / "student.safetensors")
    assert not torch.equal(student.fc.weight, torch.load(weights)["fc.weight"])


def test_student_weights_may_be_given(command, options, weights, tmp_path):
    """One tiny step: the net starts from them."""
    step = ["--batch_size", 96, "--mix.group", 8, "--epochs", 1, "--optimizer.lr", 1e-9]
    assert command("train", *options, *step, "--weights", weights, "--output", tmp_path / "run").code == 0
    found = load_file(tmp_path / "run" / "last" / "student.safetensors")
    torch.testing.assert_close(found["conv.weight"], torch.load(weights)["conv.weight"], rtol=0, atol=1e-6)


def test_runs_say_how_images_were_normalised_and_their_weights_keep_it(
    command, options, training, teacher, weights, tmp_path
):
    """By a mean and std of their own; who loads the student's weights later gets the same."""
    run, report = tmp_path / "run", tmp_path / "report.json"
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    given = [word for name, values in own.items() for word in (f"--{name}", values)]
    others = ["--teacher.mean", [0.5, 0.5, 0.4], "--teacher.std", [0.5, 0.5, 0.3], "--teacher.sha256"]
    arguments = [*given, *others, file_sha256(weights)[:8], "--epochs", 1, "--output", run]
    assert command("distill", *training, *teacher, *arguments).code == 0
    results = json.loads((run / "results.json").read_text())
    assert results["normalisation"] == own
    assert results["teacher"]["normalisation"] == {"mean": [0.5, 0.5, 0.4], "std": [0.5, 0.5, 0.3]}
    assert results["teacher"]["sha256"] == file_sha256(weights)
    student = run / "last" / "student.safetensors"
    assert results["sha256"]["last/student.safetensors"] == file_sha256(student)
    assert command("evaluate", *options, "--weights", student, "--json", report).code == 0
    found = json.loads(report.read_text())
    assert found["normalisation"] == own
    assert found["loss"] == pytest.approx(results["last"]["val"]["loss"], rel=1e-6)


def test_a_fixed_student_is_observed(command, options, training, teacher, weights, tmp_path):
    run, report = tmp_path / "run", tmp_path / "report.json"
    fixed = ["--weights", weights, "--freeze_student", "true", "--epochs", 1, "--output", run]
    assert command("distill", *training, *teacher, *fixed).code == 0
    assert command("evaluate", *options, "--weights", weights, "--json", report).code == 0
    results, found = json.loads((run / "results.json").read_text()), json.loads(report.read_text())
    for key, value in results["last"]["val"].items():
        assert found[key] == pytest.approx(value, rel=1e-6), key


def test_the_default_folder_names_the_run(command, training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = command("train", *training)
    assert ended.code == 0
    assert (tmp_path / "runs" / "train-imagefolder-small" / "results.json").exists()
    assert ended.out.endswith("run folder: runs/train-imagefolder-small\n")


def test_measure_prints_a_table_and_writes_it(command, options, teacher, tmp_path):
    path = tmp_path / "new" / "measure.json"
    ended = command(
        "measure",
        *options,
        *teacher,
        "--batch_size",
        32,
        "--mix.group",
        8,
        "--epochs",
        2,
        "--window",
        32,
        "--json",
        path,
    )
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0] == "| augmentation | T. stddev | std. error | entropy | windows |"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:11]]
    assert {row[0] for row in rows} == set(PUBLISHED)
    assert [float(row[1]) for row in rows] == sorted(float(row[1]) for row in rows)
    settings = "198 images (2 epoch(s) of 99 at most), per_sample, mix group 8"
    assert lines[11] == f"T. stddev over windows of 32 teacher outputs, {settings}; lower is better."
    assert "student: small, weights: fresh, from the seed" in lines
    assert any(line.startswith(("0 of 8 neighbours", "1 of 8", "2 of 8")) for line in lines)
    assert lines[-1] == f"written: {path}"
    report = json.loads(path.read_text())
    assert [result["augmentation"] for result in report["results"]] == list(PUBLISHED)
    assert {result["windows"] for result in report["results"]} == {2 * 2 * 99 // 32}
    assert report["config"]["window"] == 32
    assert {"mode", "mix_group", "seed", "teacher", "data", "fingerprint", "versions"} <= set(report)


def test_batch_sizes_measure_the_same(command, options, teacher):
    """In float64, an augmentation of each kind: the table is the same to the last digit."""
    names = ["crop_flip", "cutout", "mixup", "cutmixpick_student", "cutmixpick_teacher"]
    common = ["--mix.group", 32, "--epochs", 1, "--window", 32, "--precision", "fp64", "--augmentation", *names]
    tables = [command("measure", *options, *teacher, "--batch_size", size, *common).out for size in (32, 64)]
    assert tables[0] == tables[1]
    assert [name for name in names if name not in tables[0]] == []


# at the very end of each process: the names of the threads that outlive the interpreter
_LAST_THREADS = """
import atexit, os, pathlib

def write():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    pathlib.Path(os.environ["LAST_THREADS"] + os.environ["RANK"]).write_text("".join(names))

if "RANK" in os.environ:
    atexit.register(write)
"""


@pytest.mark.slow
def test_torchrun_starts_two_processes(training, tmp_path):
    """As a user would; tests of what two processes do fork theirs."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dalikd.tools.distill"]
    torch.save(create_model("resnet14", 3).state_dict(), tmp_path / "teacher.pt")
    nets = ("--model", "resnet8", "--teacher.name", "resnet14", "--teacher.weights", tmp_path / "teacher.pt")
    words += map(str, (*training, *nets, "--epochs", 1, "--loss", "AT", "--output", tmp_path / "run"))
    (tmp_path / "sitecustomize.py").write_text(_LAST_THREADS)
    paths = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "LAST_THREADS": str(tmp_path / "threads")}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gloo" not in "".join((tmp_path / f"threads{rank}").read_text() for rank in range(2))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["finished"], results["processes"]) == (True, 2)
    assert results["last"]["train"]["at"] > 0


@pytest.mark.slow
@pytest.mark.full
def test_two_launchers_of_one_process_do_what_one_of_two_does(training, tmp_path):
    """As on two machines, of which each has its own cache folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def launch(run: str, *words: str) -> subprocess.Popen[str]:
        (tmp_path / run).mkdir(exist_ok=True)
        cache = tmp_path / f"cache{len(launched)}"
        given = [*words, "-m", "dalikd.tools.train", *map(str, training), "--model", "resnet8", "--epochs", "1"]
        command = [sys.executable, "-m", "torch.distributed.run", *given, "--output", str(tmp_path / run / "run")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DALIKD_CACHE": str(cache)}
        launched.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return launched[-1]

    launched = list[subprocess.Popen[str]]()
    meet = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "x"]
    meet += ["--rdzv_endpoint", f"localhost:{port}"]
    launch("two", *meet)
    launch("two", *meet)
    ended = [launcher.communicate()[1] for launcher in launched]
    assert [launcher.returncode for launcher in launched] == [0, 0], ended
    one = launch("one", "--standalone", "--nproc_per_node", "2")
    assert one.wait() == 0, one.communicate()[1]
    found = [json.loads((tmp_path / run / "run/results.json").read_text()) for run in ("one", "two")]
    assert found[0]["processes"] == found[1]["processes"] == 2
    assert found[0]["sha256"] == found[1]["sha256"]


def test_a_run_an_evaluation_and_a_list_are_json_on_stdout(command, training, options, weights, tmp_path):
    ended = command("train", *training, "--epochs", 1, "--output", tmp_path / "run", "--json", "-")
    assert json.loads(ended.out)["last"] == json.loads((tmp_path / "run/results.json").read_text())["last"]
    assert "run folder: " in ended.err
    assert "json" not in yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    ended = command("evaluate", *options, "--weights", weights, "--json", "-")
    assert json.loads(ended.out)["images"] == 30
    assert "on 30 images" in ended.err
    mistaken = command("evaluate", *options, "--weights", tmp_path / "absent", "--json", "-")
    assert (mistaken.code, mistaken.out, mistaken.err.count("\n")) == (2, "", 1)


@pytest.fixture
def bare(tree, data_options):
    """The training images without their labels."""
    return [*data_options(tree), "--data.name", "images", "--data.train_split", "train"]


def test_images_without_labels_are_distilled_and_not_evaluated(command, bare, teacher, tmp_path):
    run = tmp_path / "run"
    arguments = [*bare, *teacher, "--model", "small", "--batch_size", 16, "--mix.group", 8, "--augmentation", "mixup"]
    ended = command("distill", *arguments, "--loss.ce_weight", 0, "--epochs", 1, "--output", run)
    assert (ended.code, ended.err) == (0, "")
    assert "the teacher small is not verified: there are no labelled images" in ended.out
    assert "last epoch (1): not evaluated, no labelled images; training loss" in ended.out
    results = json.loads((run / "results.json").read_text())
    assert (results["last"]["val"], results["best"], results["fingerprint"]["val"]) == (None, {}, None)
    assert set(results["last"]["train"]) == {"loss", "kd", "kd_mix", "agreement"}
    assert results["best_is"] == "none: there are no labelled images to evaluate on"
    assert results["class_names"] == ["0", "1", "2"]
    assert not (run / "best").exists()
    again = command("distill", "--resume", run, "--epochs", 2)
    assert (again.code, json.loads((run / "results.json").read_text())["steps"]) == (0, 12)


def test_images_without_labels_are_evaluated_on_labelled_ones(command, bare, teacher, tmp_path):
    run = tmp_path / "run"
    arguments = [*bare, "--data.val_split", "val", *teacher, "--model", "small", "--batch_size", 48, "--mix.group", 8]
    assert command("distill", *arguments, "--loss.ce_weight", 0, "--epochs", 1, "--output", run).code == 0
    results = json.loads((run / "results.json").read_text())
    assert results["class_names"] == ["class0", "class1", "class2"]
    assert (results["last"]["val"]["images"], results["data"]["val_images"]) == (30, 30)
    assert results["best"] == results["last"]


def test_images_without_labels_are_measured(command, bare, teacher, tmp_path):
    asked = [*teacher, "--epochs", 1, "--window", 32, "--augmentation", "flip", "cutmixpick_teacher", "--mix.group", 8]
    assert command("measure", *bare, *asked, "--json", tmp_path / "bare.json").code == 0
    labelled = [*bare[:6], *bare[6:8], *asked, "--teacher.verify", "false", "--json", tmp_path / "labelled.json"]
    assert command("measure", *labelled).code == 0
    found = [json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("bare", "labelled")]
    assert found[0] == found[1]


def test_learning_from_labels_that_are_not_there_is_refused(command, bare, teacher, tmp_path):
    """In one line, before anything is read or written."""
    common = [*bare, "--model", "small", "--output", tmp_path / "run"]
    refused = {name: command(name, *common).err for name in ("train", "probe")}
    for name, line in refused.items():
        assert line.startswith(f"dalikd {name}: error: --data.name images has no labels to learn from")
    kd, dkd = (command("distill", *common, *teacher, "--loss", loss).err for loss in ("KD", "DKD"))
    why = "learns from labels, and --data.name images has none"
    assert kd == f"dalikd distill: error: --loss KD {why}: give --loss.ce_weight 0\n"
    assert f"--loss DKD {why}: take one that can compare the nets alone" in dkd
    assert not (tmp_path / "run").exists()
