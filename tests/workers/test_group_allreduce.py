from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from scheduler.errors import ProtocolError, SetupError
from workers.build import check_int8_sums
from workers.group import ways as ways_module
from workers.group.allreduce import ALGORITHMS
from workers.group.allreduce_int8 import ALGORITHMS_INT8, decode, encode
from workers.group.formation import connect
from workers.group.links import accept, dial, listener
from workers.group.sum_cost import fastest, predicted_s
from workers.group.ways import ALL, ALWAYS, IN_TURN, Combine, measure, rehearse
from workers.group.words import Peer, Use

SECRET = b"a secret"


@pytest.fixture
def meshes():
    """Makes the meshes of so many ranks over loopback."""
    made = []

    def make(ranks):
        servers = [listener("127.0.0.1", 0) for _ in range(ranks)]
        peers = [Peer(str(i), "127.0.0.1", s.getsockname()[1]) for i, s in enumerate(servers)]
        with ThreadPoolExecutor(ranks) as pool:
            joined = pool.map(lambda r: connect(servers[r], SECRET, 1, r, peers), range(ranks))
            made.extend(meshes := list(joined))
        for server in servers:
            server.close()
        return meshes

    yield make
    for mesh in made:
        mesh.close()


def summed(meshes, way, parts):
    """What each rank ends with."""
    results = [part.copy() for part in parts]
    with ThreadPoolExecutor(len(meshes)) as pool:
        list(pool.map(lambda rank: ALL[way](meshes[rank], results[rank]), range(len(meshes))))
    return results


@pytest.mark.parametrize("way", ALGORITHMS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_ends_with_the_same_bits_of_the_sum(meshes, way, ranks):
    group = meshes(ranks)
    rng = np.random.default_rng(ranks)
    # The longest is more than the sockets' buffers hold: nobody may wait in a circle.
    for length in (1, ranks - 1, ranks, 577, 4096, 3_000_001):
        parts = rng.normal(size=(ranks, length)).astype(np.float32)
        results = summed(group, way, parts)
        assert all(np.array_equal(result, results[0]) for result in results)
        np.testing.assert_allclose(results[0], parts.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["star", "direct", "two-shot"])
def test_sums_are_made_in_the_order_of_ranks(meshes, way):
    parts = np.array([[1e8], [1.0], [-1e8], [1.0]], np.float32)
    expected = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    assert np.array_equal(summed(meshes(4), way, parts)[0], expected)


@pytest.mark.parametrize("way", ALGORITHMS_INT8)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_int8_sums_are_the_same_bits_everywhere_and_no_further_off_than_their_steps(
    meshes, way, ranks
):
    group = meshes(ranks)
    rng = np.random.default_rng(ranks)
    for length in (1, ranks - 1, 31, 577, 4096, 300_001):
        parts = rng.normal(size=(ranks, length)).astype(np.float32)
        results = summed(group, way, parts)
        assert all(np.array_equal(result, results[0]) for result in results)
        steps = sum(np.repeat(encode(part)["scale"], 32)[:length] for part in parts)
        if way == "two-shot-int8":
            total = sum(decode(encode(part))[:length] for part in parts)
            steps = steps + np.repeat(encode(total)["scale"], 32)[:length]
        assert (np.abs(results[0] - parts.sum(0)) <= 0.51 * steps).all()


def test_groups_of_zeros_and_of_no_numbers_stay_what_they_are():
    values = np.zeros(96, np.float32)
    values[40], values[64] = np.nan, 254.0
    decoded = decode(encode(values))
    assert (decoded[:32] == 0).all()
    assert np.isnan(decoded[32:64]).all()
    assert decoded[64] == 254.0


@pytest.mark.parametrize("way", ALL)
def test_a_lost_rank_breaks_the_sum_of_all_others(meshes, way):
    group = meshes(3)
    group[2].close()

    def attempt(mesh):
        try:
            ALL[way](mesh, np.zeros(1000, np.float32))
        except OSError:
            mesh.close()  # as a rank does that leaves its formation
            return True
        return False

    with ThreadPoolExecutor(2) as pool:
        assert any(pool.map(attempt, group[:2]))


@pytest.mark.parametrize(
    ("mode", "way", "message"),
    [("exact", None, "leave out --mode exact"), ("fast", "ring", "leave out --allreduce ring")],
)
def test_int8_sums_are_refused_where_they_cannot_be(mode, way, message):
    with pytest.raises(SetupError, match=message):
        check_int8_sums(mode, way)


@pytest.mark.parametrize(
    ("ranks", "size", "latency_s", "rate", "way"),
    [
        (8, 32_768, 4e-3, 300e6 / 8, "two-shot"),  # TPI-LLM's homes, float32
        (8, 9_216, 4e-3, 300e6 / 8, "direct"),  # the same in int8
        (2, 1_000, 1e-3, 1e8, "direct"),
        (4, 16_777_216, 1e-4, 125e6, "two-shot"),
    ],
)
def test_the_formulas_choose_one_hop_for_short_sums_and_two_for_long(
    ranks, size, latency_s, rate, way
):
    assert fastest(ranks, size, latency_s, rate) == way


def test_two_ranks_of_a_star_and_of_direct_exchange_differ_by_a_hop():
    star, direct = (predicted_s(way, 2, 1000, 1e-3, 1e6) for way in ("star", "direct"))
    assert star == pytest.approx(2 * direct)


def test_a_group_takes_the_fastest_way_of_each_size_that_it_tried(meshes):
    group = meshes(2)
    combine = Combine(group[1])
    said = queue.Queue()

    def obey():
        while not isinstance(word := said.get(), Use):
            rehearse(group[1], word)
        combine.use(word.ways)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(obey)
        ways = measure(group[0], said.put, [256, 65_536], ALL)
        said.put(Use(ways))
        future.result()
    assert [size for size, _ in ways] == [4096, ALWAYS]  # the middle of the two, by their ratio
    assert {way for _, way in ways} <= ALL.keys()


def test_where_there_is_no_time_for_all_ways_the_best_for_long_sums_is_tried_first(
    meshes, monkeypatch
):
    """On a slow link; the other rank does whatever it is told."""
    monkeypatch.setattr(ways_module, "BUDGET_S", 0.0)
    one, other = meshes(2)
    with ThreadPoolExecutor(1) as pool:

        def say(word):
            pool.submit(rehearse, other, word)

        assert measure(one, say, [1024, 1 << 20]) == ((32_768, "two-shot"), (ALWAYS, "two-shot"))
    assert set(IN_TURN) == ALL.keys()


# ── who may join ────────────────────────────────────────────────────────────────────────────────


def test_who_does_not_know_the_secret_is_refused_on_either_side():
    with listener("127.0.0.1", 0) as server:
        host, port = server.getsockname()
        taken = []
        thread = threading.Thread(target=lambda: taken.append(accept(server, SECRET, 5, 10)))
        thread.start()
        with pytest.raises((ProtocolError, OSError)):
            dial(host, port, b"another", 5)
        link = dial(host, port, SECRET, 5)  # the stranger before it did no harm
        thread.join()
        taken[0].close()
        link.close()


def test_a_silent_rank_is_noticed():
    with listener("127.0.0.1", 0) as server:
        host, port = server.getsockname()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(accept, server, SECRET, 5, 10)
            link = dial(host, port, SECRET, limit_s=0.05)
            other = future.result()
        with pytest.raises(TimeoutError, match="silent"):
            link.receive_into(memoryview(bytearray(4)))
        link.close()
        other.close()
