import json

from dalikd.kd import losses
from dalikd.kd.losses import KD, DistillationLoss, LogitLoss, Schedule
from dalikd.tools.methods import main


class _Later(KD):
    """A method whose weight grows."""

    def __init__(self, kd_weight=Schedule([0, 20], [0.0, 1.5]), **kwargs):  # noqa: B008
        super().__init__(kd_weight=kd_weight, **kwargs)


def test_every_loss_that_can_be_made_stands_in_the_table_with_its_paper(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(losses, "__all__", [*losses.__all__, "_Later"])
    monkeypatch.setattr(losses, "_Later", _Later, raising=False)
    file = tmp_path / "methods.json"
    main(["--json", str(file)])
    found = {row["name"]: row for row in json.loads(file.read_text())["methods"]}
    exported = {name: getattr(losses, name) for name in losses.__all__}
    kinds = {name for name, kind in exported.items() if isinstance(kind, type) and issubclass(kind, DistillationLoss)}
    abstract = {name for name in kinds if exported[name].__abstractmethods__}
    assert {LogitLoss.__name__, DistillationLoss.__name__} <= abstract
    assert found.keys() == kinds - abstract
    assert [name for name, row in found.items() if not row["paper"]] == []
    assert found["KD"]["weights"] == {"ce_weight": 0.1, "kd_weight": 0.9}
    assert "configs/cifar100/kd/resnet56_resnet20.yaml" in found["KD"]["configs"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "| _Later | ce_weight 0.1, kd_weight 0@0 1.5@20 |  |  | Hinton et al., 2015, arXiv 1503.02531 |"
    assert lines[-1] == f"written: {file}"
    assert len(lines) == 3 + len(found)
