"""KV hand-over between two engines over loopback: the same answer, and no way out that leaks."""

from __future__ import annotations

import asyncio
import importlib
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from scheduler.batching import Batcher
from scheduler.blocks import BlockPool
from scheduler.errors import HandoffFailed
from scheduler.messages import (
    Address,
    Commit,
    Committed,
    FirstToken,
    Joined,
    KvBlocks,
    Peer,
    Refused,
    Reserve,
    Reserved,
)
from scheduler.transport import listen
from workers import kv_send
from workers.engine import Engine
from workers.fake import SHAPE, FakeOptions, FakeRunner, FakeText
from workers.host_memory import host
from workers.kv_cache import KvCache
from workers.kv_wire import Limits, seal

pytestmark = pytest.mark.asyncio

SECRET = b"of this test"
PROMPT = list(b"once upon a time there was")
KEY = ("job", 1)
LIMITS = Limits(early_bytes=1)


@pytest.fixture
def job(make_job):
    return make_job(ids=PROMPT)


def answer(engine, job) -> list:
    engine.add(job, PROMPT)
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
    return said(outputs)


def shares_memory() -> bool:
    maps = Path("/proc/self/maps")  # of Linux
    return maps.exists() and "memfd:motley-kv" in maps.read_text()


def said(outputs) -> list:
    """What the client sees of them, in order."""
    return sorted((o.choice, o.position, o.ids, o.text, o.finish) for o in outputs)


# ── the straight way ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("share", [True, False], ids=["shared memory", "network"])
@pytest.mark.parametrize("choices", [(0,), (0, 1, 2)])
async def test_two_workers_give_what_one_gives(linked, make_engine, make_job, choices, share):
    job = make_job(ids=PROMPT, choices=choices, ignore_eos=True, max_tokens=20)
    async with linked(limits=replace(LIMITS, share=share)) as link:
        await link.hand_over(job)
        await link.decode.finished()
        outputs = link.prefill.outputs + link.decode.outputs
        assert said(outputs) == answer(make_engine(), job)
        size = 26 * 2 * 2 * 4  # tokens · layers · key and value · bytes
        assert (link.sender.bytes_sent, link.receiver.bytes_received) == (size, size)
        assert shares_memory() is (share and bool(host()))


class Layered(FakeRunner):
    """Computes a layer when it is let."""

    def __init__(self) -> None:
        super().__init__(64, FakeOptions())
        self.permits = threading.Semaphore(0)

    def _write(self, piece, layer):
        assert self.permits.acquire(timeout=10)
        super()._write(piece, layer)


async def test_a_layer_arrives_while_the_next_one_is_computed(linked, make_engine, job, until):
    runner = Layered()
    async with linked(prefill=make_engine(runner=runner)) as link:
        moving = asyncio.create_task(link.hand_over(job))
        runner.permits.release()
        cache = link.decode.engine.runner.cache
        await until(lambda: np.count_nonzero(cache.data[0]) == 2 * len(PROMPT))
        assert not cache.data[1].any()
        assert not link.prefill.outputs
        runner.permits.release()
        await moving
        await link.decode.finished()
        assert said(link.prefill.outputs + link.decode.outputs) == answer(make_engine(), job)


async def test_a_chunk_of_a_prompt_arrives_while_the_next_one_is_computed(
    linked, make_engine, job, until
):
    runner = Layered()
    async with linked(prefill=make_engine(runner=runner, max_step_tokens=20)) as link:
        moving = asyncio.create_task(link.hand_over(job))
        for _ in range(2):
            runner.permits.release()
        cache = link.decode.engine.runner.cache
        await until(lambda: np.count_nonzero(cache.data[1]) == 2 * 20)
        for _ in range(2):
            runner.permits.release()
        await moving
        await link.decode.finished()
        assert said(link.prefill.outputs + link.decode.outputs) == answer(make_engine(), job)


def kv(engine, tokens):
    """What an engine keeps of a prompt that began in its first block."""
    return engine.runner.cache.data.reshape(2, 2, -1)[:, :, :tokens]


