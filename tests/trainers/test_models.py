import re
import warnings
from dataclasses import replace

import pytest
import torch

from dalikd.kd import known_weights
from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalisation
from dalikd.kd.checkpoints import load_weights
from dalikd.kd.known_weights import KnownWeights, file_sha256, published_classes
from dalikd.pipelines.draw_spec import View
from dalikd.trainers.checkpoint import save_weights
from dalikd.trainers.models import (
    TeacherConfig,
    build_model,
    build_teacher,
    describe_teacher,
    open_teacher,
    reinitialise,
)
from dalikd.trainers.teacher_cache.read import teacher_fingerprint


@pytest.fixture
def weights(tmp_path):
    """Of a resnet8 with ten classes."""
    path = tmp_path / "resnet8.pt"
    torch.save(create_model("resnet8", 10).state_dict(), path)
    return str(path)


def _statistics(net):
    std = 1 / (255 * net.scale.flatten())
    return (-net.shift.flatten() * std).tolist(), std.tolist()


def test_a_net_normalises_by_the_data(make_source):
    source = replace(make_source(), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    mean, std = _statistics(build_model("resnet8", source))
    assert mean == pytest.approx([0.1, 0.2, 0.3])
    assert std == pytest.approx([0.4, 0.5, 0.6])
    assert build_model("resnet8", source)(torch.zeros(2, 3, 32, 32).byte()).shape == (2, 3)


def test_a_timm_model_normalises_as_it_was_trained(make_source):
    mean, std = _statistics(build_model("timm:resnet18", make_source()))
    assert mean == pytest.approx([0.485, 0.456, 0.406], abs=1e-6)
    assert std == pytest.approx([0.229, 0.224, 0.225], abs=1e-6)


def test_weights_and_options_reach_the_net(make_source, weights):
    net = build_model("resnet8", make_source(classes=10), weights=weights)
    assert torch.equal(net.model.state_dict()["conv1.weight"], torch.load(weights)["conv1.weight"])
    dropout = build_model("wrn_16_1", make_source(), args={"dropout": 0.3})
    assert {module.p for module in dropout.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}


def test_options_of_the_call_are_not_changed(make_source):
    args = {"dropout": 0.3}
    build_model("wrn_16_1", make_source(), args=args)
    assert args == {"dropout": 0.3}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TeacherConfig(), "no teacher given: name its architecture with --teacher.name, e.g."),
        (TeacherConfig("resnet8"), "the teacher resnet8 has no weights: give a file with --teacher.weights"),
        (TeacherConfig("resnet8", "pretrained"), "teacher resnet8: resnet8 has no pretrained weights to download"),
        (TeacherConfig("timm:resnet18", "pretrained"), "pretrained weights have 1000 classes, the data set has 3"),
        (TeacherConfig("resnte8", "x.pt"), 'teacher resnte8: unknown model "resnte8": did you mean resnet8'),
    ],
)
def test_a_teacher_needs_a_name_and_weights(make_source, config, message):
    with pytest.raises(ValueError, match=message):
        build_teacher(config, make_source())


def test_a_teacher_of_other_classes_is_refused(make_source, weights):
    with pytest.raises(
        ValueError, match=r"teacher resnet8: .*the weights have 10 classes, the model 3 \(data set tinted"
    ):
        build_teacher(TeacherConfig("resnet8", weights), make_source())
    with pytest.raises(FileNotFoundError, match=r"there is no weights file nowhere.pt"):
        build_teacher(TeacherConfig("resnet8", "nowhere.pt"), make_source())


