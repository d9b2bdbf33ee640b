"""A linear probe: what stays as it is, which net is taken, and how nearest neighbours vote."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.optim import SGD

from dalikd.kd.backbones import create_model, factory
from dalikd.kd.checkpoints import backbone_weights, find_classifier
from dalikd.trainers.augmentation import MixOptions
from dalikd.trainers.checkpoint import save_weights
from dalikd.trainers.launch import start
from dalikd.trainers.loop import Loop
from dalikd.trainers.setup import Setup
from dalikd.trainers.tasks.probe import ProbeOptions
from dalikd.trainers.tracking import RunFolder


def _trained(name, classes=5):
    """A net with running statistics of its own."""
    torch.manual_seed(1)
    model = create_model(name, classes)
    for values in model.state_dict().values():
        if values.is_floating_point():
            values.add_(0.1 * torch.rand_like(values))
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of resnet8, for five classes."""
    path = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    save_weights(path, _trained("resnet8"), None, list("abcde"))
    return path


@pytest.fixture
def make_probe(make_source, accelerator, weights, tmp_path):
    """Loops that probe a net on three classes: 96 images, 41 to validate on."""

    def make(on=accelerator, folder="run", **options):
        given = {"model": "resnet8", "weights": str(weights), "batch_size": 32, "mix": MixOptions(group=8), "epochs": 2}
        made = ProbeOptions(**{**given, "knn": 5, "optimizer": partial(SGD, lr=0.1), **options})
        setup = Setup(made, on, make_source(), make_source(41, seed=1))
        task = made.build(setup)
        folders = RunFolder(tmp_path / folder, writes=True)
        return Loop(task, task.loader(setup), setup.val_loader(), made, on, folders, {})

    return make


def _state(net):
    return {key: value.clone() for key, value in net.model.state_dict().items()}


def test_nothing_but_the_classifier_changes(make_probe, weights):
    """Over two epochs with evaluations; neither in the average."""
    loop = make_probe(ema=0.5)
    before, theirs = _state(loop.task.student), _trained("resnet8").state_dict()
    loop.run()
    for net in (loop.task.student, loop.averages["student"].module):
        for key, value in net.model.state_dict().items():
            assert torch.equal(value, before[key]) == (not key.startswith("fc.")), key
            assert key.startswith("fc.") or torch.equal(value, theirs[key]), key
    loop.model.train()
    assert [part for part in loop.task.student.modules() if part.training] == [loop.task.student.model.fc]
    assert loop.task.header["backbone"]["weights"] == str(weights)


