"""HTTP/1.1 responses and server-sent events, from bytes cut at any place. No sockets in here."""

from __future__ import annotations

import re

from loadtest.errors import WireError

_HEAD_LIMIT = 64 * 1024
_LINE_LIMIT = 4 * 1024
_EVENT_LIMIT = 16 * 1024 * 1024

_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?")


class Response:
    """One response (RFC 9112): `feed` takes what was read and returns what of it is body.

    `complete` turns true with the last byte; a body that lasts until the connection closes is
    completed by `close`. Raises WireError on bytes that are no response.
    """

    __slots__ = (
        "_between",
        "_body",
        "_left",
        "_pending",
        "complete",
        "headers",
        "keep_alive",
        "status",
    )

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.complete = False
        self.keep_alive = True
        self._pending = b""  # an unfinished head, size line or trailer
        self._body = self._head  # what reads the next bytes
        self._left = 0  # bytes of the body, or of a chunk, still to come
        self._between = False  # a chunk's CRLF is still to come

    def feed(self, data: bytes) -> bytes:
        if self.complete:
            raise WireError("bytes after the end of the response")
        if self._pending:
            data, self._pending = self._pending + data, b""
        return self._body(data)

    def close(self) -> None:
        """The peer has closed: right only for a body without a length."""
        self.keep_alive = False
        if self._body == self._until_close:
            self.complete = True

    def _head(self, data: bytes) -> bytes:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > _HEAD_LIMIT:
                raise WireError(f"response head longer than {_HEAD_LIMIT} bytes")
            self._pending = data
            return b""
        status_line, *lines = data[:end].split(b"\r\n")
        version, _, rest = status_line.partition(b" ")
        if version not in (b"HTTP/1.1", b"HTTP/1.0") or not rest[:3].isdigit():
            raise WireError(f"not an HTTP/1.1 status line: {status_line[:80]!r}")
        self.status = int(rest[:3])
        data = data[end + 4 :]
        if 100 <= self.status < 200:  # an interim response; the real one follows
            return self._head(data) if data else b""
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon:
                raise WireError(f"header without a colon: {line[:80]!r}")
            self.headers[name.strip().lower()] = value.strip()
        self._choose_body(version)
        return self._body(data) if data and not self.complete else b""

    def _choose_body(self, version: bytes) -> None:
        connection = self.headers.get(b"connection", b"").lower()
        self.keep_alive = connection != b"close" and version == b"HTTP/1.1"
        length = self.headers.get(b"content-length")
        if self.headers.get(b"transfer-encoding", b"").lower() == b"chunked":
            self._body = self._chunks
        elif length is not None:
            if not length.isdigit() or len(length) > 15:
                raise WireError(f"content-length is no number: {length[:40]!r}")
            self._left = int(length)
            self._body = self._counted
            self.complete = self._left == 0
        elif self.status in (204, 304):
            self.complete = True
        else:
            self.keep_alive = False
            self._body = self._until_close

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise WireError("more bytes than content-length said")
        self.complete = self._left == 0
        return data

    def _until_close(self, data: bytes) -> bytes:
        return data

    def _chunks(self, data: bytes) -> bytes:
        out = b""
        at = 0
        while at < len(data):
            if self._between:  # a chunk's data is done, its CRLF is due
                if data[at : at + 2] != b"\r\n"[: len(data) - at]:
                    raise WireError("a chunk's data does not end where its size said")
                if len(data) - at < 2:
                    self._pending = data[at:]
                    break
                at += 2
                self._between = False
            elif self._left:
                piece = data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                self._between = self._left == 0
                out = out + piece if out else piece
            elif (end := data.find(b"\r\n", at)) < 0:
                self._keep_line(data[at:])
                break
            else:
                self._left = _chunk_size(data, at, end)
                at = end + 2
                if self._left == 0:
                    self._body = self._trailer
                    self._trailer(data[at:])
                    break
        return out

    def _trailer(self, data: bytes) -> bytes:
        """After the last chunk: header lines that nobody needs, then an empty line."""
        if data.startswith(b"\r\n"):
            self._finish(data[2:])
        elif (end := data.find(b"\r\n\r\n")) >= 0:
            self._finish(data[end + 4 :])
        else:
            self._keep_line(data)
        return b""

    def _finish(self, rest: bytes) -> None:
        if rest:
            raise WireError("bytes after the end of the response")
        self.complete = True

    def _keep_line(self, data: bytes) -> None:
        if len(data) > _LINE_LIMIT:
            raise WireError(f"a chunk's size line or trailer is longer than {_LINE_LIMIT} bytes")
        self._pending = data


def _chunk_size(data: bytes, at: int, end: int) -> int:
    match = _SIZE.fullmatch(data, at, end)
    if match is None:
        raise WireError(f"not a chunk size: {data[at:end][:40]!r}")
    return int(match[1], 16)


class Events:
    """Splits an event stream into the `data` of its events (WHATWG HTML, server-sent events).

    Lines end in LF, CRLF or CR; comments and other fields are skipped.
    """

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> list[bytes]:
        if self._pending:
            data, self._pending = self._pending + data, b""
        if data.startswith(b"data: ") and data.find(b"\n") == len(data) - 2 and data[-1] == 10:
            return [data[6:-2]] if b"\r" not in data else self._split(data)  # one whole event
        return self._split(data)

    def _split(self, data: bytes) -> list[bytes]:
        held = b""
        if b"\r" in data:
            if data[-1] == 13:  # half of a CRLF, perhaps
                data, held = data[:-1], b"\r"
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *blocks, rest = data.split(b"\n\n")
        self._pending = rest + held
        if len(self._pending) > _EVENT_LIMIT:
            raise WireError(f"an event longer than {_EVENT_LIMIT} bytes")
        return [payload for block in blocks if (payload := _payload(block)) is not None]


def _payload(block: bytes) -> bytes | None:
    lines = []
    for line in block.split(b"\n"):
        if line.startswith(b"data:"):
            lines.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line == b"data":
            lines.append(b"")
    return b"\n".join(lines) if lines else None
