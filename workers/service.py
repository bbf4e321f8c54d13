"""The worker process: obey its routers and answer them.

Each submitted job runs in a task of its own; whatever ends that task frees what the job held. When
a router is lost its jobs are freed (its clients are served elsewhere), those of others go on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from scheduler.cost import of_rates
from scheduler.cost_fit import Learner
from scheduler.errors import BadRequest, HandoffFailed, ProtocolError
from scheduler.messages import (
    Accepted,
    Address,
    Cancel,
    Failed,
    FailureKind,
    HandedOver,
    Join,
    Leaving,
    Load,
    Output,
    Outputs,
    Rates,
    Role,
    Submit,
    Tokenise,
    Tokenised,
    Wire,
)
from scheduler.request import Job, Prompt, router_of
from scheduler.transport import listen
from workers.engine_loop import EngineLoop
from workers.kv_receive import KvReceiver
from workers.kv_send import KvSender
from workers.kv_wire import Limits
from workers.membership import Membership

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine

    from scheduler.batching import Sequence
    from scheduler.messages import Peer
    from workers.engine import Engine, Key

logger = logging.getLogger(__name__)

DRAIN_S = 30.0


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Who this worker is, and where its routers are."""

    name: str
    model: str
    role: Role
    routers: tuple[Address, ...]
    secret: bytes
    listen_host: str  # where other workers push KV to
    advertise_host: str | None = None  # how they reach it; None: as the router sees us
    kv_codecs: tuple[str, ...] = ("raw",)  # that KV may travel in, best quality first
    kind: str = ""  # the plan's column that it is a replica of


