"""Transport over real loopback sockets, on both event loops: what peers may say, and what not.

A *raw* peer speaks bytes, so that it can break every rule; the others are Connections.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import socket
import struct
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest
import pytest_asyncio

from scheduler import transport
from scheduler.errors import ProtocolError, SetupError
from scheduler.messages import (
    HANDSHAKE,
    OLDEST,
    SPEAKS,
    VERSION,
    Answer,
    Cancel,
    Challenge,
    Committed,
    Joined,
    Refused,
    Reserved,
    Welcome,
    Wire,
)
from scheduler.transport import MAX_HEADER, MAX_PAYLOAD, Connection, dial, listen

SECRET = b"of this test"
PREFIX = struct.Struct("!4sIQ")
MAGIC = b"MTL" + bytes([HANDSHAKE])  # a raw peer is of the first release: it says no versions

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture(autouse=True)
async def nothing_leaks():
    """Every descriptor and every task that a test opened is gone at its end."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(asyncio.all_tasks()) == 1


def frame(message: Wire, payload: bytes = b"", magic: bytes = MAGIC) -> bytes:
    header = msgspec.msgpack.encode(message)
    return PREFIX.pack(magic, len(header), len(payload)) + header + payload


@asynccontextmanager
async def pair():
    """Two authenticated ends of one connection: (dialler's, listener's)."""
    accepted: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def handle(connection: Connection) -> None:
        accepted.set_result(connection)
        await done.wait()

    async with listen("127.0.0.1", 0, SECRET, handle) as (host, port):
        connection = await dial(host, port, SECRET)
        try:
            yield connection, await accepted
        finally:
            connection.close()
            done.set()


