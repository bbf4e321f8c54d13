"""KV between groups and workers of another number of ranks: tiny models, real sockets."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from scheduler.batching import Batcher
from scheduler.blocks import BlockPool
from scheduler.errors import HandoffFailed
from scheduler.messages import FirstToken
from workers.engine import Engine
from workers.fake import SHAPE, FakeText
from workers.fast import FastRunner
from workers.group.formation import connect
from workers.group.kv_exchange import Exchange, GroupCache, Keeper, serve_kv
from workers.group.links import listener
from workers.group.partition import partition
from workers.group.words import Peer
from workers.kv_cache import KvCache, KvPiece
from workers.native import NativeRunner
from workers.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.asyncio

BLOCKS = 24
PROMPT = [7 * i % 100 for i in range(53)]
# FakeText knows ids below 128; 6 query heads share 3 kv heads, as SmolLM2's 9 do.
SIZES = {"hidden_size": 96, "intermediate_size": 192, "vocab_size": 128, "head_dim": 16}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("Llama", **SIZES, **HEADS)[1]


@pytest.fixture
def make_worker(make_group, folder):
    """An engine over so many ranks of these weights; one is a worker of its own.

    The prompt takes several steps, so that its KV leaves while it is computed.
    """

    def make(weights=(1,), mode="exact"):
        batcher = Batcher(BlockPool(BLOCKS), max_step_tokens=20)
        fast = {"mode": "fast", "quantize": "int8"}
        if len(weights) > 1:
            options = fast if mode == "fast" else {}
            runner = make_group().runner(folder, weights, blocks=BLOCKS, **options)
        elif mode == "fast":
            runner = FastRunner(open_checkpoint(folder, "int8"), BLOCKS, 1, 64)
        else:
            runner = NativeRunner(open_checkpoint(folder), BLOCKS, 1)
        return Engine(runner, FakeText(200), batcher, speculate=False)

    return make


@pytest.fixture
def job(make_job):
    return make_job(ids=PROMPT, choices=(0, 1), max_tokens=12, temperature=0.5, ignore_eos=True)


def said(outputs):
    return sorted((o.choice, o.position, o.ids) for o in outputs)


def alone(engine, job):
    """What one worker says by itself."""
    engine.add(job, PROMPT)
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
    return said(outputs)


# ── the same tokens, whatever is at either end ──────────────────────────────────────────────────

ENDS = {
    "one to two": ((1,), (2, 1)),
    "three to one": ((1, 1, 1), (1,)),
    "two to three, uneven": ((1, 2), (3, 1, 2)),
    "one to four, of which two keep the same kv head": ((1,), (1, 1, 1, 1)),
    "five, of which four share kv heads, to two": ((1, 1, 1, 1, 1), (1, 1)),
}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
async def test_a_split_request_says_what_one_worker_says(linked, make_worker, job, ends):
    prefill, decode = map(make_worker, ends)
    async with linked(prefill=prefill, decode=decode) as link:
        lease = await link.hand_over(job, PROMPT)
        assert lease.bytes_early  # before the whole prompt was computed
        await link.decode.finished()
        outputs = link.prefill.outputs + link.decode.outputs
        assert said(outputs) == alone(make_worker(), job)
        assert link.receiver.bytes_received == len(PROMPT) * 3 * 2 * 3 * 16 * 4
        assert decode.steps <= 13  # nothing was computed anew


async def test_fast_ranks_go_on_with_the_numbers_that_they_got(linked, make_worker, job):
    prefill, decode = make_worker(mode="fast"), make_worker((1, 1), mode="fast")
    piece = KvPiece(list(range(4)), range(len(PROMPT)), range(3), decode.runner.cache.generation)
    async with linked(prefill=prefill, decode=decode) as link:
        await link.hand_over(job, PROMPT)
        taken = b"".join(await decode.runner.cache.taken(piece))
        assert taken == b"".join(prefill.runner.cache.views(*piece[:3]))
        await link.decode.finished()


# ── heads are cut and put together ──────────────────────────────────────────────────────────────


@pytest.fixture
def exchange():
    """Makes a group's cache of so many ranks, without a model, and the caches of its ranks."""
    ended = []

    def make(ranks, dtype):
        shape = msgspec.structs.replace(SHAPE, layers=3, heads=6, kv_heads=3, head_dim=4)
        shares = partition(msgspec.structs.replace(shape, hidden=32, ffn=320), [1.0] * ranks)
        servers = [listener("127.0.0.1", 0) for _ in shares]
        peers = [Peer("", "127.0.0.1", server.getsockname()[1]) for server in servers]
        with ThreadPoolExecutor(ranks) as pool:
            join = pool.map(lambda rank: connect(servers[rank], b"x", 1, rank, peers), range(ranks))
            meshes = list(join)
        own = [KvCache(share.shape(shape), 8, dtype) for share in shares]
        for mesh, cache in zip(meshes[1:], own[1:], strict=True):
            threading.Thread(target=serve_kv, args=(mesh.kv_links[0], cache)).start()
        links = [None, *meshes[0].kv_links.values()]
        keepers = [Keeper(share.kv_heads, link) for share, link in zip(shares, links, strict=True)]
        group = GroupCache(shape, 8, dtype, lambda pairs: None)
        group.exchange = Exchange(1, own[0], keepers)
        ended.extend([*servers, *meshes, group])
        return SimpleNamespace(group=group, own=own, shares=shares, meshes=meshes)

    yield make
    for each in ended:
        each.close()


