import argparse
import collections
import copy
import hashlib
import re
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dalikd.kd import known_weights
from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalisation
from dalikd.kd.checkpoints import (
    Origin,
    backbone_weights,
    class_order,
    find_classifier,
    load_weights,
    order_classes,
    read_origin,
    read_state_dict,
)
from dalikd.kd.known_weights import KnownWeights, published_classes


def make_model(num_classes=10):
    return nn.Sequential(
        collections.OrderedDict(
            convolution=nn.Conv2d(3, 4, 3),
            norm=nn.BatchNorm2d(4),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(4, num_classes),
        )
    )


def prefixed(state_dict, prefix):
    return {prefix + key: value for key, value in state_dict.items()}


@pytest.fixture
def source():
    model = make_model()
    nn.init.normal_(model.norm.running_mean)
    return model


LAYOUTS = {
    "plain": lambda state: state,
    "model": lambda state: {"epoch": 240, "model": state, "best_acc": 0.7, "optimizer": {"state": {}}},
    "net": lambda state: {"net": state, "acc": 76.5},
    "state_dict": lambda state: {"best_prec1": 91.7, "state_dict": state},
    "weight": lambda state: {"weight": state},
    "state_dict_ema": lambda state: {"state_dict_ema": state},
    "distributed": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "distributed and compiled": lambda state: {"model": prefixed(state, "module._orig_mod.")},
    "compiled and distributed": lambda state: {"net": prefixed(state, "_orig_mod.module.")},
}


def assert_same(model, source):
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_layout_is_read(layout, zipped, source, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](source.state_dict()), path, _use_new_zipfile_serialization=zipped)
    model = make_model()
    load_weights(model, str(path))
    assert_same(model, source)
    assert read_state_dict(path).keys() == source.state_dict().keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_in_a_tar_is_read(zipped, source, tmp_path):
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    (tmp_path / "w.safetensors").touch()
    with tarfile.open(tmp_path / "teachers.tar", "w") as archive:
        for name in ("w.pth", "w.safetensors"):
            archive.add(tmp_path / name, f"teachers/{name}")
    model = make_model()
    load_weights(model, tmp_path / "teachers.tar:w.pth")
    assert_same(model, source)
    with pytest.raises(ValueError, match=r"teachers\.tar:w\.safetensors is a safetensors file in a tar: unpack it"):
        read_state_dict(tmp_path / "teachers.tar:w.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no weights file .*absent\.tar$"):
        read_state_dict(tmp_path / "absent.tar:w.pth")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_are_read(prefix, source, tmp_path):
    save_file(prefixed(source.state_dict(), prefix), tmp_path / "weights.safetensors")
    model = make_model()
    load_weights(model, tmp_path / "weights.safetensors")
    assert_same(model, source)


def test_raw_weights_come_before_averaged_ones(source, tmp_path):
    torch.save({"state_dict_ema": make_model().state_dict(), "state_dict": source.state_dict()}, tmp_path / "w.pth")
    model = make_model()
    load_weights(model, tmp_path / "w.pth")
    assert_same(model, source)


def test_a_prefix_that_only_some_keys_have_is_a_name_and_stays(tmp_path):
    torch.save({"module.weight": torch.ones(2), "head.weight": torch.ones(2)}, tmp_path / "w.pth")
    assert list(read_state_dict(tmp_path / "w.pth")) == ["module.weight", "head.weight"]


