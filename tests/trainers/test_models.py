import warnings
from dataclasses import replace

import pytest
import torch

from dalikd.kd.backbones import create_model
from dalikd.pipelines.augment import View
from dalikd.trainers.models import TeacherConfig, build_model, build_teacher, open_teacher


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
    assert {values.dtype for values in teacher.model.parameters()} == {kept_in}
    assert not teacher.model.training
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    assert teacher(pixels).dtype == answers_in
    tolerance = {"fp32": 1e-5, "fp64": 1e-12, "bf16": 0.1}[precision]
    torch.testing.assert_close(teacher(pixels), plain(pixels), rtol=0, atol=tolerance)
    if precision == "bf16":
        exact = open_teacher(config, source, None, torch.device("cpu"), "fp32")
        assert not torch.equal(teacher(pixels), exact(pixels))


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
