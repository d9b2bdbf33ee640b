"""A number that is none, and a teacher of other classes, stop a run before they harm what is there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dalikd.kd.backbones import create_model
from dalikd.trainers.checkpoint import read_state

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Four classes that a small net tells apart soon: 64 training and 256 validation images of 32 pixels."""
    root, random = tmp_path_factory.mktemp("tinted"), np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 256)):
        for number in range(count):
            image = random.integers(0, 100, (32, 32, 3), dtype=np.uint8)
            image[..., number % 4 % 3] += np.uint8(60 * (1 + number % 4 // 3))
            path = root / split / f"class{number % 4}" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


def _words(tree: Path, *own: object) -> list[object]:
    data = ["--data.root", tree, "--data.image_size", 32, "--data.threads", 1, "--device", "cpu", "--model", "resnet8"]
    return [*data, "--batch_size", 16, "--mix.group", 8, "--schedule.name", "constant", *own]


def _assert_finite(folder: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(path).values()), path
    for path in folder.glob("*/trainer*.pt"):
        weights = [value for value in read_state(path)["task"].values() if isinstance(value, torch.Tensor)]
        assert all(torch.isfinite(value).all() for value in weights), path


def test_a_run_that_diverges_is_gone_on_with_at_a_lower_rate(tree, tmp_path, start_forked, full):
    """It ends as the run that never had the high rate, bit for bit; and the step at which it broke runs elsewhere, with
    neither images nor run there."""
    run, calm = tmp_path / "run", tmp_path / "calm"
    first = start_forked(tmp_path / "1", "train", *_words(tree, "--epochs", 1, "--output", run))
    assert first.wait() == 0, first.err
    shutil.copytree(run, calm)
    more = ["--epochs", 2, "--checkpoint_every", 1]
    wild = start_forked(tmp_path / "2", "train", "--resume", run, *more, "--optimizer.lr", "1e30")
    other = start_forked(tmp_path / "3", "train", "--resume", calm, *more, "--optimizer.lr", 0.01)
    assert (wild.wait(), other.wait()) == (2, 0), (wild.err, other.err)
    assert wild.err.count("training has diverged; lower --optimizer.lr") == 1
    assert f"go on from step 4 with --resume {run}; " in wild.err
    _assert_finite(run)
    (step,) = run.glob("nan-step*.pt")
    assert f"dalikd replay {step}" in wild.err
    mended = start_forked(tmp_path / "4", "train", "--resume", run, *more, "--optimizer.lr", 0.01)
    assert mended.wait() == 0, mended.err
    ours, theirs = (load_file(folder / "last" / "student.safetensors") for folder in (run, calm))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    kept = tmp_path / "elsewhere.pt"
    step.replace(kept)
    shutil.rmtree(run)
    moved = tree.rename(tree.with_name("moved"))
    try:
        for number, precision in enumerate(["fp32", "fp64"] if full else ["fp32"]):
            again = start_forked(
                tmp_path / f"replay{number}", "replay", kept, "--device", "cpu", "--precision", precision
            )
            assert again.wait() in (0, 1), again.err
            if precision == "fp32":
                assert again.wait() == 1, again.out
                assert "it is not finite again" in again.out
                assert "first not finite: student.model." in again.out or "the step    student.model." in again.out
    finally:
        moved.rename(tree)


@pytest.mark.parametrize("rate", ["1e4", "1e8", "1e12", "1e20", "1e30", "1e38"])
@pytest.mark.parametrize("every", [1, 2, 0])
def test_no_rate_leaves_a_state_that_is_not_finite(rate, every, tree, tmp_path, start_forked, full):
    if not full:
        pytest.skip("with --full")
    words = _words(
        tree, "--epochs", 3, "--output", tmp_path / "run", "--optimizer.lr", rate, "--checkpoint_every", every
    )
    run = start_forked(tmp_path / "1", "train", *words)
    code = run.wait()
    assert code == 0 or (code == 2 and "training has diverged" in run.err), run.err
    _assert_finite(tmp_path / "run")
    for step in (tmp_path / "run").glob("nan-step*.pt"):
        again = start_forked(tmp_path / "2", "replay", step)
        assert again.wait() == 1, (again.out, again.err)


def test_a_distilled_step_needs_no_teacher_elsewhere(tree, tmp_path, start_forked, full):
    """Its weights are in the file. The teacher is right by chance: that stops a run, unless it is told to go on."""
    torch.manual_seed(0)
    weights = tmp_path / "teacher.pt"
    torch.save(create_model("resnet8", 4).state_dict(), weights)
    teacher = ["--teacher.name", "resnet8", "--teacher.weights", weights, "--augmentation", "cutmixpick_teacher"]
    words = _words(tree, *teacher, "--epochs", 3, "--output", tmp_path / "run", "--optimizer.lr", "1e30")
    refused = start_forked(tmp_path / "1", "distill", *words)
    assert refused.wait() == 2
    assert "of 256 validation images, no more than by chance (1 in 4): its weights may be of" in refused.err
    assert not (tmp_path / "run").exists()
    run = start_forked(tmp_path / "2", "distill", *words, "--teacher.verify", "false")
    assert run.wait() == 2
    assert "training has diverged" in run.err, run.err
    weights.unlink()
    (step,) = (tmp_path / "run").glob("nan-step*.pt")
    again = start_forked(tmp_path / "3", "replay", step, "--device", "cpu")
    assert again.wait() == 1, (again.out, again.err)
    assert {"ce", "kd", "kd_mix", "loss"} <= {line.split()[0] for line in again.out.splitlines()}
    if not full:
        return
    ok = start_forked(tmp_path / "4", "train", *_words(tree, "--epochs", 12, "--output", tmp_path / "teacher"))
    assert ok.wait() == 0
    words[words.index(weights)] = tmp_path / "teacher" / "last" / "student.safetensors"
    words[-1] = 0.05
    good = start_forked(tmp_path / "5", "distill", *words, "--output", tmp_path / "good")
    assert good.wait() == 0, good.err


def test_two_processes_stop_together_and_one_of_them_writes_the_step(tree, tmp_path, start_joined, start_forked, full):
    if not full:
        pytest.skip("with --full")
    words = _words(tree, "--epochs", 3, "--output", tmp_path / "run", "--optimizer.lr", "1e30")
    ranks = start_joined(2, tmp_path / "ranks", "train", *words)
    assert [rank.wait() for rank in ranks] == [2, 2]
    _assert_finite(tmp_path / "run")
    (step,) = (tmp_path / "run").glob("nan-step*.pt")
    again = start_forked(tmp_path / "1", "replay", step)
    assert again.wait() == 1, (again.out, again.err)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("command", ["distill", "train", "evaluate", "measure", "cache"])
def test_weights_that_are_not_finite_are_named(command, value, tree, tmp_path, start_forked, full):
    if not full and (command, value) != ("distill", "inf"):
        pytest.skip("with --full")
    state = create_model("resnet8", 4).state_dict()
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = float(value)
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    asked = ["--teacher.name", "resnet8", "--teacher.weights", path]
    own = {"train": ["--weights", path], "evaluate": ["--weights", path]}.get(command, asked)
    words = _words(tree, *own)
    if command in ("measure", "cache"):
        del words[words.index("--model") : words.index("--model") + 2]
    if command != "train" and command != "distill":
        del words[words.index("--schedule.name") : words.index("--schedule.name") + 2]
    if command == "evaluate":
        del words[words.index("--mix.group") : words.index("--mix.group") + 2]
    else:
        words += ["--output", tmp_path / "out"] if command != "measure" else ["--augmentation", "flip"]
    ended = start_forked(tmp_path / "1", command, *words)
    assert ended.wait() == 2
    assert "layer2.0.conv1.weight holds " + {"nan": "NaN", "inf": "infinity"}[value] in ended.err
    assert not (tmp_path / "out").exists()


def test_a_cache_whose_bytes_have_changed_is_not_learned_from(tree, tmp_path, start_forked, full):
    torch.manual_seed(0)
    weights = tmp_path / "teacher.pt"
    torch.save(create_model("resnet8", 4).state_dict(), weights)
    asked = ["--teacher.name", "resnet8", "--teacher.weights", weights, "--teacher.verify", "false"]
    words = [word for word in _words(tree) if word not in ("--model", "resnet8", "--schedule.name", "constant")]
    cache = start_forked(tmp_path / "1", "cache", *words, *asked, "--epochs", 2, "--output", tmp_path / "cache")
    assert cache.wait() == 0, cache.err
    path = tmp_path / "cache" / "epoch-0001" / "logits.npy"
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(0)
    for _ in range(5 if full else 1):
        changed = bytearray(content)
        changed[random.integers(128, len(content))] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        words = _words(tree, "--teacher.cache", tmp_path / "cache", "--epochs", 2, "--overwrite", "true")
        ended = start_forked(tmp_path / "2", "distill", *words, "--output", tmp_path / "run")
        assert ended.wait() == 2
        assert f"{path} is not what dalikd cache has written" in ended.err
        assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 4  # of the first epoch
    if full:
        verified = start_forked(tmp_path / "3", "cache", "--verify", tmp_path / "cache", "--share", 0.01)
        assert verified.wait() == 2
        assert f"{path} is not what dalikd cache has written" in verified.err


def test_weights_of_numbered_classes_in_the_order_of_text_are_put_in_that_of_numbers(tmp_path, start_forked):
    """As an earlier version wrote them: class 10 came after class 1."""
    names, random = [str(number) for number in range(12)], np.random.default_rng(0)
    for name in names:
        for number in range(2):
            path = tmp_path / "tree" / "val" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    net, found = create_model("resnet8", 12), []
    for number, classes in enumerate((names, sorted(names))):
        rows = [names.index(name) for name in classes]
        state = {key: value[rows] if key.startswith("fc.") else value for key, value in net.state_dict().items()}
        metadata = {"dalikd": json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3, "class_names": classes})}
        save_file(
            {key: value.contiguous() for key, value in state.items()}, tmp_path / f"{number}.safetensors", metadata
        )
        data = ["--data.root", tmp_path / "tree", "--data.image_size", 32, "--data.threads", 1, "--device", "cpu"]
        net_words = ["--model", "resnet8", "--weights", tmp_path / f"{number}.safetensors"]
        json_words = ["--json", tmp_path / f"{number}.json"]
        ended = start_forked(tmp_path / f"of{number}", "evaluate", *data, *net_words, *json_words)
        assert ended.wait() == 0, ended.err
        assert "ordered by number: 0, 1, 2, 3, 4 and 7 more; not as text: 0, 1, 10, 11, 2" in ended.out + ended.err
        assert ("has the data's classes in another order" in ended.err) == (number == 1)
        results = json.loads((tmp_path / f"{number}.json").read_text())
        found.append({name: results[name] for name in ("loss", "top1", "top5")})
    assert found[0] == found[1]
