"""One HTTP/1.1 connection to an endpoint: a request at a time as bytes, its answer as it comes.

What a general client does for a request costs six times the CPU time of this, and the router's CPU
is what a relay is measured by.
"""

from __future__ import annotations

import asyncio
from typing import cast

from scheduler.errors import WorkerLost
from serving.stream import Stream

ANSWER_S = 1800.0  # for a whole answer
HEAD_MOST = 1 << 16  # bytes
CHUNK_MOST = 1 << 26  # bytes
_UNTIL_CLOSE = -1


class Answer:
    """`stream` is accepted once status and headers are here; it gives the pieces of the body."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}  # names in lower case
        self.stream: Stream[bytes] = Stream(1)

    async def body(self) -> bytes:
        """All of it. Raises WorkerLost."""
        pieces: list[bytes] = []

        def take(piece: bytes) -> bool:
            pieces.append(piece)
            return True

        await self.stream.pour(take)
        return b"".join(pieces)


class Upstream(asyncio.Protocol):
    """A connection. An answer that does not come in full ends in WorkerLost."""

    def __init__(self) -> None:
        self.used = False  # it has answered before
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._data = b""  # not understood yet
        self._chunked = False
        self._left = 0  # bytes of a body that is not chunked
        self._keep = True
        self._timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """It may be asked."""
        transport = self._transport
        return self._answer is None and transport is not None and not transport.is_closing()

    def ask(self, *request: bytes) -> Answer:
        """The parts of one request, head first."""
        answer = Answer()
        if self._transport is None or not self.idle:
            answer.stream.end(WorkerLost("the connection is closed"))
            return answer
        self._answer = answer
        self._timer = asyncio.get_running_loop().call_later(ANSWER_S, self._late)
        self._transport.writelines(request)
        return answer

    def pause(self) -> None:
        """Let the endpoint wait."""
        if self._transport and self._answer:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport and self._answer:
            self._transport.resume_reading()

    def close(self) -> None:
        """Cut it; an answer under way is lost. Idempotent."""
        if self._transport:
            self._transport.abort()

    # ── asyncio.Protocol ────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by descent

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer:
            whole = self._answer.status and not self._chunked and self._left == _UNTIL_CLOSE
            self._end(None if whole and not error else WorkerLost("the connection ended"))
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._data = self._data + data if self._data else data
        try:
            if self._answer is None:
                raise ValueError("bytes that answer nothing")
            if self._answer.status or self._head(self._answer):
                self._body(self._answer)
        except ValueError as error:  # whoever sends this is no HTTP server
            if self._answer:
                self._end(WorkerLost(f"its answer is damaged: {error}"))
            self.close()

    def _head(self, answer: Answer) -> bool:
        """Read status and headers; False if they are not all here. Raises ValueError."""
        head, found, rest = self._data.partition(b"\r\n\r\n")
        if not found:
            if len(head) > HEAD_MOST:
                raise ValueError("its head is too long")
            return False
        self._data = rest
        first, *lines = head.decode("latin-1").split("\r\n")
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise ValueError("a line of its head does not end as lines do")
        if not first.startswith("HTTP/1."):
            raise ValueError(first[:80])
        version, status = first[:8], int(first[9:12])
        if status < 200:  # 100 Continue and the like: the answer follows
            return self._head(answer)
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        self._chunked = headers.get("transfer-encoding", "").lower().endswith("chunked")
        bare = status in (204, 304)
        self._left = 0 if bare else int(headers.get("content-length", _UNTIL_CLOSE))
        connection = headers.get("connection", "").lower()
        self._keep = version == "HTTP/1.1" and connection != "close"
        answer.status, answer.headers = status, headers
        answer.stream.start(0)
        return True

    def _body(self, answer: Answer) -> None:
        """Give what is here of the body. Raises ValueError."""
        if self._chunked:
            piece, ended = self._chunks()
        elif self._left == _UNTIL_CLOSE:
            piece, self._data, ended = self._data, b"", False
        else:
            piece, self._data = self._data[: self._left], self._data[self._left :]
            self._left -= len(piece)
            ended = self._left == 0
        if piece:
            answer.stream.feed(piece)
        if ended:
            self._end(None)

    def _chunks(self) -> tuple[bytes, bool]:
        """Whole chunks that are here, joined; and whether the last is. Raises ValueError."""
        data, at, ended = self._data, 0, False
        pieces: list[bytes] = []
        while (line := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:line].partition(b";")[0], 16)
            if not 0 <= size <= CHUNK_MOST:
                raise ValueError(f"a chunk of {size} bytes")
            if size == 0:  # trailers may follow
                ended = data.startswith(b"\r\n", line + 2) or b"\r\n\r\n" in data[line:]
                at = len(data) if ended else at
                break
            end = line + 2 + size
            if len(data) < end + 2:
                break
            pieces.append(data[line + 2 : end])
            at = end + 2
        self._data = data[at:]
        return b"".join(pieces), ended

    def _late(self) -> None:
        self._end(WorkerLost(f"its answer takes longer than {ANSWER_S:g} s"))

    def _end(self, error: WorkerLost | None) -> None:
        answer, self._answer, self.used = self._answer, None, True
        if self._timer:
            self._timer.cancel()
        if error or not self._keep or (self._left == _UNTIL_CLOSE and not self._chunked):
            self.close()
        if answer:
            answer.stream.end(error)
