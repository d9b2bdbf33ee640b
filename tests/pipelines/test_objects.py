"""Against moto's S3 server on this machine, behind a layer that delays, fails and hangs as it is told.

Skipped where it is missing; `pip install 'moto[s3,server]'` takes 190 MB, too much for the extra `test`.
"""

import errno
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalikd.pipelines import object_cache, objects
from dalikd.pipelines.data import DataConfig, open_source, open_split
from dalikd.pipelines.datasets import object_list
from dalikd.pipelines.datasets.object_list import find_objects
from dalikd.pipelines.datasets.spec import SplitSpec
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.files import write_atomically
from dalikd.pipelines.loader import BadFileError, Loader
from dalikd.pipelines.objects import ObjectOptions, ObjectStore, Unavailable
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source
from dalikd.tools import prepare

BUCKET, ROOT = "bucket", "s3://bucket/some/photos"
WRONG, LATE = "InvalidAccessKeyId", "RequestTimeTooSkewed"
REFUSED = {"wrong": WRONG, "nobody": "AccessDenied", "old": "ExpiredToken", "late": LATE}
VIEW = DrawSpec(View(24, "random_resized_crop"))


@dataclass
class Server:
    """What the layer does to requests for objects, and what it has seen."""

    url: str = ""
    client: Any = None
    seconds: float = 0
    failing: float = 0  # share
    hanging: float = 0  # share, for 5 s
    held: dict[str, bytes] = field(default_factory=dict)  # what the bucket has
    gone: threading.Event = field(default_factory=threading.Event)
    random: Random = field(default_factory=lambda: Random(0))
    seen: list[str] = field(default_factory=list)
    most: int = 0
    running: int = 0
    kept: dict[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def calm(self) -> None:
        """Do nothing to requests from now on."""
        self.seconds = self.failing = self.hanging = 0
        self.most, self.random = 0, Random(0)
        self.seen.clear()

    def put(self, key: str, content: bytes | None) -> None:
        """Let the bucket have it; None: not."""
        if content is None:
            self.client.delete_object(Bucket=BUCKET, Key=key)
            del self.held[key]
        elif self.held.get(key) != content:
            self.client.put_object(Bucket=BUCKET, Key=key, Body=content)
            self.held[key] = content

    def keys(self, prefix: str) -> list[str]:
        return [one["Key"] for one in self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]]

    def layer(self, app: Callable[..., Any]) -> Callable[..., Any]:
        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
            path, words = environ["PATH_INFO"], environ["QUERY_STRING"]
            if environ["REQUEST_METHOD"] != "GET":
                self.kept.clear()
                if "Credential=reads/" in environ.get("HTTP_AUTHORIZATION", ""):
                    start("403 Forbidden", [("Connection", "close")])
                    return [b"<Error><Code>AccessDenied</Code></Error>"]
                return app(environ, start)
            with self.lock:
                self.seen.append(f"{path}?{words}" if words else path)
                self.running += 1
                self.most = max(self.most, self.running)
                draw = self.random.random()
            try:
                time.sleep(self.seconds)
                who = environ.get("HTTP_AUTHORIZATION", "Credential=nobody/").partition("Credential=")[2]
                if code := REFUSED.get(who.partition("/")[0]):
                    start("403 Forbidden", [])
                    return [f"<Error><Code>{code}</Code><AWSAccessKeyId>{who}</AWSAccessKeyId></Error>".encode()]
                if not words and draw < self.failing:
                    start("503 Slow Down", [])
                    return [b"<Error><Code>SlowDown</Code></Error>"]
                if not words and draw < self.failing + self.hanging:
                    self.gone.wait(5)
                place = f"{path}?{words} {environ.get('HTTP_RANGE')}"  # moto takes some 10 ms
                if place not in self.kept:
                    self.kept[place] = _whole(app, environ)
                status, headers, body = self.kept[place]
                start(status, headers)
                return [body]
            finally:
                with self.lock:
                    self.running -= 1

        return answer