class Raw:
    """A peer that speaks bytes."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock, self.loop = sock, asyncio.get_running_loop()

    async def hear(self) -> Wire:
        kinds = Challenge | Answer | Welcome | Refused
        data = await self.loop.sock_recv(self.sock, 4096)  # so small a frame comes whole
        return msgspec.msgpack.decode(data[PREFIX.size :], type=kinds)

    async def say(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.sock, data)

    def say_no_more(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    async def end(self) -> None:
        """Wait until the other side has closed."""
        with suppress(ConnectionResetError):
            while await self.loop.sock_recv(self.sock, 4096):
                pass

    async def authenticate(self) -> None:
        challenge = await self.hear()
        proof = hmac.digest(SECRET, b"dial" + challenge.nonce + bytes(16), "sha256")
        await self.say(frame(Answer(HANDSHAKE, bytes(16), proof)))
        welcome = await self.hear()
        expected = hmac.digest(SECRET, b"listen" + bytes(16) + challenge.nonce, "sha256")
        assert welcome == Welcome(expected)


@asynccontextmanager
async def raw_dialler():
    """A raw peer of a listener whose handler takes messages into `heard` until one is wrong."""
    heard: asyncio.Queue[object] = asyncio.Queue()

    async def handle(connection: Connection) -> None:
        try:
            while True:
                message, _ = await connection.receive()
                heard.put_nowait(message)
        except (ConnectionError, ProtocolError) as error:
            heard.put_nowait(error)

    async with listen("127.0.0.1", 0, SECRET, handle) as address:
        with socket.create_connection(address) as sock:
            yield Raw(sock), heard


@asynccontextmanager
async def raw_listener(say):
    """Where `dial` meets a raw peer, which does `say(raw)`."""
    loop = asyncio.get_running_loop()

    async def serve(server: socket.socket) -> None:
        sock, _ = await loop.sock_accept(server)
        with sock:
            raw = Raw(sock)
            await say(raw)
            await raw.end()

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        serving = asyncio.create_task(serve(server))
        yield server.getsockname()
        await serving


# ── messages and payloads ───────────────────────────────────────────────────────────────────────


async def test_messages_arrive_whole_and_in_order():
    async with pair() as (left, right):
        for epoch in range(50):
            await left.send(Cancel("a" * epoch, epoch))
        for epoch in range(50):
            assert await right.receive() == (Cancel("a" * epoch, epoch), 0)
        await right.send(Joined(0.5))
        assert await left.expect(Joined) == Joined(0.5)


@pytest.mark.parametrize("size", [1, 1000, 1 << 18, (1 << 20) + 17])
async def test_a_payload_fills_the_receivers_own_memory(size):
    data = os.urandom(size)
    third = size // 3
    parts = [memoryview(data)[:third], b"", data[third:]]
    place = bytearray(size + 20)
    views = [memoryview(place)[10 : 10 + size // 2], memoryview(place)[10 + size // 2 : 10 + size]]
    async with pair() as (left, right):
        sending = asyncio.create_task(left.send(Reserved("a", 1), parts))
        assert await right.receive() == (Reserved("a", 1), size)
        await right.receive_into(views)
        await sending
        await left.send(Committed("a", 1))
        assert await right.receive() == (Committed("a", 1), 0)
    assert place == bytes(10) + data + bytes(10)


async def test_a_payload_nobody_takes_is_skipped():
    async with pair() as (left, right):
        sending = asyncio.create_task(left.send(Reserved("a", 1), [bytes(1 << 20)]))
        assert (await right.receive())[1] == 1 << 20
        await asyncio.gather(sending, left.send(Committed("b", 2)))
        assert await right.receive() == (Committed("b", 2), 0)


@pytest.mark.parametrize("size", [99, 101])
async def test_a_payload_of_another_size_is_refused_before_a_byte_is_written(size):
    place = bytearray(size)
    async with pair() as (left, right):
        await left.send(Reserved("a", 1), [b"x" * 100])
        await right.receive()
        with pytest.raises(ProtocolError, match=f"payload of 100 bytes where {size} fit"):
            await right.receive_into([memoryview(place)])
    assert place == bytes(size)


async def test_a_header_larger_than_the_read_buffer():
    long = Cancel("x" * (1 << 20), 3)
    async with pair() as (left, right):
        sending = asyncio.create_task(left.send(long))
        assert await right.receive() == (long, 0)
        await sending


async def test_senders_at_once_do_not_mix_their_frames():
    async with pair() as (left, right):
        senders = [
            asyncio.create_task(left.send(Reserved("a", n), [bytes([n]) * 300_000]))
            for n in range(8)
        ]
        for _ in senders:
            message, size = await right.receive()
            place = bytearray(size)
            await right.receive_into([memoryview(place)])
            assert place == bytes([message.epoch]) * 300_000
        await asyncio.gather(*senders)


async def test_posted_words_arrive_in_order_though_nobody_listens_yet():
    words = [Refused(f"{number} " + "x" * 300_000) for number in range(40)]
    async with pair() as (left, right):
        for word in words:
            left.post(word)
        assert [(await right.receive())[0] for _ in words] == words
        left.post(Joined(1.0))
        assert await right.expect(Joined) == Joined(1.0)


async def test_a_word_posted_while_a_frame_is_sent_does_not_cut_it():
    async with pair() as (left, right):
        sending = asyncio.create_task(left.send(Reserved("a", 1), [bytes(16 << 20)]))
        await right.receive()
        left.post(Joined(1.0))
        await right.receive_into([memoryview(bytearray(16 << 20))])
        assert await right.expect(Joined) == Joined(1.0)
        await sending


async def test_what_is_posted_to_a_connection_that_ends_is_forgotten():
    async with pair() as (left, right):
        left.post(Refused("x" * (16 << 20)))
        right.close()
        left.post(Joined(1.0))
        left.close()
        left.post(Joined(2.0))
        with pytest.raises(ConnectionError):
            await left.receive()


async def test_out_of_turn_and_refused_are_protocol_errors():
    async with pair() as (left, right):
        await left.send(Joined(1.0))
        await left.send(Refused("because"))
        with pytest.raises(ProtocolError, match="said Joined out of turn"):
            await right.expect(Welcome)
        with pytest.raises(ProtocolError, match="because"):
            await right.expect(Welcome)


# ── the end of a connection ─────────────────────────────────────────────────────────────────────


async def test_close_wakes_who_receives_and_who_sends():
    async with pair() as (left, right):
        receiving = asyncio.create_task(left.receive())
        sending = asyncio.create_task(left.send(Reserved("a", 1), [bytes(64 << 20)]))
        waiting = asyncio.create_task(left.send(Joined(1.0)))
        await right.receive()  # now all three wait: for words, for room, for their turn
        left.close()
        left.close()
        ends = await asyncio.gather(receiving, sending, waiting, return_exceptions=True)
        assert [isinstance(end, ConnectionError) for end in ends] == [True] * 3
        with pytest.raises(ConnectionError):
            await left.receive()
        with pytest.raises(ConnectionError):
            await left.send(Joined(1.0))
        assert not left.alive


async def test_the_other_end_is_told():
    async with pair() as (left, right):
        left.close()
        with pytest.raises(ConnectionError):
            await right.receive()


async def test_a_frame_that_its_sender_gave_up_ends_the_connection():
    async with pair() as (left, right):
        sending = asyncio.create_task(left.send(Reserved("a", 1), [bytes(64 << 20)]))
        await right.receive()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        with pytest.raises(ConnectionError):
            await left.send(Joined(1.0))


async def test_waiting_for_a_turn_to_send_can_be_given_up():
    async with pair() as (left, right):
        sending = asyncio.create_task(left.send(Reserved("a", 1), [bytes(16 << 20)]))
        await right.receive()
        waiting = asyncio.create_task(left.send(Joined(1.0)))
        await asyncio.sleep(0)
        waiting.cancel()
        place = bytearray(16 << 20)
        await right.receive_into([memoryview(place)])
        await sending
        await left.send(Joined(2.0))
        assert await right.expect(Joined) == Joined(2.0)


async def test_alive():
    async with pair() as (left, right):
        assert left.alive
        assert right.alive
        await left.send(Joined(1.0))
        await left.send(Joined(2.0))
        await right.receive()
        assert not right.alive  # another word is there: it is not idle
        await right.receive()
        assert right.alive
        left.close()
        with pytest.raises(ConnectionError):
            await right.receive()
        assert not right.alive


class Unroutable(socket.socket):
    """The kernel's word for a network that went away."""

    def sendmsg(self, parts):
        raise OSError(113, "No route to host")

    def recv(self, size, *flags):
        raise OSError(113, "No route to host")