@pytest.mark.parametrize(
    "name", ["resnet8", "timm:test_vit", "timm:test_byobnet", "timm:deit_tiny_distilled_patch16_224"]
)
def test_weights_of_the_same_classes_in_another_order_answer_in_that_of_the_data(make_source, tmp_path, name):
    source, path = make_source(), tmp_path / "student.safetensors"
    size = {"img_size": 32} if "vit" in name or "deit" in name else {}
    torch.manual_seed(0)
    trained = create_model(name, 3, **size)
    save_weights(path, trained, TENTHS, ["class2", "class0", "class1"])
    with pytest.warns(UserWarning, match=r"student\.safetensors has the data's classes in another order"):
        net = build_model(name, source, weights=str(path), args=size)
    pixels = torch.randint(0, 256, (2, 3, 32, 32)).byte()
    answers = trained.eval()(net.normalize(pixels))
    assert torch.equal(net.eval()(pixels), answers[:, [1, 2, 0]])
    save_weights(path, net.model, TENTHS, source.classes)  # as a student started from them is saved
    again = build_model(name, source, weights=str(path), args=size)
    assert torch.equal(again.eval()(pixels), answers[:, [1, 2, 0]])


def test_weights_of_other_classes_are_refused_by_name(make_source, tmp_path):
    path = tmp_path / "student.safetensors"
    save_weights(path, create_model("resnet8", 3), TENTHS, ["class1", "class2", "class3"])
    message = r"student\.safetensors is for other classes than the data \(3 and 3\): only of the weights: class3"
    with pytest.raises(ValueError, match=f"teacher resnet8: .*{message}"):
        build_teacher(TeacherConfig("resnet8", str(path)), make_source())
    with pytest.warns(UserWarning, match="is for other classes than the data: its last layer has to learn anew"):
        build_model("resnet8", make_source(), weights=str(path), trained=True)  # a start for a student
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3), torch.nn.Softmax(1))
    save_weights(path, net, TENTHS, ["class2", "class1", "class0"])
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3), torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="not of this model"):
        load_weights(other, path, class_names=["class0", "class1", "class2"])
    save_weights(path, torch.nn.Conv2d(3, 3, 1), TENTHS, ["class2", "class1", "class0"])
    with pytest.raises(ValueError, match="the last layer of this model is not known: name the class folders so"):
        load_weights(torch.nn.Conv2d(3, 3, 1), path, class_names=["class0", "class1", "class2"])


def test_pretrained_weights_of_imagenet_come_in_the_order_of_the_folders(make_source, monkeypatch):
    """The folders are WordNet ids; in another order they are mapped, and with a foreign one among them refused."""
    names = published_classes("ImageNet")
    source = replace(make_source(classes=1000, count=1000), classes=names[::-1])
    torch.manual_seed(0)
    made = create_model("timm:resnet18", 1000)
    monkeypatch.setattr("dalikd.trainers.models.create_model", lambda *_, **__: made)
    before = made.fc.weight.clone()
    with pytest.warns(UserWarning, match="timm:resnet18, pretrained, has the data's classes in another order"):
        net = build_model("timm:resnet18", source, weights="pretrained")
    assert torch.equal(net.model.fc.weight, before.flip(0))
    with pytest.raises(ValueError, match="only of the weights: n15075141; only of the data: n9; n01440764 is class 0"):
        build_model("timm:resnet18", replace(source, classes=("n9", *names[:-1])), weights="pretrained")


@pytest.mark.parametrize(
    ("precision", "kept_in", "answers_in"),
    [
        ("fp32", torch.float32, torch.float32),
        ("fp64", torch.float64, torch.float64),
        ("bf16", torch.float32, torch.float32),
    ],
)
def test_an_opened_teacher_is_frozen_and_folded_in_the_runs_precision(
    make_source, weights, precision, kept_in, answers_in
):
    config, source = TeacherConfig("resnet8", weights), make_source(classes=10)
    teacher = open_teacher(config, source, None, torch.device("cpu"), precision)
    plain = open_teacher(replace(config, fold_bn=False), source, None, torch.device("cpu"), precision)
    assert (teacher.folded, plain.folded) == (9, 0)
    assert teacher.digest == plain.digest == teacher_fingerprint(config, source)["teacher.weights"]
    assert {values.dtype for values in teacher.model.parameters()} == {kept_in}
    assert not teacher.model.training
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    assert teacher(pixels).dtype == answers_in
    tolerance = {"fp32": 1e-5, "fp64": 1e-12, "bf16": 0.1}[precision]
    torch.testing.assert_close(teacher(pixels), plain(pixels), rtol=0, atol=tolerance)
    if precision == "bf16":
        exact = open_teacher(config, source, None, torch.device("cpu"), "fp32")
        assert not torch.equal(teacher(pixels), exact(pixels))