class Other(FakeRunner):
    """Keeps its KV in another type."""

    def __init__(self, dtype: str) -> None:
        super().__init__(64, FakeOptions())
        self.cache = KvCache(SHAPE, 64, dtype)


@pytest.mark.parametrize("share", [True, False], ids=["shared memory", "network"])
@pytest.mark.parametrize(
    "dtypes", [("float16", "float32"), ("float32", "float16")], ids=" to ".join
)
async def test_caches_of_unlike_types_hold_the_same_numbers(
    linked, make_engine, job, dtypes, share
):
    here, there = (make_engine(runner=Other(dtype)) for dtype in dtypes)
    limits = replace(LIMITS, share=share)
    async with linked(f"model:{dtypes[0]}", limits, prefill=here, decode=there) as link:
        await link.hand_over(job)
        ours, theirs = (kv(engine, len(PROMPT)) for engine in (here, there))
        assert ours.all()
        assert np.array_equal(ours, theirs)


async def test_a_link_that_may_lose_a_little_is_used_so_once_its_rate_is_known(linked, make_job):
    limits = replace(LIMITS, share=False, codecs=("int4",))
    prompt = list(bytes(range(97, 123)) * 4)
    async with linked(limits=limits) as link:
        sizes = []
        for name in ("first", "second"):
            before = link.receiver.bytes_received
            await link.hand_over(make_job(id=name, ids=prompt), prompt)
            sizes.append(link.receiver.bytes_received - before)
            await link.decode.empty()
        raw = len(prompt) * 2 * 2 * 4
        assert sizes[0] == raw
        assert sizes[1] != raw
        ends = (link.prefill.engine, link.decode.engine)
        assert np.allclose(*(kv(engine, len(prompt)) for engine in ends), atol=2)


