"""Object storage: S3, whatever speaks as S3 does, and Google's by its XML interface, which does.

Requests are made by http.client in threads. A GET of 5 kB so takes 0.24 ms of CPU, signature and all; by boto3 1.5 ms,
by s3fs 2.9. What botocore and google-auth are for is credentials: all places that they may lie in, and their renewal.
"""

import base64
import contextlib
import datetime
import fcntl
import hashlib
import hmac
import http.client
import json
import os
import queue
import random
import re
import shutil
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree

from dalikd.pipelines.files import file_digest, read_json, write_atomically
from dalikd.pipelines.object_cache import ObjectCache, open_cache
from dalikd.pipelines.progress import progress

__all__ = ["Changed", "Listed", "ObjectOptions", "ObjectStore", "StoreError", "Unavailable", "is_object_url"]

_SCHEMES = {"s3": "S3", "gs": "Google Cloud Storage"}
_ATTEMPTS = 9  # of one request; with the waits between them up to five minutes
_FIRST_ATTEMPTS = 2  # before a store has ever answered: a wrong address is told within 20 s
_FIRST_SECONDS, _MOST_SECONDS = 2.0, 60.0  # that an answer may take at the first attempt, doubled at each, and at most
_CONNECT_SECONDS = 8.0
_LISTING = 8  # times as long for a page of a listing
_USUAL = 4  # times what answers take of late is waited for at least: asked twice, a slow store would be slower still
_FIRST_WAIT, _MOST_WAIT = 0.1, 20.0  # s before another attempt, likewise
_GOOD = (200, 204, 206)  # 204: it was removed; 206: a part, which was asked for
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_AGAIN_CODES = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "OperationAborted"}) | {
    "BadDigest"
}
_WRONG = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthorizationHeaderMalformed"})
_PIECE, _PIECES = 16 << 20, 16  # bytes of a file that one request is for, and of these requests at once
_LARGEST = 5_000_000_000  # bytes of an object that is written by one request
_EMPTY = hashlib.sha256(b"").hexdigest()
_BLOCK = 1 << 20  # bytes of a file that are read and sent at once
_DONE = {"GET": "read", "PUT": "written", "DELETE": "removed"}
_WAYS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
}
_RANDOM = random.Random()  # of its own: runs seed the module's


class StoreError(ConnectionError):
    """The store does not answer, or refuses: no fault of one object. The text is one line, and holds no secret."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.strerror = text


class Unavailable(StoreError):
    """The store fails, or does not answer, at every attempt: later it may.

    Attributes:
        answered: it has answered before, so that its address is no mistake.
    """

    def __init__(self, text: str, answered: bool = False) -> None:  # by default, so that it can be pickled
        super().__init__(text)
        self.answered = answered


class Changed(OSError):
    """An object is not the one that was listed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.strerror = text


@dataclass(frozen=True)
class ObjectOptions:
    """How objects are read.

    Attributes:
        endpoint: URL of a store; None: that of AWS_ENDPOINT_URL or of the profile, else Amazon's or Google's.
        in_flight: requests at once.
        cache: folder that objects are kept in, or None.
        cache_size: bytes that it may have; None: nine tenths of what is free on its disk.
    """

    endpoint: str | None = None
    in_flight: int = 128
    cache: str | None = None
    cache_size: int | None = None


class Listed(NamedTuple):
    """One page of a listing: `objects` as (key, size, tag) and `folders`, both without the store's prefix; `more`
    continues it, and is empty on the last."""

    objects: list[tuple[str, int, int]]
    folders: list[str]
    more: str


def is_object_url(root: object) -> bool:
    """Whether a root lies in object storage."""
    return isinstance(root, str) and root.partition("://")[0] in _SCHEMES


def tag_of(etag: str) -> int:
    """An ETag in 63 bits."""
    text = etag.removeprefix("W/").strip('"')
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


