"""Limits and priorities that a request brings, and what becomes of them."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from scheduler.errors import BadRequest, Unavailable
from scheduler.request import Turn
from serving import placing
from serving.wish import Limits, Wish, read_wish
from workers.fake import FakeOptions

SENT = {
    "nothing": ({}, Wish()),
    "both limits": (
        {"x-slo-ttft-ms": "500", "x-slo-tpot-ms": "12.5"},
        Wish(Limits(0.5, 0.0125)),
    ),
    "one": ({"x-slo-tpot-ms": "50"}, Wish(Limits(None, 0.05))),
}


@pytest.mark.parametrize(("headers", "wish"), SENT.values(), ids=SENT)
def test_headers_are_limits_in_ms(headers, wish):
    assert read_wish(headers, None) == wish


@pytest.mark.parametrize("header", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_bad_limit_names_its_header(header, value):
    with pytest.raises(BadRequest, match=header) as wrong:
        read_wish({header: value}, None)
    assert (wrong.value.status, wrong.value.param) == (400, header)


def test_a_key_is_the_same_for_the_same_authorization_and_does_not_give_it_away():
    one, same, other = (
        read_wish({"Authorization": f"Bearer {key}"}, 3) for key in ("sk-1", "sk-1", "sk-2")
    )
    assert one == same
    assert one.key != other.key
    assert one.priority == 3
    assert "sk-1" not in one.key


# ── through a cluster ───────────────────────────────────────────────────────────────────────────


def wishing(ask, **fields):
    return msgspec.structs.replace(ask, wish=Wish(**fields))


@pytest.mark.asyncio
async def test_what_cannot_be_in_time_is_refused_at_once_and_others_are_served(cluster, make_ask):
    async with cluster("m", policy="priced") as it:
        worker, now = it.members.get("m").worker, it.members.clock()
        worker.enqueue((0, 0), 10**7, 0, now)  # some seconds of work
        with pytest.raises(Unavailable, match="can be kept again") as refused:
            await it.text(wishing(make_ask(), limits=Limits(ttft_s=0.5)))
        assert refused.value.status == 429
        assert 0 < refused.value.retry_after < 10
        assert await it.text(make_ask())
        urgent = wishing(make_ask(), limits=Limits(ttft_s=60.0), priority=-1)
        assert await it.text(urgent)  # it does not wait for those of lower priority
        worker.dequeue((0, 0), 10**7, 0, now)


@pytest.mark.asyncio
async def test_a_models_limits_are_for_requests_that_bring_none(cluster, make_ask):
    options = placing.RoutingOptions("least-load", ttft_s={"": 5.0, "fake": 1e-9})
    async with cluster("m", routing=options) as it:
        await it.text(make_ask())
        await it.text(wishing(make_ask(), limits=Limits(ttft_s=60.0)))
        assert it.gateway.placing.violations == {"ttft": 1}


@pytest.mark.asyncio
async def test_turns_reach_the_workers_of_both_phases(cluster, make_ask, until):
    async with cluster("p", "d") as it:
        ask = wishing(make_ask(), limits=Limits(ttft_s=60.0), priority=2)
        seen = {}
        for name in "pd":
            batcher = it.workers[name].engine.batcher
            add = batcher.add

            def watch(sequence, name=name, add=add):
                seen[name] = sequence
                add(sequence)

            batcher.add = watch
        await it.text(ask)
        for sequence in seen.values():
            assert isinstance(sequence.job.turn, Turn)
            assert (sequence.job.turn.priority, sequence.due[:2]) == (2, (2, 0))
            assert 59 < sequence.job.turn.left_s <= 60


@pytest.mark.asyncio
async def test_a_replay_keeps_the_place_of_its_arrival_in_a_queue(cluster, make_ask, until):
    """Else it would be behind whoever came later, as often as it loses its worker."""
    now = [0.0]
    slow = FakeOptions(prefill_tps=200)  # it is lost before the first token
    async with cluster("m1", "m2", options=slow, clock=lambda: now[0]) as it:
        turns = []
        async with it.gateway.open(make_ask()) as stream:
            for name in ("m1", "m2"):
                engine = it.workers[name].engine
                await until(lambda e=engine: e.keys)
                (sequences,) = engine._jobs.values()
                turns.append(sequences[0].job.turn)
                now[0] += 7.0
                if name == "m1":
                    await it.kill("m1")
            async for _ in it.each(stream):
                pass
        assert turns == [Turn(left_s=300.0), Turn(left_s=293.0)]


@pytest.mark.asyncio
async def test_a_greedy_key_gets_behind_a_modest_one(cluster, make_ask):
    async with cluster("m", blocks=20_000, options=FakeOptions(tokens=30, step_ms=2)) as it:
        modest = asyncio.create_task(it.text(wishing(make_ask("hello"), key="modest")))
        await asyncio.sleep(0)
        long = [wishing(make_ask("x" * 90_000), key="greedy", priority=n) for n in range(3)]
        running = [asyncio.create_task(it.text(ask)) for ask in long]
        await asyncio.sleep(0)
        shares = {(s.key, s.priority): s.share for s in map(standing, it.gateway._live.values())}
        assert shares == {("modest", 0): 0} | {("greedy", n): n for n in range(3)}
        await asyncio.gather(modest, *running)


def standing(live):
    return live.standing


@pytest.mark.asyncio
async def test_a_worker_reports_what_its_steps_cost(cluster, make_ask, until):
    """The fake worker's measurement said 1e-4 s; a step of it takes 2 ms."""
    async with cluster("m", options=FakeOptions(tokens=500, step_ms=2)) as it:
        worker = it.members.get("m").worker
        assert worker.cost.decode_step_s(1, 30) < 5e-4
        await it.text(make_ask())
        await until(lambda: worker.cost.decode_step_s(1, 30) > 1e-3)
        assert worker.heard > 0
