import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dalikd.kd.backbones.layers import Normalisation
from dalikd.kd.checkpoints import Origin, load_weights, read_origin
from dalikd.trainers.checkpoint import read_state, save_state, save_weights


def test_a_state_comes_back_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "last" / "trainer.pt"
    save_state(path, {"step": 1, "task": {"weight": torch.arange(3.0)}})
    save_state(path, {"step": 2, "task": {"weight": torch.ones(3)}})
    state = read_state(path)
    assert state["step"] == 2
    assert torch.equal(state["task"]["weight"], torch.ones(3))
    assert [file.name for file in path.parent.iterdir()] == ["trainer.pt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_are_as_the_umask_says(tmp_path, make_net, umask, mode):
    before = os.umask(umask)
    try:
        save_weights(tmp_path / "last" / "student.safetensors", make_net().model)
        save_state(tmp_path / "last" / "trainer.pt", {"step": 1})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "last").iterdir()} == {mode}
    assert stat.S_IMODE((tmp_path / "last").stat().st_mode) == 0o777 & ~umask


def test_a_missing_state_names_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"trainer.pt does not exist: .*--overwrite true"):
        read_state(tmp_path / "trainer.pt")


@pytest.mark.parametrize("content", [b"", b"not a state", b"PK\x03\x04cut off"])
def test_a_damaged_state_is_named(tmp_path, content):
    path = tmp_path / "trainer.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"trainer.pt cannot be read as a saved state") as caught:
        read_state(path)
    assert "\n" not in str(caught.value)


def test_another_file_is_no_state(tmp_path):
    path = tmp_path / "trainer.pt"
    torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is not a state saved by dalikd"):
        read_state(path)


class _Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_state_executes_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": _Malicious()}, "trainer.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_state(Path("trainer.pt"))
    assert not Path("executed").exists()


def test_weights_are_saved_by_their_published_keys(tmp_path, make_net):
    model = make_net().model.to(memory_format=torch.channels_last)
    save_weights(tmp_path / "best" / "student.safetensors", model)
    found = load_file(tmp_path / "best" / "student.safetensors")
    assert found.keys() == model.state_dict().keys()
    other = make_net(5).model
    load_weights(other, tmp_path / "best" / "student.safetensors")
    assert all(torch.equal(value, found[key]) for key, value in other.state_dict().items())
    assert [file.name for file in (tmp_path / "best").iterdir()] == ["student.safetensors"]


def test_weights_carry_their_origin_and_the_same_weights_make_the_same_file(tmp_path, make_net):
    model, normalisation = make_net().model, Normalisation((0.1, 0.2, 0.3), (1 / 3, 0.5, 0.6))
    for name in ("a", "b"):
        save_weights(tmp_path / f"{name}.safetensors", model, normalisation, ["x", "\udce9", "z"])  # as not in UTF-8
    assert read_origin(tmp_path / "a.safetensors") == (normalisation, ("x", "\udce9", "z"), False)  # to the last bit
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    save_weights(tmp_path / "c.safetensors", model)
    assert read_origin(tmp_path / "c.safetensors") == Origin()
