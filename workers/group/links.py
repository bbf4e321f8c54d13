"""Blocking connections between the ranks of a group, for the thread that computes.

An event loop costs more than the messages of one allreduce: raw sockets are several times faster.
Both sides prove that they know the cluster secret, as in scheduler.transport, before anything else
is read; frames are bounded; nothing is ever unpickled. Between two ranks of one host long messages
pass through memory, see workers.group.passage: the socket says where they lie.
"""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import msgspec

from scheduler.errors import ProtocolError, SetupError
from workers.group.passage import HEADER, LEAST

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from msgspec.msgpack import Decoder

    from workers.group.passage import Passage

_FRAME = struct.Struct("!4sI")
_MAGIC = b"MTG\x01"
_NONCE, _PROOF = 16, 32
MAX_WORD = 64 << 20
HANDSHAKE_S = 10.0
BUFFER = 4 << 20
# A host that vanishes without a word is noticed in some 10 s.
_VANISHED = (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))
_VANISHED_MS = 10_000

Buffer = bytes | bytearray | memoryview
Word = TypeVar("Word")


class Link:
    """One connection to another rank, used by one thread at a time.

    Every method raises ConnectionError when the link is broken, TimeoutError when `limit_s` passes
    without progress, ProtocolError when the other side says what it must not. What is sent as one
    message is received as one.
    """

    def __init__(self, sock: socket.socket, limit_s: float) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for side in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, side, BUFFER)
        for option, value in (*_VANISHED, ("TCP_USER_TIMEOUT", _VANISHED_MS)):
            if hasattr(socket, option):  # they differ between systems
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.sock = sock
        self.passage: Passage | None = None  # if both sides have it
        self.set_limit(limit_s)

    def set_limit(self, limit_s: float) -> None:
        """The kernel keeps the limit: a system call less than a timeout of Python's."""
        self.limit_s = limit_s
        limit = struct.pack("ll", int(limit_s), int(limit_s % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self.sock.setsockopt(socket.SOL_SOCKET, option, limit)

    @property
    def remote(self) -> tuple[str, int]:
        host, port = self.sock.getpeername()[:2]
        return host, port

    def passage_for(self, view: memoryview) -> Passage | None:
        """What a message passes through beside the socket; both sides say the same."""
        return self.passage if len(view) >= LEAST else None

    def send(self, data: Buffer) -> None:
        self._push(self.post(memoryview(data).cast("B")))

    def post(self, view: memoryview) -> memoryview:
        """Begin a message: as much as goes at once; what is left is for the socket."""
        passage = self.passage_for(view)
        if passage is None:
            return self.send_at_once(view)
        header, rest = passage.put(view)
        if unsent := self.send_at_once(header):
            return memoryview(bytes(unsent) + bytes(rest))  # a socket that was full before
        return self.send_at_once(rest) if rest else rest

    def send_at_once(self, view: memoryview) -> memoryview:
        """Give as much as fits into the socket's buffer; gives what is left."""
        try:
            return view[self.sock.send(view, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return view

    def _push(self, view: memoryview) -> None:
        while view:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                raise TimeoutError("a rank takes no data") from None

    def receive_into(self, view: memoryview) -> None:
        """Fill the view."""
        if passage := self.passage_for(view):
            header = bytearray(HEADER.size)
            self._fill(memoryview(header))
            view = passage.take(header, view)
        self._fill(view)

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                count = self.sock.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise TimeoutError("a rank is silent") from None
            if not count:
                raise ConnectionResetError("a rank closed its link")
            view = view[count:]

    def say(self, word: msgspec.Struct) -> None:
        """Send one framed message."""
        body = msgspec.msgpack.encode(word)
        self._push(memoryview(_FRAME.pack(_MAGIC, len(body)) + body))

    def hear(self, decoder: Decoder[Word], limit: int = MAX_WORD) -> Word:
        """The next message, which must be one that the decoder knows."""
        prefix = bytearray(_FRAME.size)
        self._fill(memoryview(prefix))
        magic, length = _FRAME.unpack(prefix)
        if magic != _MAGIC or length > limit:
            raise ProtocolError("a rank does not speak our protocol, or speaks too much")
        body = bytearray(length)
        self._fill(memoryview(body))
        try:
            return decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"a rank said what we do not know: {error}") from None

    def close(self) -> None:
        """End the link; whoever waits on it, in any thread, gets a ConnectionError. Idempotent."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.passage = None  # its memory is free as soon as no copy is under way


def exchange(
    outgoing: Sequence[tuple[Link, memoryview]], incoming: Sequence[tuple[Link, memoryview]]
) -> None:
    """Send and receive at the same time; each view is of bytes. Never waits in a circle.

    What fits into shared memory and the sockets' buffers is sent at once and then received in
    order, with no other system call; only the rest goes piece by piece as the sockets allow.
    """
    unsent = [(link, rest) for link, view in outgoing if (rest := link.post(view))]
    if not unsent:
        for link, view in incoming:
            link.receive_into(view)
        return
    sending = {link.sock.fileno(): (link, view) for link, view in unsent}
    receiving = {link.sock.fileno(): _Arrival(link, view) for link, view in incoming}
    limit = max(link.limit_s for link, _ in (*outgoing, *incoming))
    poll = select.poll()
    for number in {*sending, *receiving}:
        poll.register(number, _events(number, sending, receiving))
    while sending or receiving:
        ready = poll.poll(limit * 1000)
        if not ready:
            raise TimeoutError("no rank sends or takes data")
        for number, events in ready:
            if number in sending and events & (select.POLLOUT | select.POLLERR):
                link, view = sending.pop(number)
                if rest := link.send_at_once(view):
                    sending[number] = (link, rest)
            readable = events & (select.POLLIN | select.POLLHUP | select.POLLERR)
            if number in receiving and readable and receiving[number].take():
                del receiving[number]
            poll.modify(number, _events(number, sending, receiving))


class _Arrival:
    """A message that comes piece by piece."""

    def __init__(self, link: Link, view: memoryview) -> None:
        self._sock, self._whole = link.sock, view
        self._passage = link.passage_for(view)
        self._header = bytearray(HEADER.size if self._passage else 0)
        self._rest = memoryview(self._header) if self._passage else view

    def take(self) -> bool:
        """Take what is there; says whether that is all."""
        count = self._sock.recv_into(self._rest, 0, socket.MSG_DONTWAIT)
        if not count:
            raise ConnectionResetError("a rank closed its link")
        self._rest = self._rest[count:]
        if self._passage and not self._rest:
            self._rest = self._passage.take(self._header, self._whole)
            self._passage = None
        return not self._rest


def _events(number: int, *directions: Container[int]) -> int:
    flags = (select.POLLOUT, select.POLLIN)
    return sum(flag for flag, waiting in zip(flags, directions, strict=True) if number in waiting)


def dial(host: str, port: int, secret: bytes, limit_s: float, wait_s: float = HANDSHAKE_S) -> Link:
    """Connect and prove both sides. Raises ConnectionError, TimeoutError or ProtocolError."""
    try:
        sock = socket.create_connection((host, port), timeout=wait_s)
    except OSError as error:
        raise ConnectionRefusedError(f"no rank at {host}:{port}: {error}") from error
    link = Link(sock, HANDSHAKE_S)
    try:
        theirs = bytearray(_NONCE)
        link.receive_into(memoryview(theirs))
        ours = secrets.token_bytes(_NONCE)
        link.send(ours + _proof(secret, b"dial", theirs, ours))
        proof = bytearray(_PROOF)
        link.receive_into(memoryview(proof))
        if not hmac.compare_digest(proof, _proof(secret, b"listen", ours, theirs)):
            raise ProtocolError(f"{host}:{port} does not know the cluster secret")
    except BaseException:
        link.close()
        raise
    link.set_limit(limit_s)
    return link


def accept(server: socket.socket, secret: bytes, limit_s: float, wait_s: float) -> Link:
    """The next connection that proves itself; those that cannot are dropped.

    Raises TimeoutError when none came within `wait_s`, OSError when the server is closed.
    """
    until = time.monotonic() + wait_s
    while True:
        server.settimeout(max(0.001, until - time.monotonic()))
        sock, _ = server.accept()
        link = Link(sock, HANDSHAKE_S)
        try:
            ours = secrets.token_bytes(_NONCE)
            link.send(ours)
            answer = bytearray(_NONCE + _PROOF)
            link.receive_into(memoryview(answer))
            theirs, proof = answer[:_NONCE], answer[_NONCE:]
            if hmac.compare_digest(proof, _proof(secret, b"dial", ours, theirs)):
                link.send(_proof(secret, b"listen", theirs, ours))
                link.set_limit(limit_s)
                return link
        except OSError:
            pass  # a port scan, or a rank that gave up
        link.close()


def listener(host: str, port: int) -> socket.socket:
    """Raises SetupError when the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise SetupError(
            f"cannot listen on {host}:{port}: {error}. Choose a free port or an address of this "
            "machine."
        ) from error


def _proof(secret: bytes, side: bytes, first: Buffer, second: Buffer) -> bytes:
    return hmac.digest(secret, b"group " + side + bytes(first) + bytes(second), "sha256")