class ObjectStore:
    """The objects below `s3://bucket/prefix` or `gs://bucket/prefix`.

    Args:
        url: of the prefix, which is taken for a folder.
        options: how they are read.
        writes: whether they are written too; then it is an --output.

    Attributes:
        url: without a slash at its end.
        in_flight: requests at once.
        cache: that keeps objects on this machine, or None.

    Raises:
        ValueError: the URL or an option is none, or what credentials need is not installed.
        OSError: the cache's folder cannot be written.
    """

    def __init__(self, url: str, options: ObjectOptions = ObjectOptions(), *, writes: bool = False) -> None:
        parts, self._flag = urlsplit(url), "--output" if writes else "--data.root"
        if not parts.netloc or parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError(f"{self._flag} {url.rpartition('@')[2]}: give {parts.scheme}://BUCKET/FOLDER")
        if options.in_flight < 1:
            raise ValueError(f"--data.in_flight {options.in_flight}: give at least 1")
        self.bucket, self._scheme, self.in_flight = parts.netloc, parts.scheme, options.in_flight
        self._prefix = "/".join(part for part in parts.path.split("/") if part)
        self.url = "/".join(part for part in (f"{parts.scheme}://{parts.netloc}", self._prefix) if part)
        self._signer = _S3Signer() if parts.scheme == "s3" else _GoogleSigner("read_write" if writes else "read_only")
        self._endpoint = self._signer.endpoint(options.endpoint)
        self._idle: list[http.client.HTTPConnection] = []
        self._answered, self._usual = False, 0.0  # s
        self._tls = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or None)
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.cache: ObjectCache | None = None
        if options.cache is not None:
            self.cache = open_cache(options.cache, options.cache_size)
        weakref.finalize(self, _end, self._queue, self._threads)

    # ------------------------------------------------------------------------------------------ what is asked

    def list_page(self, folder: str, *, deep: bool, more: str = "") -> Listed:
        """Up to 1,000 of the objects in a folder, and of its folders; or, `deep`, all objects below it.

        Args:
            folder: its name below the store's prefix; "" for that itself.
            deep: go into folders.
            more: where a page before has ended.

        Raises:
            StoreError: there is no such bucket, credentials are missing or wrong, or the store does not answer.
        """
        start = "".join(f"{part}/" for part in (self._prefix, folder) if part)
        query = {"list-type": "2", "prefix": start, "encoding-type": "url"}
        query |= ({} if deep else {"delimiter": "/"}) | ({"continuation-token": more} if more else {})
        _, body = self._ask(_Request("", query), f"{self.url}/{folder}".rstrip("/"))
        try:
            return _parse(body, len(self._prefix) + bool(self._prefix))
        except (ElementTree.ParseError, ValueError, KeyError) as error:
            raise StoreError(f"{self.url}: the answer of {self._host()} is no listing ({error})") from None

    def list_all(self, folder: str, *, deep: bool) -> Iterator[Listed]:
        """All pages, one after the other; as `list_page`."""
        page = self.list_page(folder, deep=deep)
        yield page
        while page.more:
            page = self.list_page(folder, deep=deep, more=page.more)
            yield page

    def read(self, url: str, size: int, tag: int) -> bytes:
        """An object, from the cache or from the store.

        Args:
            url: of it.
            size: in bytes, as it was listed.
            tag: `tag_of` its ETag, as it was listed.

        Raises:
            FileNotFoundError: it is missing.
            Changed: it is not the one that was listed.
            StoreError: the store does not answer, or refuses.
        """
        kept = self.kept(url, size, tag)
        return self.download(url, size, tag) if kept is None else kept

    def kept(self, url: str, size: int, tag: int) -> bytes | None:
        """What the cache has of an object."""
        return None if self.cache is None else self.cache.read(url, size, tag)

    def download(self, url: str, size: int, tag: int) -> bytes:
        """An object from the store, which the cache then keeps; as `read`."""
        headers, body = self._ask(_Request(url[len(f"{self._scheme}://{self.bucket}/") :], most=size), url)
        found, etag = len(body), headers.get("ETag", "")
        if found != size:
            raise Changed(f"it has changed since it was listed: {size:,} bytes then, {found:,} now")
        if etag and tag_of(etag) != tag:
            raise Changed("it has changed since it was listed: its ETag is another")
        if self.cache is not None:
            self.cache.keep(url, size, tag, body)
        return body

    def copy_folder(self, folder: str, target: Path) -> None:
        """Copy what lies in a folder, but not in folders below it, to a disk; what is there already is kept. Processes
        of one machine wait for the first of them.

        Raises:
            FileNotFoundError: there is nothing.
            OSError: the disk has no room, or cannot be written.
            Changed, StoreError: as `read`.
        """
        place = f"{self.url}/{folder}".rstrip("/")
        listed = [one for page in self.list_all(folder, deep=False) for one in page.objects]
        found = {key.rpartition("/")[2]: [size, tag] for key, size, tag in listed if not key.endswith("/")}
        if not found:
            raise FileNotFoundError(f"{place} holds no files: check --data.root")
        target.mkdir(parents=True, exist_ok=True)
        with (target / ".lock").open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            note = target / ".objects.json"
            known = read_json(note) if note.is_file() else {}
            new = [name for name, own in found.items() if known.get(name) != own or not (target / name).is_file()]
            needed, free = sum(found[name][0] for name in new), shutil.disk_usage(target).free
            if needed > free:
                raise OSError(f"{place} takes {needed / 1e9:.1f} GB more, and {target} has room for {free / 1e9:.1f}")
            for path in target.iterdir():
                if path.name not in found and path.name[0] != ".":
                    path.unlink()
            for name in progress(f"copying {place}", new, unit=" files"):
                size, tag = found[name]
                self._copy(f"{place}/{name}", size, tag, target / name)
                known[name] = found[name]
                write_atomically(note, json.dumps(known).encode(), sync=False)

    def _copy(self, url: str, size: int, tag: int, path: Path) -> None:
        starts = iter(range(0, size, _PIECE))
        coming = deque(self.submit(self._piece, url, size, tag, start) for start in islice(starts, _PIECES))

        def write(file: Any) -> None:
            while coming:
                file.write(coming.popleft().result())
                coming.extend(self.submit(self._piece, url, size, tag, start) for start in islice(starts, 1))

        write_atomically(path, write)

    def _piece(self, url: str, size: int, tag: int, start: int) -> bytes:
        stop = min(start + _PIECE, size)
        key, part = url[len(f"{self._scheme}://{self.bucket}/") :], f"bytes={start}-{stop - 1}"
        headers, body = self._ask(_Request(key, most=stop - start, part=part), url)
        if len(body) != stop - start or (headers.get("ETag") and tag_of(headers["ETag"]) != tag):
            raise Changed(f"{url} has changed since it was listed: start again")
        return body

    def write(self, name: str, path: Path) -> None:
        """Put a file into the store: whole, or not at all. What has this name is replaced.

        Args:
            name: below the store's prefix.
            path: of the file.

        Raises:
            ValueError: it is too large.
            OSError: it cannot be read.
            StoreError: the store does not answer, or refuses.
        """
        if path.stat().st_size > _LARGEST:
            gigabytes = f"{path.stat().st_size / 1e9:.1f} GB, and an object may have {_LARGEST / 1e9:.0f}"
            raise ValueError(f"{path.name} has {gigabytes}: give a smaller --shard_images")
        self._ask(_Request(f"{self._prefix}/{name}".lstrip("/"), method="PUT", file=path), f"{self.url}/{name}")

    def remove(self, name: str) -> None:
        """Remove an object below the store's prefix, if it is there. Raises StoreError as `write`."""
        self._ask(_Request(f"{self._prefix}/{name}".lstrip("/"), method="DELETE"), f"{self.url}/{name}")

    def submit(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> "Future[Any]":
        """Call in a thread, of which there are as many as there may be requests. None keeps the process from ending."""
        future: Future[Any] = Future()
        self._queue.put((future, partial(call, *arguments, **options)))
        if len(self._threads) < self.in_flight:
            self._threads.append(
                threading.Thread(target=_work, args=(self._queue,), daemon=True, name="dalikd-objects")
            )
            self._threads[-1].start()
        return future

    # ------------------------------------------------------------------------------------------- how it is asked

    def _host(self) -> str:
        """Amazon's own has the bucket in its name, unless a dot there would spoil its certificate."""
        if self._endpoint:
            return urlsplit(self._endpoint).netloc
        return self._signer.host(self.bucket)

    def _ask(self, request: "_Request", url: str) -> tuple[Any, bytes]:
        """As often as it takes: headers and body.

        Args:
            request: what is asked.
            url: that messages name.
        """
        attempt, moved, reason = 0, False, ""
        while attempt < (_ATTEMPTS if self._answered else _FIRST_ATTEMPTS):
            if attempt:
                wait = min(_FIRST_WAIT * 2 ** (attempt - 1), _MOST_WAIT)
                time.sleep(wait * _RANDOM.uniform(0.5, 1.5))  # so that those who failed together do not come together
            attempt += 1
            least = max(_FIRST_SECONDS * (1 if request.key else _LISTING), _USUAL * self._usual)
            seconds, began = min(least * 2 ** (attempt - 1), _MOST_SECONDS), time.monotonic()
            seconds = seconds if request.file is None else _MOST_SECONDS
            try:
                status, headers, body = self._send(request, seconds)
            except ssl.SSLCertVerificationError as error:
                raise StoreError(
                    f"{url}: the certificate of {self._host()} is not trusted ({error.verify_message}): check "
                    "--data.endpoint, or name its authority's file in AWS_CA_BUNDLE"
                ) from None
            except StoreError:
                raise
            except _StaleError:  # the store has closed a connection that was not in use
                attempt -= 1
                continue
            except (OSError, http.client.HTTPException) as error:
                late = isinstance(error, TimeoutError)
                reason = (
                    "no answer in time"
                    if late
                    else getattr(error, "strerror", "") or str(error) or type(error).__name__
                )
                continue
            finally:
                self._usual += (time.monotonic() - began - self._usual) / 32
            self._answered = True
            if status in _GOOD:
                return headers, body
            found = re.search(rb"<Code>([A-Za-z]+)</Code>", body)
            code = found[1].decode() if found else str(status)
            region = headers.get("x-amz-bucket-region")
            if region and region != self._signer.region and not moved:
                self._signer.region, moved = region, True
                continue
            if status not in _AGAIN and code not in _AGAIN_CODES:
                raise self._refusal(status, code, url, request)
            reason = f"{code} ({status})" if found else code
        many = "" if attempt == 1 else f" at {attempt} attempts"
        advice = "" if self._answered else ": check --data.endpoint, AWS_ENDPOINT_URL and the network"
        done = _DONE[request.method]
        words = f"{url} cannot be {done}: {self._host()} fails{many}, at last: {reason}{advice}"
        raise Unavailable(words, self._answered)

    def _send(self, request: "_Request", seconds: float) -> tuple[int, Any, bytes]:
        """Once."""
        host, secure = self._host(), not self._endpoint.startswith("http://")
        path = f"/{quote(request.key, safe='/-_.~', errors='surrogateescape')}"
        if not host.startswith(f"{self.bucket}."):
            path = f"/{self.bucket}{path if request.key else ''}"
        path = urlsplit(self._endpoint).path.rstrip("/") + path
        quoted = partial(quote, safe="-_.~", errors="surrogateescape")
        words = "&".join(f"{name}={quoted(value)}" for name, value in sorted(request.query.items()))
        digest, headers = request.headers()
        headers |= {"Host": host, "Accept-Encoding": "identity"}
        headers |= self._signer.sign(host, path, words, request.method, digest)
        try:
            connection, used = self._idle.pop(), True
        except IndexError:
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            options: dict[str, Any] = {"context": self._tls} if secure else {}
            connection, used = kind(host, timeout=min(seconds, _CONNECT_SECONDS), blocksize=_BLOCK, **options), False
        try:
            if connection.sock is None:
                connection.connect()
            if connection.sock is not None:
                connection.sock.settimeout(seconds)
            request.send(connection, f"{path}?{words}" if words else path, headers)
            response, most = connection.getresponse(), request.most
            body = response.read() if most is None or response.status not in _GOOD else response.read(most + 1)
            if not response.isclosed() and response.read(1):  # the rest of a longer one is not worth its time
                connection.close()
        except BaseException as error:
            connection.close()
            stale = http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, http.client.CannotSendRequest
            if used and isinstance(error, stale):
                raise _StaleError from None
            raise
        expected = response.headers.get("Content-Length")
        if most is not None and response.status in _GOOD and expected and len(body) < min(int(expected), most):
            connection.close()
            raise http.client.IncompleteRead(body)
        if connection.sock is not None:
            self._idle.append(connection)
        return response.status, response.headers, body

    def _refusal(self, status: int, code: str, url: str, request: "_Request") -> OSError:
        done, place = _DONE[request.method], f"{self._scheme}://{self.bucket}"
        if code == "NoSuchBucket" or (status == 404 and not request.key):
            where = "AWS_ENDPOINT_URL" if self._flag == "--output" else "--data.endpoint"
            return StoreError(f"{place}: {self._host()} has no such bucket: check {self._flag} and {where}")
        if status == 404:
            return FileNotFoundError(f"{url} is missing, and was there when it was listed")
        if code == "RequestTimeTooSkewed":
            return StoreError(f"{url} is refused: the clock of this machine is wrong by minutes: set it")
        way = _WAYS[self._scheme]
        if status in (400, 401, 403) and ("Expired" in code):
            return StoreError(f"{url} is refused: the credentials have expired ({code}): {way}")
        if code in _WRONG or status == 401:
            return StoreError(f"{url} is refused: the credentials are wrong ({code}): {way}")
        if status == 403 and self._signer.anonymous:
            return StoreError(f"{url} is refused: it is not public, and no credentials were found: {way}")
        if status == 403:
            return StoreError(f"{url} is refused: these credentials do not allow that it is {done} ({code}): {way}")
        return StoreError(f"{url} cannot be {done}: {self._host()} answers {code} ({status})")


class _Request(NamedTuple):
    """What is asked of a store: `key` of an object, or "", and `query`; `most` bytes of the answer are of use, of a
    longer one only one more is read; `part` of the object, as the header Range has it; `file` is what is sent."""

    key: str
    query: Mapping[str, str] = MappingProxyType({})
    most: int | None = None
    part: str = ""
    method: str = "GET"
    file: Path | None = None

    def headers(self) -> tuple[str, dict[str, str]]:
        """SHA-256 of what is sent, and headers; by Content-MD5 a store sees that it has got what was sent."""
        if self.file is None:
            return _EMPTY, {"Range": self.part} if self.part else {}
        with self.file.open("rb") as content:
            md5 = hashlib.file_digest(content, partial(hashlib.md5, usedforsecurity=False)).digest()
        sent = {"Content-Length": str(self.file.stat().st_size), "Content-MD5": base64.b64encode(md5).decode()}
        return file_digest(self.file), sent

    def send(self, connection: http.client.HTTPConnection, path: str, headers: dict[str, str]) -> None:
        """Make the request."""
        if self.file is None:
            return connection.request(self.method, path, headers=headers)
        with self.file.open("rb") as content, contextlib.suppress(BrokenPipeError):  # refused: the answer says why
            connection.request(self.method, path, content, {**headers, "Connection": "close"})


class _StaleError(Exception):
    """A connection from before is closed."""


def _work(calls: "queue.SimpleQueue[Any]") -> None:
    while (item := calls.get()) is not None:
        future, call = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # passed on
                future.set_exception(error)
        del item, future, call  # a store that nobody has any more ends its threads


def _end(calls: "queue.SimpleQueue[Any]", threads: list[threading.Thread]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            calls.get_nowait()
    for _ in threads:
        calls.put(None)


def _parse(body: bytes, prefix: int) -> Listed:
    """A page of ListObjectsV2; elements have other namespaces elsewhere."""
    root = ElementTree.fromstring(body)
    space, closing, kind = root.tag.rpartition("}")
    if kind != "ListBucketResult":
        raise ValueError("it is something else")
    space += closing
    url = root.findtext(f"{space}EncodingType") == "url"

    def name(text: str) -> str:
        quoted = url and ("%" in text or "+" in text)
        return (unquote(text.replace("+", " "), errors="surrogateescape") if quoted else text)[prefix:]

    key, size, etag = f"{space}Key", f"{space}Size", f"{space}ETag"
    objects = [
        (name(one.findtext(key, "")), int(one.findtext(size, "")), tag_of(one.findtext(etag, "")))
        for one in root.iterfind(f"{space}Contents")
    ]
    folders = [name(one.text or "").rstrip("/") for one in root.iterfind(f"{space}CommonPrefixes/{space}Prefix")]
    return Listed(objects, folders, root.findtext(f"{space}NextContinuationToken", ""))


# ---------------------------------------------------------------------------------------------------- credentials


class _S3Signer:
    """Amazon's signature, version 4, with whatever credentials botocore finds; none for a public bucket."""

    def __init__(self) -> None:
        try:
            from botocore.exceptions import BotoCoreError
            from botocore.session import Session
        except ImportError:
            raise ValueError("s3:// needs botocore, which is not installed: pip install 'dalikd[s3]'") from None
        try:
            self._session: Any = Session()
            self._credentials = self._session.get_credentials()
            self.region = self._session.get_config_variable("region") or "us-east-1"
        except BotoCoreError as error:  # such as a profile that is not there; it names no secret
            raise StoreError(f"AWS's configuration cannot be used: {' '.join(str(error).split())}") from None
        self.anonymous = self._credentials is None
        self._keys: dict[tuple[str, str, str], bytes] = {}

    def endpoint(self, given: str | None) -> str:
        """The endpoint that is asked for, or ""."""
        profile = self._session.get_scoped_config().get("endpoint_url") if self._session.profile else None
        return _checked(
            given or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or profile or ""
        )

    def host(self, bucket: str) -> str:
        """Amazon's own."""
        place = f"s3.{self.region}.amazonaws.com{'.cn' if self.region.startswith('cn-') else ''}"
        return place if "." in bucket else f"{bucket}.{place}"

    def sign(self, host: str, path: str, query: str, method: str = "GET", digest: str = _EMPTY) -> dict[str, str]:
        """Headers of a request, whose body has this SHA-256; 8 µs."""
        if self._credentials is None:
            return {}
        try:
            access, secret, token = self._credentials.get_frozen_credentials()[:3]  # renewed where they end soon
        except Exception as error:  # of any of its providers
            raise StoreError(
                f"AWS's credentials could not be renewed ({type(error).__name__}): {_WAYS['s3']}"
            ) from None
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        scope = (now[:8], self.region, "s3", "aws4_request")
        signed = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": now}
        if token:
            signed["x-amz-security-token"] = token
        names = ";".join(signed)
        lines = "".join(f"{name}:{value}\n" for name, value in signed.items())
        request = hashlib.sha256(f"{method}\n{path}\n{query}\n{lines}\n{names}\n{digest}".encode()).hexdigest()
        place = now[:8], self.region, secret
        if place not in self._keys:
            key = f"AWS4{secret}".encode()
            for word in scope:
                key = hmac.digest(key, word.encode(), "sha256")
            self._keys = {place: key}
        text = f"AWS4-HMAC-SHA256\n{now}\n{'/'.join(scope)}\n{request}".encode()
        signature = hmac.digest(self._keys[place], text, "sha256").hex()
        del signed["host"]
        given = f"Credential={access}/{'/'.join(scope)}, SignedHeaders={names}, Signature={signature}"
        return {**signed, "Authorization": f"AWS4-HMAC-SHA256 {given}"}


class _GoogleSigner:
    """A token of Google's, from wherever google-auth finds one; none for a public bucket."""

    region = ""

    def __init__(self, scope: str) -> None:
        try:
            google: Any = import_module("google.auth")  # not installed where types are checked
            request: Any = import_module("google.auth.transport.requests")
        except ImportError:
            raise ValueError("gs:// needs google-auth, which is not installed: pip install 'dalikd[gcs]'") from None
        self._request, self._lock, self._credentials = request.Request, threading.Lock(), None
        with contextlib.suppress(google.exceptions.DefaultCredentialsError):
            self._credentials, _ = google.default(scopes=[f"https://www.googleapis.com/auth/devstorage.{scope}"])
        self.anonymous = self._credentials is None

    def endpoint(self, given: str | None) -> str:
        """The endpoint that is asked for, or ""."""
        return _checked(given or os.environ.get("STORAGE_EMULATOR_HOST") or "")

    def host(self, bucket: str) -> str:  # noqa: ARG002 - signers have one form
        """Google's own."""
        return "storage.googleapis.com"

    def sign(self, *_: str) -> dict[str, str]:
        """Headers of a request."""
        if self._credentials is None:
            return {}
        with self._lock:
            if not self._credentials.valid:
                try:
                    self._credentials.refresh(self._request())
                except Exception as error:  # of any of its providers
                    kind = type(error).__name__
                    raise StoreError(f"Google's credentials could not be renewed ({kind}): {_WAYS['gs']}") from None
            return {"Authorization": f"Bearer {self._credentials.token}"}


def _checked(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if endpoint and (parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc):
        raise ValueError(
            f"--data.endpoint {endpoint.rpartition('@')[2]}: give a URL, as https://HOST or http://HOST:PORT"
        )
    return endpoint
