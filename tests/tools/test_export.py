"""What is exported answers as the net of the run, loads as its card says, and is whole or not there."""

import base64
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dalikd.kd.backbones import create_model, factory
from dalikd.kd.backbones.layers import Normalisation
from dalikd.kd.checkpoints import load_weights
from dalikd.trainers import export
from dalikd.trainers.checkpoint import save_weights

CLASSES = ("class0", "class1", "class2")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
VAL = {"loss": 1.0, "top1": 0.5, "top5": 1.0, "images": 30}


@pytest.fixture
def make_run(tree: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder, as training does: of one net, or of several by the names of their files."""

    def make(model: str = "resnet8", side: int = 32, *, files: tuple[str, ...] = ("student",), **config: Any) -> Path:
        folder, names = tmp_path / "run", [model, *config.get("peers", ())]
        for number, file in enumerate(files):
            torch.manual_seed(number)
            net = create_model(names[min(number, len(names) - 1)], 3, **config.get("model_args", {}))
            save_weights(folder / "last" / f"{file}.safetensors", net, Normalisation(MEAN, STD), CLASSES)
        data = {"name": "imagefolder", "root": str(tree), "image_size": side, "val_resize": side + 8, "threads": 1}
        config = {"model": model, "data": data, "seed": 0, "batch_size": 16, "precision": "fp32", **config}
        nets = {"nets": {name: {**VAL, "top1": 0.1 * number} for number, name in enumerate(files)}}
        results = {
            **{"finished": True, "steps": 6, "epochs": 1.0, "command": "train", "evaluated": f"{files[0]}.safetensors"},
            "last": {"epoch": 1, "val": {**VAL, **nets}},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "results.json").write_text(json.dumps(results))
        return folder

    return make


@pytest.fixture
def distilled(command: Callable[..., Any], options: list[object], teacher: list[object], tmp_path: Path) -> Path:
    """A run as `dalikd distill` leaves it, with an average of the weights."""
    words = ["--epochs", 1, "--batch_size", 16, "--mix.group", 8, "--ema", 0.5, "--augmentation", "cutmix"]
    ended = command("distill", *options, *teacher, *words, "--model", "resnet8", "--output", tmp_path / "run")
    assert ended.code == 0, ended
    return tmp_path / "run"


def _code(folder: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def _installed(*formats: str) -> list[str]:
    return [name for name in formats if name != "onnx" or all(map(find_spec, export._NEEDED))]


@pytest.mark.parametrize(
    ("model", "side", "args"),
    [
        ("resnet8", 32, {}),
        ("timm:test_resnet", 48, {}),
        ("timm:test_vit", 64, {"img_size": 64, "drop_path_rate": 0.1}),
    ],
)
def test_each_file_loads_as_the_card_says_and_answers_as_the_net(model, side, args, make_run, command, monkeypatch):
    run = make_run(model, side, model_args=args)
    formats = _installed("safetensors", "torch", *["onnx"] * (model == "timm:test_vit"))
    ended = command("export", run, "--format", *formats, "--images", 9, "--license", "apache-2.0")
    assert ended.code == 0, ended
    graphs = formats[1:]
    assert len(re.findall(r"difference \d\S*, top-1 agreement 100\.00 % on 9 validation images", ended.out)) == len(
        graphs
    )

    folder = run.with_name("run-export")
    weights, written = load_file(folder / "model.safetensors"), load_file(run / "last/student.safetensors")
    assert weights.keys() == create_model(model, 3, **args).state_dict().keys()
    assert all(torch.equal(weights[name], written[name]) for name in written)
    net = create_model(model, 3, **args).eval()
    load_weights(net, run / "last/student.safetensors")
    images = torch.randn(3, 3, side, side)
    blocks = _code(folder)
    assert len(blocks) == len(formats)
    monkeypatch.chdir(folder)
    Image.effect_noise((90, 70), 60).convert("RGB").save("image.jpg")
    for code in blocks:
        assert len(code.splitlines()) <= 5
        names: dict[str, Any] = {"images": images}
        exec(compile(code, "README.md", "exec"), names)
        asked = images
        if "transform" in names:
            asked = names["transform"](Image.open("image.jpg").convert("RGB"))[None]
            assert asked.shape == (1, 3, side, side)
            assert f"size={side + 8}," in str(names["transform"].transforms[0])
            assert names["model"].pretrained_cfg["label_names"] == list(CLASSES)
            assert timm.data.resolve_model_data_config(names["model"])["mean"] == list(MEAN)
        torch.testing.assert_close(torch.as_tensor(names["logits"]), net(asked), rtol=0, atol=1e-4)
    assert yaml.safe_load(Path("README.md").read_text().split("---")[1])["license"] == "apache-2.0"


def test_a_graph_takes_pixels_and_needs_no_dalikd(make_run, command, tmp_path, monkeypatch):
    run = make_run()
    assert command("export", run, "--format", "torch", "--pixels", "true", "--output", tmp_path / "a/b").code == 0
    card = (tmp_path / "a/b/README.md").read_text()
    assert "uint8 [N, 3, 32, 32] (NCHW, RGB)" in card
    assert str(tmp_path) not in card
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    names: dict[str, Any] = {"pixels": pixels}
    with monkeypatch.context() as patch:
        for module in [name for name in sys.modules if name.partition(".")[0] == "dalikd"]:
            patch.setitem(sys.modules, module, None)  # importing it fails
        patch.chdir(tmp_path / "a/b")
        exec(compile(_code(tmp_path / "a/b")[0], "README.md", "exec"), names)
    net = create_model("resnet8", 3).eval()
    load_weights(net, run / "last/student.safetensors")
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    torch.testing.assert_close(names["logits"], net((pixels / 255 - mean) / std), rtol=0, atol=1e-4)


def test_the_card_tells_what_the_run_was(distilled, command):
    results = json.loads((distilled / "results.json").read_text())
    results["last"]["t_stddev"] = 0.0123456
    (distilled / "results.json").write_text(json.dumps(results))
    assert command("export", distilled, "--format", "safetensors").code == 0
    folder = distilled.with_name("run-export")
    card, val = (folder / "README.md").read_text(), results["last"]["val"]
    rows = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", card, re.MULTILINE))
    assert rows["teacher"] == f"small, small.pt, SHA-256 {results['teacher']['sha256']}"
    assert rows["method"].startswith("KD (ce_weight 0.1, ")
    assert (rows["augmentation"], rows["T. stddev"], rows["license"]) == ("cutmix", "0.012346", "not stated")
    assert results["fingerprint"]["val"] in rows["data fingerprint"]
    assert rows["accuracy"] == (
        f"top-1 {100 * val['top1']:.2f} %, top-5 100.00 %, loss {val['loss']:.4f} on 30 validation images"
    )
    average = load_file(distilled / "last/ema.safetensors")  # what the accuracy is of
    assert all(torch.equal(value, average[name]) for name, value in load_file(folder / "model.safetensors").items())
    other = distilled.with_name("student")
    assert command("export", distilled, "--format", "safetensors", "--net", "student", "--output", other).code == 0
    assert "| accuracy | not measured |" in (other / "README.md").read_text()


def test_one_of_several_nets_without_its_heads(make_run, command):
    run = make_run("resnet14_aux", files=("net0", "net1"), peers=["resnet8_aux"], model_args={"detach_heads": False})
    ended = command("export", run, "--format", "safetensors", "--net", "net1")
    assert ended.code == 0, ended
    folder = run.with_name("run-export")
    assert load_file(folder / "model.safetensors").keys() == create_model("resnet8", 3).state_dict().keys()
    assert "| net | resnet8 |" in (folder / "README.md").read_text()
    assert "| accuracy | top-1 10.00 %" in (folder / "README.md").read_text()


def test_an_unfinished_run_says_so(make_run, command):
    run = make_run()
    (run / "results.json").unlink()
    ended = command("export", run, "--format", "safetensors")
    assert (ended.code, ended.out.count("the run is not finished: no epoch is done")) == (0, 1)
    assert "| state | the run is not finished" in run.with_name("run-export").joinpath("README.md").read_text()


def test_an_export_is_replaced_where_that_is_said_and_by_a_whole_one(make_run, command, monkeypatch):
    run = make_run()
    words, folder = ["export", run, "--format", "safetensors"], run.with_name("run-export")
    assert command(*words).code == 0
    (folder / "README.md").write_text("an earlier one")
    ended = command(*words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert f"--output {folder} holds an export: name another folder, or replace it with --overwrite true" in ended.err
    with monkeypatch.context() as patch:
        patch.setattr(export, "_loading", lambda *_, **__: {}["the last thing that is written"])
        with pytest.raises(KeyError):
            command(*words, "--overwrite", "true")
    assert (folder / "README.md").read_text() == "an earlier one"
    assert command(*words, "--license", "mit", "--overwrite", "true").code == 0
    assert "license: mit" in (folder / "README.md").read_text()
    (folder / "LICENSE").touch()
    assert "holds other files and is not touched" in command(*words, "--overwrite", "true").err
    assert {path.name for path in run.parent.iterdir()} == {"run", "run-export"}


class _Torn(torch.nn.Module):
    """What it does depends on its values: no graph has that."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.fc(images.mean((2, 3)))
        return -logits if logits.sum() > 0 else logits


def _spoil(kind: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, results = run / "config.yaml", run / "results.json"
    if kind == "no run":
        config.unlink()
    elif kind == "no net":
        config.write_text("points: 3")
    elif kind == "no weights":
        (run / "last/student.safetensors").unlink()
    elif kind == "other weights":
        digests = {"sha256": {"last/student.safetensors": "0" * 64}}
        results.write_text(json.dumps({**json.loads(results.read_text()), **digests}))
    elif kind == "no data":
        config.write_text(re.sub("root: .*", "root: /nowhere", config.read_text()))
    elif kind == "far off":
        monkeypatch.setattr(export, "_compare", lambda *_: export.Parity(float("nan"), 0.5, 9))
    elif kind == "no packages":
        monkeypatch.setattr(export, "find_spec", lambda _: None)
    elif kind == "no graph":
        monkeypatch.setitem(factory._BUILDERS, "torn", _Torn)
        config.write_text(config.read_text().replace("resnet8", "torn"))
        save_weights(run / "last/student.safetensors", _Torn(3), Normalisation(MEAN, STD), CLASSES)
    elif kind == "no account":
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


@pytest.mark.parametrize(
    ("kind", "words", "told"),
    [
        ("no run", [], "is no run folder \\(.*config.yaml is missing\\): name one"),
        ("no net", [], "config.yaml names no model"),
        ("no weights", [], "has no weights last/student.safetensors: wait for an epoch's end"),
        ("", ["--epoch", "best"], "has no weights best/student.safetensors"),
        ("", ["--net", "net1"], "--net net1 .* has no weights last/net1.safetensors: there are student"),
        ("other weights", [], "is not what the run has written"),
        ("no data", [], "/nowhere.*; .* --root, or write --format safetensors alone"),
        ("far off", [], "torch: largest logit difference nan, .* above --tolerance 0.0001: nothing is written"),
        ("no graph", [], "torch.export cannot express torn: .*; leave it out of --format"),
        ("no packages", ["--format", "onnx"], "onnx, onnxruntime, onnxscript: pip install 'dalikd\\[onnx\\]'"),
        ("", ["--format", "onnx", "onnx"], "name each once"),
        ("", ["--format", "onyx"], "onyx"),
        ("", ["--images", "0"], "1 to 256 images"),
        ("", ["--output", "."], "--output .* holds other files and is not touched: name another folder"),
        ("", ["--output", ".", "--overwrite", "true"], "--output .* holds other files and is not touched"),
        ("", ["--push", "a/b/c"], "a/b/c"),
        ("no account", ["--push", "me/net"], "--push me/net: log in first"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(kind, words, told, make_run, command, monkeypatch):
    run = make_run()
    _spoil(kind, run, monkeypatch)
    ended = command("export", run, *words)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1), ended
    assert re.search(told, ended.err), ended.err
    assert [path.name for path in run.parent.iterdir()] == ["run"]


class _Hub(BaseHTTPRequestHandler):
    """The requests of the Hub that an upload makes. A server has `refuses`, a part of the path that is answered with
    403 and the token, and keeps what it was sent in `files`, by the path of a commit."""

    server: Any

    def _answer(self, code: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body, hub, place = self.rfile.read(int(self.headers["Content-Length"])), self.server, self.server.place
        hub.tokens.add(self.headers["Authorization"])
        if hub.refuses and hub.refuses in self.path:
            self._answer(403, {"error": f"you may not, {self.headers['Authorization']}"})
        elif self.path == "/api/repos/create":
            hub.made = json.loads(body)
            self._answer(200, {"url": f"{place}/me/net"})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            kinds = {name: "lfs" if name.endswith("safetensors") else "regular" for name in names}
            files = [{"path": name, "uploadMode": kinds[name], "shouldIgnore": False} for name in names]
            self._answer(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            to = [{**one, "actions": {"upload": {"href": f"{place}/lfs/{one['oid']}"}}} for one in objects]
            self._answer(200, {"transfer": "basic", "objects": to})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.large[value["oid"]]
            self._answer(200, {"commitUrl": f"{place}/me/net/commit/1", "commitOid": "1", "pullRequestUrl": None})
        else:
            self._answer(200, {"errors": [], "warnings": []})  # the card's metadata are looked at

    def do_PUT(self) -> None:
        self.server.large[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, {})

    def do_GET(self) -> None:
        self._answer(403, {"error": "you may not"})

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Hub of this machine, and somebody who is logged in."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.refuses, server.files, server.large, server.tokens, server.made = "", {}, {}, set(), None
    server.place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.place)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not HTTP's alone
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_folder_is_pushed_as_it_is_written(make_run, command, hub):
    run = make_run("timm:test_resnet", 48)
    words = ["--format", "safetensors", "--push", "me/net", "--private", "true", "--json", "-"]
    ended = command("export", run, *words)
    assert ended.code == 0, ended
    folder, told = run.with_name("run-export"), json.loads(ended.out)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.files == written
    assert (hub.made["name"], hub.made["organization"], "private" in json.dumps(hub.made)) == ("net", "me", True)
    assert hub.tokens == {"Bearer hf_secret"}
    assert told == {
        **{"folder": str(folder), "files": sorted(written), "compared": {}, "state": "finished"},
        "pushed": f"{hub.place}/me/net",
    }
    assert '"hf-hub:me/net"' in _code(folder)[0]


@pytest.mark.parametrize("refuses", ["repos/create", "/preupload", "/lfs", "/commit"])
def test_a_push_that_is_refused_is_one_line_without_the_token(refuses, make_run, command, hub):
    run, hub.refuses = make_run(), refuses
    ended = command("export", run, "--format", "safetensors", "--push", "me/net")
    assert (ended.code, hub.files) == (2, {})
    (line,) = [line for line in ended.err.splitlines() if line.startswith("dalikd export: error:")]
    assert re.search(r"run-export is written, but --push me/net has failed: .*403.*; then `hf upload me/net ", line)
    assert "hf_secret" not in ended.err + ended.out
    written = {path.name for path in run.with_name("run-export").iterdir()}
    assert written == {"README.md", "config.json", "model.safetensors"}
