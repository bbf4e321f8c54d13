"""Workers fail in every way at every moment: the client gets the unbroken answer."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from scheduler.errors import BadRequest, SetupError, Unavailable
from scheduler.messages import Role
from scheduler.request import Grammar
from serving import gateway
from workers.fake import FakeOptions, FakeRunner

pytestmark = pytest.mark.asyncio

SLOW = FakeOptions(tokens=30, step_ms=1.5)
PROMPT = "once upon a time there was"


class Broken(FakeRunner):
    """It fails in the steps whose numbers it is given."""

    def __init__(self, steps, blocks: int = 64) -> None:
        super().__init__(blocks, SLOW)
        self._steps, self._step = set(steps), 0

    def run(self, *step):
        self._step += 1
        if self._step in self._steps:
            raise ArithmeticError("not a number")
        return super().run(*step)


@pytest.fixture
def unbroken(make_engine, make_job):
    """The texts of n choices when nothing fails."""

    def run(n: int = 1) -> dict[int, str]:
        engine = make_engine(options=FakeOptions(tokens=30))
        engine.add(make_job(PROMPT, choices=tuple(range(n))), list(PROMPT.encode()))
        found: dict[int, str] = {}
        while engine.has_work:
            for output in engine.step().outputs:
                found[output.choice] = found.get(output.choice, "") + output.text
        return found

    return run


async def answer_while(it, ask, after: int, strike) -> dict[int, str]:
    """The answer to `ask`; after so many deltas, `strike()`."""
    found: dict[int, str] = {}
    seen = 0
    async with it.gateway.open(ask) as stream:
        if after == 0:
            await strike()
        async for delta in it.each(stream):
            found[delta.index] = found.get(delta.index, "") + delta.text
            seen += 1
            if seen == after:
                await strike()
    return found


# ── a worker dies ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("after", [0, 1, 2, 9])
@pytest.mark.parametrize("victim", ["p1", "d1"])
async def test_a_worker_of_a_pair_dies(cluster, make_ask, unbroken, victim, after, n):
    async with cluster("p1", "d1", options=SLOW) as it:

        async def strike():
            await it.join("m1", Role.MIXED, options=SLOW)
            await it.kill(victim)

        assert await answer_while(it, make_ask(n=n), after, strike) == unbroken(n)


@pytest.mark.parametrize("after", [1, 9])
async def test_the_only_worker_dies_and_another_comes_later(cluster, make_ask, unbroken, after):
    async with cluster("m1", options=SLOW) as it:

        async def strike():
            await it.kill("m1")
            it.start("m2", Role.MIXED, options=SLOW)

        assert await answer_while(it, make_ask(), after, strike) == unbroken()
        assert it.gateway.replayed == 1


async def test_workers_die_one_after_another(cluster, make_ask, unbroken):
    async with cluster("m1", "m2", "m3", "m4", options=SLOW) as it:
        found, victims = "", iter(["m1", "m2", "m3"])
        async with it.gateway.open(make_ask()) as stream:
            async for delta in it.each(stream):
                found += delta.text
                if len(found) % 7 == 3 and (victim := next(victims, None)):
                    await it.kill(victim)
        assert {0: found} == unbroken()


async def test_a_connection_breaks_and_the_worker_comes_back(cluster, make_ask, unbroken):
    """Nobody else is there, and it is back before anybody notices more than the break."""
    async with cluster("m", options=SLOW) as it:

        async def strike():
            it.cut("m")

        assert await answer_while(it, make_ask(), 5, strike) == unbroken()
        assert it.members.lost == 1


async def test_a_worker_comes_back_before_its_loss_is_noticed(cluster, make_ask, unbroken, until):
    """Two processes claim one name; the older one is silent, so the newer one takes over."""
    async with cluster("m", options=SLOW) as it:
        old = it.workers.pop("m")

        async def strike():
            (link,) = old.service._memberships
            await link._connection._sending.acquire()  # it is stopped: nothing comes any more
            it.start("m", Role.MIXED, options=SLOW)
            before = it.members.get("m")
            await until(lambda: it.members.get("m") not in (before, None))
            old.task.cancel()
            await asyncio.gather(old.task, return_exceptions=True)

        assert await answer_while(it, make_ask(), 5, strike) == unbroken()


async def test_a_name_that_somebody_alive_has_is_refused(cluster, make_ask, unbroken):
    async with cluster("m", options=SLOW) as it:
        first = it.workers.pop("m")
        second = it.start("m", Role.MIXED, options=SLOW)
        with pytest.raises(SetupError, match="called m is here already"):
            await second.task
        it.workers["m"] = first
        assert await it.text(make_ask()) == unbroken()
        assert it.members.lost == 0


async def test_nobody_comes(cluster, make_ask, monkeypatch):
    monkeypatch.setattr(gateway, "REPLAY_WAIT_S", 0.05)
    async with cluster("m", options=SLOW) as it:
        with pytest.raises(Unavailable, match=r"its worker was lost.*no worker for this model"):
            await answer_while(it, make_ask(), 3, lambda: it.kill("m"))


async def test_a_replay_that_the_queue_refuses_waits_for_the_queue(
    cluster, make_ask, unbroken, until
):
    """Nobody joins: what changes is the load of those who are there."""
    async with cluster("m1", "m2", options=SLOW, policy="priced") as it:
        other = it.members.get("m2")
        # So m1 has the request, and its replay is refused.
        other.worker.enqueue((0, 0), 10**9, 0, it.members.clock())
        done = asyncio.Event()

        async def strike():
            await it.kill("m1")
            asyncio.get_running_loop().call_soon(done.set)

        answer = asyncio.create_task(answer_while(it, make_ask(), 3, strike))
        await done.wait()
        (live,) = it.gateway._live.values()
        await until(lambda: live.waiting)
        other.worker.dequeue((0, 0), 10**9, 0, it.members.clock())
        assert await answer == unbroken()
        assert it.gateway.replayed == 1


async def test_between_two_lives_of_the_only_worker_the_model_is_unavailable_not_unknown(
    cluster, make_ask
):
    async with cluster("m", model="other", options=SLOW) as it:
        await it.kill("m")
        with pytest.raises(Unavailable, match="not ready"):
            await it.text(make_ask(model="other"))
        with pytest.raises(BadRequest, match="does not exist"):
            await it.text(make_ask(model="unheard of"))


async def test_the_client_leaves_while_it_waits_for_a_worker(cluster, make_ask):
    """Nothing of it is left: the fixture counts tasks."""
    async with cluster("m", options=SLOW) as it, it.gateway.open(make_ask()) as stream:
        await anext(it.each(stream))
        await it.kill("m")


@pytest.mark.parametrize("after", [1, 4, 12])
@pytest.mark.parametrize("victim", ["p1", "d1"])
async def test_an_answer_that_follows_a_schema_goes_on_in_the_middle_of_it(
    cluster, make_ask, victim, after
):
    """Whoever takes over has only the ids: the grammar's state is replayed from them."""
    schema = json.dumps(
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    )
    ask = make_ask(grammar=Grammar("json_schema", schema, "response_format"))
    async with cluster("p1", "d1", options=SLOW) as it:
        unbroken = await it.text(ask)
        assert set(json.loads(unbroken[0])) == {"name", "age"}

        async def strike():
            await it.join("m1", Role.MIXED, options=SLOW)
            await it.kill(victim)

        assert await answer_while(it, ask, after, strike) == unbroken


