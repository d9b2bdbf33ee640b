import pytest

from dalikd.trainers import renamed as module
from dalikd.trainers.renamed import new_name, take_old_names
from dalikd.trainers.resume import check_same_run, identity

TABLE = {
    **{"mode": "mix.mode", "loss.temp": "loss.temperature", "gone": "give --a or --b"},
    "loss.pair": ("loss.first", "loss.second"),
}


def test_no_new_name_is_an_old_one():
    new = {name for value in module.RENAMED.values() for name in ([value] if isinstance(value, str) else value)}
    assert not set(module.RENAMED) & new


def test_old_names_give_way_to_new_ones(monkeypatch):
    monkeypatch.setattr(module, "RENAMED", TABLE)
    content = {"mode": 1, "mix": {"alpha": 2}, "loss": {"init_args": {"temp": 3, "x": 4, "pair": [5, 6]}}, "gone": 5}
    assert take_old_names(content, {"mix.mode"}) == TABLE | {"loss.pair": "loss.first and loss.second"}
    assert content == {
        "mix": {"alpha": 2, "mode": 1},
        "loss": {"init_args": {"temperature": 3, "x": 4, "first": 5, "second": 6}},
        "gone": 5,
    }
    assert take_old_names({"mode": 1, "loss": None}, {"mode"}) == {}


def test_a_run_is_the_same_by_the_new_names(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RENAMED", TABLE)
    assert [new_name(name) for name in ("mode", "seed", "loss.init_args.temp")] == [
        *("mix.mode", "seed", "loss.init_args.temperature"),
    ]
    old = identity("distill", {"mode": "a", "loss": {"init_args": {"temp": 3, "pair": [1, 2]}}}, {})
    new = identity(
        "distill", {"mix": {"mode": "a"}, "loss": {"init_args": {"temperature": 3, "first": 1, "second": 2}}}, {}
    )
    assert check_same_run(old, new, tmp_path) == []
    switch = {"temperature": 3, "first": 1, "second": 2, "switch": False}  # what the class could not do before
    off = identity("distill", {"mix": {"mode": "a"}, "loss": {"init_args": switch}}, {})
    assert check_same_run(old, off, tmp_path) == []
    on = identity("distill", {"mix": {"mode": "a"}, "loss": {"init_args": {**switch, "switch": True}}}, {})
    with pytest.raises(ValueError, match=r"--loss\.switch was None, now it is True"):
        check_same_run(old, on, tmp_path)


def test_a_run_of_a_version_without_shares_had_all_images(tmp_path):
    before, whole, half = (
        identity("train", {"data": {"limit": 9, **share}}, {}) for share in ({}, {"share": 1.0}, {"share": 0.5})
    )
    assert check_same_run(before, whole, tmp_path) == []
    with pytest.raises(ValueError, match=r"--data\.share was None, now it is 0\.5"):
        check_same_run(before, half, tmp_path)
