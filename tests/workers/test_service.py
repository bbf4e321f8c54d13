"""The worker process, from its own side: the router here is played by the test, word by word."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import asynccontextmanager

import pytest

from scheduler.errors import SetupError
from scheduler.messages import (
    Accepted,
    Address,
    Cancel,
    Failed,
    FailureKind,
    Join,
    Joined,
    Leaving,
    Load,
    Outputs,
    Peer,
    Rates,
    Refused,
    Role,
    Submit,
)
from scheduler.transport import listen
from workers import membership
from workers import service as service_module
from workers.fake import FakeOptions
from workers.run import run_worker
from workers.service import WorkerConfig, WorkerService

pytestmark = pytest.mark.asyncio

SECRET = b"of this test"
SLOW = FakeOptions(tokens=200, step_ms=1)


class Router:
    """What the worker dials. `connections` come one by one, already introduced and welcomed."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue = asyncio.Queue()
        self.joins: list[Join] = []
        self.address = Address("", 0)
        self.reply: object = Joined(0.02)

    async def serve(self, connection) -> None:
        self.joins.append(await connection.expect(Join))
        await connection.send(self.reply)
        self.connections.put_nowait(connection)
        await asyncio.Event().wait()

    async def hear(self, connection, kind, seconds: float = 10):
        """The next word of this kind; heartbeats and others pass."""
        async with asyncio.timeout(seconds):
            while True:
                message, _ = await connection.receive()
                if isinstance(message, kind):
                    return message


@pytest.fixture
def worker(make_engine, until):
    """`async with worker(…) as (router, connection, service)`; at the end its engine is empty."""

    @asynccontextmanager
    async def start(**engine):
        router = Router()
        made = make_engine(**engine)
        async with listen("127.0.0.1", 0, SECRET, router.serve) as bound:
            router.address = Address(*bound)
            config = WorkerConfig("w", "fake", Role.MIXED, (router.address,), SECRET, "127.0.0.1")
            service = WorkerService(config, made, Rates(1.0, 1.0))
            task = asyncio.create_task(service.run())
            try:
                yield router, await router.connections.get(), service
                await until(lambda: not made.keys)
                made.check_integrity()
                assert made.batcher.pool.free == made.batcher.pool.size
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await until(lambda: len(asyncio.all_tasks()) == 1)

    return start


async def test_it_says_who_it_is_and_how_it_is(worker):
    async with worker(blocks=9, options=FakeOptions(context=77)) as (router, connection, _):
        (join,) = router.joins
        assert (join.name, join.model, join.role, join.pid) == ("w", "fake", "mixed", os.getpid())
        assert (join.kv_blocks, join.context_length) == (9, 77)
        assert join.address.host == "127.0.0.1"
        load = await router.hear(connection, Load)
        assert load == Load(0, 0, 9, 0, 0, 0, 0, 0, 0, 0, tasks=load.tasks, cost=load.cost)
        assert load.cost.provenance == "measured"
        assert load.tasks


async def test_a_job_is_accepted_and_answered(worker, make_job):
    async with worker() as (router, connection, _):
        await connection.send(Submit(make_job("abc", max_tokens=2)))
        assert await router.hear(connection, Accepted) == Accepted("job", 1, list(b"abc"))
        first = await router.hear(connection, Outputs)
        second = await router.hear(connection, Outputs)
        assert [o.position for o in (*first.items, *second.items)] == [0, 1]


@pytest.mark.parametrize(
    ("text", "limits", "param"), [("", {}, "prompt"), ("x" * 90, {"max_tokens": 20}, "max_tokens")]
)
async def test_a_job_that_can_never_run_fails_as_a_bad_request(
    worker, make_job, text, limits, param
):
    async with worker(options=FakeOptions(context=100)) as (router, connection, _):
        await connection.send(Submit(make_job(text, **limits)))
        failed = await router.hear(connection, Failed)
        assert (failed.kind, failed.param) == (FailureKind.BAD_REQUEST, param)


async def test_a_job_with_an_unreachable_peer_fails_as_a_hand_over(worker, make_job):
    async with worker() as (router, connection, _):
        peer = Peer("d", Address("127.0.0.1", 1))
        await connection.send(Submit(make_job(), peer))
        failed = await router.hear(connection, Failed)
        assert (failed.id, failed.epoch, failed.kind) == ("job", 1, FailureKind.HANDOFF)


class Unreadable(str):
    """A prompt on which the tokenizer fails."""

    def encode(self, *rest):
        raise MemoryError("too much")


async def test_an_error_of_the_worker_itself_gives_the_job_back(worker, make_job):
    async with worker() as (router, connection, service):
        task = asyncio.create_task(service._serve(make_job(Unreadable("x")), None))
        failed = await router.hear(connection, Failed)
        assert (failed.kind, failed.message) == (FailureKind.INTERNAL, "MemoryError: too much")
        await task


async def test_a_cancel_frees_and_the_worker_goes_on(worker, make_job):
    async with worker(options=SLOW) as (router, connection, _):
        await connection.send(Submit(make_job()))
        await router.hear(connection, Outputs)
        await connection.send(Cancel("job", 1))
        await connection.send(Cancel("nobody", 1))
        load = await router.hear(connection, Load)
        while load.running or not load.cancelled:
            load = await router.hear(connection, Load)
        assert (load.cancelled, load.free_blocks) == (1, 64)
        assert load.cancel_steps_max <= 1