# -------------------------------------------------------------------------------------------- normalisation

TENTHS = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.fixture
def known(weights, monkeypatch):
    """The weights, as a published file."""
    entry = KnownWeights("published.pt", file_sha256(weights)[:8], "resnet8", "CIFAR-10", TENTHS, 90.0, "https://x.org")
    monkeypatch.setattr(known_weights, "KNOWN", (entry,))


@pytest.mark.usefixtures("known")
def test_published_weights_bring_the_normalisation_they_were_trained_with(make_source, weights):
    source = make_source(classes=10)
    net = build_model("resnet8", source, weights=weights)
    mean, std = _statistics(net)
    assert net.normalisation == TENTHS
    assert mean == pytest.approx(TENTHS.mean)
    assert std == pytest.approx(TENTHS.std)
    assert build_model("resnet8", source).normalisation == (source.mean, source.std)


def test_weights_of_this_project_bring_it_in_their_file(make_source, tmp_path):
    path = tmp_path / "student.safetensors"
    save_weights(path, create_model("resnet8", 10), TENTHS)
    assert build_model("resnet8", make_source(classes=10), weights=str(path)).normalisation == TENTHS
    save_weights(path, create_model("timm:resnet18", 10), TENTHS)
    assert build_model("timm:resnet18", make_source(classes=10), weights=str(path)).normalisation == TENTHS


@pytest.mark.usefixtures("known")
def test_what_is_given_wins(make_source, weights):
    given = ([0.0, 0.5, 1.0], [0.25, 1.0, 0.5])
    config = TeacherConfig("resnet8", weights, mean=given[0], std=given[1])
    teacher = build_teacher(config, make_source(classes=10))
    assert teacher.normalisation == tuple(map(tuple, given))
    assert _statistics(teacher) == (pytest.approx(given[0]), pytest.approx(given[1]))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0.5, 0.5, 0.5], None),
        (None, [0.5, 0.5, 0.5]),
        ([0.5], [0.5]),
        ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4]),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.0]),
        ([], []),
    ],
)
def test_an_impossible_normalisation_is_refused_before_any_work(make_source, mean, std):
    with pytest.raises(ValueError, match=r"teacher resnet8: mean .* and std .*: give both, three numbers each, of"):
        build_teacher(TeacherConfig("resnet8", "nowhere.pt", mean=mean, std=std), make_source())


def test_a_teachers_checksum_is_checked(make_source, weights):
    source, digest = make_source(classes=10), file_sha256(weights)
    build_teacher(TeacherConfig("resnet8", weights, sha256=digest[:12]), source)
    with pytest.raises(ValueError, match=rf"teacher resnet8: .*resnet8\.pt is damaged or another file: .*{digest}"):
        build_teacher(TeacherConfig("resnet8", weights, sha256="0" * 64), source)
    with pytest.raises(ValueError, match="sha256 is the checksum of a weights file: leave it out"):
        build_teacher(TeacherConfig("timm:resnet18", "pretrained", sha256=digest), source)


@pytest.mark.usefixtures("known")
def test_a_teacher_is_described_by_its_files_checksum_origin_and_normalisation(make_source, weights):
    source, config = make_source(classes=10), TeacherConfig("resnet8", weights)
    described = describe_teacher(config, build_teacher(config, source))
    assert described["name"] == "resnet8"
    assert described["sha256"] == file_sha256(weights)
    assert described["known_as"] == "resnet8, trained on CIFAR-10 (https://x.org)"
    assert described["normalisation"] == {"mean": TENTHS.mean, "std": TENTHS.std}
    pretrained = TeacherConfig("timm:resnet18", "pretrained")
    described = describe_teacher(pretrained, build_model("timm:resnet18", source))
    assert (described["sha256"], described["known_as"]) == (None, None)


