"""What a rank says of itself: measured, not asked."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest

from scheduler.errors import ProtocolError, SetupError
from workers.group.gauge import BURST, OPENING, PROBES, answer_probe, disk_rate, gauge, gauge_link
from workers.group.links import accept, dial, listener
from workers.group.memory import used_bytes
from workers.group.part import Means
from workers.group.shard_file import DATA
from workers.group.shard_folder import ShardFolder
from workers.group.stream import REQUEST
from workers.group.words import PROBE, Probe

SECRET = b"a secret"


def test_a_rank_knows_its_rate_and_only_under_a_cap_its_disk(tmp_path):
    free = gauge("a", Means(1, ShardFolder(tmp_path, "m")))
    used = used_bytes()  # whatever else ran in this process
    capped = gauge("a", Means(1, ShardFolder(tmp_path, "m"), 10**9))
    assert free.weights_per_s > 1e7
    assert (free.cap, free.disk_bytes_per_s) == (None, 0.0)
    assert capped.cap == 10**9
    assert capped.disk_bytes_per_s > 1e6
    assert 0 < capped.base <= used + 2 * OPENING
    assert list(tmp_path.iterdir()) == []  # what was written for it is gone


def test_a_shard_that_is_there_is_read_and_left_as_it_is(tmp_path):
    shard = tmp_path / "0" / DATA
    shard.parent.mkdir()
    shard.write_bytes(bytes(2 * REQUEST))
    assert disk_rate(tmp_path, direct=True) > 1e6
    assert shard.read_bytes() == bytes(2 * REQUEST)


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SetupError, match="give a folder with 64 MiB free with --shards"):
        disk_rate(tmp_path / "file" / "below", direct=True)


@contextmanager
def answered(serve):
    """A link whose other end does `serve` on a thread."""
    with listener("127.0.0.1", 0) as server:
        thread = threading.Thread(target=lambda: serve(accept(server, SECRET, 5, 5)))
        thread.start()
        link = dial(*server.getsockname()[:2], SECRET, 5)
        try:
            yield link
        finally:
            link.close()
            thread.join(10)


def test_a_link_is_tried_both_for_its_latency_and_for_its_rate():
    def serve(link):
        for _ in range(PROBES):
            answer_probe(link, link.hear(PROBE))
        link.close()

    with answered(serve) as link:
        latency_s, rate = gauge_link(link)
    assert 0 < latency_s < 1
    assert rate > 1e6


def test_a_probe_larger_than_any_of_ours_is_not_read():
    caught = []

    def serve(link):
        try:
            answer_probe(link, link.hear(PROBE))
        except ProtocolError as error:
            caught.append(str(error))
            link.close()

    with answered(serve) as link:
        link.say(Probe(BURST + 1))
        with pytest.raises(ConnectionError):
            link.hear(PROBE)
    assert caught == [f"a probe of {BURST + 1} bytes"]