async def test_a_network_that_went_away_is_a_lost_connection():
    with socket.create_server(("127.0.0.1", 0)) as listener, Unroutable() as sock:
        sock.connect(listener.getsockname())
        connection = Connection(sock)
        assert not connection.alive
        with pytest.raises(ConnectionError, match="No route to host"):
            await connection.send(Joined(1.0))


async def test_a_fault_of_whoever_serves_a_connection_is_logged_and_ends_it(caplog):
    async def handle(connection: Connection) -> None:
        raise ArithmeticError("no such number")

    async with listen("127.0.0.1", 0, SECRET, handle) as (host, port):
        for _ in range(2):  # the listener goes on
            connection = await dial(host, port, SECRET)
            with pytest.raises(ConnectionError):
                await connection.receive()
            connection.close()
    assert [record.exc_info[0] for record in caplog.records] == [ArithmeticError] * 2


# ── the handshake ───────────────────────────────────────────────────────────────────────────────


async def test_the_dialler_with_a_wrong_secret_is_told_what_to_do():
    async def handle(connection: Connection) -> None:
        raise AssertionError("let in")

    async with listen("127.0.0.1", 0, SECRET, handle) as (host, port):
        with pytest.raises(ProtocolError, match="wrong cluster secret: give this process"):
            await dial(host, port, b"another")


async def test_a_listener_that_does_not_know_the_secret_is_left():
    async def pretend(raw: Raw) -> None:
        await raw.say(frame(Challenge(HANDSHAKE, bytes(16))))
        await raw.hear()
        await raw.say(frame(Welcome(bytes(32))))

    async with raw_listener(pretend) as (host, port):
        with pytest.raises(ProtocolError, match="does not know the cluster secret"):
            await dial(host, port, SECRET)


async def test_a_proof_cannot_be_sent_back_to_who_made_it():
    """Whoever answers a challenge with the same challenge learns nothing that opens a door."""

    async def mirror(raw: Raw) -> None:
        await raw.say(frame(Challenge(HANDSHAKE, bytes(16))))
        answer = await raw.hear()
        await raw.say(frame(Welcome(answer.proof)))

    async with raw_listener(mirror) as (host, port):
        with pytest.raises(ProtocolError, match="does not know the cluster secret"):
            await dial(host, port, SECRET)


@pytest.mark.parametrize("version", [0, HANDSHAKE + 1])
async def test_a_listener_of_another_handshake_is_left(version):
    async def other(raw: Raw) -> None:
        await raw.say(frame(Challenge(version, bytes(16)), magic=b"MTL" + bytes([version])))

    async with raw_listener(other) as (host, port):
        with pytest.raises(ProtocolError, match=f"does not speak version {HANDSHAKE}"):
            await dial(host, port, SECRET)