class _Awkward(nn.Module):
    """What has no parameters stands beside the classifier: running statistics and dropout."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3, affine=False), nn.Dropout(0.5)
        self.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, num_classes))

    def get_classifier(self):
        return self.fc

    def forward(self, images):
        return self.fc(self.dropout(self.norm(images)).mean((2, 3)))


def test_parts_without_parameters_do_not_learn_either(make_probe, monkeypatch, tmp_path):
    monkeypatch.setitem(factory._BUILDERS, "awkward", _Awkward)
    torch.save(_trained("awkward").state_dict(), tmp_path / "awkward.pt")
    loop = make_probe(model="awkward", weights=str(tmp_path / "awkward.pt"))
    before = _state(loop.task.student)
    loop.run()
    loop.task.train()
    net = loop.task.student.model
    assert (net.dropout.training, net.norm.training, net.fc[0].training) == (False, False, True)
    after = _state(loop.task.student)
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["fc.1.weight", "fc.1.bias"]


def test_the_vote_is_that_of_brute_force(make_probe, make_source):
    """On features that are computed here, in float64."""
    loop = make_probe(start("cpu", "fp64"), precision="fp64", knn=7)
    found = loop.task.metrics()["knn"]
    net = loop.task.student
    train, val = make_source(), make_source(41, seed=1)

    def features(source):
        pixels = torch.from_numpy(source.arrays).permute(0, 3, 1, 2)
        rows = net.outputs(pixels, features=True).features[-1].detach().numpy()
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    cosines, right = features(val) @ features(train).T, 0
    for row, label in zip(cosines, val.labels, strict=True):
        nearest = np.argsort(-row)[:7]
        right += np.bincount(train.labels[nearest], np.exp(row[nearest] / 0.07), 3).argmax() == label
    assert found == right / 41
    assert 0.4 < found < 1


def test_neighbours_vote_once_and_may_be_left_out(make_probe, monkeypatch):
    loop, calls = make_probe(), []
    vote = loop.task._vote
    monkeypatch.setattr(loop.task, "_vote", lambda: calls.append(1) or vote())
    results = loop.run()
    assert len(calls) == 1
    assert results["last"]["knn"] == results["best"]["knn"] > 0
    without = make_probe(folder="without", knn=0)
    assert without.task.metrics() == {}


def test_images_that_cannot_be_decoded_are_stood_in_for(make_probe, monkeypatch):
    """In the bank as in training: by the image after."""
    loop = make_probe(knn=1)
    setup, banks = loop.task._setup, []
    val_loader = Setup.val_loader

    def replacing(self):
        loader = val_loader(self)
        if self.val is setup.source:
            loader.replace([4])
        return loader

    monkeypatch.setattr(Setup, "val_loader", replacing)
    monkeypatch.setattr("dalikd.trainers.tasks.probe.knn_scores", lambda *given: banks.append(given) or given[0])
    loop.task.metrics()
    _, bank, labels, *_ = banks[0]
    assert torch.equal(bank[4], bank[5])
    assert labels[4] == labels[5] == setup.source.labels[5] != setup.source.labels[4]
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(96))


@pytest.mark.parametrize("name", ["resnet8_aux", "resnet8"])
def test_the_backbone_of_a_net_with_heads_is_taken(make_probe, tmp_path, name):
    """By either name, also of a published file."""
    theirs = _trained("resnet8_aux").state_dict()
    torch.save({"net": theirs, "acc": 77.0}, tmp_path / "net.pth.tar")
    args = {"detach_heads": False} if name == "resnet8_aux" else {}
    task = make_probe(model=name, model_args=args, weights=str(tmp_path / "net.pth.tar")).task
    for key, value in task.student.model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, backbone_weights(theirs)[key]), key


def test_a_timm_net_is_probed(make_probe, tmp_path):
    args = {"img_size": 12, "patch_size": 4, "depth": 1, "drop_path_rate": 0.5, "drop_rate": 0.5}
    name = "timm:vit_tiny_patch16_224"
    torch.save(create_model(name, 9, **args).state_dict(), tmp_path / "vit.pt")
    loop = make_probe(model=name, model_args=args, weights=str(tmp_path / "vit.pt"), epochs=1)
    before = _state(loop.task.student)
    assert loop.run()["last"]["knn"] > 0
    after = _state(loop.task.student)
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("classes", [3, 10])
def test_timms_own_weights_are_taken_without_their_classifier(make_probe, tmp_path, classes):
    """Whatever number of classes they have; here from a file, so that nothing is downloaded."""
    theirs = create_model("timm:test_resnet", classes)
    torch.save(theirs.state_dict(), tmp_path / "own.pt")
    own = {"file": str(tmp_path / "own.pt"), "num_classes": classes, "hf_hub_id": None, "url": ""}
    args = {"pretrained_cfg_overlay": own}
    net = make_probe(model="timm:test_resnet", model_args=args, weights="pretrained").task.student.model
    classifier, taken = find_classifier(net)["fc"], net.state_dict()
    assert len(classifier.weight) == 3
    for key, value in theirs.state_dict().items():
        assert key.startswith("fc.") != torch.equal(value, taken[key]), key


@pytest.mark.parametrize("classes", [3, 5])
def test_the_classifier_is_fresh_and_a_function_of_the_seed(make_probe, tmp_path, classes):
    """Also where the file's has as many classes."""
    trained = _trained("resnet8", classes)
    torch.save(trained.state_dict(), tmp_path / "net.pt")
    one, same, other = (
        make_probe(weights=str(tmp_path / "net.pt"), seed=seed).task.student.model for seed in (0, 0, 1)
    )
    assert torch.equal(one.fc.weight, same.fc.weight)
    assert not torch.equal(one.fc.weight, other.fc.weight)
    assert not torch.equal(one.fc.weight, trained.fc.weight[:3])


def test_a_resumed_run_goes_on_as_it_would_have(make_probe, monkeypatch):
    """And does not let neighbours vote again."""
    whole = make_probe(folder="whole")
    expected = whole.run()["last"]
    stopped = make_probe()
    stopped.folder.start({}, None)
    for _ in range(3):
        stopped.step()
    stopped.end_epoch()
    stopped.step()
    stopped.save()
    resumed = make_probe()
    monkeypatch.setattr(resumed.task, "_vote", lambda: pytest.fail("voted again"))
    resumed.load()
    assert resumed.run()["last"] == expected
    for key, value in _state(whole.task.student).items():
        assert torch.equal(value, _state(resumed.task.student)[key]), key


def test_another_backbone_is_another_run(make_probe, tmp_path):
    torch.save(create_model("resnet8", 3).state_dict(), tmp_path / "other.pt")
    one, same, other = (
        make_probe(**of).task for of in ({}, {"weights": make_probe().options.weights}, {"reinit": True})
    )
    assert one.contents == same.contents != other.contents


# ---------------------------------------------------------------------------------------------------- run folders