PIECE = KvPiece([6, 2, 3, 0], range(5, 50), range(1, 3), 1)
SHAPE_3 = msgspec.structs.replace(SHAPE, layers=3, heads=6, kv_heads=3, head_dim=4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
async def test_every_rank_keeps_its_heads_and_together_they_are_the_whole(exchange, ranks, dtype):
    made = exchange(ranks, dtype)
    whole = KvCache(SHAPE_3, 8, dtype)
    bits = whole.data.view(np.uint8)
    bits[:] = np.random.default_rng(0).integers(256, size=bits.shape)
    sent = b"".join(await whole.taken(PIECE))
    (room,) = made.group.room(PIECE)
    room[:] = sent
    await made.group.keep(PIECE, [room])
    for share, cache in zip(made.shares, made.own, strict=True):
        expected = KvCache(share.shape(SHAPE_3), 8, dtype)
        expected.data[:] = whole.data[..., share.kv_heads.first : share.kv_heads.last, :]
        assert await cache.taken(PIECE) == await expected.taken(PIECE)
    assert b"".join(await made.group.taken(PIECE)) == sent


# ── a rank that is lost costs a recomputation ───────────────────────────────────────────────────


@pytest.fixture
def make_jobs(make_job):
    def make(*names):
        return [make_job(id=n, ids=PROMPT, max_tokens=12, ignore_eos=True) for n in names]

    return make


def of(job, *sides):
    return said(output for side in sides for output in side.outputs if output.id == job.id)


@pytest.mark.parametrize("end", ["prefill", "decode"])
async def test_a_rank_that_is_gone_ends_the_hand_over_and_the_next_one_works(
    linked, make_worker, make_jobs, end
):
    first, second = make_jobs("first", "second")
    async with linked(prefill=make_worker((1, 1, 1)), decode=make_worker((1, 1))) as link:
        engine = getattr(link, end).engine
        engine.runner._mesh.kv_links[1].close()  # as when its process dies
        with pytest.raises(HandoffFailed):
            await link.hand_over(first, PROMPT)
        again = msgspec.structs.replace(first, epoch=2)  # as the router does
        await link.decode.loop.add(again, PROMPT)
        await link.decode.finished()
        expected = alone(make_worker(), first)
        assert of(first, link.decode) == expected
        link.decode.outputs.clear()
        await link.hand_over(second, PROMPT)
        await link.decode.finished()
        assert of(second, link.prefill, link.decode) == expected


@pytest.mark.parametrize("end", ["prefill", "decode"])
async def test_a_group_that_forms_anew_in_a_hand_over_forgets_what_it_had_of_it(
    linked, make_worker, make_group, make_jobs, end
):
    """Its blocks are still held, but hold something else."""
    first, second = make_jobs("first", "second")
    ends = {name: make_worker((1, 1) if name == end else (1,)) for name in ("prefill", "decode")}
    async with linked(**ends) as link:
        side = getattr(link, end)

        async def held():
            held = await link.prefill.loop.prefill(first, PROMPT)
            side.engine.runner._mesh.links[1].close()
            await side.loop.add(second, PROMPT)  # whose first step notices
            await side.finished()
            return held

        with pytest.raises(HandoffFailed):
            async with link.sender.reserve(first, link.peer) as lease:
                await lease.push(held())
        link.prefill.loop.release((first.id, first.epoch))
        assert of(second, side) == alone(make_worker(), second)


async def test_kv_that_is_lost_after_its_last_byte_is_not_gone_on_with(make_worker, make_jobs):
    engine, (job,) = make_worker((1, 1)), make_jobs("job")
    engine.reserve(job, PROMPT)
    engine.step()
    generation = engine.runner.cache.generation
    engine.runner._mesh.links[1].close()
    engine.add(*make_jobs("other"), PROMPT)
    while engine.has_work:
        engine.step()
    firsts = (FirstToken(0, 97, 1),)
    assert not engine.resume(("job", 1), firsts, generation)
    assert engine.resume(("job", 1), firsts, engine.runner.cache.generation)


async def test_a_hand_over_that_is_cancelled_writes_no_more_once_its_blocks_are_free(exchange):
    made = exchange(2, "float32")
    rank = made.own[1]
    (room,) = made.group.room(PIECE)
    room[:] = b"\1" * len(room)
    keeping = asyncio.create_task(made.group.keep(PIECE, [room]))
    await asyncio.sleep(0)
    keeping.cancel()
    with suppress(asyncio.CancelledError):
        await keeping
    before = rank.data.copy()
    made.group._thread.submit(lambda: None).result()
    assert np.array_equal(rank.data, before)
    assert not before.any() or b"".join(await rank.taken(PIECE)).strip(b"\1") == b""
