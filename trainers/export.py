"""`dalikd export`: the net of a run alone, as files that need no dalikd, checked against the net on real images."""

import contextlib
import io
import logging
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalisation, Normalized
from dalikd.kd.checkpoints import load_weights, read_origin
from dalikd.kd.known_weights import file_sha256
from dalikd.pipelines.data import evaluation_view
from dalikd.pipelines.datasets.info import DATASET_INFO, default_statistics
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.files import names_in, write_atomically
from dalikd.trainers.checkpoint import save_weights
from dalikd.trainers.launch import start
from dalikd.trainers.options import RunOptions
from dalikd.trainers.runs import read_run_files
from dalikd.trainers.setup import open_run
from dalikd.trainers.tracking import check_writable, write_json

__all__ = [
    "Format",
    "Parity",
    "SavedNet",
    "check_formats",
    "check_login",
    "check_target",
    "open_images",
    "open_net",
    "push_folder",
    "write_export",
]

Format = Literal["safetensors", "onnx", "torch"]

_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_FILES = {"README.md", "config.json", "model.safetensors", "model.onnx", "model.pt2"}
_TIMM = "timm:"
_OF_SHAPES = ("fixed_input_size", "min_input_size", "pool_size", "first_conv", "classifier")  # in timm's config


class SavedNet(NamedTuple):
    """A net of a run, as it was saved.

    Attributes:
        name: its architecture, without auxiliary heads, which are not exported.
        args: options of the architecture.
        net: takes pixels; float32, on the CPU, in eval mode.
        class_names: index = logit.
        figures: its loss and accuracy on the validation images; {} where the run does not say.
        config: of the run.
        results: of the run; {} where there are none yet.
        epoch: which weights: last or best.
        file: that they are read from.
        unfinished: what is to be said of a run that is not at its end; "" of any other.
    """

    name: str
    args: dict[str, Any]
    net: Normalized
    class_names: tuple[str, ...]
    figures: dict[str, Any]
    config: dict[str, Any]
    results: dict[str, Any]
    epoch: str
    file: Path
    unfinished: str


class Parity(NamedTuple):
    """How near an exported graph comes to the net."""

    difference: float  # the largest one of any two logits
    agreement: float  # share of the images with the same top class
    images: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.2g}, top-1 agreement {100 * self.agreement:.2f} % on "
            f"{self.images} validation images"
        )


