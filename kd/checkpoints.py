"""Weights made elsewhere."""

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dalikd.kd.backbones.layers import Normalisation
from dalikd.kd.known_weights import (
    NET_NAME,
    check_sha256,
    file_and_member,
    file_and_net,
    identify,
    open_weights,
    published_classes,
)
from dalikd.kd.rotation import TURNS
from dalikd.pipelines.files import LARGEST_TEXT, parse_json

__all__ = [
    "ORIGIN_KEY",
    "Origin",
    "backbone_weights",
    "class_order",
    "find_classifier",
    "has_heads",
    "load_torch",
    "load_weights",
    "order_classes",
    "read_origin",
    "read_state_dict",
]

#: where the metadata of a safetensors file say how its net was trained, as JSON: the lists "mean", "std", "class_names"
ORIGIN_KEY = "dalikd"
_FORMER_KEY = "normalisation"  # the same without class names

# where trainers keep the state_dict, in the order in which they are looked for: averaged weights last
_CONTAINERS = ("model", "net", "state_dict", "weight", "model_state_dict", "state_dict_ema", "model_ema")
_BACKBONE, _HEADS = "backbone.", "auxiliary_classifier."  # of nets with auxiliary heads
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
_SHOWN_KEYS = 4
_LARGEST_PICKLE = 32 << 20  # bytes of a torch file that describe its tensors; the largest nets take some 100,000
_MOST_OPERATIONS = 2_000_000  # of a pickle; a net of 1,000 tensors takes 50,000
_MOST_TUPLES = 10_000  # in a row, of which none is used: the hash of 300,000 in each other overflows the stack

_LONGEST_NAME = 200  # of a class in a torch file
_TAKE_TUPLES = ("REDUCE", "BINPERSID", "BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS")
_PICKLES_BEFORE_TENSORS = 4  # of a torch file that is no zip: two numbers, what machine it is of, and its content


class Origin(NamedTuple):
    """What is known of how the weights of a file were trained; None where the file does not say."""

    normalisation: Normalisation | None = None  # of the images
    class_names: tuple[str, ...] | None = None  # index = logit
    published: bool = False  # known by their content or path: folders of the same classes may have other names


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    strict: bool = True,
    sha256: str | None = None,
    class_names: Sequence[str] | None = None,
    keep_classifier: bool = False,
) -> None:
    """Loads the weights of a file into a model; the model is untouched if they do not fit.

    Batch norms' `num_batches_tracked` may be absent, as in files older than torch 0.4.1. Of a net with auxiliary heads
    a net without takes the backbone.

    Args:
        model: a net whose keys the file uses, possibly with the prefixes that `read_state_dict` removes.
        path: a file that `read_state_dict` can read.
        strict: whether every key must be in both; if not, at least one must.
        sha256: checksum that the file must have, or its leading digits.
        class_names: of the data, index = label. A file of the same classes in another order is loaded in theirs, with
            a warning; one that does not know its classes is taken as it is.
        keep_classifier: leave the model's classifier as it is; the file's has the same keys, and any classes.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: as `read_state_dict`; ValueError also if the keys or the
            shapes are not those of the model, or the classes not those of the data; or a weight is NaN or infinite; or
            the classifier is to be kept and the model names none. It says what the file is, where that is known.
    """
    weights = read_state_dict(path, sha256=sha256)
    order = None if class_names is None else class_order(read_origin(path), class_names, str(path))
    expected = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    if not has_heads(expected):
        weights = backbone_weights(weights)
    kept = tuple(f"{name}." for name in find_classifier(model)) if keep_classifier else ()
    try:
        _check_keys(weights, expected, path, strict)
        weights = {key: value for key, value in weights.items() if not key.startswith(kept)}
        _check_shapes(weights, expected, path, _last_layers(model))
        _check_numbers(weights, expected, path)
    except ValueError as error:
        known = identify(path) or _known_by_keys(weights, model)
        raise ValueError(f"{error}; the file is {known}" if known else str(error)) from None
    if order is not None:
        weights = order_classes(weights, model, order, str(path))
    model.load_state_dict(weights, strict=False)


