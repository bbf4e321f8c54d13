"""Shards from rank 0: whole, checked, and never the same bytes twice."""

from __future__ import annotations

import threading
from contextlib import closing, suppress

import pytest

from scheduler.errors import ProtocolError, SetupError
from scheduler.messages import Address
from workers.group.links import Link, accept, dial, listener
from workers.group.partition import partition
from workers.group.shard_file import DATA, DRAFT, check, write_shard
from workers.group.shard_folder import ShardFolder
from workers.group.sharded import Sharded
from workers.group.travel import ATTEMPTS, Shelf, fetch
from workers.group.words import GET, OFFER, SHIPMENT, Get, Want
from workers.weights.checkpoint import open_checkpoint

SECRET = b"a secret"


@pytest.fixture(scope="module")
def checkpoint(tiny_model):
    _, folder = tiny_model("Llama", hidden_size=64, intermediate_size=192, vocab_size=320)
    return open_checkpoint(folder, "int4")


@pytest.fixture
def shares(checkpoint):
    return partition(checkpoint.shape, [1, 2])


class CountingLink(Link):
    """Counts bytes of weights that are sent, and breaks after so many."""

    def __init__(self, sock, server):
        super().__init__(sock, 5)
        self.server = server

    def hear(self, decoder, **limits):
        word = super().hear(decoder, **limits)
        if decoder is GET:
            self.server.asked.append(word)
        return word

    def send(self, data):
        self.server.budget -= len(data)
        if self.server.budget < 0:
            raise ConnectionResetError("the cable is cut")
        super().send(data)


class Server:
    """Rank 0, as far as it gives shards."""

    def __init__(self, checkpoint, folder):
        self.asked = []
        self.budget = 1 << 40
        self.made = []
        self.full = False
        self._closed = threading.Event()
        self._listener = listener("127.0.0.1", 0)
        self.address = Address(*self._listener.getsockname()[:2])
        self._checkpoint, self._folder = checkpoint, folder
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def make(self, share):
        if self.full:
            raise SetupError("the disk is full")
        folder = self._folder / str(len(self.made))
        self.made.append(write_shard(Sharded(self._checkpoint, share), folder, str(share)))
        return folder, self.made[-1]

    def _serve(self):
        while not self._closed.is_set():
            try:
                link = CountingLink(accept(self._listener, SECRET, 5, 0.1).sock, self)
            except TimeoutError:
                continue
            with suppress(ConnectionError, ProtocolError):
                Shelf(self.make).serve(link, link.hear(OFFER))
            link.close()

    def close(self):
        self._closed.set()
        self._thread.join(20)
        self._listener.close()


@pytest.fixture
def server(checkpoint, tmp_path):
    made = Server(checkpoint, tmp_path / "rank 0")
    yield made
    made.close()


@pytest.fixture
def shards(tmp_path):
    with closing(ShardFolder(tmp_path / "a rank", "m")) as folder:
        yield folder


def test_a_shard_comes_whole_and_only_once(server, shares, shards):
    folder, manifest = fetch(server.address, SECRET, shares[1], shards)
    assert manifest == server.made[0]
    assert check(folder, manifest) == []
    assert len(server.asked) == len(manifest.entries)
    assert fetch(server.address, SECRET, shares[1], shards) == (folder, manifest)
    assert len(server.asked) == len(manifest.entries)


def test_a_transfer_that_is_cut_off_goes_on_where_it_ended(server, shares, shards):
    server.budget = 60_000
    with pytest.raises(ConnectionError):
        fetch(server.address, SECRET, shares[1], shards, pause_s=0.001)
    (draft,) = shards.path.glob(f"*/{DRAFT}")
    assert not (draft.parent / DATA).exists()
    before = len(server.asked)
    server.budget = 1 << 40
    folder, manifest = fetch(server.address, SECRET, shares[1], shards)
    assert check(folder, manifest) == []
    # At each break one weight was on its way; all others were sent once.
    assert 0 < before < len(manifest.entries) + ATTEMPTS
    assert len(server.asked) <= len(manifest.entries) + ATTEMPTS


def test_what_another_shard_holds_is_copied_not_sent(server, shares, shards):
    _, first = fetch(server.address, SECRET, shares[0], shards)
    server.asked.clear()
    folder, second = fetch(server.address, SECRET, shares[1], shards)
    shared = {entry.sha256 for entry in first.entries}
    new = [entry for entry in second.entries if entry.sha256 not in shared]
    assert len(new) < len(second.entries)  # norms are the same on all ranks
    assert [get.offset for get in server.asked] == [entry.offset for entry in new]
    assert check(folder, second) == []


def test_damage_in_what_was_kept_is_found_and_sent_anew(server, shares, shards):
    folder, manifest = fetch(server.address, SECRET, shares[1], shards)
    (folder / "manifest.json").unlink()
    (folder / DATA).rename(folder / DRAFT)
    entry = manifest.entries[4]
    with (folder / DRAFT).open("r+b") as file:
        file.seek(entry.offset)
        byte = file.read(1)[0]
        file.seek(entry.offset)
        file.write(bytes([byte ^ 1]))
    server.asked.clear()
    fetch(server.address, SECRET, shares[1], shards)
    assert server.asked == [Get(entry.offset, entry.size)]
    assert check(folder, manifest) == []


def test_a_shard_that_rank_0_cannot_make_is_refused_with_its_reason(server, shares, shards):
    server.full = True
    with pytest.raises(SetupError, match="cannot give this rank's weights: the disk is full"):
        fetch(server.address, SECRET, shares[1], shards)


def test_bytes_outside_the_shard_are_not_given(server, shares):
    link = dial(server.address.host, server.address.port, SECRET, 5)
    link.say(Want(shares[0]))
    size = link.hear(SHIPMENT).manifest.size
    link.say(Get(size - 1, 2))
    with pytest.raises(ConnectionError):
        link.hear(SHIPMENT)
    link.close()
