"""Membership, from the router's side: workers here are played by the test, word by word."""

from __future__ import annotations

from contextlib import asynccontextmanager

import msgspec
import pytest

from scheduler import suspicion
from scheduler.errors import ProtocolError
from scheduler.messages import (
    VERSION,
    Address,
    Cancel,
    Committed,
    HandedOver,
    Join,
    Joined,
    Leaving,
    Load,
    Peer,
    Rates,
    Role,
)
from scheduler.pricing import Demand
from scheduler.routing import Route, choose, priced
from scheduler.transport import dial, listen
from serving import members as members_module
from serving.cluster_metrics import ClusterCollector
from serving.gateway import Gateway
from serving.members import HEARTBEAT_S, Members

pytestmark = pytest.mark.asyncio

SECRET = b"of this test"
LOAD = Load(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


def introduction(name: str = "a", **changes) -> Join:
    join = Join(
        name=name,
        model="m",
        role=Role.MIXED,
        address=Address("127.0.0.1", 5),
        fingerprint="f",
        context_length=100,
        kv_blocks=8,
        rates=Rates(1000.0, 0.01),
        pid=1,
    )
    return msgspec.structs.replace(join, **changes)


class Router:
    def __init__(self) -> None:
        self.members = Members()
        self.heard: list = []
        self.lost: list[str] = []
        self.members.on_message = lambda worker, message: self.heard.append((worker, message))
        self.members.on_lost = self.lost.append
        self.address = ("", 0)
        self.connections: list = []

    def chosen(self) -> str:
        """The mixed worker that takes a request now."""
        fleet, now = self.members.fleet("m"), self.members.clock()
        return choose(Demand(100, 10), fleet, now, lambda: 0.5, priced).decode.name

    async def join(self, name: str = "a", **changes):
        connection = await dial(*self.address, SECRET)
        self.connections.append(connection)
        await connection.send(introduction(name, **changes))
        assert await connection.expect(Joined) == Joined(HEARTBEAT_S, self.members.router)
        await self.members.joined(name)
        return connection


@pytest.fixture
def routing():
    @asynccontextmanager
    async def start():
        router = Router()
        async with listen("127.0.0.1", 0, SECRET, router.members.serve) as router.address:
            try:
                yield router
            finally:
                for connection in router.connections:
                    connection.close()

    return start


async def test_a_worker_joins_speaks_and_leaves(routing, until):
    async with routing() as router:
        worker = await router.join()
        assert [m.join for m in router.members.of("m")] == [introduction()]
        assert router.members.of("other") == []
        await worker.send(LOAD)
        await worker.send(HandedOver("job", 1))
        await worker.send(Leaving())
        member = router.members.get("a")
        await until(lambda: member.worker.draining)
        assert (member.load, router.heard) == (LOAD, [("a", HandedOver("job", 1))])
        assert member.worker.draining
        worker.close()
        await until(lambda: router.members.of() == [])
        assert (router.lost, router.members.lost) == (["a"], 1)


async def test_posts_arrive_in_order_and_to_a_stranger_not_at_all(routing):
    async with routing() as router:
        worker = await router.join()
        for epoch in range(5):
            router.members.post("a", Cancel("job", epoch))
            router.members.post("nobody", Cancel("job", epoch))
        for epoch in range(5):
            assert await worker.expect(Cancel) == Cancel("job", epoch)


async def test_a_name_belongs_to_who_came_last(routing, until):
    async with routing() as router:
        old = await router.join(pid=1)
        new = await router.join(pid=2)
        with pytest.raises(ConnectionError):
            await old.receive()
        assert router.members.get("a").join.pid == 2
        assert router.lost == ["a"]
        router.members.post("a", Cancel("job", 1))
        assert await new.expect(Cancel) == Cancel("job", 1)


async def test_another_fingerprint_is_refused_unless_it_is_the_same_worker(routing, until):
    async with routing() as router:
        await router.join()
        stranger = await dial(*router.address, SECRET)
        await stranger.send(introduction("b", fingerprint="g"))
        with pytest.raises(ProtocolError, match="differs from a's"):
            await stranger.expect(Joined)
        stranger.close()
        await router.join("a", fingerprint="g")
        await router.join("c", model="other", fingerprint="h")
        assert len(router.members.of()) == 2


async def test_other_numbers_are_refused_and_unknown_ones_of_an_older_worker_are_not(routing):
    async with routing() as router:
        await router.join(numbers="fast mode, weights 9 Q4_1")
        stranger = await dial(*router.address, SECRET)
        await stranger.send(introduction("b", numbers="fast mode, weights 9 Q8_0"))
        with pytest.raises(ProtocolError, match=r"9 Q8_0, which differs from a's .* 9 Q4_1"):
            await stranger.expect(Joined)
        stranger.close()
        await router.join("c")
        assert {member.join.name for member in router.members.of()} == {"a", "c"}


async def test_whoever_does_not_introduce_itself_is_left(routing):
    async with routing() as router:
        stranger = await dial(*router.address, SECRET)
        await stranger.send(LOAD)
        with pytest.raises(ConnectionError):
            await stranger.receive()
        stranger.close()
        assert router.members.of() == []


@pytest.fixture
def impatient(monkeypatch):
    """Members look a hundred times as often, and lose patience sooner."""
    monkeypatch.setattr(members_module, "LOOK_S", members_module.LOOK_S / 100)
    monkeypatch.setattr(suspicion, "LOOK_S", suspicion.LOOK_S / 100)
    monkeypatch.setattr(suspicion, "SUSPECT_S", suspicion.SUSPECT_S / 10)


@pytest.mark.usefixtures("impatient")
async def test_silence_is_a_loss(routing):
    async with routing() as router:
        worker = await router.join()
        with pytest.raises(ConnectionError):
            await worker.receive()
        assert router.lost == ["a"]


@pytest.mark.usefixtures("impatient")
async def test_a_part_of_a_word_is_a_sign_of_life(routing, until):
    """A long message over a slow link is no silence."""
    async with routing() as router:
        worker = await router.join()
        member = router.members.get("a")
        frame = b"MTL" + bytes([VERSION]) + (1 << 20).to_bytes(4) + bytes(8)
        silence = []
        for byte in frame + bytes(50):
            await until(lambda: member.record.suspicion.silence > 0)
            worker._sock.send(bytes([byte]))
            await until(lambda: member.record.suspicion.silence == 0)
            silence.append(router.lost)
        assert not any(silence)


async def test_a_worker_that_talks_but_takes_no_step_is_a_loss(routing, until):
    """Its engine hangs; its event loop still sends heartbeats."""
    async with routing() as router:
        now = [100.0]
        router.members.clock = lambda: now[0]
        worker = await router.join()
        for passed, here in ((0, True), (25, True), (10, False)):
            now[0] += passed
            before = router.members.get("a").load
            await worker.send(msgspec.structs.replace(LOAD))
            await until(lambda b=before: getattr(router.members.get("a"), "load", None) is not b)
            assert (router.members.get("a") is not None) is here
        assert router.lost == ["a"]


async def test_who_is_doubtful_gets_nothing_new_while_others_are_there(routing):
    async with routing() as router:
        await router.join("a")
        await router.join("b")
        router.members.get("a").record.suspicion.silence = 0.5
        for _ in range(3):
            assert router.chosen() == "b"
        router.members.get("b").record.suspicion.silence = 0.5
        assert router.chosen() == "a"


async def test_losses_in_a_row_open_the_breaker_and_a_farewell_does_not(routing, until):
    async with routing() as router:
        now = [0.0]
        router.members.clock = lambda: now[0]
        await router.join("b")
        for _ in range(3):
            worker = await router.join("a")
            now[0] += 0.2
            worker.close()
            await until(lambda: router.members.get("a") is None)
        await router.join("a")
        assert router.chosen() == "b"
        router.members.praise("a")
        for _ in range(5):
            worker = await router.join("a")
            await worker.send(Leaving())
            member = router.members.get("a")
            await until(lambda member=member: member.worker.draining)
            worker.close()
            await until(lambda: router.members.get("a") is None)
        await router.join("a")
        assert router.chosen() == "a"


async def test_a_broken_word_is_a_loss(routing, until):
    async with routing() as router:
        worker = await router.join()
        await worker.send(LOAD, [b"payload that nobody takes"])
        await worker.send(Load("many", 2, 3, 4, 5, 6, 7, 8, 9, 10))  # type: ignore[arg-type]
        with pytest.raises(ConnectionError):
            await worker.receive()
        assert router.lost == ["a"]


# ── routes ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_route_names_an_address(routing):
    async with routing() as router:
        await router.join("p", role=Role.PREFILL)
        await router.join("d", role=Role.DECODE, address=Address("10.0.0.7", 9))
        assert router.members.route("p", "d") == Route("p", Peer("d", Address("10.0.0.7", 9)))
        assert router.members.route("d", "d") == Route("d")


@pytest.mark.parametrize(
    ("receiver", "sender", "reached"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "10.0.0.9", "10.0.0.1"),
        ("localhost", "10.0.0.9", "10.0.0.1"),
        ("10.0.0.7", "10.0.0.9", "10.0.0.7"),
        ("decode.example", "127.0.0.1", "decode.example"),
    ],
    ids=["both here", "one here", "by name", "both elsewhere", "a name elsewhere"],
)
async def test_a_worker_beside_the_router_is_reached_at_the_routers_address(
    routing, receiver, sender, reached
):
    async with routing() as router:
        await router.join("p", role=Role.PREFILL)
        await router.join("d", role=Role.DECODE, address=Address(receiver, 9))
        connection = router.members.get("p").connection
        connection.remote, connection.local = (sender, 1), ("10.0.0.1", 2)
        route = router.members.route("p", "d")
        assert route.handoff == Peer("d", Address(reached, 9))


# ── what Prometheus is told ─────────────────────────────────────────────────────────────────────


async def test_metrics_are_what_the_workers_said_last(routing, until):
    async with routing() as router:
        worker = await router.join()
        await router.join("silent", role=Role.PREFILL)
        await worker.send(LOAD)
        await until(lambda: router.members.get("a").load)
        collector = ClusterCollector(router.members, Gateway(router.members))
        samples = {
            (s.name, s.labels.get("worker")): s.value
            for family in collector.collect()
            for s in family.samples
        }
        assert samples["motley_worker_running", "a"] == 1
        assert samples["motley_worker_kv_bytes_received_total", "a"] == 10
        assert samples["motley_worker_kv_blocks", "silent"] == 8
        assert samples["motley_worker_circuit_open", "silent"] == 0
        assert ("motley_worker_running", "silent") not in samples
        assert samples["motley_workers", None] == 2


async def test_a_word_out_of_turn_is_only_a_warning(routing, until, caplog):
    async with routing() as router:
        Gateway(router.members)
        worker = await router.join()
        await worker.send(Committed("job", 1))
        await until(lambda: "said Committed out of turn" in caplog.text)
        assert router.members.get("a")
