"""Long messages between ranks of one host: through memory, the same bits, and nothing is left."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from scheduler.errors import ProtocolError
from workers.group import passage as passages
from workers.group.formation import connect
from workers.group.links import Link, exchange, listener
from workers.group.passage import AREA, HEADER, LEAST, Offer, attach
from workers.group.ways import ALL
from workers.group.words import Peer
from workers.host_memory import host

pytestmark = pytest.mark.skipif(not host(), reason="only Linux has files without a name")

SECRET = b"a secret"
# The second rank of a formation: it says that it stands, takes part in one sum, and stays.
OTHER = """
import sys
import numpy as np
from workers.group.formation import connect
from workers.group.links import listener
from workers.group.ways import ALL
from workers.group.words import Peer
server = listener("127.0.0.1", 0)
peers = [Peer("0", "127.0.0.1", int(sys.argv[1])), Peer("1", "127.0.0.1", 0)]
mesh = connect(server, b"a secret", 1, 1, peers)
ALL["star"](mesh, np.ones(100_000, np.float32))
print("summed", flush=True)
sys.stdin.read()
"""


def in_use() -> tuple[int, int]:
    """Descriptors of this process, and mappings of such memory."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("memfd:motley-link")


def view_of(size):
    return memoryview(bytearray(os.urandom(size)))


def empty(size):
    return memoryview(bytearray(size))


@pytest.fixture
def ends():
    """Two links of one connection that share memory."""
    with Offer.of_this_host(wanted=True) as offer:
        links = pair()
        links[0].passage, links[1].passage = offer.passage, attach(offer.memory)
    yield links
    for link in links:
        link.close()


def pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return [Link(sock, 10) for sock in (near, server.accept()[0])]


def form(ranks):
    servers = [listener("127.0.0.1", 0) for _ in range(ranks)]
    peers = [Peer(str(i), "127.0.0.1", s.getsockname()[1]) for i, s in enumerate(servers)]
    with ThreadPoolExecutor(ranks) as pool:
        meshes = list(pool.map(lambda r: connect(servers[r], SECRET, 1, r, peers), range(ranks)))
    for server in servers:
        server.close()
    return meshes


def summed(meshes, way, parts):
    results = [part.copy() for part in parts]
    with ThreadPoolExecutor(len(meshes)) as pool:
        list(pool.map(lambda rank: ALL[way](meshes[rank], results[rank]), range(len(meshes))))
    return results


def close_all(meshes):
    for mesh in meshes:
        mesh.close()


@pytest.mark.parametrize("way", ALL)
def test_sums_have_the_same_bits_with_and_without_memory(way):
    meshes = form(3)
    links = [link for mesh in meshes for link in mesh.links.values()]
    assert all(link.passage for link in links)
    parts = np.random.default_rng(1).normal(size=(3, 400_001)).astype(np.float32)
    through = [summed(meshes, way, parts) for _ in range(3)]
    for link in links:
        link.passage = None
    (alone, *_) = summed(meshes, way, parts)
    assert all(np.array_equal(one, alone) for results in through for one in results)
    close_all(meshes)


def test_only_long_messages_leave_the_socket(ends):
    near, far = ends
    for size, in_socket in ((LEAST - 1, LEAST - 1), (LEAST, HEADER.size)):
        sent, got = view_of(size), empty(size)
        assert not near.post(sent)
        waiting = far.sock.recv(size, socket.MSG_PEEK | socket.MSG_WAITALL * (size < LEAST))
        assert len(waiting) == in_socket
        far.receive_into(got)
        assert got == sent


def test_messages_that_find_no_room_go_by_the_socket_and_in_order(ends):
    near, far = ends
    sent = [view_of(size) for size in (AREA // 2, 10, AREA - LEAST, AREA // 3, 3 * AREA, LEAST)]
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(lambda: [near.send(view) for view in sent])
        for view in sent:
            got = empty(len(view))
            far.receive_into(got)
            assert got == view
        sending.result()


def test_what_was_read_makes_room_from_the_beginning(ends):
    near, far = (link.passage for link in ends)
    sent = view_of(AREA)
    for _ in range(3):
        header, rest = near.put(sent)
        assert HEADER.unpack(header) == (0, AREA)
        assert not rest
        got = empty(AREA)
        assert not far.take(bytearray(header), got)
        assert got == sent


def test_a_full_socket_delays_where_a_message_lies_but_loses_nothing(ends):
    near, far = ends
    filler = empty(1 << 20)
    filled = 0
    while len(left := near.send_at_once(filler)) < len(filler):
        filled += len(filler) - len(left)
    sent, got = view_of(2 * AREA), empty(2 * AREA)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(exchange, [(near, sent)], [])
        ahead = empty(filled)
        far._fill(ahead)
        far.receive_into(got)
        sending.result()
    assert got == sent


@pytest.mark.parametrize("header", [(AREA, 1), (0, LEAST + 1), (0xFFFFFFFF, 0xFFFFFFFF)])
def test_a_place_outside_of_the_memory_is_refused(ends, header):
    with pytest.raises(ProtocolError, match="outside"):
        ends[0].passage.take(bytearray(HEADER.pack(*header)), empty(LEAST))


@pytest.mark.parametrize(
    "changes",
    [{"nonce": bytes(16)}, {"host": "another"}, {"descriptor": 999_999}, {"process": 1 << 30}],
    ids=["another nonce", "another host", "no such descriptor", "no such process"],
)
def test_memory_that_cannot_be_opened_is_done_without(changes):
    before = in_use()
    with Offer.of_this_host(wanted=True) as offer:
        assert attach(msgspec.structs.replace(offer.memory, **changes)) is None
    del offer
    assert in_use() == before


@pytest.mark.parametrize("cause", ["not to be opened", "not to be made"])
def test_a_group_without_shared_memory_works_over_its_sockets(monkeypatch, cause):
    if cause == "not to be opened":
        monkeypatch.setattr("workers.group.formation.attach", lambda place: None)
    else:
        monkeypatch.setattr(passages.host_memory, "host", lambda: "")
    meshes = form(2)
    assert not any(link.passage for mesh in meshes for link in mesh.links.values())
    results = summed(meshes, "direct", np.ones((2, LEAST), np.float32))
    assert all((result == 2).all() for result in results)
    close_all(meshes)


def test_closing_leaves_nothing():
    before = in_use()
    meshes = form(3)
    summed(meshes, "two-shot", np.ones((3, 3 * LEAST), np.float32))
    assert in_use()[1] == before[1] + 6  # three links, both ends here
    close_all(meshes)
    assert in_use() == before


def test_the_memory_of_a_killed_rank_is_gone_and_the_loss_noticed():
    before = in_use()
    server = listener("127.0.0.1", 0)
    command = [sys.executable, "-c", OTHER, str(server.getsockname()[1])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        mesh = connect(server, SECRET, 1, 0, [Peer("0", "", 0), Peer("1", "", 0)])
        assert mesh.links[1].passage
        part = np.ones(100_000, np.float32)
        ALL["star"](mesh, part)
        assert (part == 2).all()
        assert other.stdout.readline() == b"summed\n"
        other.send_signal(signal.SIGKILL)
        with pytest.raises(ConnectionError):
            ALL["star"](mesh, part)
    mesh.close()
    server.close()
    assert in_use() == before