def find_classifier(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that make a net's logits of its pooled features, by their names in it; most nets have one.

    Raises:
        ValueError: the net names none.
    """
    layers = _named_classifiers(model)
    named = {name: module for name, module in model.named_modules() if any(module is layer for layer in layers)}
    if not named:
        raise ValueError(f"{type(model).__name__} names no classifier: it needs a method get_classifier that gives it")
    return named


def _named_classifiers(model: nn.Module) -> list[nn.Module]:
    found: Any = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    return [found] if isinstance(found, nn.Module) else list(found or ())


def backbone_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain net's state_dict of that of an `AuxiliaryNet`, without its heads; any other as it is."""
    if not has_heads(weights):
        return weights
    return {key.removeprefix(_BACKBONE): value for key, value in weights.items() if key.startswith(_BACKBONE)}


def has_heads(weights: dict[str, Tensor]) -> bool:
    """Whether a state_dict is of a net with auxiliary heads."""
    return any(key.startswith(_HEADS) for key in weights)


def _known_by_keys(weights: dict[str, Tensor], model: nn.Module) -> str | None:
    """What weights of other keys than the model's are, where that can be told."""
    net = getattr(model, "backbone", model)
    if net is not model and not has_heads(weights):
        return "of a net without auxiliary heads: dalikd train --freeze_backbone true trains heads on it"
    telltales: dict[str, str] = getattr(net, "telltale_keys", {})
    return next((what for key, what in telltales.items() if not {key, _BACKBONE + key}.isdisjoint(weights)), None)


def class_order(origin: Origin, class_names: Sequence[str], what: str) -> list[int] | None:
    """Where the classes of a data set stand among those that weights are for.

    Args:
        origin: of the weights.
        class_names: of the data, index = label.
        what: the weights, for messages.

    Returns:
        for each label the logit of its class; None where the two are the same already, or nothing is known.

    Raises:
        ValueError: the weights are for other classes. Published ones are known by the names of their data set, and
            folders may have other names: theirs must differ only in order, or stand at the same places where they meet.
    """
    if origin.class_names is None:
        return None
    theirs, ours = list(origin.class_names), list(class_names)
    if origin.published:  # spelling is each copy's own
        theirs, ours = ([re.sub(r"[\W_]+", " ", name).casefold() for name in names] for names in (theirs, ours))
    if theirs == ours:
        return None
    if sorted(theirs) == sorted(ours) and len(set(ours)) == len(ours):
        return [theirs.index(name) for name in ours]
    common = set(theirs) & set(ours)
    if not origin.published or any(theirs.index(name) != ours.index(name) for name in common):
        raise ValueError(
            f"{what} is for other classes than the data ({len(theirs)} and {len(ours)}): "
            f"{_class_difference(theirs, ours)}; give weights that were trained for these classes, or the data of those"
        )
    return None


def order_classes(weights: dict[str, Tensor], model: nn.Module, order: Sequence[int], what: str) -> dict[str, Tensor]:
    """Weights whose logits come in the order of other labels; a warning says so.

    Args:
        weights: a state_dict of the model.
        model: timm names its last layers, other nets have one, their last linear layer; each auxiliary head has one
            more, of several joint classes for each class.
        order: for each label of the data its logit, as `class_order` gives it.
        what: the weights, for messages.

    Raises:
        ValueError: the last layer is not found, or is neither linear nor a convolution.
    """
    names = _last_layers(model)
    last_layers = [model.get_submodule(name) for name in names]
    if not names or not all(
        isinstance(layer, nn.Linear | nn.Conv2d) and len(layer.weight) in (len(order), TURNS * len(order))
        for layer in last_layers
    ):
        raise ValueError(
            f"{what} has its classes in another order than the data, and the last layer of this model is not known: "
            "name the class folders so that they come in the order of the weights"
        )
    warnings.warn(f"{what} has the data's classes in another order: its last layer is put into theirs", stacklevel=2)
    keys = [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    rows = torch.tensor(order)
    return {
        key: value.unflatten(0, (len(order), -1))[rows].flatten(0, 1) if key in keys else value
        for key, value in weights.items()
    }


def _class_difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    sides = (("of the weights", theirs, ours), ("of the data", ours, theirs))
    parts = [
        f"only {where}: {_listed(missing)}"
        for where, names, others in sides
        if (missing := [name for name in names if name not in others])
    ]
    moved = [
        f"{name} is class {theirs.index(name)} of the weights and {label} of the data"
        for label, name in enumerate(ours)
        if name in theirs and theirs.index(name) != label
    ]
    return "; ".join([*parts, *moved[: 1 if parts else _SHOWN_KEYS]])


def read_origin(path: str | Path) -> Origin:
    """How a file's weights were trained, where that is known.

    Published files that are known say it by their content or their path, those that this project writes in their
    metadata.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: as `read_state_dict`.
    """
    path = _existing(path)
    known = identify(path)
    if known is not None:
        return Origin(known.normalisation, published_classes(known.data), published=True)
    if path.suffix != ".safetensors":
        return Origin()
    metadata = _read_metadata(path)
    key = ORIGIN_KEY if ORIGIN_KEY in metadata else _FORMER_KEY
    return _parse_origin(metadata[key], path, key) if key in metadata else Origin()


def read_state_dict(path: str | Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU; no code in the file is run.

    Reads safetensors (by their suffix) and torch files that hold a state_dict, plain or under one of the usual names
    ("model", "net", "state_dict", "weight", ...; of several the first in this order, averaged weights last).
    The prefixes "module." and "_orig_mod." are removed where every key has them.

    Args:
        path: the file; a torch file may be a member of a tar, FILE.tar:MEMBER. Of nets that learned together and lie
            in one file, all their keys beginning with "net1." or "net2.", FILE:net1 takes the first.
        sha256: checksum that it must have, or its leading digits; it is read only if it has.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: the file is damaged, has another checksum, is not a checkpoint, needs unsafe unpickling, or holds
            no state_dict; or it holds several nets and none of them is named, or the other way round.
    """
    net, path = file_and_net(path)[1], _existing(path)
    if sha256 is not None:
        check_sha256(path, sha256)
    identify(path)  # a known file's name with another content is an error
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch_file(path)
    return _one_net(_strip_prefixes(_check_tensors(_find_state_dict(content, path), path)), net, path)


def _existing(path: str | Path) -> Path:
    path, (file, member) = file_and_net(path)[0], file_and_member(path)
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder: name the weights file in it")
    if not file.is_file():
        raise FileNotFoundError(f"there is no weights file {file}")
    if member.endswith(".safetensors"):
        raise ValueError(f"{path} is a safetensors file in a tar: unpack it, and name it alone")
    return path


def _read_metadata(path: Path) -> dict[str, str]:
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {_first_line(error)}") from error


def _parse_origin(text: str, path: Path, key: str) -> Origin:
    try:
        content = parse_json(text, str(path))
        names = content.get("class_names")
        if names is not None and not all(isinstance(name, str) for name in names):
            raise TypeError
        mean, std = (None if content[part] is None else tuple(map(float, content[part])) for part in ("mean", "std"))
        normalisation = None if mean is None or std is None else Normalisation(mean, std)
        return Origin(normalisation, None if names is None else tuple(names))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f'{path}: its metadata "{key}" has no lists "mean", "std" and "class_names"') from error


def _check_header(path: Path) -> None:
    """A safetensors file begins with the length of its header, which takes some ten times as much memory."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_TEXT:
        raise ValueError(f"{path} is damaged or not a safetensors file: a header of {length} bytes")


def _read_safetensors(path: Path) -> Any:
    _check_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {_first_line(error)}") from error


def _read_torch_file(path: Path) -> Any:
    with open_weights(path) as file:
        try:
            return load_torch(file)
        except Exception as error:  # unpickling foreign bytes can raise anything, OSError for a truncated zip
            raise ValueError(_why_unreadable(path, error)) from error


def load_torch(file: BinaryIO) -> Any:
    """What a torch file holds, on the CPU; no code in it is run, and it takes memory in proportion to its size.

    torch refuses code, but not what a few bytes can ask for: deflated zeros, bytes by their number, the same bytes
    encoded again and again, tuples in tuples until their hash overflows the stack.

    Raises:
        Exception: anything, of a damaged file; ValueError of one that was made to do harm.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("it is compressed, as torch.save writes no file")
            if sum(member.file_size for member in members) > size:
                raise ValueError("its parts are larger than the file")
            for member in members:
                if member.filename.endswith(".pkl"):
                    with archive.open(member) as pickled:
                        _check_pickle(pickled.read())
    else:
        file.seek(0)
        start = file.read(_LARGEST_PICKLE + 1)
        for _ in range(_PICKLES_BEFORE_TENSORS):
            start = start[_check_pickle(start) :]
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's advice in it is to run the code
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise (_UnsafeError(f"needs unsafe unpickling ({refused[1]})") if refused else error) from None


class _UnsafeError(ValueError):
    """A file names code."""


def _check_pickle(content: bytes) -> int:
    """Look through a pickle's operations; returns its length.

    Raises:
        ValueError: it asks for more than data need.
    """
    tuples = 0
    for operations, (operation, argument, place) in enumerate(pickletools.genops(content[:_LARGEST_PICKLE])):
        tuples += operation.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
        if operation.name in _TAKE_TUPLES:
            tuples = 0
        if tuples > _MOST_TUPLES or operations > _MOST_OPERATIONS:
            raise ValueError("its structure is larger than that of any net's weights")
        if operation.name == "GLOBAL" and len(str(argument)) > _LONGEST_NAME:  # torch's search in it takes its square
            raise ValueError(f"it calls {str(argument)[:40]}…, which weights have no need of")
        if operation.name == "GLOBAL" and str(argument).split(" ")[-1] in ("bytearray", "encode"):
            raise ValueError(f"it calls {str(argument).replace(' ', '.')}, which weights have no need of")
        if operation.name == "STOP":
            return (place or 0) + 1
    raise ValueError("its pickle has no end")


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, _UnsafeError):
        return (
            f"{path} {error}: save its state_dict alone, "
            "torch.save(model.state_dict(), path), where the file comes from"
        )
    return f"{path} is damaged or not a checkpoint: {type(error).__name__}, {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if _is_state_dict(content):
        return content
    keys = [str(key) for key in content] if isinstance(content, dict) else []
    for name in _CONTAINERS:
        if name in keys and _is_state_dict(content[name]):
            return content[name]
    has = f"its keys are {_listed(keys)}" if keys else f"it is a {type(content).__name__}"
    raise ValueError(f"{path} holds no state_dict, plain or under {', '.join(_CONTAINERS)}: {has}")


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def _check_tensors(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Refuse what is no plain array of numbers, and what repeats a few numbers without end."""
    for key, value in weights.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(f"{path}: {key} is no plain tensor: save the net's own state_dict")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: {key} of shape {list(value.shape)} repeats fewer numbers: save it contiguous")
    return weights


def _strip_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = dict(weights)
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _one_net(weights: dict[str, Tensor], net: str, path: Path) -> dict[str, Tensor]:
    """The net that is named, of a file of several; of any other file the only one."""
    nets = list(dict.fromkeys(key.partition(".")[0] for key in weights))
    if len(nets) < 2 or not all(re.fullmatch(NET_NAME, name) for name in nets):
        if net:
            raise ValueError(f"{path} holds one net alone: leave out :{net}")
        return weights
    if net not in nets:
        raise ValueError(f"{path} holds {len(nets)} nets: name one of them, {' or '.join(f'{path}:{n}' for n in nets)}")
    return {key.removeprefix(f"{net}."): value for key, value in weights.items() if key.startswith(f"{net}.")}


def _check_keys(weights: dict[str, Tensor], expected: dict[str, Tensor], path: str | Path, strict: bool) -> None:
    missing = [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in expected]
    if strict and (missing or unexpected):
        kinds = {"missing keys": missing, "unexpected keys": unexpected}
        differences = "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys)
        raise ValueError(f"{path} is not of this model, check the model's name: {differences}")
    if weights.keys().isdisjoint(expected):
        raise ValueError(f"{path} has no key of this model, check the model's name; its keys: {_listed(unexpected)}")


def _check_shapes(
    weights: dict[str, Tensor], expected: dict[str, Tensor], path: str | Path, last_layers: list[str]
) -> None:
    shapes = {
        key: (list(weights[key].shape), list(value.shape))
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    }
    if not shapes:
        return
    keys = {f"{name}.{part}" for name in last_layers for part in ("weight", "bias")}
    classes = shapes.get(f"{last_layers[0]}.weight") if last_layers else None
    if classes and shapes.keys() <= keys and all(theirs[1:] == ours[1:] for theirs, ours in shapes.values()):
        raise ValueError(f"{path}: the weights have {classes[0][0]} classes, the model {classes[1][0]}")
    differences = _listed(f"{key} {theirs} instead of {ours}" for key, (theirs, ours) in shapes.items())
    raise ValueError(f"{path} has other shapes than this model, check the model's name and options: {differences}")


def _check_numbers(weights: dict[str, Tensor], expected: dict[str, Tensor], path: str | Path) -> None:
    """Raises ValueError where a weight is not finite. A model's own buffers may hold infinities, such as a mask."""
    bad = [
        key
        for key, value in expected.items()
        if key in weights and not torch.isfinite(weights[key]).all() and torch.isfinite(value).all()
    ]
    if bad:
        kind = "NaN" if torch.isnan(weights[bad[0]]).any() else "infinity"
        more = f", as do {len(bad) - 1} more of its tensors" if bad[1:] else ""
        raise ValueError(
            f"{path}: {bad[0]} holds {kind}{more}: the run that wrote it has diverged, or the file is damaged; give "
            "weights of before that"
        )


def _last_layers(model: nn.Module) -> list[str]:
    """Names of the layers that give logits; those of auxiliary heads come last."""
    layers = [
        part for layer in _named_classifiers(model) for part in (layer if isinstance(layer, nn.Sequential) else [layer])
    ]
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    heads = [name for name in linear if name.startswith(_HEADS) and name.count(".") == 1]
    return (names or linear[-1:]) + heads


def _listed(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = len(keys) - _SHOWN_KEYS
    return ", ".join(keys[:_SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")
