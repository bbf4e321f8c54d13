"""Framed, authenticated messages between processes, over TCP.

A frame is a 16-byte prefix (magic, version, header bytes, payload bytes), a MessagePack header and
raw payload bytes. Payloads (KV caches) are sent from and received into memory that the caller
owns: they are never joined, copied or decoded here. Nothing is ever unpickled.

Before anything else is read both sides prove who they are and agree on a version: see `handshake`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from scheduler.errors import ProtocolError, SetupError
from scheduler.handshake import greet, introduce
from scheduler.messages import HANDSHAKE, Anything, Refused, Wire
from scheduler.vectored import Reader, advance, send_all, send_some

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence

logger = logging.getLogger(__name__)

_PREFIX = struct.Struct("!3sBIQ")
_MAGIC = b"MTL"
MAX_HEADER = 64 << 20  # a 16 MiB prompt as text, with room for its ids
MAX_PAYLOAD = 64 << 30
_HANDSHAKE_S = 10.0
_READ = 1 << 18
_DELIVERY_RATE = 160  # where Linux's tcp_info has tcpi_delivery_rate
# A host that vanishes without a word is noticed in 10 s, by silence or by unacknowledged bytes.
_VANISHED = (
    ("TCP_KEEPIDLE", 4),
    ("TCP_KEEPINTVL", 2),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", 10_000),
)

Buffer = bytes | bytearray | memoryview
Word = TypeVar("Word", bound=Wire)


class Connection:
    """One TCP connection. Any task may send; one task at a time receives.

    Every method raises ConnectionError when the connection is gone, ProtocolError when the peer
    sends what it must not.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _VANISHED:
            if hasattr(socket, option):  # they differ between systems
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.local: tuple[str, int] = sock.getsockname()[:2]
        self.remote: tuple[str, int] = sock.getpeername()[:2]
        self.bytes_read = 0
        self.version = HANDSHAKE  # until both have said what they speak
        self._sock = sock
        self._reader = Reader(sock)
        self._sending = asyncio.Lock()
        self._posted: list[memoryview] = []
        self._poster: asyncio.Task[None] | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Anything)
        self._buffer = memoryview(bytearray(_READ))
        self._start = self._end = 0  # unread bytes of the buffer
        self._payload = 0  # payload bytes of the current frame not yet taken
        self._pending = 0  # socket operations under way
        self._closed = False

    @property
    def alive(self) -> bool:
        """False if it is known to be of no use: closed by either side, or mid-conversation."""
        if self._closed or self._payload or self._start < self._end:
            return False
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True  # open, and as silent as an idle connection must be
        except OSError:
            return False
        return False

    @property
    def rate(self) -> float | None:
        """Bytes per second that the network takes from us, if the system measures it."""
        if self._closed or not hasattr(socket, "TCP_INFO"):
            return None
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _DELIVERY_RATE + 8)
        if len(info) < _DELIVERY_RATE + 8:
            return None
        return float(struct.unpack_from("=Q", info, _DELIVERY_RATE)[0]) or None

    async def send(self, message: Wire, payload: Sequence[Buffer] = ()) -> None:
        """Send one frame. The payload's memory must not change until this returns."""
        parts = [memoryview(part).cast("B") for part in payload]
        size = sum(part.nbytes for part in parts)
        await self._send([*self._frame(message, size), *parts])

    async def send_all(self, messages: Iterable[Wire]) -> None:
        """Send these frames, in order, in as few calls as the socket takes."""
        await self._send([part for message in messages for part in self._frame(message, 0)])

    def post(self, message: Wire) -> None:
        """Send one frame, in the order of posting. Never waits, never raises.

        What the socket has no room for is kept here until it has, or until the connection is gone.
        """
        if self._closed:
            return
        self._posted += self._frame(message, 0)
        if self._poster or self._sending.locked():
            done = False
        else:
            try:
                done = send_some(self._sock, self._posted)
            except OSError:
                self.close()
                return
        if not done and self._poster is None:
            self._poster = asyncio.create_task(self._post())

    async def _post(self) -> None:
        try:
            with suppress(ConnectionError):
                await self._send(self._posted)
        finally:
            self._poster = None

    async def receive(self, limit: int = MAX_HEADER) -> tuple[Wire, int]:
        """The next message, and the bytes of payload to be taken by `receive_into`."""
        if self._payload:
            await self._skip()
        prefix = self._at_hand(_PREFIX.size) or await self._take(_PREFIX.size)
        magic, version, length, payload = _PREFIX.unpack(prefix)
        if magic != _MAGIC or version != self.version:
            raise ProtocolError(
                f"{self.remote} does not speak version {self.version} of our protocol"
            )
        if length > limit or payload > MAX_PAYLOAD:
            raise ProtocolError(f"{self.remote} sent a frame of {length} + {payload} bytes")
        header = self._at_hand(length) or await self._take(length)
        self._payload = payload
        try:
            message: Wire = self._decoder.decode(header)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"{self.remote} sent an unknown message: {error}") from None
        return message, payload

    def hears(self, kinds: Any) -> None:
        """From here on it understands these kinds of messages only: a union of them."""
        self._decoder = msgspec.msgpack.Decoder(kinds)

    async def expect(self, kind: type[Word]) -> Word:
        """The next message, which must be of this kind. Raises ProtocolError if it is not."""
        message, _ = await self.receive()
        if isinstance(message, Refused):
            raise ProtocolError(message.reason)
        if not isinstance(message, kind):
            raise ProtocolError(f"{self.remote} said {type(message).__name__} out of turn")
        return message

    async def receive_into(self, views: Sequence[memoryview]) -> None:
        """Fill these byte views, in order, with the current frame's payload, all of it."""
        size = sum(view.nbytes for view in views)
        if size != self._payload:
            raise ProtocolError(f"payload of {self._payload} bytes where {size} fit")
        await self._fill(list(views))
        self._payload = 0

    def _frame(self, message: Wire, payload: int) -> tuple[memoryview, memoryview]:
        header = self._encoder.encode(message)
        prefix = _PREFIX.pack(_MAGIC, self.version, len(header), payload)
        return memoryview(prefix), memoryview(header)

    async def _send(self, parts: list[memoryview]) -> None:
        async with self._sending:
            try:
                await self._write(parts)
            except BaseException:
                self.close()  # a frame cut in the middle cannot be mended
                raise

    def close(self) -> None:
        """End the connection; whoever waits on it gets a ConnectionError. Idempotent."""
        self._closed = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes operations under way
        self._close_descriptor()

    @contextmanager
    def _operation(self) -> Iterator[None]:
        """The descriptor stays open while the event loop watches it: its number may be reused."""
        if self._closed:
            raise ConnectionResetError(f"the connection to {self.remote} is closed")
        self._pending += 1
        try:
            yield
        except ConnectionError:
            raise
        except OSError as error:  # a route that vanished, a peer that stopped to acknowledge
            raise ConnectionResetError(f"the connection to {self.remote} broke: {error}") from error
        finally:
            self._pending -= 1
            self._close_descriptor()

    def _close_descriptor(self) -> None:
        if self._closed and not self._pending:
            self._reader.end()
            self._sock.close()

    async def _write(self, parts: list[memoryview]) -> None:
        with self._operation():
            await send_all(self._sock, parts)

    async def _fill(self, views: list[memoryview]) -> None:
        """Fill views: first from what was read ahead, then straight from the socket."""
        while views and self._start < self._end:
            ready = min(self._end - self._start, views[0].nbytes)
            views[0][:ready] = self._buffer[self._start : self._start + ready]
            self._start += ready
            advance(views, ready)
        advance(views, 0)  # those of no bytes: nothing would be read into them
        while views:
            await self._read(views)

    async def _read(self, views: list[memoryview]) -> int:
        with self._operation():
            count = await self._reader.some(views)
        if count == 0:
            raise ConnectionResetError(f"{self.remote} closed the connection")
        self.bytes_read += count
        return count

    async def _take(self, count: int) -> memoryview | bytearray:
        """The next `count` bytes, valid until the next receive."""
        if count > _READ:
            large = bytearray(count)
            await self._fill([memoryview(large)])
            return large
        if self._start + count > _READ:
            rest = bytes(self._buffer[self._start : self._end])
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        while (taken := self._at_hand(count)) is None:
            self._end += await self._read([self._buffer[self._end :]])
        return taken

    def _at_hand(self, count: int) -> memoryview | None:
        """The next `count` bytes, valid until the next receive, if they were read already."""
        start, end = self._start, self._start + count
        if end > self._end:
            return None
        if end == self._end:
            self._start = self._end = 0
        else:
            self._start = end
        return self._buffer[start:end]

    async def _skip(self) -> None:
        scrap = memoryview(bytearray(min(self._payload, _READ)))
        while self._payload:
            piece = scrap[: min(self._payload, len(scrap))]
            await self._fill([piece])
            self._payload -= len(piece)