# ------------------------------------------------------------------------------------------------ made anew


def test_reinitialising_resets_convolutions_linear_layers_and_batch_norms(make_source):
    net = build_model("timm:test_vit", make_source()).model
    net.head_norm = torch.nn.BatchNorm2d(4)
    with torch.no_grad():
        for values in (*net.parameters(), net.head_norm.running_mean):
            values.fill_(7.0)
    reinitialise(net, 3)
    torch.manual_seed(3)
    expected = torch.nn.Conv2d(3, net.patch_embed.proj.out_channels, 16, 16)  # the first one drawn
    assert torch.equal(net.patch_embed.proj.weight, expected.weight)
    assert torch.equal(net.head_norm.weight, torch.ones(4))
    assert not net.head_norm.running_mean.any()
    assert net.head.weight.std() > 0
    assert (net.norm.weight == 7).all()  # of the layer norms


def test_reinitialising_depends_on_the_seed_alone():
    def state(weights_of, seed):
        torch.manual_seed(weights_of)
        net = create_model("resnet8", 10)
        reinitialise(net, seed)
        return torch.cat([values.flatten().float() for values in net.state_dict().values()])

    assert torch.equal(state(0, 5), state(1, 5))
    assert not torch.equal(state(0, 5), state(0, 6))


# ------------------------------------------------------------------------------ files that are known by their path


def _published_layout(path, key, seed):
    """A checkpoint as publishers write it, and its digest."""
    with torch.device("meta"):
        state = create_model("resnet56", 100).state_dict()
    tensors = {name: torch.full(value.shape, seed, dtype=value.dtype) for name, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: tensors, "epoch": 240, "accuracy": torch.tensor(72.3), "optimizer": {"state": {}}}, path)
    return file_sha256(path)


