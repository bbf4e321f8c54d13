"""The engine's loop: what happens between two steps, and what a failing step leaves behind.

Runners here are gates: a step ends when the test says so.
"""

from __future__ import annotations

import asyncio
import math
import threading
from contextlib import asynccontextmanager

import pytest

from scheduler.cost import CostModel
from scheduler.cost_fit import Learner
from scheduler.errors import BadRequest, HandoffFailed
from scheduler.messages import FirstToken
from workers import engine_loop
from workers.engine_loop import EngineLoop
from workers.fake import FakeOptions, FakeRunner

pytestmark = pytest.mark.asyncio

PROMPT = list(b"once upon a time there was")


class GatedRunner(FakeRunner):
    """Each step waits for a permit; `fail` makes the next one raise."""

    def __init__(self, blocks: int = 64) -> None:
        super().__init__(blocks, FakeOptions())
        self.entered = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self.fail = False

    def run(self, *step):
        self.entered.release()
        assert self.permits.acquire(timeout=10)
        if self.fail:
            self.fail = False
            raise ArithmeticError("not a number")
        return super().run(*step)

    async def in_step(self) -> None:
        """Wait until a step runs."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=10)


class Told:
    """What the loop says to its owner."""

    def __init__(self) -> None:
        self.outputs: list = []
        self.broken: list = []
        self._changed = asyncio.Event()

    async def on_outputs(self, outputs) -> None:
        self.outputs += outputs
        self._changed.set()

    async def on_broken(self, key, reason) -> None:
        self.broken.append((key, reason))
        self._changed.set()

    async def until(self, condition) -> None:
        async with asyncio.timeout(10):
            while not condition(self):
                await self._changed.wait()
                self._changed.clear()


@pytest.fixture
def running(make_engine):
    """`async with running(runner) as (loop, told)`; afterwards nothing is left in the engine."""

    @asynccontextmanager
    async def start(runner=None, blocks: int = 64):
        told = Told()
        engine = make_engine(blocks, runner=runner)
        loop = EngineLoop(engine, told.on_outputs, told.on_broken)
        task = asyncio.create_task(loop.run())
        try:
            yield loop, told
            async with asyncio.timeout(10):
                await loop.empty.wait()
            engine.check_integrity()
            assert engine.batcher.pool.free == blocks
        finally:
            if isinstance(runner, GatedRunner):
                runner.permits.release(1000)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    return start


async def test_it_steps_while_there_is_work(running, make_job):
    async with running() as (loop, told):
        assert loop.empty.is_set()
        await loop.add(make_job(), PROMPT)
        assert not loop.empty.is_set()
        await told.until(lambda t: len(t.outputs) == 17)


async def test_a_job_that_can_never_run_is_refused_to_who_adds_it(running, make_job):
    async with running(blocks=1) as (loop, _told):
        for change in (loop.add, loop.prefill, loop.reserve):
            with pytest.raises(BadRequest):
                await change(make_job(), PROMPT)


COST = CostModel(1e-3, 1e-5, 0.0, 1e-4, 0.0, "measured")


async def test_an_idle_worker_looks_how_fast_it_is_and_serves_at_once(
    running, make_job, monkeypatch
):
    monkeypatch.setattr(engine_loop, "IDLE_S", 0.0)
    monkeypatch.setattr(engine_loop, "LOOK_S", math.inf)
    runner = GatedRunner()
    runner.cache.data[:] = 7
    async with running(runner) as (loop, told):
        loop.engine.watch.learner = Learner(COST)
        await runner.in_step()
        adding = asyncio.create_task(loop.add(make_job(max_tokens=1), PROMPT))
        await asyncio.sleep(0)
        runner.permits.release()
        await adding
        assert (runner.cache.data == 7).all(), "it left no trace"
        await runner.in_step()
        runner.permits.release()
        await told.until(lambda t: t.outputs)
        assert loop.engine.steps == 1


async def test_a_look_that_fails_harms_nobody(running, make_job, monkeypatch):
    monkeypatch.setattr(engine_loop, "IDLE_S", 0.0)
    runner = GatedRunner()
    async with running(runner) as (loop, told):
        loop.engine.watch.learner = Learner(COST)
        runner.fail = True
        await runner.in_step()
        runner.permits.release(1000)
        await loop.add(make_job(max_tokens=1), PROMPT)
        await told.until(lambda t: t.outputs)
        assert not told.broken


async def test_a_cancel_during_a_step_frees_before_the_next(running, make_job):
    runner = GatedRunner()
    async with running(runner) as (loop, _told):
        await loop.add(make_job(), PROMPT)
        await runner.in_step()
        loop.cancel(("job", 1))
        assert loop.engine.keys == [("job", 1)]  # the step that runs is not disturbed
        runner.permits.release()
        async with asyncio.timeout(10):
            await loop.empty.wait()
        assert (loop.cancelled, loop.cancel_steps_max) == (1, 1)
        assert loop.engine.steps == 1
        assert not runner.entered.acquire(blocking=False)


async def test_a_cancel_between_steps_is_at_once(running, make_job):
    async with running() as (loop, _told):
        await loop.reserve(make_job(), PROMPT)
        loop.cancel(("job", 1))
        assert (loop.engine.keys, loop.cancelled, loop.cancel_steps_max) == ([], 1, 0)
        loop.cancel(("job", 1))
        assert loop.cancelled == 1


async def test_a_job_added_and_cancelled_during_a_step_never_runs(running, make_job):
    runner = GatedRunner()
    async with running(runner) as (loop, told):
        await loop.add(make_job(id="first", max_tokens=1), PROMPT)
        await runner.in_step()
        adding = asyncio.create_task(loop.add(make_job(id="late"), PROMPT))
        await asyncio.sleep(0)
        adding.cancel()
        loop.cancel(("late", 1))
        runner.permits.release()
        await told.until(lambda t: t.outputs)
    assert {output.id for output in told.outputs} == {"first"}


async def test_an_add_that_nobody_waits_for_any_more_may_fail_in_silence(running, make_job):
    runner = GatedRunner(blocks=1)
    async with running(runner, blocks=1) as (loop, told):
        await loop.add(make_job(id="first", max_tokens=1), [1])
        await runner.in_step()
        adding = asyncio.create_task(loop.add(make_job(id="late"), PROMPT))
        await asyncio.sleep(0)
        adding.cancel()
        runner.permits.release()
        await told.until(lambda t: t.outputs)


async def test_prefill_holds_and_release_frees_without_counting(running, make_job):
    async with running() as (loop, _told):
        held = await loop.prefill(make_job(choices=(0, 1)), PROMPT)
        assert (held.tokens, len(held.firsts)) == (26, 2)
        loop.release(("job", 1))
        assert (loop.engine.keys, loop.cancelled) == ([], 0)


async def test_a_reservation_waits_for_blocks(running, make_job):
    async with running(blocks=2) as (loop, _told):
        await loop.reserve(make_job(id="first"), PROMPT)
        second = asyncio.create_task(loop.reserve(make_job(id="second"), PROMPT))
        await asyncio.sleep(0)
        assert not second.done()
        loop.release(("first", 1))
        assert len((await second).blocks) == 2
        loop.release(("second", 1))


async def test_resume_goes_on_to_the_end(running, make_job):
    async with running() as (loop, told):
        await loop.reserve(make_job(max_tokens=3), PROMPT)
        assert await loop.resume(("job", 1), (FirstToken(0, 97, 1),))
        await told.until(lambda t: len(t.outputs) == 2)
        assert not await loop.resume(("job", 1), (FirstToken(0, 97, 1),))


@pytest.mark.parametrize("wait", ["prefill", "reserve"])
async def test_a_cancel_wakes_who_waits(running, make_job, wait):
    runner = GatedRunner(blocks=2)
    async with running(runner, blocks=2) as (loop, _told):
        await loop.reserve(make_job(id="other"), PROMPT)
        waiting = asyncio.create_task(getattr(loop, wait)(make_job(), PROMPT))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        loop.cancel(("job", 1))
        with pytest.raises(HandoffFailed, match="cancelled"):
            await waiting
        loop.release(("other", 1))


# ── a failing step ──────────────────────────────────────────────────────────────────────────────


async def test_a_failing_step_gives_every_job_back_and_the_loop_goes_on(running, make_job):
    runner = GatedRunner()
    async with running(runner) as (loop, told):
        await loop.add(make_job(id="first"), PROMPT)
        await runner.in_step()
        adding = asyncio.create_task(loop.add(make_job(id="second"), PROMPT))
        runner.permits.release()
        await adding
        await runner.in_step()
        runner.fail = True
        runner.permits.release()
        await told.until(lambda t: len(t.broken) == 2)
        assert told.broken == [
            (("first", 1), "ArithmeticError: not a number"),
            (("second", 1), "ArithmeticError: not a number"),
        ]
        assert loop.engine.keys == []
        runner.permits.release(100)
        before = len(told.outputs)
        await loop.add(make_job(id="third"), PROMPT)
        await told.until(lambda t: len(t.outputs) == before + 17)


async def test_a_failing_step_wakes_who_waits_for_its_prefill(running, make_job):
    runner = GatedRunner()
    runner.fail = True
    runner.permits.release()
    async with running(runner) as (loop, told):
        with pytest.raises(HandoffFailed):
            await loop.prefill(make_job(), PROMPT)
        assert [key for key, _ in told.broken] == [("job", 1)]


async def test_a_failing_step_gives_back_the_reservation_that_it_granted(running, make_job):
    runner = GatedRunner()
    async with running(runner) as (loop, told):
        await loop.add(make_job(id="first"), PROMPT)
        await runner.in_step()
        reserving = asyncio.create_task(loop.reserve(make_job(id="second"), PROMPT))
        await asyncio.sleep(0)
        runner.permits.release()
        await runner.in_step()  # the step in which it is granted
        runner.fail = True
        runner.permits.release()
        async with asyncio.timeout(5):
            with pytest.raises(HandoffFailed):
                await reserving
        await told.until(lambda t: len(t.broken) == 2)


async def test_a_failing_step_leaves_kv_that_only_waits_for_a_transfer(running, make_job):
    runner = GatedRunner()
    runner.permits.release()
    async with running(runner) as (loop, told):
        await loop.prefill(make_job(id="held"), PROMPT)
        await runner.in_step()
        await loop.add(make_job(id="broken"), PROMPT)
        await runner.in_step()
        runner.fail = True
        runner.permits.release()
        await told.until(lambda t: t.broken)
        assert loop.engine.keys == [("held", 1)]
        loop.release(("held", 1))