async def test_a_listener_that_says_nothing_is_left_after_the_limit():
    async def silence(raw: Raw) -> None:
        pass

    async with raw_listener(silence) as (host, port):
        with pytest.raises(TimeoutError):
            await dial(host, port, SECRET, timeout=0.05)


async def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody else gets the port
        with pytest.raises(ConnectionRefusedError):
            await dial(*taken.getsockname(), SECRET)


async def test_a_dialler_that_says_nothing_is_left_after_the_limit(monkeypatch):
    monkeypatch.setattr(transport, "_HANDSHAKE_S", 0.05)
    async with raw_dialler() as (raw, heard):
        assert isinstance(await raw.hear(), Challenge)
        await raw.end()
        assert heard.empty()


# ── versions ────────────────────────────────────────────────────────────────────────────────────


async def test_two_of_this_release_speak_its_newest_version():
    async with pair() as (left, right):
        assert (left.version, right.version) == (VERSION, VERSION)
        await left.send(Joined(1.0))
        assert await right.expect(Joined) == Joined(1.0)


async def test_a_dialler_of_the_first_release_is_spoken_to_as_such():
    async with raw_dialler() as (raw, heard):
        await raw.authenticate()
        await raw.say(frame(Joined(1.0)))
        assert await heard.get() == Joined(1.0)


async def test_a_listener_of_the_first_release_is_spoken_to_as_such():
    heard = asyncio.get_running_loop().create_future()

    async def first_release(raw: Raw) -> None:
        await raw.say(frame(Challenge(HANDSHAKE, bytes(16))))
        answer = await raw.hear()
        proof = hmac.digest(SECRET, b"listen" + answer.nonce + bytes(16), "sha256")
        await raw.say(frame(Welcome(proof)))
        heard.set_result(await raw.loop.sock_recv(raw.sock, 4096))

    async with raw_listener(first_release) as (host, port):
        connection = await dial(host, port, SECRET)
        await connection.send(Joined(1.0))
        assert await heard == frame(Joined(1.0))
        connection.close()


async def test_a_dialler_from_too_far_a_release_is_told_so():
    assert SPEAKS == (OLDEST, VERSION)
    async with raw_dialler() as (raw, heard):
        challenge = await raw.hear()
        proof = hmac.digest(SECRET, b"dial" + challenge.nonce + bytes(16), "sha256")
        later = (VERSION + 1, VERSION + 2)
        await raw.say(frame(Answer(HANDSHAKE, bytes(16), proof, later)))
        refused = await raw.hear()
        assert "by one release at a time" in refused.reason
        assert heard.empty()


async def test_a_frame_of_another_version_than_agreed_ends_the_connection():
    async with raw_dialler() as (raw, heard):
        await raw.authenticate()
        await raw.say(frame(Joined(1.0), magic=b"MTL" + bytes([VERSION])))
        assert isinstance(await heard.get(), ProtocolError)


UNKNOWN = {
    "another version": frame(Joined(1.0), magic=b"MTL" + bytes([HANDSHAKE + 1])),
    "another protocol": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a word that is no answer": frame(Joined(1.0)),
    "an oversized answer": PREFIX.pack(MAGIC, 5000, 0) + bytes(5000),
    "a wrong proof": frame(Answer(HANDSHAKE, bytes(16), hashlib.sha256().digest())),
    "an empty proof": frame(Answer(HANDSHAKE, b"", b"")),
    "half a frame": frame(Answer(HANDSHAKE, bytes(16), bytes(32)))[:20],
}


@pytest.mark.parametrize("said", UNKNOWN.values(), ids=UNKNOWN)
async def test_who_does_not_prove_itself_is_not_let_in(said):
    async with raw_dialler() as (raw, heard):
        await raw.hear()
        await raw.say(said)
        raw.say_no_more()
        await raw.end()  # perhaps after a Refused
        assert heard.empty()


# ── what a trusted peer must not say ────────────────────────────────────────────────────────────

