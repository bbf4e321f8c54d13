"""Memory that two workers of one host share: what is written is read, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from workers.host_memory import host
from workers.kv_memory import SLOTS, OwnMemory, PeerMemory

pytestmark = pytest.mark.skipif(not host(), reason="only Linux has files without a name")

KEEPER = """
import sys
from workers.kv_memory import OwnMemory
memory = OwnMemory()
place = memory.place
print(place.process, place.descriptor, place.nonce.hex(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def own():
    memory = OwnMemory()
    yield memory
    memory.close()


def in_use() -> tuple[int, int]:
    """Descriptors of this process, and mappings of such memory."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("memfd:motley-kv")


def test_what_one_end_writes_the_other_reads_and_both_see_it(own):
    peer = PeerMemory(own.place)
    sent = [memoryview(os.urandom(size)) for size in (1, 200_000, 0, 77)]
    slots = [peer.take() for _ in range(SLOTS)]
    seen: list[bytes] = []
    for slot in slots:
        peer.write(slot, sent, lambda piece: seen.append(bytes(piece)))
    for slot in slots:
        got = [memoryview(bytearray(view.nbytes)) for view in sent]
        own.read(slot, got, lambda piece: seen.append(bytes(piece)))
        assert got == sent
    assert b"".join(seen) == b"".join(sent) * 2 * SLOTS
    peer.close()


def test_a_slot_is_free_again_once_it_was_read(own):
    peer = PeerMemory(own.place)
    slots = [peer.take() for _ in range(SLOTS)]
    assert sorted(slots) == list(range(SLOTS))
    assert peer.take() is None
    for slot in (slots[1], slots[1], SLOTS, -1):  # said twice, or of no slot
        peer.give_back(slot)
    assert (peer.take(), peer.take()) == (slots[1], None)
    peer.close()


def test_closing_leaves_nothing():
    before = in_use()
    own = OwnMemory()
    peer = PeerMemory(own.place)
    peer.close()
    own.close()
    assert in_use() == before


@pytest.mark.parametrize(
    "changes",
    [{"nonce": bytes(16)}, {"slots": SLOTS + 1}, {"descriptor": 999_999}, {"process": 1 << 30}],
    ids=["another nonce", "smaller than said", "no such descriptor", "no such process"],
)
def test_memory_that_is_not_the_peers_is_refused(own, changes):
    before = in_use()
    with pytest.raises(OSError):
        PeerMemory(msgspec.structs.replace(own.place, **changes))
    assert in_use() == before


def test_memory_of_a_process_that_was_killed_is_gone_with_its_last_user(own):
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with keeper:
        process, descriptor, nonce = keeper.stdout.readline().split()
        place = msgspec.structs.replace(
            own.place,
            process=int(process),
            descriptor=int(descriptor),
            nonce=bytes.fromhex(nonce),
        )
        before = in_use()
        peer = PeerMemory(place)
        keeper.send_signal(signal.SIGKILL)
        keeper.wait(10)
        peer.write(0, [memoryview(b"still ours")], lambda _: None)
        peer.close()
    with pytest.raises(OSError):
        PeerMemory(place)
    assert in_use()[1] == before[1]
