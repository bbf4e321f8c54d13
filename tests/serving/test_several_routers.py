"""Two routers serve one cluster: each knows every worker, and what the other has there."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from scheduler.messages import Address, Role
from workers.fake import FakeOptions

pytestmark = pytest.mark.asyncio

SLOW = FakeOptions(tokens=40, step_ms=1.5)
SLOWER = FakeOptions(tokens=600, step_ms=1.5)  # for several heartbeats


@pytest.fixture
def two_routers(cluster):
    """Clusters `here` and `there`; the workers of `here` are members of both."""

    @asynccontextmanager
    async def start(options=SLOW, **names: Role):
        async with cluster() as there, cluster() as here:
            here.also = (Address("127.0.0.1", there.port),)
            for name, role in names.items():
                await here.join(name, role, options=options)
                await there.members.joined(name)
            try:
                yield here, there
            finally:
                for name in list(here.workers):
                    await here.kill(name)

    return start


async def test_requests_of_both_share_workers_and_go_home(two_routers, make_ask):
    async with two_routers(p=Role.PREFILL, d=Role.DECODE) as (here, there):
        prompts = [f"once upon a time, number {n}" for n in range(8)]
        alone = [await here.text(make_ask(prompt, id="same")) for prompt in prompts]
        answers = await asyncio.gather(
            *(it.text(make_ask(p, id="same")) for p in prompts for it in (here, there))
        )
        assert answers == [answer for one in alone for answer in (one, one)]
        await here.idle()


async def test_each_sees_what_the_other_has_there(two_routers, make_ask, until):
    async with two_routers(SLOWER, m=Role.MIXED) as (here, there):
        async with here.gateway.open(make_ask(n=1)) as stream:
            await anext(here.each(stream))
            await until(lambda: there.members.get("m").load.others_running == 1)
            assert here.members.get("m").load.others_running == 0
        await until(lambda: there.members.get("m").load.others_running == 0)


async def test_a_router_that_is_lost_takes_only_its_own_requests_along(
    two_routers, make_ask, until
):
    async with two_routers(p=Role.PREFILL, d=Role.DECODE) as (here, there):
        unbroken = await here.text(make_ask())
        async with here.gateway.open(make_ask(n=2)) as stream:
            deltas = here.each(stream)
            await anext(deltas)
            theirs = asyncio.create_task(there.text(make_ask()))
            await until(
                lambda: any(live.generation.started for live in there.gateway._live.values())
            )
            before = [there.members.get(name) for name in ("p", "d")]
            for name in ("p", "d"):
                there.cut(name)
            for name, old in zip(("p", "d"), before, strict=True):
                await until(lambda name=name, old=old: there.members.get(name) not in (old, None))
            rest = {0: 0, 1: 0}
            async for delta in deltas:
                rest[delta.index] += delta.tokens
            assert min(rest.values()) > 0
            assert await theirs == unbroken
        assert here.gateway.replayed == 0
        assert there.gateway.replayed  # at least once: two workers were lost one after the other
        await here.idle()
