"""Token ids that stay packed are counted without being read, and read as they were written."""

from __future__ import annotations

import msgspec
import pytest

from scheduler.errors import ProtocolError
from scheduler.messages import Accepted, ToRouter
from scheduler.packed import PackedIds


@pytest.mark.parametrize("count", [0, 1, 15, 16, 255, 256, 65535, 65536])
def test_ids_are_counted_and_read_back(count):
    ids = [(n * 7919) % 200_000 for n in range(count)]
    packed = PackedIds(msgspec.msgpack.encode(ids))
    assert len(packed) == count
    assert list(packed) == ids


@pytest.mark.parametrize("other", [7, "ids", {1: 2}, b"ids", None])
def test_what_is_no_array_is_refused(other):
    with pytest.raises(ProtocolError, match="not an array"):
        PackedIds(msgspec.msgpack.encode(other))


def test_a_router_reads_a_workers_word_without_its_ids():
    word = msgspec.msgpack.encode(Accepted("job", 3, [1, 20_000, 300]))
    heard = msgspec.msgpack.decode(word, type=ToRouter)
    assert (heard.id, heard.epoch) == ("job", 3)
    assert list(PackedIds(bytes(heard.prompt_ids))) == [1, 20_000, 300]
