"""Two processes do what one does."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dalikd.kd.checkpoints import load_weights
from dalikd.trainers.evaluate import evaluate
from dalikd.trainers.launch import start

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("shared_work.py")


def _module() -> Any:
    specification = importlib.util.spec_from_file_location("shared_work", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(folder) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        module = _module()
        patch.setattr(module.setup, "open_split", module.setup.open_split)  # put back what the work replaces
        return module.work(start("cpu", "fp64"), folder / "one")


def _shared(start_joined: Any, folder: Path, processes: int) -> dict[str, Any]:
    """What so many processes find together."""
    file = folder / f"{processes}.pt"
    for process in start_joined(processes, folder / f"printed{processes}", SCRIPT, processes, file):
        process.end()
    return torch.load(file, weights_only=False)


@pytest.fixture(scope="module")
def two(folder, start_joined) -> dict[str, Any]:
    return _shared(start_joined, folder, 2)


@pytest.fixture(scope="module")
def four(folder, start_joined) -> dict[str, Any]:
    return _shared(start_joined, folder, 4)


@pytest.mark.parametrize("augmentation", ["mixup", "cutmixpick_teacher", "turned"])
def test_training_with_accumulation_gives_the_same_weights(one, two, augmentation):
    ours, theirs = one["trained"][augmentation], two["trained"][augmentation]
    for kind in ("weights", "average"):
        assert ours[kind].keys() == theirs[kind].keys()
        for key, value in ours[kind].items():
            torch.testing.assert_close(theirs[kind][key], value, rtol=0, atol=1e-9)
    assert ours["metrics"]["windows"] == 6
    assert theirs["metrics"] == pytest.approx(ours["metrics"], rel=0, abs=1e-9)
    assert ("t_stddev1" in ours["metrics"]) == (augmentation == "mixup")
    assert theirs["terms"] == pytest.approx(ours["terms"], rel=0, abs=1e-9)  # of all images, not of one process's
    assert {"loss", "ce", "kd", "top1"} <= theirs["terms"].keys()


def test_nets_that_learn_together_have_the_same_weights(one, two):
    for name in ("net0", "net1"):
        ours, theirs = (found["together"][name] for found in (one, two))
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("processes", ["two", "four"])
def test_measuring_gives_the_same_figures(one, processes, request):
    several = request.getfixturevalue(processes)
    for setting, found in one["measured"].items():
        images = 2 * setting[0]
        for name, ours in found.items():
            theirs = several["measured"][setting][name]
            assert theirs["images"] == ours["images"] == images
            assert theirs["windows"] == ours["windows"] == 2 * images // 40
            for key in ("stddev", "stderr", "entropy", "per_class", "probability_covariance"):
                assert theirs[key] == pytest.approx(ours[key], rel=0, abs=1e-9), (setting, name, key)
            assert theirs["cross_entropy_covariance"] == ours["cross_entropy_covariance"]
            heads = list(zip(ours.get("heads", ()), theirs.get("heads", ()), strict=True))
            assert len(heads) == (3 if images == 2 * 74 else 0)
            for own, other in heads:
                assert other["stddev"] == pytest.approx(own["stddev"], rel=0, abs=1e-9), (setting, name)
                assert other["entropy"] == pytest.approx(own["entropy"], rel=0, abs=1e-9), (setting, name)


def test_evaluation_sees_every_image_once(one, two):
    assert two["evaluated"]["seen"] == one["evaluated"]["seen"] == list(range(101))
    assert two["evaluated"]["images"] == 101
    for key in ("loss", "top1", "top5"):
        assert two["evaluated"][key] == pytest.approx(one["evaluated"][key], rel=0, abs=1e-9)


def test_a_probe_finds_the_same_neighbours_and_the_same_classifier(one, two):
    """Each process looks for those of its share of the images among all."""
    ours, theirs = one["probed"], two["probed"]
    assert theirs["knn"] == ours["knn"]
    assert 0.4 < ours["knn"] < 1
    for key, value in ours["weights"].items():
        torch.testing.assert_close(theirs["weights"][key], value, rtol=0, atol=1e-9)


def test_what_is_evaluated_is_what_is_saved(two, folder, make_net, make_loop, accelerator):
    """Running statistics differ between processes after a step; the main process's are evaluated, and saved."""
    net = make_net()
    load_weights(net.model, folder / "2" / "batch_norm" / "last" / "ema.safetensors")
    found = evaluate({"net": net}, make_loop().val_loader, accelerator)["net"]
    for key, value in two["batch_norm"].items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


def test_buffers_of_a_loss_stay_with_their_process(two):
    one, other = map(np.array, two["remembered"])
    assert (one.sum(), other.sum()) == (48, 48)
    assert ((one + other) == 1).all()


def test_a_fixed_student_is_observed_by_several(one, two):
    ours, theirs = one["fixed"], two["fixed"]
    assert ours["stayed"]
    assert theirs["stayed"]
    assert theirs["val"] == pytest.approx(ours["val"], rel=0, abs=1e-9)
    assert ours["metrics"]["windows"] == 3
    assert theirs["metrics"] == pytest.approx(ours["metrics"], rel=0, abs=1e-9)


@pytest.mark.parametrize(
    ("what", "text", "step", "saves"),  # one after each epoch of three steps, and one at the end
    [
        ("signal to one", "stopped by signal 15", 5, 2),
        ("signals a step apart", "stopped by signal 15", 4, 2),
        ("bad file", "cannot decode a.jpg", 4, 2),
        ("bad file to validate", "cannot decode a.jpg", 9, 3),
    ],
)
def test_what_one_process_knows_ends_all_at_one_step_and_the_main_one_saves(two, what, text, step, saves):
    text = f"{text}; go on with --resume FOLDER"
    assert two["stopped"][what] == [(text, step, saves), (text, step, 0)]