BROKEN = {
    "a header beyond the limit": (PREFIX.pack(MAGIC, MAX_HEADER + 1, 0), "sent a frame of"),
    "a payload beyond the limit": (PREFIX.pack(MAGIC, 1, MAX_PAYLOAD + 1), "sent a frame of"),
    "bytes that are no frame": (bytes(range(64)), "does not speak version"),
    "a word that we do not know": (
        PREFIX.pack(MAGIC, 12, 0) + msgspec.msgpack.encode({"type": "Later"}),
        "sent an unknown message",
    ),
    "a header that is no MessagePack": (PREFIX.pack(MAGIC, 3, 0) + b"\xc1\xc1\xc1", "unknown"),
    "a word that is no text": (PREFIX.pack(MAGIC, 8, 0) + b"\x81\xa4type\xa1\xf4", "unknown"),
    "a known word with a wrong field": (
        frame(Joined("soon")),  # type: ignore[arg-type]
        "sent an unknown message",
    ),
}


@pytest.mark.parametrize(("said", "error"), BROKEN.values(), ids=BROKEN)
async def test_a_broken_frame_is_a_protocol_error(said, error):
    async with raw_dialler() as (raw, heard):
        await raw.authenticate()
        await raw.say(frame(Joined(1.0)) + said)
        assert await heard.get() == Joined(1.0)
        wrong = await heard.get()
        assert isinstance(wrong, ProtocolError)
        assert error in str(wrong)


@pytest.mark.parametrize("cut", [1, 15, 16, 20, 40])
async def test_a_frame_cut_in_the_middle_is_a_lost_connection(cut):
    whole = frame(Cancel("x" * 20, 1), bytes(10))
    async with raw_dialler() as (raw, heard):
        await raw.authenticate()
        await raw.say(whole[:cut])
        raw.say_no_more()
        assert isinstance(await heard.get(), ConnectionError)


async def test_a_frame_may_come_byte_by_byte():
    async with raw_dialler() as (raw, heard):
        await raw.authenticate()
        for byte in frame(Cancel("abc", 1), b"payload") + frame(Joined(1.0)):
            await raw.say(bytes([byte]))
            await asyncio.sleep(0)
        assert [await heard.get(), await heard.get()] == [Cancel("abc", 1), Joined(1.0)]


# ── listening ───────────────────────────────────────────────────────────────────────────────────


async def test_a_port_that_is_taken_says_what_to_do():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(SetupError, match="Choose a free port"),
    ):
        async with listen(*taken.getsockname(), SECRET, handle=None):
            raise AssertionError("listens")


@pytest.mark.parametrize("port", [70000, -1])
async def test_a_port_that_is_none(port):
    with pytest.raises(SetupError, match="cannot listen"):
        async with listen("127.0.0.1", port, SECRET, handle=None):
            raise AssertionError("listens")


async def test_leaving_the_listener_closes_its_connections_and_ends_their_tasks():
    started, ended = asyncio.Event(), []

    async def handle(connection: Connection) -> None:
        started.set()
        try:
            await connection.receive()
        finally:
            ended.append(connection)

    async with listen("127.0.0.1", 0, SECRET, handle) as (host, port):
        known = await dial(host, port, SECRET)
        unknown = Raw(socket.create_connection((host, port)))  # never says who it is
        assert isinstance(await unknown.hear(), Challenge)
        await started.wait()
    with pytest.raises(ConnectionError):
        await known.receive()
    await unknown.end()
    assert len(ended) == 1
    known.close()
    unknown.sock.close()
    with pytest.raises(ConnectionRefusedError):
        await dial(host, port, SECRET)


async def test_a_connection_is_closed_when_its_handler_returns():
    async def handle(connection: Connection) -> None:
        await connection.expect(Joined)

    async with listen("127.0.0.1", 0, SECRET, handle) as (host, port):
        connection = await dial(host, port, SECRET)
        await connection.send(Joined(1.0))
        with pytest.raises(ConnectionError):
            await connection.receive()
        connection.close()


async def test_an_ipv6_address_is_listened_on():
    async def handle(connection: Connection) -> None:
        await connection.send(Joined(1.0))

    async with listen("::1", 0, SECRET, handle) as (host, port):
        connection = await dial(host, port, SECRET)
        assert await connection.expect(Joined) == Joined(1.0)
        connection.close()


async def test_a_name_is_dialled_at_each_of_its_addresses():
    async def handle(connection: Connection) -> None:
        await connection.send(Joined(1.0))

    async with listen("127.0.0.1", 0, SECRET, handle) as (_, port):
        connection = await dial("localhost", port, SECRET)
        assert await connection.expect(Joined) == Joined(1.0)
        connection.close()