@pytest.fixture
def slowly(monkeypatch):
    """The way to a link's decode worker becomes an emulated one of so many bytes per second."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    emulation = importlib.import_module("link_emulator")

    @contextmanager
    def emulate(link, rate):
        emulator = emulation.LinkEmulator([link.peer.address.port, 0], 0.0, rate)
        link.peer = Peer("d", Address("127.0.0.1", emulator.port(1, 0)))
        try:
            yield
        finally:
            link.sender.close()
            emulator.cut()

    return emulate


async def test_the_sender_hears_for_how_long_the_link_was_busy(
    linked, slowly, make_engine, make_job
):
    """The emulated link is never faster than its rate; 8 KiB come with the head of a chunk."""
    prompt, rate = list(b"once more " * 800), 4e6
    job = make_job(ids=prompt)
    unshared, here = Limits(share=False), make_engine(600)
    async with linked(limits=unshared, decode_blocks=600, prefill=here) as link:
        with slowly(link, rate):
            async with link.sender.reserve(job, link.peer) as lease:
                await lease.push(link.prefill.loop.prefill(job, prompt, lease.watch))
            link.prefill.loop.release((job.id, job.epoch))
            assert lease.kv_bytes == len(prompt) * 2 * 2 * 4
            assert 0 < lease.kv_bytes / lease.link_s < 1.5 * rate
            await link.decode.finished()


async def test_an_idle_connection_is_used_again(linked, make_job):
    async with linked() as link:
        for name in ("first", "second", "third"):
            await link.hand_over(make_job(id=name, ids=PROMPT))
        assert len(link.connections) == 1


async def test_hand_overs_at_once_have_a_connection_each(linked, make_engine, make_job):
    jobs = [make_job(id=f"job-{n}", ids=PROMPT, seed=n) for n in range(5)]
    async with linked() as link:
        await asyncio.gather(*map(link.hand_over, jobs))
        assert len(link.connections) == 5
        await link.decode.empty()
        outputs = link.prefill.outputs + link.decode.outputs
    for job in jobs:
        ours = [output for output in outputs if output.id == job.id]
        assert said(ours) == answer(make_engine(), job)


async def test_a_kept_connection_that_the_peer_closed_is_not_used(linked, make_job):
    async with linked() as link:
        await link.hand_over(make_job(id="first", ids=PROMPT))
        link.connections[0].close()
        await link.hand_over(make_job(id="second", ids=PROMPT))
        assert len(link.connections) == 2


async def test_links_that_nobody_needs_for_a_while_are_closed(linked, make_job, monkeypatch, until):
    monkeypatch.setattr(kv_send, "KEEP_S", 0.01)
    async with linked() as link:
        jobs = [make_job(id=str(number), ids=PROMPT) for number in range(3)]
        await asyncio.gather(*map(link.hand_over, jobs))
        await until(lambda: not link.sender._idle)
        for connection in link.connections:
            await until(lambda connection=connection: not connection.alive)


async def test_a_full_decode_pool_makes_the_next_wait_before_its_prefill(linked, make_job, until):
    async with linked(decode_blocks=3) as link:
        await link.decode.loop.reserve(make_job(id="other"), PROMPT)
        moving = asyncio.create_task(link.hand_over(make_job(ids=PROMPT)))
        await until(lambda: link.decode.engine.batcher.waiting)
        assert link.prefill.engine.keys == []
        link.decode.loop.release(("other", 1))
        await moving
        await link.decode.finished()


# ── what breaks it ──────────────────────────────────────────────────────────────────────────────


async def test_another_model_is_refused(linked, job):
    async with linked(fingerprint="another") as link:
        with pytest.raises(HandoffFailed, match="do not run the same model"):
            await link.hand_over(job)


async def test_a_job_that_the_decode_worker_can_never_hold(linked, job):
    async with linked(decode_blocks=1) as link:
        with pytest.raises(HandoffFailed, match="KV cache holds 16 tokens"):
            await link.hand_over(job)


async def test_nobody_listens(linked, job):
    async with linked() as link:
        link.peer = Peer("d", Address("127.0.0.1", 1))
        with pytest.raises(HandoffFailed, match="d did not take the KV cache"):
            await link.hand_over(job)


async def test_no_blocks_within_the_limit(linked, make_job, job):
    async with linked(decode_blocks=2, limits=Limits(reserve_s=0.05)) as link:
        await link.decode.loop.reserve(make_job(id="other"), PROMPT)
        with pytest.raises(HandoffFailed, match="TimeoutError"):
            await link.hand_over(job)
        link.decode.loop.release(("other", 1))


class Faulty(Engine):
    """It fails where nobody expects it."""

    def __init__(self, where: str) -> None:
        options = FakeOptions()
        batcher = Batcher(BlockPool(64))
        super().__init__(FakeRunner(64, options), FakeText(options.context), batcher)
        self._where = where

    def reserve(self, job, prompt):
        if self._where == "reserve":
            raise ArithmeticError("no such number")
        super().reserve(job, prompt)

    def resume(self, key, firsts, generation=None):
        if self._where == "resume":
            raise ArithmeticError("no such number")
        return super().resume(key, firsts, generation)


@pytest.mark.parametrize("where", ["reserve", "resume"])
async def test_a_fault_of_the_decode_worker_is_said_and_logged_and_frees_the_blocks(
    linked, job, caplog, where
):
    async with linked(decode=Faulty(where)) as link:
        with pytest.raises(HandoffFailed, match="ArithmeticError: no such number"):
            await link.hand_over(job)
        await link.decode.empty()
        (record,) = (r for r in caplog.records if r.levelname == "ERROR")
        assert (record.getMessage(), record.exc_info[0]) == (
            "job job from p failed",
            ArithmeticError,
        )


async def test_a_lease_without_a_commit_runs_out(linked, job):
    async with linked(limits=Limits(lease_s=0.05)) as link, link.sender.reserve(job, link.peer):
        assert link.decode.engine.keys == [KEY]
        await link.decode.empty()


async def test_leaving_without_a_push_ends_the_lease(linked, job):
    async with linked() as link:
        async with link.sender.reserve(job, link.peer):
            assert link.decode.engine.keys == [KEY]
        await link.decode.empty()
        assert link.sender.bytes_sent == 0


async def test_an_error_of_the_sender_ends_the_lease(linked, job):
    async with linked() as link:
        with pytest.raises(ArithmeticError):
            async with link.sender.reserve(job, link.peer):
                raise ArithmeticError
        await link.decode.empty()


async def test_what_was_sent_counts_however_the_lease_ends(linked, job):
    async def push_and_fail(link) -> None:
        async with link.sender.reserve(job, link.peer) as lease:
            await lease.push(link.prefill.loop.prefill(job, PROMPT, lease.watch))
            raise ArithmeticError

    async with linked() as link:
        with pytest.raises(ArithmeticError):
            await push_and_fail(link)
        link.prefill.loop.release(KEY)
        assert link.sender.bytes_sent == link.receiver.bytes_received > 0


async def test_the_decode_worker_dies_before_the_push(linked, job):
    async def push_too_late(link) -> None:
        async with link.sender.reserve(job, link.peer) as lease:
            link.connections[0].close()
            await lease.push(link.prefill.loop.prefill(job, PROMPT, lease.watch))

    async with linked() as link:
        with pytest.raises(HandoffFailed):
            await push_too_late(link)
        link.prefill.loop.release(KEY)


@pytest.mark.parametrize("when", ["reserved", "waiting"])
async def test_a_cancel_at_the_decode_worker_ends_the_hand_over(linked, make_job, job, when, until):
    async with linked(decode_blocks=3) as link:
        if when == "waiting":
            await link.decode.loop.reserve(make_job(id="other"), PROMPT)
        moving = asyncio.create_task(link.hand_over(job))
        await until(lambda: KEY in link.decode.engine.keys)
        assert link.receiver.cancel(KEY)
        with pytest.raises(HandoffFailed):
            await moving
        assert not link.receiver.cancel(KEY)
        link.decode.loop.release(("other", 1))


async def test_a_cancel_that_comes_sooner_than_what_it_is_about(linked, job):
    """Router and prefill worker speak on links of their own."""
    async with linked() as link:
        assert not link.receiver.cancel(KEY)
        with pytest.raises(HandoffFailed, match="was cancelled"):
            await link.hand_over(job)
        assert not link.decode.outputs


async def test_a_prefill_worker_that_dies_in_the_queue_leaves_it(linked, make_job, job, until):
    async with linked(decode_blocks=3) as link:
        await link.decode.loop.reserve(make_job(id="other"), PROMPT)
        connection = await link.dial()
        await connection.send(Reserve(job, "p", "model", 10.0))
        await until(lambda: KEY in link.decode.engine.keys)
        connection.close()
        await until(lambda: KEY not in link.decode.engine.keys)
        assert not link.decode.engine.batcher.waiting
        link.decode.loop.release(("other", 1))


# ── a sender that speaks out of turn ────────────────────────────────────────────────────────────


def blocks(**changes) -> KvBlocks:
    whole = KvBlocks("job", 1, 0, 2, len(PROMPT), 1, 1, "float32", "raw")
    return msgspec.structs.replace(whole, **changes)


HALF = len(PROMPT) * 2 * 4  # bytes of one layer
COMMIT = Commit("job", 1, (FirstToken(0, 97, 1),))
WRONG = {
    "more layers than there are": [(blocks(layers=3), 3 * HALF)],
    "a layer before the first": [(blocks(first_layer=-1, layers=1), HALF)],
    "another number of tokens": [(blocks(tokens=25), 2 * HALF - 16)],
    "another head size": [(blocks(head_dim=2), 4 * HALF)],
    "an unknown codec": [(blocks(codec="zip"), 2 * HALF)],
    "an unknown dtype": [(blocks(dtype="complex64"), 2 * HALF)],
    "another size than announced": [(blocks(), HALF)],
    "a commit without any KV": [(COMMIT, 0)],
    "a commit without the second layer": [(blocks(layers=1), HALF), (COMMIT, 0)],
    "a commit without choices": [(blocks(), 2 * HALF), (Commit("job", 1, ()), 0)],
    "a word out of turn": [(Joined(1.0), 0)],
    "another job": [(blocks(id="other"), 2 * HALF)],
    "tokens beyond the last": [(blocks(first_token=1), 2 * HALF)],
}


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG)
async def test_a_wrong_word_ends_the_connection_and_frees_the_blocks(linked, job, words):
    async with linked() as link:
        connection = await link.dial()
        await connection.send(Reserve(job, "p", "model", 10.0))
        assert await connection.expect(Reserved) == Reserved("job", 1)
        for message, size in words:
            await connection.send(message, [bytes(size)])
        with pytest.raises(ConnectionError):
            await connection.receive()
        await link.decode.empty()
        connection.close()


async def test_layers_may_come_one_by_one(linked, job):
    async with linked() as link:
        connection = await link.dial()
        await connection.send(Reserve(job, "p", "model", 10.0))
        await connection.expect(Reserved)
        for layer in (1, 0):
            await connection.send(blocks(first_layer=layer, layers=1), [bytes(HALF)])
        await connection.send(COMMIT)
        done = await connection.expect(Committed)
        assert (done.id, done.epoch) == ("job", 1)
        await link.decode.finished()
        connection.close()


async def test_the_prompt_of_a_reservation_is_ids(linked, make_job):
    async with linked() as link:
        connection = await link.dial()
        await connection.send(Reserve(make_job("text"), "p", "model", 10.0))
        message, _ = await connection.receive()
        assert isinstance(message, Refused)
        connection.close()


async def test_a_decode_worker_of_the_version_before_gets_whole_layers_at_the_end(linked, job):
    words = []

    async def receive(connection) -> None:
        await connection.expect(Reserve)
        await connection.send(Reserved(*KEY))
        while not words or not isinstance(words[-1], Commit):
            words.append((await connection.receive())[0])
        await connection.send(Committed(*KEY))

    limits = replace(LIMITS, codecs=("int4",))
    async with linked(limits=limits) as link, listen("127.0.0.1", 0, SECRET, receive) as bound:
        link.peer = Peer("older", Address(*bound))
        await link.hand_over(job)
        assert words == [blocks(), seal(Commit(*KEY, (FirstToken(0, 32, 1),)))]


@pytest.mark.parametrize("preempted", [False, True])
async def test_blocks_of_a_prompt_that_was_preempted_are_not_sent(
    linked, make_engine, job, preempted
):
    engine = make_engine()
    engine.add(job, PROMPT, hold=True)
    (held,) = engine.step().held.values()
    ready = engine.ready(KEY)
    if preempted:
        ready.sequence.blocks = list(held.blocks)  # its own again, and not those it had

    async with linked(prefill=engine) as link, link.sender.reserve(job, link.peer) as lease:

        async def computed():
            lease.watch(ready)
            for _ in range(100):  # turns, in which what is sent early is sent
                await asyncio.sleep(0)
            return held

        await lease.push(computed())
        assert bool(lease.bytes_early) is not preempted
        link.prefill.loop.release(KEY)


async def test_the_rate_of_a_link_is_known_once_something_was_sent(linked, job):
    async with linked(limits=replace(LIMITS, share=False)) as link:
        async with link.sender.reserve(job, link.peer) as lease:
            await lease.push(link.prefill.loop.prefill(job, PROMPT, lease.watch))
        connection = link.connections[0]
        assert connection.rate is None or connection.rate > 0
        connection.close()
        assert connection.rate is None
        link.prefill.loop.release(KEY)


@pytest.mark.parametrize("cut", [0, 1, HALF])
async def test_a_prefill_worker_that_dies_in_the_middle_of_a_push(linked, job, cut):
    async with linked() as link:
        connection = await link.dial()
        await connection.send(Reserve(job, "p", "model", 10.0))
        await connection.expect(Reserved)
        await connection.send(blocks(layers=1), [bytes(HALF)])
        if cut:
            sending = asyncio.create_task(connection.send(blocks(), [bytes(cut)]))
            await asyncio.sleep(0)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        connection.close()
        await link.decode.empty()
