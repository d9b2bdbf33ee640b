"""Serves a folder as a bucket of any name, read only, each answer so many milliseconds late: for measurements, since
moto's server takes ten milliseconds of a core for a request.

    python tests/serve_objects.py FOLDER --port 9000 --milliseconds 30
"""

import argparse
import asyncio
import hashlib
from collections.abc import Iterator
from html import escape
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

_PAGE = 1000  # objects


class Bucket:
    """The files of a folder, or as many objects as ImageNet has, 1,281,000 in 1,000 classes, all of them the folder's
    first image."""

    def __init__(self, folder: Path, simulated: bool) -> None:
        self.folder, self.tags, self.image = folder, {}, b""
        if simulated:
            self.image = next(path for path in sorted(folder.rglob("*.[jJ][pP]*")) if path.is_file()).read_bytes()
            self.keys = [f"train/n{row // 1281:08d}/n{row // 1281:08d}_{row:08d}.JPEG" for row in range(1_281_000)]
        else:
            self.keys = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def answer(self, target: str) -> tuple[str, str, bytes]:
        """Status, ETag and body of a GET."""
        parts = urlsplit(target)
        key = unquote(parts.path).lstrip("/").partition("/")[2]
        if not key:
            return "200 OK", "", self._list({name: values[0] for name, values in parse_qs(parts.query).items()})
        if self.image:
            return "200 OK", _made_up(key), self.image
        try:
            content = (self.folder / key).read_bytes()
        except OSError:
            return "404 Not Found", "", b"<Error><Code>NoSuchKey</Code></Error>"
        return "200 OK", self._tag(key, content), content

    def _tag(self, key: str, content: bytes | None = None) -> str:
        if key not in self.tags:
            self.tags[key] = hashlib.md5(
                (self.folder / key).read_bytes() if content is None else content, usedforsecurity=False
            ).hexdigest()
        return self.tags[key]

    def _list(self, query: dict[str, str]) -> bytes:
        from bisect import bisect_left, bisect_right

        prefix, more = query.get("prefix", ""), query.get("continuation-token", "")
        first = bisect_right(self.keys, more) if more else bisect_left(self.keys, prefix)
        last = bisect_left(self.keys, f"{prefix}\U0010ffff")
        if "delimiter" in query:
            folders = dict.fromkeys(self._folders(first, last, len(prefix)))
            found = "".join(f"<CommonPrefixes><Prefix>{quote(one)}</Prefix></CommonPrefixes>" for one in folders)
            return _page(found)
        page = self.keys[first : min(last, first + _PAGE)]
        found = "".join(self._entry(key) for key in page)
        token = page[-1] if first + _PAGE < last else ""
        return _page(found + (f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else ""))

    def _folders(self, first: int, last: int, start: int) -> Iterator[str]:
        from bisect import bisect_left

        while first < last:
            name, slash, _ = self.keys[first][start:].partition("/")
            if slash:
                yield self.keys[first][:start] + name + "/"
            first = bisect_left(self.keys, self.keys[first][:start] + name + ("0" if slash else "\0"))  # 0 follows /

    def _entry(self, key: str) -> str:
        size, tag = len(self.image), _made_up(key)
        if not self.image:
            size, tag = (self.folder / key).stat().st_size, self._tag(key)
        return (
            f"<Contents><Key>{quote(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{tag}&quot;</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )


def _made_up(key: str) -> str:
    return f"{hash(key) % 2**64:016x}" * 2


def _page(found: str) -> bytes:
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return f'<ListBucketResult xmlns="{space}"><EncodingType>url</EncodingType>{found}</ListBucketResult>'.encode()


class _Connection(asyncio.Protocol):
    def __init__(self, bucket: Bucket, seconds: float) -> None:
        self._bucket, self._seconds, self._read = bucket, seconds, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._read += data
        while b"\r\n\r\n" in self._read:
            head, _, self._read = self._read.partition(b"\r\n\r\n")
            asyncio.get_running_loop().call_later(self._seconds, self._answer, head.split(b" ", 2)[1].decode())

    def _answer(self, target: str) -> None:
        status, tag, body = self._bucket.answer(target)
        etag = f'ETag: "{tag}"\r\n' if tag else ""
        self._transport.write(f"HTTP/1.1 {status}\r\n{etag}Content-Length: {len(body)}\r\n\r\n".encode() + body)


async def _serve(bucket: Bucket, port: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(bucket, seconds), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serves a folder as a bucket.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--milliseconds", type=float, default=30)
    parser.add_argument("--simulate", action="store_true", help="have 1,281,000 objects, all alike")
    given = parser.parse_args()
    asyncio.run(_serve(Bucket(given.folder, given.simulate), given.port, given.milliseconds / 1000))
