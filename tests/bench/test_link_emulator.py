"""Emulated links: what is lost comes later, and nothing is missing."""

from __future__ import annotations

import importlib
import os
import socket
import time
from pathlib import Path

import pytest

DELAY_S = 0.002


@pytest.fixture
def emulation(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("link_emulator")


@pytest.fixture
def connected(emulation):
    """Makes two ends of a connection over an emulated link that loses this share."""
    emulators, sockets = [], []

    def make(loss):
        server = socket.create_server(("127.0.0.1", 0))
        ports = [server.getsockname()[1], 0]
        emulators.append(emulation.LinkEmulator(ports, DELAY_S, 1e8, loss=loss, seed=1))
        near = socket.create_connection(("127.0.0.1", emulators[-1].port(1, 0)), timeout=20)
        far, _ = server.accept()
        far.settimeout(20)
        sockets.extend((near, far, server))
        return near, far

    yield make
    for emulator in emulators:
        emulator.cut()
    for sock in sockets:
        sock.close()


def received(sock, size):
    data = b""
    while len(data) < size:
        data += sock.recv(1 << 16)
    return data


@pytest.mark.parametrize("loss", [0.0, 0.2, 1.0])
def test_all_bytes_arrive_in_order_whatever_is_lost(connected, loss):
    near, far = connected(loss)
    sent = os.urandom(300_000)
    near.sendall(sent)
    assert received(far, len(sent)) == sent


@pytest.mark.parametrize(
    ("loss", "at_least_s"), [(0.0, DELAY_S), (1.0, 0.2)], ids=["nothing lost", "lost"]
)
def test_a_lone_message_that_is_lost_comes_after_the_timeout(connected, loss, at_least_s):
    near, far = connected(loss)
    begun = time.perf_counter()
    near.sendall(b"alone")
    assert received(far, 5) == b"alone"
    assert time.perf_counter() - begun >= at_least_s


def test_a_loss_that_more_data_follows_is_made_good_within_a_round_trip(emulation):
    losses = emulation.Losses(1.0, 0.01, "0")
    assert losses.pause_s(more=True) == 0.02
    assert losses.pause_s(more=False) == pytest.approx(0.22)


def test_the_share_is_kept_and_the_seed_says_which_chunks_are_lost(emulation):
    first, again, other = (
        [losses.next() for _ in range(10_000)]
        for losses in (emulation.Losses(0.1, 0.0, seed) for seed in ("0", "0", "1"))
    )
    assert first == again != other
    assert 900 < sum(first) < 1100
