"""Drives the engine: steps on a thread of their own, everything else between two steps.

The engine has one owner at a time: its thread during a step, the event loop otherwise. So nothing
in it needs a lock, and a cancel frees its blocks before the next step starts.
"""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from scheduler.errors import HandoffFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from scheduler.batching import Sequence
    from scheduler.errors import BadRequest
    from scheduler.messages import FirstToken, Output
    from scheduler.request import Grammar, Job, TokenIds
    from workers.engine import Engine, Key, StepResult
    from workers.held import Held, Ready

logger = logging.getLogger(__name__)
Value = TypeVar("Value")
IDLE_S = 5.0  # without work before a look
LOOK_S = 0.1  # that it takes: see SEEN_S
IDLE_SHARE = 0.02  # of an idle worker's time, at most, goes to looks


class EngineLoop:
    """The asynchronous face of one engine. `run` must be running for anything to happen."""

    def __init__(
        self,
        engine: Engine,
        on_outputs: Callable[[list[Output]], Awaitable[None]],
        on_broken: Callable[[Key, str | BadRequest], Awaitable[None]],
    ) -> None:
        """`on_broken` hears of each job that is given up: by a fault of ours, or of the request."""
        self.engine = engine
        self.cancelled = 0
        self.cancel_steps_max = 0
        self.empty = asyncio.Event()  # no job holds anything here
        self.empty.set()
        self._on_outputs = on_outputs
        self._on_broken = on_broken
        self._stepping = False
        self._between: list[Callable[[], object]] = []  # what waits for the current step to end
        self._wake = asyncio.Event()
        self._held: dict[Key, asyncio.Future[Held]] = {}
        self._granted: dict[Key, asyncio.Future[Sequence]] = {}
        self._watching: dict[Key, Callable[[Ready], None]] = {}
        self._bell: int | None = None  # written to as layers are finished
        self._thread = ThreadPoolExecutor(1, "engine")

    async def run(self) -> None:
        """Step while there is work; until cancelled."""
        with self._listening():
            while True:
                await self._woken()
                self._wake.clear()
                self._stepping = True
                progressed = await self._step()
                self._stepping = False
                changed = self._catch_up()
                if self.engine.has_work and (progressed or changed):
                    self._wake.set()
                else:
                    self.engine.watch.rest()

    async def _woken(self) -> None:
        """Wait for work, and while there is none look now and then how fast this worker is.

        Nobody else would tell: a router gives nothing to a worker that it believes to be slow.
        """
        pause = IDLE_S
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
                return
            if self.empty.is_set() and self.engine.watch.learner:
                pause = max(IDLE_S, await self._look() / IDLE_SHARE)

    async def _look(self) -> float:
        """Decode for nobody, until there is work or enough was seen; says for how long."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        self._stepping = True
        try:
            while not self._between and loop.time() - begun < LOOK_S:
                await loop.run_in_executor(self._thread, self.engine.look)
        except Exception:  # it is said again by the first step that serves somebody
            logger.exception("a step for nobody failed")
        finally:
            self._stepping = False
        self.engine.watch.rest()
        self._catch_up()
        if self.engine.has_work:
            self._wake.set()
        return loop.time() - begun

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Hear of each layer that a step finishes, if somebody watches; at last end the thread."""
        loop, (read, bell) = asyncio.get_running_loop(), os.pipe()
        for descriptor in (read, bell):
            os.set_blocking(descriptor, False)
        self._bell = bell

        def heard() -> None:
            os.read(read, 4096)
            self._report()

        loop.add_reader(read, heard)
        try:
            yield
        finally:
            self._bell = None
            self.engine.runner.cache.mark.wake(None)
            self._thread.shutdown(wait=True)  # a step may ring to its end
            loop.remove_reader(read)
            os.close(read)
            os.close(bell)

    def _report(self) -> None:
        for key, watch in self._watching.items():
            if ready := self.engine.ready(key):
                watch(ready)

    async def prepare(self, job: Job) -> None:
        """Do beforehand, beside the steps, what would hold them up. Raises BadRequest."""
        if job.grammar:
            await asyncio.to_thread(self._compile, job.grammar)

    def _compile(self, grammar: Grammar) -> None:
        self.engine.text.grammars.compile(grammar)

    async def add(self, job: Job, prompt: TokenIds) -> None:
        """Serve a job here; its outputs follow. Raises BadRequest if it can never fit."""
        await self._do(lambda: self.engine.add(job, prompt))

    async def prefill(
        self, job: Job, prompt: TokenIds, watch: Callable[[Ready], None] | None = None
    ) -> Held:
        """Compute a prompt and its first tokens, and keep the KV until `release`.

        `watch` hears how far it is, layer by layer.
        """
        key = (job.id, job.epoch)
        future: asyncio.Future[Held] = asyncio.get_running_loop().create_future()
        self._held[key] = future
        self._watch(key, watch)
        try:
            await self._do(lambda: self.engine.add(job, prompt, hold=True))
            return await future
        finally:
            self._held.pop(key, None)
            self._watch(key, None)

    def _watch(self, key: Key, watch: Callable[[Ready], None] | None) -> None:
        if watch:
            self._watching[key] = watch
        else:
            self._watching.pop(key, None)
        self.engine.runner.cache.mark.wake(self._bell if self._watching else None)

    async def reserve(self, job: Job, prompt: TokenIds) -> Sequence:
        """Wait until blocks are held for a KV cache that will arrive."""
        key = (job.id, job.epoch)
        await self.prepare(job)
        future: asyncio.Future[Sequence] = asyncio.get_running_loop().create_future()
        self._granted[key] = future
        try:
            await self._do(lambda: self.engine.reserve(job, prompt))
            return await future
        finally:
            self._granted.pop(key, None)

    async def resume(self, key: Key, firsts: tuple[FirstToken, ...], generation: int = 0) -> bool:
        """The KV has arrived. False if the job was cancelled meanwhile, or the KV lost."""
        return await self._do(lambda: self.engine.resume(key, firsts, generation))

    def release(self, key: Key) -> None:
        """Free what a job still holds; not counted as a cancel."""
        self._soon(lambda: self._cancel(key))

    def cancel(self, key: Key) -> None:
        """The client left: free everything before the next step."""
        asked_at = self.engine.steps

        def cancel() -> None:
            if self._cancel(key):
                self.cancelled += 1
                steps = self.engine.steps - asked_at
                self.cancel_steps_max = max(self.cancel_steps_max, steps)

        self._soon(cancel)

    def _cancel(self, key: Key) -> bool:
        for waiting in (self._held.get(key), self._granted.get(key)):
            if waiting and not waiting.done():
                waiting.set_exception(HandoffFailed("the request was cancelled"))
        return self.engine.cancel(key)

    async def _do(self, change: Callable[[], Value]) -> Value:
        """Run `change` between two steps and give its result, or raise what it raises."""
        future: asyncio.Future[Value] = asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                value = change()
            except Exception as error:  # noqa: BLE001  # whoever waits for the change gets it
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(value)

        self._soon(run)
        return await future

    def _soon(self, change: Callable[[], object]) -> None:
        """Apply a change now, or after the step that is running."""
        self._between.append(change)
        if not self._stepping:
            self._catch_up()
            if self.engine.has_work:
                self._wake.set()

    def _catch_up(self) -> bool:
        """Apply what waited; says whether there was anything."""
        changes, self._between = self._between, []
        for change in changes:
            change()
        if self.engine.keys:
            self.empty.clear()
        else:
            self.empty.set()
        return bool(changes)

    async def _step(self) -> bool:
        """One step and what it gave; says whether anything could be done."""
        loop = asyncio.get_running_loop()
        try:
            result = await loop.run_in_executor(self._thread, self.engine.step)
        except Exception as error:  # one bad batch must not end the worker
            logger.exception("a step failed; its jobs are given back")
            await self._break(f"{type(error).__name__}: {error}")
            return True
        await self._publish(result)
        return not result.idle

    async def _publish(self, result: StepResult) -> None:
        self._report()
        for key, held in result.held.items():
            self._resolve(self._held.get(key), held)
        for key, sequence in result.granted.items():
            self._resolve(self._granted.get(key), sequence)
        if result.outputs:
            await self._on_outputs(result.outputs)
        for key, error in result.refused.items():
            await self._on_broken(key, error)
            self._cancel(key)

    @staticmethod
    def _resolve(future: asyncio.Future[Value] | None, value: Value) -> None:
        if future and not future.done():
            future.set_result(value)

    async def _break(self, reason: str) -> None:
        known = self.engine.keys
        held = [key for key, future in self._held.items() if not future.done()]
        granted = [key for key, future in self._granted.items() if not future.done()]
        # What the step granted or held before it failed was never told to who waits for it.
        untold = [key for key in (*held, *granted) if key in known]
        for key in dict.fromkeys([*self.engine.computing, *untold]):
            self._cancel(key)
            await self._on_broken(key, reason)