def test_a_checksum_is_shown_at_first_sight_and_another_content_told_of(make_source, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DALIKD_CACHE", str(tmp_path / "cache"))
    path, source = tmp_path / "cifar_teachers" / "resnet56_vanilla" / "ckpt_epoch_240.pth", make_source(classes=100)
    kept = tmp_path / "cache" / "weights" / "cifar_teachers" / "resnet56_vanilla" / "ckpt_epoch_240.pth.sha256"
    first = _published_layout(path, "model", 1)
    config = TeacherConfig("resnet56", str(path))
    monkeypatch.setenv("RANK", "1")
    build_teacher(config, source)
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("RANK")
    mean, std = _statistics(teacher := build_teacher(config, source))
    assert (mean, std) == (pytest.approx([0.5071, 0.4867, 0.4408]), pytest.approx([0.2675, 0.2565, 0.2761]))
    assert capsys.readouterr().out == (
        f"dalikd: by its path {path} is resnet56, trained on CIFAR-100 (https://github.com/megvii-research/"
        f"mdistiller); its SHA-256 is {first}, kept in {kept}\n"
    )
    assert describe_teacher(config, teacher)["known_as"].startswith("resnet56, trained on CIFAR-100")
    build_teacher(config, source)
    assert capsys.readouterr().out == ""

    second = _published_layout(path, "model", 2)
    message = (
        f"before: its SHA-256 is {second}, that was {first}. Fetch it again from https://github.com/megvii-research"
    )
    for _ in range(2):  # until something is done about it
        with pytest.warns(UserWarning, match=re.escape(message)) as caught:
            build_teacher(config, source)
    assert str(caught[0].message).endswith(f"give --teacher.sha256 {second[:16]} once, or remove {kept}")
    build_teacher(replace(config, sha256=second[:16]), source)
    assert second in capsys.readouterr().out
    build_teacher(config, source)
    assert (capsys.readouterr().out, kept.read_text()) == ("", f"{second}\n")


def test_hsakds_checkpoints_and_wrong_nets_say_what_they_are(make_source, monkeypatch, tmp_path):
    monkeypatch.setenv("DALIKD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "train_teacher_cifar_arch_resnet56_dataset_cifar100_seed0" / "resnet56.pth.tar"
    _published_layout(path, "net", 1)
    mean, _ = _statistics(build_teacher(TeacherConfig("resnet56", str(path)), make_source(classes=100)))
    assert mean == pytest.approx([0.5071, 0.4867, 0.4408])
    with pytest.raises(
        ValueError, match=r"the file is resnet56, trained on CIFAR-100 \(https://github.com/winycg/HSAKD"
    ):
        build_teacher(TeacherConfig("resnet20", str(path)), make_source(classes=100))


HEADED = ("resnet8_aux", "train_teacher_cifar_arch_resnet8_aux_dataset_cifar100_seed0/resnet8_aux.pth.tar")
PAIR = ("resnet8_aux", "train_online_kd_cifar_arch_resnet8_resnet8_dataset_cifar100_seed0/resnet8_resnet8.pth.tar")


@pytest.mark.parametrize(("name", "file", "member"), [(*HEADED, ""), (*PAIR, ":net1"), (*PAIR, ":net2")])
def test_hsakds_nets_with_heads_and_pairs_of_them_teach_and_are_evaluated(
    make_source, monkeypatch, tmp_path, name, file, member
):
    monkeypatch.setenv("DALIKD_CACHE", str(tmp_path / "cache"))
    source, path, net = make_source(classes=10), tmp_path / file, create_model(name, 10)
    path.parent.mkdir()
    both = torch.nn.ModuleDict({"net1": create_model(name, 10), "net2": create_model(name, 10)})
    both[member[1:] or "net1"] = net
    torch.save({"net": (both if member else net).state_dict(), "acc": 78.5, "epoch": 239}, path)
    config = TeacherConfig(name, f"{path}{member}")
    teacher = build_teacher(config, source)
    for found in (teacher, build_model(name, source, weights=config.weights)):
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in found.model.state_dict().items())
    assert _statistics(teacher)[0] == pytest.approx([0.5071, 0.4867, 0.4408])
    described = describe_teacher(config, teacher)
    assert described["sha256"] == file_sha256(path)
    assert described["known_as"].endswith("trained on CIFAR-100 (https://github.com/winycg/HSAKD)")


@pytest.mark.parametrize("container", ["model", "state_dict", None])
def test_a_published_plain_net_is_the_backbone_that_heads_start_from(make_source, tmp_path, container):
    """As CRD's files, SSKD's and torchvision's hold it."""
    plain = create_model("resnet8", 10)
    content = {container: plain.state_dict(), "epoch": 240} if container else plain.state_dict()
    torch.save(content, tmp_path / "plain.pth")
    net = build_model("resnet8_aux", make_source(classes=10), weights=str(tmp_path / "plain.pth"), trained=True).model
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in net.backbone.state_dict().items())
    with pytest.raises(ValueError, match="the file is of a net without auxiliary heads"):
        build_teacher(TeacherConfig("resnet8_aux", str(tmp_path / "plain.pth")), make_source(classes=10))


# ------------------------------------------------------------------------- how pretrained weights want to see


def _pretrained(monkeypatch, source, config, view):
    """Pretrained weights without a download: the builder gives a net that says how it was trained."""
    net = build_model("timm:resnet18", source)
    net.model.pretrained_cfg = {**net.model.pretrained_cfg, **config}
    monkeypatch.setattr("dalikd.trainers.models.build_model", lambda *_, **__: net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_teacher(TeacherConfig("timm:resnet18", "pretrained"), source, view)
    return [str(warning.message) for warning in caught]


def test_pretrained_weights_warn_of_another_view(monkeypatch, make_source):
    view = View(224, "center_crop", resize=256, interpolation="bilinear")
    assert _pretrained(monkeypatch, make_source(), {"interpolation": "bilinear", "crop_pct": 0.875}, view) == []
    messages = _pretrained(monkeypatch, make_source(), {"interpolation": "bicubic", "crop_pct": 0.95}, view)
    assert len(messages) == 2
    assert "set --data.interpolation bicubic" in messages[0]
    assert "set --data.val_resize 236" in messages[1]