# ── a worker errs ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("step", [1, 2, 6])
async def test_a_failing_step_is_computed_elsewhere(cluster, make_ask, unbroken, step):
    async with cluster() as it:
        await it.join("a", Role.MIXED, runner=Broken([step]), options=SLOW)
        await it.join("b", Role.MIXED, options=SLOW)
        assert await it.text(make_ask(n=2)) == unbroken(2)
        assert it.gateway.replayed
        assert it.workers["b"].engine.tokens  # not on the one that failed, though it is first


@pytest.mark.parametrize("name", ["p", "d"])
async def test_a_failing_step_of_a_pair(cluster, make_ask, unbroken, name):
    async with cluster("m", options=SLOW) as it:
        for role in (Role.PREFILL, Role.DECODE):
            broken = {"runner": Broken([1])} if name == str(role)[0] else {}
            await it.join(str(role)[0], role, options=SLOW, **broken)
        it.members.get("m").worker.outstanding += 9  # the pair is the first choice
        assert await it.text(make_ask()) == unbroken()
        it.members.get("m").worker.outstanding -= 9
        assert it.gateway.replayed == 1


async def test_a_worker_that_keeps_failing_is_spared_until_its_trial_succeeds(cluster, make_ask):
    now = [0.0]
    async with cluster(clock=lambda: now[0]) as it:
        await it.join("a", Role.MIXED, runner=Broken(range(1, 4)), options=SLOW)
        await it.join("b", Role.MIXED, options=SLOW)
        for _ in range(5):
            await it.text(make_ask())
            now[0] += 0.1
        assert it.gateway.replayed == 3  # the others were not even given to it
        before = it.workers["a"].engine.tokens
        now[0] += 1.0
        await it.text(make_ask())  # the trial
        assert it.workers["a"].engine.tokens > before
        assert it.gateway.replayed == 3
        assert it.members.get("a").record.breaker.allows(now[0])