async def crowd(connection, service, make_job):
    """Twelve long prompts whose ids come back on a link that takes little; gives the membership."""
    (member,) = service._memberships
    member._connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    for number in range(12):
        await connection.send(Submit(make_job(id=f"{number}", ids=[1] * 200_000)))
    return member


async def test_a_cancel_while_its_words_are_on_the_way_does_not_cut_them(worker, make_job, until):
    """The router reads slowly: the words of a cancelled job are still whole, and others follow."""
    async with worker(blocks=20_000) as (router, connection, service):
        await router.hear(connection, Load)
        member = await crowd(connection, service, make_job)
        await until(lambda: member._outbox.qsize() >= 3)  # more than the kernel takes
        for number in range(12):
            await connection.send(Cancel(f"{number}", 1))
        await connection.send(Submit(make_job("abc", id="last")))
        while (await router.hear(connection, Accepted)).id != "last":
            pass


async def test_a_router_that_does_not_listen_is_left_before_its_words_pile_up(
    worker, make_job, monkeypatch, caplog
):
    monkeypatch.setattr(membership, "OUTBOX", 3)
    async with worker(blocks=20_000) as (router, connection, service):
        await router.hear(connection, Load)
        await crowd(connection, service, make_job)
        again = await router.connections.get()
        assert "does not listen" in caplog.text
        await again.send(Submit(make_job("abc", id="last")))
        assert (await router.hear(again, Accepted)).id == "last"


# ── joining ─────────────────────────────────────────────────────────────────────────────────────


async def test_when_the_router_is_lost_everything_is_freed_and_it_joins_again(
    worker, make_job, until
):
    async with worker(options=SLOW) as (router, connection, _service):
        await connection.send(Submit(make_job()))
        await router.hear(connection, Outputs)
        connection.close()
        again = await router.connections.get()
        load = await router.hear(again, Load)
        assert (load.running, load.free_blocks) == (0, 64)
        await again.send(Submit(make_job(id="next", max_tokens=1)))
        await router.hear(again, Outputs)


async def test_a_router_that_speaks_out_of_turn_is_the_operators_to_mend(worker, make_engine):
    async with worker() as (_, connection, _service):
        await connection.send(Joined(1.0))
    router = Router()
    router.reply = Refused("not you")
    async with listen("127.0.0.1", 0, SECRET, router.serve) as bound:
        config = WorkerConfig("w", "fake", Role.MIXED, (Address(*bound),), SECRET, "127.0.0.1")
        with pytest.raises(SetupError, match="the router refused this worker: not you"):
            await WorkerService(config, make_engine(), Rates(1.0, 1.0)).run()


async def test_it_waits_for_its_router_as_long_as_it_takes(make_engine, monkeypatch, caplog, until):
    monkeypatch.setattr(membership, "REJOIN_FIRST_S", 0.01)
    router = Router()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    address = Address("127.0.0.1", port)
    config = WorkerConfig("w", "fake", Role.MIXED, (address,), SECRET, "127.0.0.1", "example.org")
    task = asyncio.create_task(WorkerService(config, make_engine(), Rates(1.0, 1.0)).run())
    await until(lambda: caplog.text.count("trying again") >= 2)
    async with listen("127.0.0.1", port, SECRET, router.serve):
        await router.connections.get()
        assert router.joins[0].address.host == "example.org"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# ── leaving ─────────────────────────────────────────────────────────────────────────────────────


async def test_it_leaves_when_what_it_has_is_finished(make_engine, make_job):
    router, stop = Router(), asyncio.Event()
    async with listen("127.0.0.1", 0, SECRET, router.serve) as bound:
        config = WorkerConfig("w", "fake", Role.MIXED, (Address(*bound),), SECRET, "127.0.0.1")
        service = WorkerService(
            config, make_engine(options=FakeOptions(tokens=20, step_ms=1)), Rates(1.0, 1.0)
        )
        task = asyncio.create_task(run_worker(service, stop, child=False))
        connection = await router.connections.get()
        await connection.send(Submit(make_job()))
        await router.hear(connection, Outputs)
        stop.set()
        await router.hear(connection, Leaving)
        last = await router.hear(connection, Outputs)
        while not last.items[0].finish:
            last = await router.hear(connection, Outputs)
        await asyncio.wait_for(task, 10)


async def test_it_does_not_drain_for_ever(make_engine, make_job, monkeypatch):
    monkeypatch.setattr(service_module, "DRAIN_S", 0.05)
    router, stop = Router(), asyncio.Event()
    async with listen("127.0.0.1", 0, SECRET, router.serve) as bound:
        config = WorkerConfig("w", "fake", Role.MIXED, (Address(*bound),), SECRET, "127.0.0.1")
        engine = make_engine(options=FakeOptions(tokens=10**6, step_ms=1))
        service = WorkerService(config, engine, Rates(1.0, 1.0))
        task = asyncio.create_task(run_worker(service, stop, child=False))
        connection = await router.connections.get()
        await connection.send(Submit(make_job()))
        await router.hear(connection, Outputs)
        stop.set()
        await asyncio.wait_for(task, 10)