@pytest.fixture
def run_folder(tmp_path):
    """Writes a run folder, without the files that are left out."""

    def write(model="resnet8", evaluated="student.safetensors", results=True, args=None):
        folder = tmp_path / "source"
        (folder / "last").mkdir(parents=True)
        config = {"model": model, **({"model_args": args} if args else {})}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if results:
            (folder / "results.json").write_text(json.dumps({"evaluated": evaluated}))
        if evaluated:
            save_weights(folder / "last" / evaluated, _trained(model or "resnet8"), ((0.1,) * 3, (0.2,) * 3))
        return folder

    return write


@pytest.mark.parametrize("evaluated", ["student.safetensors", "ema.safetensors", "net0.safetensors"])
def test_a_run_folder_says_which_net_it_is(make_probe, run_folder, evaluated):
    """The weights are those of the run's figures, whatever they are called; the normalisation is theirs."""
    folder = run_folder("resnet8_aux", evaluated, args={"detach_heads": False})
    settled = ProbeOptions(run=str(folder)).settled()
    assert (settled.run, settled.model, settled.model_args) == (None, "resnet8", {})
    assert settled.weights == str(folder / "last" / evaluated)
    assert settled.settled() == settled
    student = make_probe(model=None, weights=None, run=str(folder)).task.student
    assert student.normalisation.mean == (0.1, 0.1, 0.1)
    theirs = backbone_weights(_trained("resnet8_aux").state_dict())
    assert torch.equal(student.model.conv1.weight, theirs["conv1.weight"])


def test_a_run_without_a_net_is_named(run_folder, tmp_path):
    with pytest.raises(ValueError, match=r"--run .*nowhere is no run folder \(.*config.yaml is missing\): name one"):
        ProbeOptions(run=str(tmp_path / "nowhere")).settled()
    folder = run_folder(evaluated=None, results=False)
    with pytest.raises(ValueError, match=r"has no weights: .*last/student.safetensors is missing; wait for its first"):
        ProbeOptions(run=str(folder)).settled()
    (folder / "config.yaml").write_text("model: null\n")
    with pytest.raises(ValueError, match=r"config\.yaml names no model"):
        ProbeOptions(run=str(folder)).settled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no net given: name the folder of its run with --run, or give --model"),
        ({"model": "resnet8"}, "no net given"),
        ({"weights": "x.pt"}, "no net given"),
        ({"run": "RUN", "weights": "x.pt"}, "--run RUN has weights of its own: leave out --weights x.pt"),
        ({"run": "RUN", "model": "vgg8"}, "--run RUN has --model resnet8: leave out --model vgg8"),
        (
            {"run": "RUN", "model_args": {"width": 2}},
            "--run RUN has --model_args {}: leave out --model_args {'width': 2}",
        ),
    ],
)
def test_one_net_is_given(run_folder, options, message):
    folder = str(run_folder())
    given = {name: folder if value == "RUN" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=re.escape(message.replace("RUN", folder))):
        ProbeOptions(**given).settled()


def test_a_run_may_be_given_with_its_own_model(run_folder):
    assert ProbeOptions(run=str(run_folder()), model="resnet8").settled().model == "resnet8"


def test_weights_of_another_net(make_probe, run_folder, weights):
    with pytest.raises(ValueError, match=f"--model resnet20 with --weights: {weights} is not of this model"):
        make_probe(model="resnet20")
    file = str(run_folder("vgg8") / "last" / "student.safetensors")
    with pytest.raises(ValueError, match=f"--model resnet8 with weights of vgg8: {file} is not of this model"):
        make_probe(weights=file)


def test_a_net_that_names_no_classifier(make_probe, tmp_path):
    torch.save(create_model("small", 3).state_dict(), tmp_path / "small.pt")
    with pytest.raises(ValueError, match="--model small with --weights: SmallNet names no classifier"):
        make_probe(model="small", weights=str(tmp_path / "small.pt"))


@pytest.mark.parametrize(
    ("neighbours", "message"), [(97, "at most the number of training images, 96"), (-1, "0 or more")]
)
def test_as_many_neighbours_as_there_are_images(make_probe, neighbours, message):
    with pytest.raises(ValueError, match=f"--knn {neighbours}: give {message}"):
        make_probe(knn=neighbours)
    assert make_probe(knn=96).task.metrics()["knn"] > 0


def test_a_net_of_other_images(make_probe, tmp_path):
    args = {"img_size": 16, "patch_size": 4, "depth": 1}
    torch.save(create_model("timm:vit_tiny_patch16_224", 3, **args).state_dict(), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="the net that is probed cannot take images of 12 x 12 pixels"):
        make_probe(model="timm:vit_tiny_patch16_224", model_args=args, weights=str(tmp_path / "vit.pt"))


def test_the_defaults_are_the_published_protocol():
    options = ProbeOptions()
    group = options.optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert {name: group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")} == {
        **{"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}
    }
    assert (options.epochs, options.schedule.milestones, options.schedule.gamma) == (100, [30, 60, 90], 0.1)