async def dial(host: str, port: int, secret: bytes, timeout: float = 5.0) -> Connection:
    """Connect, authenticate, and agree on a version of the protocol.

    Raises OSError or TimeoutError when nobody answers, ProtocolError when the peer refuses us or
    cannot prove that it knows the secret.
    """
    async with asyncio.timeout(timeout):
        sock = await _connect(host, port)
        try:
            connection = Connection(sock)
        except OSError:
            sock.close()
            raise
        try:
            await introduce(connection, secret)
        except BaseException:
            connection.close()
            raise
    return connection


async def _connect(host: str, port: int) -> socket.socket:
    """To the first of the host's addresses that answers: `localhost` may be ::1 or 127.0.0.1."""
    loop = asyncio.get_running_loop()
    refused: OSError | None = None
    infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, kind, proto, _, address in infos:
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            refused = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise refused or OSError(f"{host} has no address")


@asynccontextmanager
async def listen(
    host: str,
    port: int,
    secret: bytes,
    handle: Callable[[Connection], Awaitable[None]],
) -> AsyncIterator[tuple[str, int]]:
    """Accept connections while the context is open; gives the bound (host, port).

    Each authenticated connection is handled in its own task and closed when `handle` returns.
    Raises SetupError when the address cannot be bound.
    """
    server = _bind(host, port)
    tasks: set[asyncio.Task[None]] = set()
    accepting = asyncio.create_task(_accept(server, secret, handle, tasks))
    try:
        yield server.getsockname()[:2]
    finally:
        accepting.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(accepting, *tasks, return_exceptions=True)
        server.close()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if not 0 <= port <= 65535:  # create_server would leak its socket
            raise OSError("a port is a number up to 65535")
        server = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise SetupError(
            f"cannot listen on {host}:{port}: {error}. Choose a free port or an address of this "
            "machine."
        ) from error
    server.setblocking(False)
    return server


async def _accept(
    server: socket.socket,
    secret: bytes,
    handle: Callable[[Connection], Awaitable[None]],
    tasks: set[asyncio.Task[None]],
) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            sock, _ = await loop.sock_accept(server)
        except OSError as error:  # out of file descriptors: existing connections will free some
            logger.warning("cannot accept a connection: %s", error)
            await asyncio.sleep(0.1)
            continue
        task = asyncio.create_task(_serve_one(sock, secret, handle))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _serve_one(
    sock: socket.socket, secret: bytes, handle: Callable[[Connection], Awaitable[None]]
) -> None:
    try:
        connection = Connection(sock)
    except OSError:  # gone before we looked
        sock.close()
        return
    try:
        async with asyncio.timeout(_HANDSHAKE_S):
            await greet(connection, secret)
        await handle(connection)
    except (ConnectionError, TimeoutError) as error:
        logger.debug("connection from %s ended: %r", connection.remote, error)
    except ProtocolError as error:
        logger.warning("connection from %s refused: %s", connection.remote, error)
    except Exception:  # it costs this connection, not the process
        logger.exception("connection from %s ended by a fault of ours", connection.remote)
    finally:
        connection.close()