def test_batch_counters_may_be_absent(source, tmp_path):
    state = {key: value for key, value in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    model = make_model()
    load_weights(model, tmp_path / "w.pth")
    assert_same(model, source)


def error_of(call, *arguments, **options):
    """The message, checked for naming the file, of the error that a call raises."""
    with pytest.raises((ValueError, OSError)) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(arguments[-1]) in message
    return message


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file"):
        read_state_dict(tmp_path / "absent.pth")
    with pytest.raises(IsADirectoryError, match="is a folder: name the weights file in it"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello, world\n", b"\x80\x02garbage", b"PK\x03\x04 half a zip"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_checkpoint(content, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert "is damaged or not a" in error_of(read_state_dict, path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file(suffix, source, tmp_path):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    assert "is damaged" in error_of(read_state_dict, path)


def leave_a_trace(path):
    path.touch()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return leave_a_trace, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(zipped, source, tmp_path):
    content = {"model": source.state_dict(), "extra": Malicious(tmp_path / "trace")}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert "needs unsafe unpickling" in error_of(read_state_dict, tmp_path / "w.pth")
    assert not (tmp_path / "trace").exists()


def test_what_needs_unsafe_unpickling_is_named(source, tmp_path):
    torch.save({"opt": argparse.Namespace(lr=0.1), "model": source.state_dict()}, tmp_path / "w.pth")
    assert "needs unsafe unpickling (argparse.Namespace)" in error_of(read_state_dict, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "optimizer": {"state": {}}}, "its keys are epoch, optimizer"),
        ({"model": {"conv": 1}}, "its keys are model"),
        ({}, "it is a dict"),
        (torch.ones(3), "it is a Tensor"),
        ([torch.ones(3)], "it is a list"),
    ],
)
def test_no_state_dict_inside(content, found, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    message = error_of(read_state_dict, tmp_path / "w.pth")
    assert "holds no state_dict, plain or under model, net, " in message
    assert message.endswith(found)


def _rezipped(path, changed, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, changed(content) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R0", r"it calls builtins\.bytearray"),  # 2 GB
        (b"c_codecs\nencode\nX\x01\0\0\0xX\x06\0\0\0latin1\x86R0", r"it calls _codecs\.encode"),
        (b")" + b"\x85" * 400_000 + b"0", "larger than that of any net"),
        (b"c" + b"a" * 300_000 + b"\nb\n0", "it calls aaaa"),
    ],
)
def test_a_torch_file_takes_no_more_memory_than_its_size(code, message, source, tmp_path):
    path = tmp_path / "net.pt"
    for zipped in (True, False):
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=zipped)
        if zipped:
            _rezipped(path, lambda content: content[:2] + code + content[2:])
        else:
            start = b"\x80\x02ccollections"
            path.write_bytes(path.read_bytes().replace(start, start[:2] + code + start[2:], 1))
        with pytest.raises(ValueError, match=f"{path} is damaged or not a checkpoint: .*{message}"):
            read_state_dict(path)