class WorkerService:
    """One worker: an engine, its memberships, its KV links."""

    def __init__(self, config: WorkerConfig, engine: Engine, rates: Rates) -> None:
        self._config = config
        self._engine = engine
        self._rates = rates
        cache = engine.runner.cache
        fingerprint = f"{engine.text.fingerprint}:{cache.layers}x{cache.kv_heads}x{cache.head_dim}"
        fingerprint += f":{cache.dtype}"
        self._fingerprint = fingerprint
        engine.watch.learner = Learner(of_rates(rates, cache.layers * cache.token_bytes))
        self._loop = EngineLoop(engine, self._on_outputs, self._on_broken)
        codecs = ("raw",) if cache.dtype == "float32" else config.kv_codecs  # exact mode
        limits = Limits(codecs=codecs)
        self._sender = KvSender(config.name, fingerprint, cache, config.secret, limits)
        self._receiver = KvReceiver(fingerprint, cache, self._loop)
        self._memberships = [Membership(router, config.secret, self) for router in config.routers]
        self._port = 0  # where other workers push KV to, once `run` listens
        self._jobs: dict[Key, asyncio.Task[None]] = {}
        self._leaving = asyncio.Event()

    async def run(self) -> None:
        """Serve until `leave`, or until cancelled. Raises SetupError if a router refuses us."""
        config = self._config
        engine = asyncio.create_task(self._loop.run())
        try:
            async with listen(config.listen_host, 0, config.secret, self._receiver.serve) as bound:
                self._port = bound[1]
                members = [asyncio.create_task(member.stay()) for member in self._memberships]
                leave = asyncio.create_task(self._leaving.wait())
                try:
                    tasks = {engine, leave, *members}
                    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    if leave in done:
                        await self._drain()
                    else:
                        done.pop().result()
                finally:
                    for task in (leave, *members):
                        task.cancel()
                    await asyncio.gather(leave, *members, return_exceptions=True)
        finally:
            await self._free({*self._jobs, *self._engine.keys})
            self._sender.close()
            engine.cancel()
            await asyncio.gather(engine, return_exceptions=True)

    def leave(self) -> None:
        """Take nothing new, finish what runs (at most DRAIN_S), then end `run`."""
        self._leaving.set()

    # ── membership ──────────────────────────────────────────────────────────────────────────────

    def introduction(self, host: str) -> Join:
        """See Host.introduction."""
        config, text, runner = self._config, self._engine.text, self._engine.runner
        return Join(
            name=config.name,
            model=config.model,
            role=config.role,
            address=Address(config.advertise_host or host, self._port),
            fingerprint=self._fingerprint,
            context_length=text.context_length,
            kv_blocks=self._engine.batcher.pool.size,
            rates=self._rates,
            pid=os.getpid(),
            numbers=f"{runner.numbers}, {runner.cache.dtype} KV",
            kind=config.kind,
        )

    def load(self, membership: Membership) -> Load:
        """See Host.load."""
        engine, batcher = self._engine, self._engine.batcher
        others = self._others(membership)
        return Load(
            running=len(batcher.running),
            waiting=len(batcher.waiting),
            free_blocks=batcher.pool.free,
            steps=engine.steps,
            tokens=engine.tokens,
            cancelled=self._loop.cancelled,
            cancel_steps_max=self._loop.cancel_steps_max,
            preempted=batcher.preempted,
            kv_bytes_sent=self._sender.bytes_sent,
            kv_bytes_received=self._receiver.bytes_received,
            drafted=engine.speculator.drafted if engine.speculator else 0,
            drafts_accepted=engine.speculator.accepted if engine.speculator else 0,
            cost=engine.watch.learner.model if engine.watch.learner else None,
            standing_s=engine.watch.standing_s(),
            others_running=len(others),
            others_queued=sum(max(s.prompt_len - s.computed, 0) for s in others),
            tasks=len(asyncio.all_tasks()),
        )

    def _others(self, membership: Membership) -> list[Sequence]:
        """What requests of other routers have here: this one cannot count it by itself."""
        if len(self._memberships) == 1:
            return []
        batcher = self._engine.batcher
        present = (*batcher.running, *batcher.waiting)
        return [s for s in present if self._home(s.job.id) is not membership]

    async def left(self, membership: Membership) -> None:
        """See Host.left."""
        keys = {*self._jobs, *self._engine.keys}
        await self._free({key for key in keys if self._home(key[0]) is membership})

    def _home(self, job: str) -> Membership | None:
        """Where the answers to this job go. A router of the first release has no id."""
        known = {m.router: m for m in self._memberships}
        return known.get(router_of(job)) or known.get("")

    async def _drain(self) -> None:
        for membership in self._memberships:
            membership.tell(Leaving())
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await asyncio.gather(*self._jobs.values(), return_exceptions=True)
                await self._loop.empty.wait()
                for membership in self._memberships:
                    await membership.flush()

    # ── jobs ────────────────────────────────────────────────────────────────────────────────────

    def hear(self, membership: Membership, message: Wire) -> None:
        """See Host.hear."""
        if isinstance(message, Submit):
            key = (message.job.id, message.job.epoch)
            self._begin(key, self._serve(message.job, message.handoff))
        elif isinstance(message, Tokenise):
            self._begin((message.id, 0), self._tokenise(message))
        elif isinstance(message, Cancel):
            self._cancel((message.id, message.epoch))
        else:
            raise ProtocolError(f"the router said {type(message).__name__} out of turn")

    def _begin(self, key: Key, work: Coroutine[None, None, None]) -> None:
        self._jobs[key] = asyncio.create_task(work)
        self._jobs[key].add_done_callback(partial(self._done, key))

    def _done(self, key: Key, task: asyncio.Task[None]) -> None:
        del self._jobs[key]

    def _cancel(self, key: Key) -> None:
        """The router takes a job back."""
        if task := self._jobs.get(key):
            task.cancel()
        if self._receiver.cancel(key):
            self._loop.cancelled += 1
        else:
            self._loop.cancel(key)

    async def _free(self, keys: Collection[Key]) -> None:
        """Nobody waits for these answers any more."""
        tasks = [self._jobs[key] for key in keys if key in self._jobs]
        for task in tasks:
            task.cancel()
        for key in keys:
            if not self._receiver.cancel(key):
                self._loop.release(key)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, job: Job, handoff: Peer | None) -> None:
        """Take one job as far as this worker does. Always ends in outputs or in one Failed."""
        try:
            prompt = await asyncio.to_thread(self._engine.text.encode, job.prompt, job.created)
            self._engine.check(job, prompt)
            await self._loop.prepare(job)
            job = msgspec.structs.replace(job, prompt=Prompt(ids=prompt))
            self._tell(Accepted(job.id, job.epoch, prompt))
            if handoff and not job.prefill_only:
                await self._hand_over(job, prompt, handoff)
            else:
                await self._loop.add(job, prompt)
        except BadRequest as error:
            self._fail(job, FailureKind.BAD_REQUEST, error.message, error.param, error.code)
        except HandoffFailed as error:
            self._fail(job, FailureKind.HANDOFF, str(error))
        except Exception as error:  # the job goes elsewhere, the worker goes on
            logger.exception("job %s failed", job.id)
            self._fail(job, FailureKind.INTERNAL, f"{type(error).__name__}: {error}")

    async def _tokenise(self, question: Tokenise) -> None:
        """Always ends in a Tokenised or in one Failed."""
        kind = FailureKind.BAD_REQUEST
        try:
            self._tell(await asyncio.to_thread(self._tokenised, question))
        except BadRequest as error:
            self._tell(Failed(question.id, 0, kind, error.message, error.param, error.code))
        except Exception as error:  # whoever asked hears of it, the worker goes on
            logger.exception("question %s failed", question.id)
            reason = f"{type(error).__name__}: {error}"
            self._tell(Failed(question.id, 0, FailureKind.INTERNAL, reason))

    def _tokenised(self, question: Tokenise) -> Tokenised:
        text = self._engine.text
        ids = text.encode(question.prompt, question.created)
        said = b"".join(map(text.token_bytes, ids)).decode(errors="replace")
        return Tokenised(question.id, ids, tuple(map(text.token_text, ids)), said)

    async def _hand_over(self, job: Job, prompt: list[int], peer: Peer) -> None:
        """Reserve there; compute the prompt here and push it meanwhile."""
        try:
            async with self._sender.reserve(job, peer) as lease:
                await lease.push(self._loop.prefill(job, prompt, lease.watch))
            self._tell(HandedOver(job.id, job.epoch, lease.kv_bytes, lease.link_s))
        finally:
            self._loop.release((job.id, job.epoch))

    # ── reports ─────────────────────────────────────────────────────────────────────────────────

    def _tell(self, message: Accepted | HandedOver | Failed | Tokenised) -> None:
        """Say it to the router whose job it is."""
        if home := self._home(message.id):
            home.tell(message)

    def _fail(
        self,
        job: Job,
        kind: FailureKind,
        message: str,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        self._tell(Failed(job.id, job.epoch, kind, message, param, code))

    async def _on_outputs(self, outputs: list[Output]) -> None:
        by_home: dict[Membership | None, list[Output]] = {}
        for output in outputs:
            by_home.setdefault(self._home(output.id), []).append(output)
        for home, items in by_home.items():
            if home:
                home.tell(Outputs(tuple(items)))

    async def _on_broken(self, key: Key, error: str | BadRequest) -> None:
        if isinstance(error, BadRequest):
            kind, reason = FailureKind.BAD_REQUEST, error.message
            self._tell(Failed(*key, kind, reason, error.param, error.code))
        else:
            self._tell(Failed(*key, FailureKind.INTERNAL, error))