async def test_a_trial_whose_client_leaves_lets_another_request_try(cluster, make_ask):
    now = [0.0]
    async with cluster("m", options=SLOW, clock=lambda: now[0]) as it:
        for _ in range(3):
            it.members.blame("m")
            now[0] += 1.0
        breaker = it.members.get("m").record.breaker
        assert breaker.allows(now[0])
        async with it.gateway.open(make_ask()):
            assert not breaker.allows(now[0])
        assert breaker.allows(now[0])


async def test_a_worker_that_always_fails(cluster, make_ask):
    async with cluster() as it:
        await it.join("m", Role.MIXED, runner=Broken(range(100)), options=SLOW)
        with pytest.raises(Unavailable, match=r"failed 8 times.*not a number"):
            await it.text(make_ask())


async def test_a_hand_over_that_fails_is_computed_on_the_decode_worker(cluster, make_ask, unbroken):
    async with cluster("p", options=SLOW) as it:
        await it.join("d", Role.DECODE, options=SLOW)
        member = it.members.get("d")
        nowhere = msgspec.structs.replace(member.join.address, port=1)
        member.join = msgspec.structs.replace(member.join, address=nowhere)
        assert await it.text(make_ask(n=2)) == unbroken(2)
        assert it.workers["p"].engine.tokens == 0


async def test_a_decode_pool_too_small_for_the_request(cluster, make_ask):
    async with cluster("p", options=SLOW) as it:
        await it.join("d", Role.DECODE, blocks=1, options=SLOW)
        with pytest.raises(BadRequest, match="KV cache holds 16 tokens") as wrong:
            await it.text(make_ask())
        assert wrong.value.param == "prompt"


# ── the router restarts ─────────────────────────────────────────────────────────────────────────


async def test_workers_join_again_when_the_router_is_back(cluster, make_ask, until, unbroken):
    async with cluster("p", "d", options=SLOW) as it:
        it.cut("p")
        it.cut("d")
        await until(lambda: not it.members.of())
        await it.joined("p")
        await it.joined("d")
        assert await it.text(make_ask()) == unbroken()


async def test_a_worker_that_drains_finishes_what_it_has(cluster, make_ask, unbroken, until):
    async with cluster("m", "m2", options=SLOW) as it:

        async def strike():
            it.workers["m"].service.leave()
            await until(lambda: it.members.get("m").worker.draining)

        assert await answer_while(it, make_ask(), 3, strike) == unbroken()
        await it.workers.pop("m").task
        assert it.gateway.replayed == 0
        assert it.members.get("m") is None
