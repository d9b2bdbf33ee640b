import pytest

from dalikd.trainers.study.options import StudyOptions
from dalikd.trainers.study.ready import chosen_pairs, read_pairs


def _read(*pairs):
    return read_pairs(StudyOptions(pairs=list(pairs)), trains_teachers=True)


def test_a_shard_is_a_number_of_a_count():
    assert StudyOptions(shard="2/8").share() == (2, 8)
    assert StudyOptions().share() == (1, 1)


@pytest.mark.parametrize("shard", ["9/8", "0/1", "x", "1/0", "-1/2", "1/2/3"])
def test_another_shard_is_refused(shard):
    with pytest.raises(ValueError, match=f"--shard {shard}: "):
        StudyOptions(shard=shard)


def test_heads_are_there_or_not():
    assert StudyOptions(methods={"hsakd": {"heads": True}}).methods["hsakd"] == {"heads": True}
    with pytest.raises(ValueError, match=r"methods.hsakd.heads is 3: give true or false"):
        StudyOptions(methods={"hsakd": {"heads": 3}})


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            {"teacher": {"name": "vgg13_aux", "weights": "x", "freeze_backbone": False}},
            r"teacher.freeze_backbone cannot be set here; a teacher with weights is not .* with freeze_backbone: true",
        ),
        (
            {"student": {"name": "vgg8_aux", "weights": "x", "freeze_backbone": True}},
            "student.freeze_backbone cannot be",
        ),
    ],
)
def test_a_frozen_backbone_is_a_trained_teachers(net, message):
    with pytest.raises(ValueError, match=rf"pairs\[0\].{message}"):
        _read({"teacher": "vgg13_aux", "student": "vgg8", **net})


def test_a_net_is_a_name_or_says_more():
    (pair,) = _read(
        {
            "teacher": {"name": "timm:resnet34", "weights": "pretrained", "mean": [0, 0, 0]},
            "student": {"name": "vgg8", "label": "own: name", "args": {"a": 1}, "schedule": {"milestones": [1]}},
        }
    )
    assert (pair.teacher.label, pair.teacher.weights, pair.teacher.settings) == (
        *("timm-resnet34", "pretrained", {"mean": [0, 0, 0]}),
    )
    assert (pair.student.label, pair.student.args) == ("own-name", {"a": 1})
    assert pair.student.settings == {"schedule.milestones": [1]}
    assert (pair.label, pair.title) == ("timm-resnet34_own-name", "timm-resnet34/own-name")


def test_a_class_with_its_options_stays_whole():
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}
    (pair,) = _read({"teacher": {"name": "vgg13", "optimizer": optimizer}, "student": "vgg8"})
    assert pair.teacher.settings == {"optimizer": optimizer}


def test_pairs_are_chosen_by_name():
    pairs = _read({"teacher": "vgg13", "student": "vgg8"}, {"teacher": "vgg13", "student": "vgg11"})
    assert chosen_pairs(pairs, []) == pairs
    assert chosen_pairs(pairs, ["vgg13/vgg11"]) == pairs[1:]
    with pytest.raises(ValueError, match="--pair vgg13: there is no such pair, there are vgg13/vgg8, vgg13/vgg11"):
        chosen_pairs(pairs, ["vgg13"])