def _whole(app: Callable[..., Any], environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
    told: list[Any] = []
    body = b"".join(app(environ, lambda status, headers, _=None: told.extend((status, headers))))
    return told[0], told[1], body


@pytest.fixture(scope="session")
def _server() -> Iterator[Server]:
    pytest.importorskip("botocore")
    app = pytest.importorskip("moto.moto_server.werkzeug_app")
    from botocore.session import Session
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            pass

    server = Server()
    layer = server.layer(app.DomainDispatcherApplication(app.create_backend_app))
    serving = make_server("127.0.0.1", 0, layer, threaded=True, request_handler=Quiet)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{serving.server_port}"
    server.client = Session().create_client(
        "s3",
        endpoint_url=server.url,
        region_name="us-east-1",
        aws_access_key_id="right",
        aws_secret_access_key="of nobody",
    )
    server.client.create_bucket(Bucket=BUCKET)
    yield server
    server.gone.set()
    serving.shutdown()


@pytest.fixture
def server(_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (("ACCESS_KEY_ID", "right"), ("SECRET_ACCESS_KEY", "of nobody"), ("ENDPOINT_URL", _server.url)):
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("CONFIG_FILE", "SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(f"AWS_{name}", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    _server.calm()
    return _server


@pytest.fixture(scope="session")
def tree(small_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in two classes, some of them in folders, with names that URLs must quote; read only."""
    root = tmp_path_factory.mktemp("photos")
    for path in sorted(small_images.glob("*/00[0-7].jpg")):
        name = {"003": "a b+c", "004": "ü%2F", "005": "deep/x"}.get(path.stem, path.stem)
        target = root / "train" / path.parent.name / f"{name}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (root / "train" / "notes.txt").write_text("")
    (next((root / "train").iterdir()) / "x.gif").write_text("")
    return root


@pytest.fixture
def stored(server: Server, tree: Path) -> Source:
    """The same in the bucket."""
    for path in sorted(tree.rglob("*")):
        if path.is_file():
            server.put(f"some/photos/{path.relative_to(tree)}", path.read_bytes())
    server.calm()
    return open_source("imagefolder", ROOT, "train")


def _loader(source: Source, **options: Any) -> Loader:
    return Loader(source, Sampler(len(source), 8, seed=7), VIEW, threads=1, **options)


def _equal(one: Loader, two: Loader, batches: int) -> None:
    for _ in range(batches):
        a, b = one.next(), two.next()
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


# ------------------------------------------------------------------------------------------------ the same images


def test_objects_are_the_files_that_they_were_copied_from(server, tree, stored):
    local = open_source("imagefolder", tree, "train")
    assert stored.fingerprint == local.fingerprint
    assert [stored.path(row).removeprefix(ROOT) for row in range(24)] == [
        local.path(row).removeprefix(str(tree)) for row in range(24)
    ]
    assert stored.notes == (f"{ROOT}/train: 1 object is left out: 1 .gif",)
    one, two = _loader(local), _loader(stored)
    _equal(one, two, 4)
    three = _loader(local)  # goes on where a run on the store has stopped, in the next epoch
    three.load_state_dict(two.state_dict())
    two.close()
    _equal(three, two, 3)
    assert len({path for path in server.seen if "?" not in path}) == 24


@pytest.mark.parametrize(("method", "digest"), [("GET", objects._EMPTY), ("PUT", "1f" * 32)])
def test_a_signature_is_that_of_botocore(monkeypatch, method, digest):
    pytest.importorskip("botocore")
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    for name, value in (("ACCESS_KEY_ID", "one"), ("SECRET_ACCESS_KEY", "two"), ("SESSION_TOKEN", "three")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    path, query = "/b/a%20b%2Bc/%C3%BC.jpg", "list-type=2&prefix=a%2Fb"
    given = objects._S3Signer().sign("host:80", path, query, method, digest)
    request = AWSRequest(method, f"http://host:80{path}?{query}", headers={"Host": "host:80"})
    request.headers["X-Amz-Content-SHA256"] = given["x-amz-content-sha256"]
    signer = S3SigV4Auth(Credentials("one", "two", "three"), "s3", "eu-west-3")
    request.context["timestamp"] = given["x-amz-date"]
    monkeypatch.setattr(signer, "_modify_request_before_signing", lambda _: None)
    request.headers["X-Amz-Date"], request.headers["X-Amz-Security-Token"] = given["x-amz-date"], "three"
    text = signer.string_to_sign(request, signer.canonical_request(request))
    assert given["Authorization"].rpartition("=")[2] == signer.signature(text, request)


# ---------------------------------------------------------------------------------------------------- what fails


@pytest.fixture
def _hurry(stored: Source, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - before that
    monkeypatch.setattr(objects, "_FIRST_SECONDS", 0.25)
    monkeypatch.setattr(objects, "_FIRST_WAIT", 0.01)


@pytest.mark.faults
@pytest.mark.usefixtures("_hurry")
def test_requests_that_fail_or_hang_are_made_again(server, tree, stored, full):
    server.seconds, server.failing, server.hanging = 0.03, 0.05 if full else 0.2, 0.1
    _equal(_loader(open_source("imagefolder", tree, "train")), _loader(stored), 60 if full else 4)
    assert server.most > 4


@pytest.mark.parametrize("policy", ["stop", "replace"])
def test_what_is_missing_or_has_changed_is_a_bad_file(server, tree, stored, policy, capfd):
    server.put(stored.path(3).removeprefix("s3://bucket/"), None)
    server.put(stored.path(9).removeprefix("s3://bucket/"), stored.read(10))
    same = bytearray(stored.read(15))
    same[-3] ^= 1
    server.put(stored.path(15).removeprefix("s3://bucket/"), bytes(same))
    loader = _loader(stored, bad_files=policy)
    if policy == "stop":
        with pytest.raises(BadFileError, match=r"missing|has changed since it was listed"):
            [loader.next() for _ in range(3)]
        return
    batches = [loader.next() for _ in range(3)]
    assert loader.replaced == {3: 4, 9: 10, 15: 16}
    told = capfd.readouterr().out
    for row, reason in ((3, "missing"), (9, "bytes then"), (15, "ETag")):
        assert f"{stored.path(row)} (" in told
        assert reason in told
    clean = _loader(open_source("imagefolder", tree, "train"))
    for batch in batches:
        other = clean.next()
        same_rows = ~torch.isin(other.ids, torch.tensor([3, 9, 15]))
        assert torch.equal(batch.images[same_rows], other.images[same_rows])


@pytest.mark.usefixtures("_hurry")
def test_a_store_that_fails_for_long_stops_the_run_and_no_file_is_bad(server, stored, monkeypatch):
    monkeypatch.setattr(objects, "_ATTEMPTS", 2)
    loader = _loader(stored, bad_files="replace")
    server.failing = 1
    with pytest.raises(Unavailable, match=r"train/.*fails at 2 attempts, at last: SlowDown \(503\)$") as caught:
        loader.next()
    assert caught.value.answered
    assert not loader.replaced


@pytest.mark.parametrize(
    ("root", "environment", "message"),
    [
        ("s3://nobody", {}, r"s3://nobody: 127.0.0.1:\d+ has no such bucket: check --data.root and --data.endpoint"),
        ("s3://bucket/other", {}, r"s3://bucket/other has no folder 'train'; it is empty"),
        ("s3://bucket/some", {}, r"has no folder 'train'; it has photos: name one with --data.train_split"),
        (ROOT, {"AWS_ACCESS_KEY_ID": "wrong"}, r"credentials are wrong \(InvalidAccessKeyId\): set AWS_PROFILE"),
        (ROOT, {"AWS_ACCESS_KEY_ID": ""}, r"it is not public, and no credentials were found: set AWS_PROFILE"),
        (ROOT, {"AWS_ACCESS_KEY_ID": "old"}, r"the credentials have expired \(ExpiredToken\): set AWS_PROFILE"),
        (ROOT, {"AWS_ACCESS_KEY_ID": "late"}, r"is refused: the clock of this machine is wrong by minutes: set it"),
        (ROOT, {"AWS_ENDPOINT_URL": "http://me:of nobody@127.0.0.1"}, r"--data.endpoint 127.0.0.1: give a URL"),
        (ROOT, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, r"Connection refused: check --data.endpoint"),
        (ROOT, {"AWS_PROFILE": "other"}, r"profile \(other\) could not be found"),
        ("s3://", {}, "give s3://BUCKET/FOLDER"),
    ],
)
@pytest.mark.usefixtures("_hurry")
def test_what_cannot_work_is_told_in_a_line_that_holds_no_secret(root, environment, message, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        open_source("imagefolder", root, "train")
    assert not getattr(caught.value, "answered", False)  # so that it is the user's to mend
    assert "of nobody" not in "".join(traceback.format_exception(caught.value)) + caplog.text
    assert "\n" not in str(caught.value)


def test_options_of_objects_are_for_objects(tmp_path):
    with pytest.raises(ValueError, match=r"--data.cache is for images in object storage"):
        open_split(DataConfig(root=str(tmp_path), cache="x"), "train", 0)
    with pytest.raises(ValueError, match=r"--data.cache_size 200X: give bytes, as 200G"):
        open_split(DataConfig(root="s3://b", cache="x", cache_size="200X"), "train", 0)
    with pytest.raises(ValueError, match=r"tinyimagenet is not read from object storage"):
        open_source("tinyimagenet", "s3://b", "train")


def test_what_is_not_installed_is_named(monkeypatch):
    for package, root, extra in (("botocore.session", "s3://b", "s3"), ("google.auth", "gs://b", "gcs")):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(ValueError, match=rf"pip install 'dalikd\[{extra}\]'"):
            ObjectStore(root, ObjectOptions())


# ------------------------------------------------------------------------------------------------------- a cache


@pytest.mark.usefixtures("stored")
def test_an_epoch_from_the_cache_asks_for_nothing_and_is_the_same(server, tree, tmp_path):
    options = ObjectOptions(cache=str(tmp_path / "cache"))
    local = _loader(open_source("imagefolder", tree, "train"))
    first = _loader(open_source("imagefolder", ROOT, "train", objects=options))
    _equal(local, first, 3)
    first.close()
    [kept.write_bytes(b"damaged") for kept in sorted((tmp_path / "cache").glob("*/*"))[:2]]
    server.seen.clear()
    again = _loader(open_source("imagefolder", ROOT, "train", objects=options))
    _equal(_loader(open_source("imagefolder", tree, "train")), again, 6)
    assert len([path for path in server.seen if "?" not in path]) == 2


def test_a_full_disk_costs_no_image(stored, tmp_path, monkeypatch, capfd):
    options = ObjectOptions(cache=str(tmp_path))
    loader = _loader(open_source("imagefolder", ROOT, "train", objects=options))
    written = []

    def write(*arguments: Any, **named: Any) -> None:
        written.append(arguments[0])
        if len(written) > 9:
            raise OSError(errno.ENOSPC, f"{arguments[0]} cannot be written: No space left on device")
        write_atomically(*arguments, **named)

    monkeypatch.setattr(object_cache, "write_atomically", write)
    _equal(_loader(stored), loader, 6)
    assert capfd.readouterr().out.count("No space left on device: nothing more is kept there") == 1
    assert len(list(tmp_path.glob("??/*"))) == 9
    monkeypatch.setattr(objects.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=r"s3://bucket/some/photos/train/\S+ takes 0.0 GB more, and .* has room for 0.0"):
        ObjectStore(ROOT).copy_folder("train/ant", tmp_path / "copy")


def test_a_remembered_list_is_taken_until_the_store_has_another(server, stored, monkeypatch, tmp_path):
    monkeypatch.setenv("DALIKD_CACHE", str(tmp_path))
    spec = SplitSpec("imagefolder", None, "train", "train")
    find_objects(spec, ObjectStore(ROOT), remember_above=10)
    found = find_objects(spec, ObjectStore(ROOT), remember_above=10)
    assert found.files is not None
    assert any(
        re.search(rf"^{ROOT}/train: 24 objects as listed at .*; remove {tmp_path}", note) for note in found.notes
    )
    assert found.files.objects([3]) == stored.files.objects([3])
    server.put("some/photos/train/bee/more.jpg", b"more")
    try:
        found = find_objects(spec, ObjectStore(ROOT), remember_above=10)
        assert len(found.labels) == 25
        assert not any("as listed" in note for note in found.notes)
    finally:
        server.put("some/photos/train/bee/more.jpg", None)


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(("remember_above", "lists"), [(10, 1), (100, 4)])
def test_of_processes_that_begin_together_one_lists(monkeypatch, tmp_path, remember_above, lists):
    monkeypatch.setenv("DALIKD_CACHE", str(tmp_path))
    calls, together, whole = [], threading.Barrier(4), object_list._list

    def listed(*arguments: Any) -> Any:
        calls.append(arguments)
        time.sleep(0.3)
        return whole(*arguments)

    def find(_: int) -> bytes:
        store = ObjectStore(ROOT)
        together.wait()
        found = find_objects(SplitSpec("imagefolder", None, "train", "train"), store, remember_above=remember_above)
        assert found.files is not None
        return bytes(found.files.buffer)

    monkeypatch.setattr(object_list, "_list", listed)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(find, range(4)))) == 1
    assert len(calls) == lists


def test_google_is_asked_with_a_token(server, stored, tree, monkeypatch):
    class Signer(objects._GoogleSigner):
        anonymous = False

        def __init__(self, *_: str) -> None:
            pass

        def sign(self, *_: str) -> dict[str, str]:
            return {"Authorization": "Bearer token"}

    monkeypatch.setattr(objects, "_GoogleSigner", Signer)
    source = open_source("imagefolder", ROOT.replace("s3", "gs"), "train", objects=ObjectOptions(endpoint=server.url))
    assert source.fingerprint == stored.fingerprint
    _equal(_loader(open_source("imagefolder", tree, "train")), _loader(source), 2)


# --------------------------------------------------------------------------------------------------------- shards


def test_shards_are_copied_once_and_again_where_they_have_changed(server, written, tmp_path, monkeypatch, full):
    if written.format == "tfrecord" and not full:
        pytest.skip("files are copied whatever they are")
    monkeypatch.setattr(objects, "_PIECE", 10_000)
    for path in sorted(written.folder.iterdir()):
        server.put(f"shards/{written.format}/train/{path.name}", path.read_bytes())
    root, options = f"s3://bucket/shards/{written.format}", ObjectOptions(cache=str(tmp_path))
    server.calm()
    found = open_source(written.format, root, "train", objects=options)
    assert found.fingerprint == written.source.fingerprint
    assert [found.read(row) for row in (0, 150, 299)] == [written.source.read(row) for row in (0, 150, 299)]
    assert len([path for path in server.seen if "?" not in path]) > len(list(written.folder.iterdir()))
    server.seen.clear()
    open_source(written.format, root, "train", objects=options)
    assert all("?" in path for path in server.seen)
    name = next(path.name for path in written.folder.iterdir() if path.suffix in (".tar", ".tfrecord"))
    server.put(f"shards/{written.format}/train/{name}", b"other")
    with pytest.raises(ValueError, match=rf"{name} has 5 bytes instead of"):
        open_source(written.format, root, "train", objects=options)
    with pytest.raises(ValueError, match=r"name a folder with --data.cache"):
        open_source(written.format, root, "train")


@pytest.mark.usefixtures("stored")
def test_prepare_writes_what_is_read_again(server, tmp_path, capsys):
    words = ["--data.root", ROOT, "--split", "train", "--shard_images", "10", "--output", "s3://bucket/a b/written"]
    prepare.main(words)
    line = "s3://bucket/a b/written/train: 24 images of 3 classes in 3 files"
    assert capsys.readouterr().out.splitlines()[-2].startswith(line)
    options = ObjectOptions(cache=str(tmp_path))
    found, files = (
        open_source("webdataset", "s3://bucket/a b/written", "train", objects=options),
        open_source("imagefolder", ROOT, "train"),
    )
    assert found.fingerprint == files.fingerprint
    assert [found.read(row) for row in range(24)] == [files.read(row) for row in range(24)]
    prepare.main([*words, "--format", "tfrecord", "--overwrite", "true"])
    assert {key.rpartition(".")[2] for key in server.keys("a b/")} == {"tfrecord", "idx", "npy", "txt", "json"}


@pytest.mark.parametrize(
    ("output", "environment", "message"),
    [
        ("s3://nobody/x", {}, r"no such bucket: check --output and AWS_ENDPOINT_URL"),
        (
            "s3://bucket/x",
            {"AWS_ACCESS_KEY_ID": "reads"},
            r"/x/train/\S+ is refused: these credentials do not allow",
        ),
        ("s3://", {}, r"--output s3://: give s3://BUCKET/FOLDER"),
    ],
)
@pytest.mark.usefixtures("_hurry")
def test_what_cannot_be_written_is_told_in_a_line(output, environment, message, tree, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        prepare.main(["--data.root", str(tree), "--split", "train", "--output", output])
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error)
    assert "of nobody" not in error