def test_a_deflated_torch_file_and_tensors_without_end_are_refused(source, tmp_path):
    path = tmp_path / "net.pt"
    torch.save(source.state_dict(), path)
    _rezipped(path, bytes, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="it is compressed"):
        read_state_dict(path)
    torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)
    with pytest.raises(ValueError, match=r"a of shape \[1048576, 1048576\] repeats fewer numbers"):
        read_state_dict(path)
    torch.save({"a": torch.zeros(3, device="meta")}, path)
    with pytest.raises(ValueError, match="a is no plain tensor"):
        read_state_dict(path)
    (tmp_path / "net.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=r"net\.safetensors is damaged .*: a header of 1099511627776 bytes"):
        read_state_dict(tmp_path / "net.safetensors")


def test_missing_and_unexpected_keys_are_listed_and_the_model_is_untouched(source, tmp_path):
    state = source.state_dict()
    state["fc.weight"] = state.pop("head.weight")
    state["fc.bias"] = state.pop("head.bias")
    torch.save(state, tmp_path / "w.pth")
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = error_of(load_weights, model, tmp_path / "w.pth")
    assert message.endswith("missing keys: head.weight, head.bias; unexpected keys: fc.weight, fc.bias")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_of_many_keys_the_first_are_listed(tmp_path):
    torch.save({f"key{number}": torch.ones(1) for number in range(9)}, tmp_path / "w.pth")
    message = error_of(load_weights, make_model(), tmp_path / "w.pth")
    assert "missing keys: convolution.weight, convolution.bias, norm.weight, norm.bias and 4 more;" in message
    assert message.endswith("unexpected keys: key0, key1, key2, key3 and 5 more")


def test_not_strict_loads_the_keys_that_are_in_both_if_there_are_any(source, tmp_path):
    state = source.state_dict()
    state["aux.weight"] = state.pop("head.weight")
    torch.save(state, tmp_path / "some.pth")
    model = make_model()
    head = model.head.weight.clone()
    load_weights(model, tmp_path / "some.pth", strict=False)
    assert torch.equal(model.convolution.weight, source.convolution.weight)
    assert torch.equal(model.head.weight, head)
    torch.save({"aux.weight": torch.ones(1)}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"none\.pth has no key of this model.*its keys: aux\.weight"):
        load_weights(model, tmp_path / "none.pth", strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_another_number_of_classes_is_said_in_so_many_words(strict, source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: the weights have 10 classes, the model 100$"):
        load_weights(make_model(100), tmp_path / "w.pth", strict=strict)


@pytest.mark.parametrize("name", ["resnet8", "resnet8_aux", "MobileNetV2", "timm:deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("classes", [3, 5])
def test_a_classifier_may_be_kept_and_the_files_be_of_any_classes(name, classes, tmp_path):
    """Also where the number of classes is the same."""
    args = {"img_size": 32, "depth": 1} if name.startswith("timm:") else {}
    theirs = create_model(name, classes, **args).state_dict()
    torch.save({"net": theirs}, tmp_path / "net.pt")
    model = create_model(name.removesuffix("_aux"), 3, **args)
    before = copy.deepcopy(model.state_dict())
    load_weights(model, tmp_path / "net.pt", keep_classifier=True)
    own = tuple(f"{part}." for part in find_classifier(model))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith(own) else backbone_weights(theirs)[key]), key


def test_a_classifier_that_is_kept_tells_nets_apart_all_the_same(tmp_path):
    """Of the two MobileNetV2 nothing else differs."""
    torch.save(create_model("mobilenetV2", 5).state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="the file is of mobilenetV2, HSAKD's own"):
        load_weights(create_model("MobileNetV2", 3), tmp_path / "net.pt", keep_classifier=True)


def test_a_net_that_names_no_classifier(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="Sequential names no classifier: it needs a method get_classifier"):
        load_weights(make_model(), tmp_path / "net.pt", keep_classifier=True)


def test_other_shapes_are_listed(source, tmp_path):
    state = source.state_dict()
    state["convolution.weight"] = torch.ones(4, 1, 3, 3)
    state["head.weight"] = torch.ones(10, 8)
    torch.save(state, tmp_path / "w.pth")
    message = error_of(load_weights, make_model(), tmp_path / "w.pth")
    assert "convolution.weight [4, 1, 3, 3] instead of [4, 3, 3, 3]" in message
    assert "head.weight [10, 8] instead of [10, 4]" in message


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_that_are_not_finite_are_named_and_the_model_is_untouched(value, kind, suffix, source, tmp_path):
    source.norm.running_var[1] = value
    source.head.bias.data[3] = value
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), str(path))
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=f"{path}: norm.running_var holds {kind}, as do 1 more of its tensors: the run"
    ):
        load_weights(model, path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_infinities_that_the_model_itself_holds_are_no_damage(source, tmp_path):
    for model in (source, other := make_model()):
        model.register_buffer("mask", torch.full((2,), float("-inf")))
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    load_weights(other, tmp_path / "weights.pt")
    assert torch.equal(other.head.weight, source.head.weight)


def test_other_features_of_the_last_layer_are_a_matter_of_shape_not_of_classes(source, tmp_path):
    state = source.state_dict()
    state["head.weight"] = torch.ones(12, 8)
    torch.save(state, tmp_path / "w.pth")
    assert "head.weight [12, 8] instead of [10, 4]" in error_of(load_weights, make_model(), tmp_path / "w.pth")


# ------------------------------------------------------------------------------------ nets with auxiliary heads


@pytest.fixture(scope="module")
def nets():
    """A net with auxiliary heads and a plain one of the kind, with other weights."""
    torch.manual_seed(0)
    return create_model("resnet8_aux", 3), create_model("resnet8", 3)


def test_a_published_file_fills_a_net_with_heads_and_a_plain_one_with_its_backbone(nets, tmp_path):
    headed, plain = map(copy.deepcopy, nets)
    torch.save({"net": prefixed(nets[0].state_dict(), "module."), "acc": 77.2}, tmp_path / "w.pth.tar")
    nn.init.zeros_(headed.auxiliary_classifier.fc1.weight)
    load_weights(headed, tmp_path / "w.pth.tar")
    assert_same(headed, nets[0])
    load_weights(plain, tmp_path / "w.pth.tar")
    assert_same(plain, nets[0].backbone)
    exported = backbone_weights(nets[0].state_dict())
    assert list(exported) == list(plain.state_dict())
    assert all(torch.equal(exported[key], value) for key, value in plain.state_dict().items())
    assert list(backbone_weights(plain.state_dict())) == list(plain.state_dict())


def test_a_plain_net_becomes_the_backbone_of_one_with_heads(nets, tmp_path):
    headed = copy.deepcopy(nets[0])
    torch.save({"model": nets[1].state_dict()}, tmp_path / "w.pth")
    load_weights(headed.backbone, tmp_path / "w.pth")
    assert_same(headed.backbone, nets[1])
    assert_same(headed.auxiliary_classifier, nets[0].auxiliary_classifier)
    with pytest.raises(ValueError, match="of a net without auxiliary heads: dalikd train --freeze_backbone true"):
        load_weights(headed, tmp_path / "w.pth")


@pytest.fixture(scope="module")
def pair(nets, tmp_path_factory):
    """The file of two nets that learned together, as published ones are, and the nets."""
    torch.manual_seed(1)
    both = nn.ModuleDict({"net1": copy.deepcopy(nets[0]), "net2": create_model("resnet8_aux", 3)})
    path = tmp_path_factory.mktemp("pair") / "resnet8_resnet8.pth.tar"
    torch.save({"net": both.state_dict(), "acc": 78.2, "epoch": 239, "optimizer": {"state": {}}}, path)
    return path, both


@pytest.mark.parametrize("name", ["net1", "net2"])
@pytest.mark.parametrize("place", ["file", "tar", "safetensors"])
def test_of_a_pairs_file_one_net_is_named(pair, name, place, tmp_path):
    path, both = pair
    if place == "tar":
        with tarfile.open(tmp_path / "pairs.tar", "w") as archive:
            archive.add(path, f"pairs/{path.name}")
        path = f"{tmp_path / 'pairs.tar'}:{path.name}"
    elif place == "safetensors":
        path = tmp_path / "pair.safetensors"
        save_file(prefixed(both.state_dict(), "module."), path)
    headed, plain = create_model("resnet8_aux", 3), create_model("resnet8", 3)
    for net, part in ((headed, both[name]), (plain, both[name].backbone)):
        load_weights(net, f"{path}:{name}")
        assert_same(net, part)
    load_weights(headed.backbone, f"{path}:{name}")
    assert known_weights.file_sha256(f"{path}:{name}") == known_weights.file_sha256(path)


def test_a_pairs_file_without_a_name_and_a_name_without_a_pair_are_refused(pair, nets, tmp_path):
    path, _ = pair
    for wrong in ("", ":net0"):
        with pytest.raises(ValueError, match=rf"holds 2 nets: name one of them, {path}:net1 or {path}:net2$"):
            load_weights(nets[1], f"{path}{wrong}")
    torch.save(nets[1].state_dict(), alone := tmp_path / "alone.pth")
    with pytest.raises(ValueError, match=r"alone\.pth holds one net alone: leave out :net1$"):
        read_state_dict(f"{alone}:net1")
    with pytest.raises(FileNotFoundError, match=r"no weights file .*absent\.pth$"):
        read_state_dict(f"{tmp_path / 'absent.pth'}:net1")
    odd = tmp_path / "odd:net1"  # a file of that name
    torch.save(nets[1].state_dict(), odd)
    assert read_state_dict(odd).keys() == nets[1].state_dict().keys()
    assert read_origin(f"{path}:net1") == Origin()


@pytest.mark.parametrize(("file", "net"), [("MobileNetV2", "mobilenetV2"), ("mobilenetV2", "MobileNetV2")])
@pytest.mark.parametrize("suffix", ["", "_aux"])
def test_the_two_mobilenets_are_told_apart(file, net, suffix, tmp_path):
    torch.save(create_model(f"{file}{suffix}", 3, width=0.1).state_dict(), tmp_path / "w.pth")
    message = error_of(load_weights, create_model(f"{net}{suffix}", 3, width=0.1), tmp_path / "w.pth")
    assert "the file is of " + file + ("," if file == "MobileNetV2" else ", HSAKD's own,") in message
    with pytest.raises(ValueError, match=f"the file is of {file}, "):
        load_weights(create_model(f"{net}_aux", 3, width=0.1).backbone, tmp_path / "w.pth")


def test_classes_of_heads_are_counted_and_put_in_order_too(nets, tmp_path):
    torch.save(create_model("resnet8_aux", 5).state_dict(), tmp_path / "w.pth")
    message = error_of(load_weights, nets[0], tmp_path / "w.pth")
    assert message.endswith("the weights have 5 classes, the model 3")
    other, images = copy.deepcopy(nets[0]).eval(), torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match="another order"):
        other.load_state_dict(order_classes(nets[0].state_dict(), other, [2, 0, 1], "w.pth"))
    with torch.no_grad():
        given, ordered = copy.deepcopy(nets[0]).eval()(images), other(images)
    torch.testing.assert_close(ordered.logits, given.logits[:, [2, 0, 1]])
    for one, head in zip(given.heads, ordered.heads, strict=True):
        torch.testing.assert_close(head, one[:, [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]])


# ------------------------------------------------------------------------------------------------- known files


@pytest.fixture
def published(source, tmp_path, monkeypatch):
    """The path of a file that is on the list of known ones."""
    path = tmp_path / "net-1.pt"
    torch.save({"state_dict": source.state_dict()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    normalisation = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    entry = KnownWeights(path.name, digest[:8], "net1", "CIFAR-10", normalisation, 90.0, "https://example.org")
    monkeypatch.setattr(known_weights, "KNOWN", (entry,))
    return path


def test_a_known_file_that_is_damaged_is_not_opened(published):
    published.write_bytes(published.read_bytes()[:-200])
    assert "is a damaged download: " in error_of(read_state_dict, published)
    assert "is a damaged download: " in error_of(load_weights, make_model(), published)


def test_errors_of_a_known_file_say_what_it_is(published):
    known = "; the file is net1, trained on CIFAR-10 (https://example.org)"
    message = error_of(load_weights, make_model(100), published)
    assert message == f"{published}: the weights have 10 classes, the model 100{known}"
    message = error_of(load_weights, nn.Sequential(nn.Linear(2, 3)), published)
    assert "is not of this model" in message
    assert message.endswith(known)


def test_a_checksum_is_checked_before_the_file_is_opened(source, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(source.state_dict(), path)
    model = make_model()
    load_weights(model, path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert_same(model, source)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"w\.pth is damaged or another file: its SHA-256 is "):
        load_weights(model, path, sha256="0" * 64)


def test_how_weights_were_trained_comes_from_the_list_or_from_the_files_metadata(published, source, tmp_path):
    assert read_origin(published).normalisation == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert read_origin(published).class_names == published_classes("CIFAR-10")
    path = tmp_path / "w.safetensors"
    former = '"mean": [0.1, 0.2, 0.7], "std": [0.3, 0.2, 1]'
    save_file(source.state_dict(), path, {"normalisation": f"{{{former}}}"})
    assert read_origin(str(path)) == (((0.1, 0.2, 0.7), (0.3, 0.2, 1.0)), None, False)
    save_file(source.state_dict(), path, {"dalikd": f'{{{former}, "class_names": ["a", "caf\\u00e9"]}}'})
    assert read_origin(path) == (((0.1, 0.2, 0.7), (0.3, 0.2, 1.0)), ("a", "caf\u00e9"), False)
    save_file(source.state_dict(), path)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert read_origin(path) == read_origin(tmp_path / "w.pth") == Origin()


@pytest.mark.parametrize(
    "text",
    ["", "1", '{"mean": [0.5]}', '{"mean": 1, "std": 2}', '{"mean": ["x"], "std": [1]}',
     '{"mean": [0.5], "std": [1], "class_names": [1]}'],
)  # fmt: skip
def test_metadata_that_say_nothing_are_named(text, source, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(source.state_dict(), path, {"dalikd": text})
    assert 'its metadata "dalikd" has no lists "mean", "std" and "class_names"' in error_of(read_origin, path)


def test_the_origin_is_asked_of_files_only(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file"):
        read_origin(tmp_path / "absent.pth")
    (tmp_path / "w.safetensors").write_bytes(b"hello")
    assert "is damaged or not a safetensors file" in error_of(read_origin, tmp_path / "w.safetensors")


ABC = Origin(class_names=("a", "b", "c"))
PUBLISHED = Origin(class_names=("pickup_truck", "maple_tree", "worm"), published=True)


@pytest.mark.parametrize(
    ("origin", "classes", "expected"),
    [
        (Origin(), ["x", "y"], None),
        (ABC, ["a", "b", "c"], None),
        (ABC, ["c", "a", "b"], [2, 0, 1]),
        (ABC, ["b", "c", "d"], "only of the weights: a; only of the data: d; b is class 1 of the weights and 0 of the"),
        (ABC, ["A", "b", "c"], "only of the weights: a; only of the data: A"),
        (ABC, ["a", "b"], "only of the weights: c; give weights that were trained"),
        (PUBLISHED, ["Pickup Truck", "maple-tree", "worm"], None),
        (PUBLISHED, ["maple tree", "pickup truck", "worm"], [1, 0, 2]),
        (PUBLISHED, ["1", "2", "3"], None),  # names of their own: nothing is known
        (PUBLISHED, ["pickup_truck", "oak", "worm"], None),
        (PUBLISHED, ["maple_tree", "oak", "worm"], "maple tree is class 1 of the weights and 0 of the data"),
    ],
)
def test_weights_are_for_certain_classes(origin, classes, expected):
    """dalikd's own know their classes; folders for published ones may have other names, but not in another order."""
    if not isinstance(expected, str):
        assert class_order(origin, classes, "w.pt") == expected
        return
    with pytest.raises(ValueError, match=rf"^w\.pt is for other classes than the data .*{re.escape(expected)}"):
        class_order(origin, classes, "w.pt")
