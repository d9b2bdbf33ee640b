import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dalikd.kd.backbones.layers import Normalisation
from dalikd.kd.checkpoints import Origin, load_weights, read_origin
from dalikd.pipelines.files import file_digest
from dalikd.trainers.checkpoint import (
    CheckpointWriter,
    HostCopies,
    read_newest,
    read_state,
    save_state,
    save_weights,
    weights_of,
)


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
    with pytest.raises(ValueError, match=r"cannot be read as a saved state: needs unsafe unpickling \(\S+\)$"):
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


# ----------------------------------------------------------------------------------------------------- damage


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """A state is read as it was, or not at all."""
    path, weight = tmp_path / "trainer.pt", torch.arange(200.0)
    save_state(path, {"step": 1, "task": {"weight": weight}})
    whole, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        try:
            state = read_state(path)
        except ValueError:
            refused += 1
        else:
            assert state["step"] == 1
            assert torch.equal(state["task"]["weight"], weight)
    assert refused > len(whole) // 7 // 2


def test_a_state_that_cannot_be_read_falls_back_on_the_one_before(tmp_path):
    last, previous = tmp_path / "trainer.pt", tmp_path / "trainer-previous.pt"
    with pytest.raises(FileNotFoundError, match="has saved no state yet"):
        read_newest((last, previous), ["weight"])
    for step, value in enumerate((1.0, 2.0, float("nan")), 1):
        save_state(last, {"step": step, "task": {"weight": torch.full((3,), value)}}, previous)
        state, damage = read_newest((last, previous), ["weight"])
        assert state["step"] == min(step, 2)
    assert damage == f"{last} is of step 3, where weight is not finite"
    last.write_bytes(b"")
    state, damage = read_newest((last, previous), ["weight"])
    assert state["step"] == 2
    assert damage.startswith(f"{last} cannot be read as a saved state: ")
    last.unlink()
    state, damage = read_newest((last, previous), ["weight"])
    assert (state["step"], damage) == (2, f"{last} does not exist")
    last.write_bytes(b"x")
    previous.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"trainer.pt cannot .*trainer-previous.pt cannot .*--overwrite true"):
        read_newest((last, previous), ["weight"])


# --------------------------------------------------------------------------------------------------- in a thread


def test_copies_are_of_the_moment_and_shared_as_the_tensors_are():
    shared, turned = torch.arange(4.0), torch.arange(6.0).reshape(2, 3).T
    tree = {"a": shared, "list": [shared, turned, "text"], "empty": torch.zeros(0), "number": 3}
    copies = HostCopies()
    found = copies.take(tree)
    assert found["list"][0] is found["a"]
    assert found["list"][1].stride() == turned.stride()
    shared.zero_()
    turned.zero_()
    assert found["a"].tolist() == [0, 1, 2, 3]
    assert found["list"][1].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert (found["list"][2], found["number"], tree["a"] is shared) == ("text", 3, True)
    places = [found["a"].data_ptr(), found["list"][1].data_ptr()]
    again = copies.take(tree)
    assert [again["a"].data_ptr(), again["list"][1].data_ptr()] == places  # the memory is used again
    assert again["a"].tolist() == [0, 0, 0, 0]


@pytest.fixture
def files(tmp_path):
    last = tmp_path / "last"
    return last / "student.safetensors", (last / "trainer.pt", last / "trainer-previous.pt")


def test_a_step_after_a_checkpoint_does_not_change_it(files, make_net, monkeypatch):
    net, writer, go_on = make_net().model, CheckpointWriter(), threading.Event()
    write = save_state
    monkeypatch.setattr("dalikd.trainers.checkpoint.save_state", lambda *a: (go_on.wait(30), write(*a)))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    writer.save({files[0]: weights_of(net)}, {"step": 1, "task": net.state_dict()}, files[1], wait=False)
    with torch.no_grad():
        for value in net.parameters():
            value.zero_()
    go_on.set()
    writer.wait()
    writer.close()
    state = read_state(files[1][0])
    assert all(torch.equal(value, state["task"][key]) for key, value in before.items())
    assert all(torch.equal(value, before[key]) for key, value in load_file(files[0]).items())
    assert state["digests"] == {"last/student.safetensors": file_digest(files[0])}


def test_a_failure_in_the_thread_is_raised_and_the_checkpoint_before_stays(files, make_net, monkeypatch):
    net, writer = make_net().model, CheckpointWriter()
    writer.save({files[0]: weights_of(net)}, {"step": 1}, files[1], wait=True)
    with monkeypatch.context() as patch:
        patch.setattr("dalikd.trainers.checkpoint.torch.save", _full)
        writer.save({files[0]: weights_of(net)}, {"step": 2}, files[1])
        with pytest.raises(OSError, match=r"trainer.pt cannot be written: No space left on device"):
            writer.wait()
        writer.save({files[0]: weights_of(net)}, {"step": 3}, files[1])
        with pytest.raises(OSError, match="No space left"):  # noqa: PT012
            while True:
                writer.check()
    assert read_state(files[1][0])["step"] == 1
    writer.wait()
    with torch.no_grad():
        next(net.parameters()).fill_(float("inf"))
    with pytest.raises(ValueError, match=r"of student.safetensors is not finite at step 4: training has diverged"):
        writer.save({files[0]: weights_of(net)}, {"step": 4}, files[1], wait=True)
    assert read_state(files[1][0])["step"] == 1
    writer.close()


def _full(_, file):
    file.file.close()
    with Path("/dev/full").open("wb", buffering=0) as full:
        file.file = full
        file.write(b"x")