def check_formats(formats: Sequence[str]) -> None:
    """Raises ValueError: a format twice, or what ONNX needs is not installed."""
    if len(set(formats)) < len(formats):
        raise ValueError(f"--format {' '.join(formats)}: name each once")
    missing = [name for name in _NEEDED if find_spec(name) is None] if "onnx" in formats else []
    if missing:
        raise ValueError(f"--format onnx needs {', '.join(missing)}: pip install 'dalikd[onnx]'")


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raises ValueError: the folder holds something, and is not an export that is to be replaced."""
    check_writable("--output", folder / "config.json")
    if not (found := names_in(folder)):
        return
    if not {"config.json"} <= found <= _FILES:
        raise ValueError(f"--output {folder} holds other files and is not touched: name another folder")
    if not overwrite:
        raise ValueError(f"--output {folder} holds an export: name another folder, or replace it with --overwrite true")


# ------------------------------------------------------------------------------------------------- the net


def open_net(folder: Path, epoch: Literal["last", "best"] = "last", net: str | None = None) -> SavedNet:
    """A net out of a run folder.

    Args:
        folder: of the run.
        epoch: which weights.
        net: of several nets, or of a net and its average, the name of its file; default: the one that the run's figures
            are of.

    Raises:
        ValueError: it is no run folder, has no such weights, or they are not what the run has written.
        OSError: a file cannot be read.
    """
    config, results = read_run_files(folder, str(folder))
    there = sorted(path.stem for path in (folder / epoch).glob("*.safetensors"))
    evaluated = Path(str(results.get("evaluated") or "student.safetensors")).stem
    chosen = net or (evaluated if evaluated in there or len(there) != 1 else there[0])
    if chosen not in there:
        option, has = (
            f"--net {net} " if net else "",
            f"there are {', '.join(there)}" if there else "wait for an epoch's end",
        )
        raise ValueError(f"{option}{folder} has no weights {epoch}/{chosen}.safetensors: {has}")
    file = folder / epoch / f"{chosen}.safetensors"
    written = (results.get("sha256") or {}).get(f"{epoch}/{file.name}")
    if written not in (None, file_sha256(file)):
        raise ValueError(f"{file} is not what the run has written, whose SHA-256 was {written}: restore it")

    name, args, number = str(config["model"]), dict(config.get("model_args") or {}), chosen.removesuffix("-ema")
    peers = config.get("peers")
    if peers and number[3:].isdecimal() and number[:3] == "net" and 0 < int(number[3:]) <= len(peers):
        name, args = str(peers[int(number[3:]) - 1]), {}
    name = name.removesuffix("_aux")
    args.pop("detach_heads", None)
    origin, said = read_origin(file), results.get("normalisation") or {}
    class_names = origin.class_names or tuple(results.get("class_names") or ())
    normalisation = origin.normalisation or (Normalisation(said["mean"], said["std"]) if said else None)
    if not class_names or normalisation is None:
        raise ValueError(f"{file} and results.json name neither classes nor normalisation: no run of dalikd wrote them")
    model = create_model(name, len(class_names), **args)
    load_weights(model, file)

    entry = results.get(epoch) or {}
    val = entry.get("val") or {}
    of_nets = val.get("nets", {}) if chosen.endswith("-ema") == evaluated.endswith("-ema") else {}
    figures = val if chosen == evaluated else of_nets.get(number, {})
    done = f"{results['epochs']:g} epochs are done" if "epochs" in results else "no epoch is done"
    normalized = Normalized(model, *normalisation).float().eval()
    return SavedNet(
        name, args, normalized, class_names, figures, config, results, epoch, file,
        "" if results.get("finished") else f"the run is not finished: {done}",
    )  # fmt: skip


def open_images(options: RunOptions, count: int) -> tuple[View, Tensor | None]:
    """What a run's nets are evaluated on.

    Args:
        options: of the run; on the CPU.
        count: of images; 0: none, and the data set may be gone.

    Returns:
        the view, and uint8 pixels [count, 3, S, S] of images out of the whole validation split.

    Raises:
        ValueError: the data set is not there, or not as it should be; says what works without it.
    """
    if not count and options.data.name in DATASET_INFO:
        return evaluation_view(options.data, default_statistics(options.data.name)), None
    try:
        setup = open_run(options, start("cpu", "fp32"), "val")
        return setup.val_view, setup.some_val_images(count).pixels.contiguous() if count else None
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error}; the export is compared with the net on validation images: name the data set's folder with "
            "--root, or write --format safetensors alone"
        ) from error


# ----------------------------------------------------------------------------------------------- the files


def write_export(
    folder: Path, saved: SavedNet, formats: Sequence[Format], view: View, images: Tensor | None, *,
    pixels: bool = False, tolerance: float = 1e-4, license: str | None = None, repository: str | None = None,
) -> dict[str, Parity]:  # fmt: skip
    """Write the files of an export into a folder that is there.

    Args:
        folder: where to.
        saved: the net.
        formats: which files: model.safetensors with config.json, model.onnx, model.pt2; README.md comes with all.
        view: what the net has been evaluated on.
        images: uint8 [N, 3, S, S], of the validation split, for the comparison; None where no graph is exported.
        pixels: graphs take uint8 pixels and normalise them; else they take normalised images.
        tolerance: the largest difference of logits.
        license: for the model card.
        repository: on the Hugging Face Hub, for the model card.

    Returns:
        what the comparison has found, by format.

    Raises:
        ValueError: a format cannot express the net, or gives other logits.
        OSError: a file cannot be written.
    """
    found: dict[str, Parity] = {}
    if images is not None:
        model: nn.Module = saved.net if pixels else saved.net.model
        with torch.inference_mode():
            wanted = saved.net(images)
            given = images if pixels else saved.net.normalize(images)
        name, what, level = "pixels" if pixels else "images", "torch.export", logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # the exporters log at length what their one error says
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a graph that fails is printed
                program = torch.export.export(model, (given[:2].clone(),), dynamic_shapes=({0: Dim("batch")},))
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
            for what in (one for one in formats if one != "safetensors"):
                content = _onnx(program, name) if what == "onnx" else _pt2(program)
                found[what] = _compare(what, content, given, wanted)
                if not found[what].difference <= tolerance:  # NaN too
                    break
                write_atomically(folder / ("model.onnx" if what == "onnx" else "model.pt2"), content)
        except OSError:
            raise
        except Exception as error:  # what torch's exporters and onnxruntime cannot do, they say in errors of any kind
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(f"{what} cannot express {saved.name}: {reason}; leave it out of --format") from error
        finally:
            logging.disable(level)
        for what, parity in found.items():
            if not parity.difference <= tolerance:
                raise ValueError(f"{what}: {parity}, above --tolerance {tolerance:g}: nothing is written")
    if "safetensors" in formats:
        save_weights(folder / "model.safetensors", saved.net.model, saved.net.normalisation, saved.class_names)
    write_json(folder / "config.json", _hub_config(saved, view))
    card = _card(saved, formats, view, found, pixels=pixels, license=license, repository=repository)
    write_atomically(folder / "README.md", card.encode())
    return found


def _onnx(program: ExportedProgram, name: str) -> bytes:
    """A graph as ONNX, in one file."""
    exported: Any = torch.onnx.export(program, input_names=[name], output_names=["logits"], verbose=False)
    graph = exported.model_proto.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param  # a symbol such as s77
    for value in (*graph.input, *graph.output, *graph.value_info):
        for side in value.type.tensor_type.shape.dim:
            side.dim_param = side.dim_param.replace(batch, "batch")
    return exported.model_proto.SerializeToString()


def _pt2(program: ExportedProgram) -> bytes:
    """A graph as torch.export.save writes it."""
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _compare(kind: str, content: bytes, given: Tensor, wanted: Tensor) -> Parity:
    """Run what is going to be written, as its users will: all images at once, and one alone.

    Args:
        kind: onnx or torch.
        content: of the file.
        given: what it takes, [N, 3, S, S].
        wanted: logits of the net, [N, C].
    """
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        parts = [session.run(None, {session.get_inputs()[0].name: part.numpy()})[0] for part in (given, given[:1])]
        many, one = map(torch.as_tensor, parts)
    else:
        module = torch.export.load(io.BytesIO(content)).module()
        with torch.inference_mode():
            many, one = module(given), module(given[:1])
    difference = max((many - wanted).abs().max().item(), (one - wanted[:1]).abs().max().item())
    return Parity(difference, (many.argmax(1) == wanted.argmax(1)).double().mean().item(), len(given))


def _hub_config(saved: SavedNet, view: View) -> dict[str, Any]:
    """config.json as timm's hub format has it; of other nets than timm's the same with their own names."""
    source: dict[str, Any] = dict(getattr(saved.net.model, "pretrained_cfg", None) or {})
    shapes = {key: source.get(key) for key in _OF_SHAPES if key in source}
    if tuple(source.get("input_size") or ())[1:] != (view.size, view.size):
        shapes |= {"pool_size": None} if "pool_size" in shapes else {}
    crop, short = view.size / (view.resize or view.size), view.resize or view.size
    while math.floor(view.size / crop) < short:  # so timm finds the short side again
        crop = math.nextafter(crop, 0)
    mean, std = saved.net.normalisation
    features = getattr(saved.net.model, "num_features", None)
    return {
        "architecture": source.get("architecture") or saved.name.removeprefix(_TIMM).partition(".")[0],
        "num_classes": len(saved.class_names),
        **({"num_features": features} if isinstance(features, int) else {}),
        "label_names": list(saved.class_names),
        **({"model_args": saved.args} if saved.args else {}),
        "pretrained_cfg": {
            **shapes,
            "custom_load": False,
            "input_size": [3, view.size, view.size],
            "interpolation": view.interpolation,
            "crop_pct": crop,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": len(saved.class_names),
        },
    }


# ------------------------------------------------------------------------------------------- the model card


def _card(
    saved: SavedNet, formats: Sequence[Format], view: View, found: dict[str, Parity], *,
    pixels: bool, license: str | None, repository: str | None,
) -> str:  # fmt: skip
    """The model card. No path of this machine stands in it."""
    results, config, val = saved.results, saved.config, saved.figures
    of_timm, (mean, std) = saved.name.startswith(_TIMM), saved.net.normalisation
    entry = results.get(saved.epoch) or {}
    loss = config.get("loss") or {}
    fingerprint = results.get("fingerprint") or {}
    data = results.get("data") or config.get("data") or {}
    options = ", ".join(f"{key} {value}" for key, value in (loss.get("init_args") or {}).items())
    teachers = results.get("teachers") or [results.get("teacher") or config.get("teacher") or {}]
    method = str(loss.get("class_path", "")).rpartition(".")[2]
    facts = {
        "net": saved.name + (f", {saved.args}" if saved.args else ""),
        "teacher": "; ".join(filter(None, map(_teacher, teachers))) or "none",
        "method": f"{method}{f' ({options})' if options else ''}"
        if method
        else f"dalikd {results.get('command', '')}".strip(),
        "augmentation": config.get("augmentation"),
        "T. stddev": None if entry.get("t_stddev") is None else f"{entry['t_stddev']:.6f}",
        "data": f"{data.get('name')}, {data.get('train_images', '?')} training images",
        "classes": len(saved.class_names),
        "data fingerprint": ", ".join(f"{split} {digest}" for split, digest in fingerprint.items()) or None,
        "training": f"{results.get('steps')} steps of {config.get('batch_size')} images, seed {config.get('seed')}, "
        f"{config.get('precision')}; weights of the {saved.epoch} epoch ({entry.get('epoch', 'unknown')})",
        "state": saved.unfinished or None,
        "accuracy": f"top-1 {100 * val['top1']:.2f} %, top-5 {100 * val['top5']:.2f} %, loss {val['loss']:.4f} on "
        f"{val['images']} validation images"
        if {"top1", "top5", "loss", "images"} <= val.keys()
        else "not measured",
        "license": license or "not stated",
        **{f"model.{'pt2' if what == 'torch' else what}": str(parity) for what, parity in found.items()},
    }
    rows = "\n".join(f"| {name} | {str(value).replace('|', '/')} |" for name, value in facts.items() if value)
    tags = ["image-classification", "knowledge-distillation", "dalikd", *["timm"] * of_timm]
    head = {**({"license": license} if license else {}), "library_name": "timm" if of_timm else "pytorch"}
    head |= {"pipeline_tag": "image-classification", "tags": tags}
    blocks = _loading(saved, formats, pixels=pixels, repository=repository)
    taken = (
        f"`pixels` is uint8 [N, 3, {view.size}, {view.size}] (NCHW, RGB): the graph normalises."
        if pixels
        else f"`images` is float32 [N, 3, {view.size}, {view.size}] (NCHW, RGB): (pixels / 255 - mean) / std, with "
        f"mean {list(mean)} and std {list(std)}."
    )
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {saved.name.removeprefix(_TIMM)}, {data.get('name')}\n\n"
        f"An image classifier, trained with dalikd. Its logits are those of the {len(saved.class_names)} classes under "
        f"`label_names` in config.json, in that order.\n\n| | |\n|:--|:--|\n{rows}\n\n## How to load it\n\n"
        f"In this folder. Images: short side resized to {view.resize or view.size} ({view.interpolation}), then the "
        f"central {view.size}x{view.size} pixels. In what follows {taken}\n\n"
        + "\n".join(f"{title}:\n\n```python\n{code}```\n" for title, code in blocks.items())
    )


def _teacher(teacher: dict[str, Any]) -> str:
    """Its architecture and where its weights come from, without a path."""
    name, digest = teacher.get("name"), teacher.get("sha256")
    origin = teacher.get("known_as") or name
    if teacher.get("weights") and not teacher.get("known_as"):
        origin = f"{name}, {Path(str(teacher['weights'])).name}"
    return f"{origin}, SHA-256 {digest}" if name and digest else str(origin or "")


def _loading(saved: SavedNet, formats: Sequence[Format], *, pixels: bool, repository: str | None) -> dict[str, str]:
    """Code that loads each file, by what is said before it."""
    given, blocks = "pixels" if pixels else "images", {}
    place = f"hf-hub:{repository}" if repository else "local-dir:."
    if "safetensors" in formats and saved.name.startswith(_TIMM):
        blocks["model.safetensors, by timm; from an image file"] = (
            "import timm\nfrom PIL import Image\n"
            f'model = timm.create_model("{place}", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
            'logits = model(transform(Image.open("image.jpg").convert("RGB"))[None])\n'
        )
    elif "safetensors" in formats:
        blocks["model.safetensors, whose keys are the published ones of this net; `images` are normalised"] = (
            "from dalikd.kd.backbones import create_model\nfrom safetensors.torch import load_file\n"
            f'model = create_model("{saved.name}", {len(saved.class_names)}{_keywords(saved.args)})\n'
            'model.load_state_dict(load_file("model.safetensors"))\n'
            "logits = model.eval()(images)\n"
        )
    if "torch" in formats:
        blocks["model.pt2, by torch alone"] = (
            f'import torch\nmodel = torch.export.load("model.pt2").module()\nlogits = model({given})\n'
        )
    if "onnx" in formats:
        blocks["model.onnx, by onnxruntime"] = (
            'import onnxruntime\nsession = onnxruntime.InferenceSession("model.onnx")\n'
            f'(logits,) = session.run(None, {{"{given}": {given}.numpy()}})\n'
        )
    return blocks


def _keywords(args: dict[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in args.items())


# -------------------------------------------------------------------------------------------------- the Hub


def check_login(repository: str) -> None:
    """Raises ValueError: no such name of a repository is possible, or nobody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repository)
    if not get_token():
        raise ValueError(f"--push {repository}: log in first, by `hf auth login` or with HF_TOKEN in the environment")


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder to a model repository, which is made if it is missing. Returns its address.

    Raises:
        ValueError: that fails, for whatever reason; the folder stays.
    """
    from huggingface_hub import HfApi, get_token

    try:
        api = HfApi(library_name="dalikd")
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add the net")
    except Exception as error:  # of HTTP, of the network, or of the Hub's client
        reason = " ".join(str(error).split()) or type(error).__name__
        if token := get_token():
            reason = reason.replace(token, "…")
        raise ValueError(
            f"{folder} is written, but --push {repository} has failed: {reason}; then `hf upload {repository} {folder}`"
        ) from None
    return address
