"""The worker process: join the router, obey, report.

Each submitted job runs in a task of its own; whatever ends that task frees what the job held. When
the router is lost every job is freed (the router's clients are served elsewhere) and the worker
joins again, with growing pauses, for as long as it lives.
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

from scheduler.errors import BadRequest, HandoffFailed, ProtocolError, SetupError
from scheduler.messages import (
    Accepted,
    Address,
    Cancel,
    Failed,
    FailureKind,
    HandedOver,
    Join,
    Joined,
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
from scheduler.request import Job, Prompt
from scheduler.transport import Connection, dial, listen
from workers.engine_loop import EngineLoop
from workers.kv_transfer import KvReceiver, KvSender

if TYPE_CHECKING:
    from scheduler.messages import Peer
    from workers.engine import Engine, Key

logger = logging.getLogger(__name__)

REJOIN_FIRST_S, REJOIN_MAX_S = 0.2, 5.0
DRAIN_S = 30.0


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Who this worker is, and where its router is."""

    name: str
    model: str
    role: Role
    router: Address
    secret: bytes
    listen_host: str  # where other workers push KV to
    advertise_host: str | None = None  # how they reach it; None: as the router sees us


class WorkerService:
    """One worker: an engine, its router connection, its KV links."""

    def __init__(self, config: WorkerConfig, engine: Engine, rates: Rates) -> None:
        self._config = config
        self._engine = engine
        self._rates = rates
        cache = engine.runner.cache
        fingerprint = f"{engine.text.fingerprint}:{cache.layers}x{cache.kv_heads}x{cache.head_dim}"
        fingerprint += f":{cache.dtype}"
        self._fingerprint = fingerprint
        self._loop = EngineLoop(engine, self._on_outputs, self._on_broken)
        self._sender = KvSender(config.name, fingerprint, cache, config.secret)
        self._receiver = KvReceiver(fingerprint, cache, self._loop)
        self._router: Connection | None = None
        self._jobs: dict[Key, asyncio.Task[None]] = {}
        self._leaving = asyncio.Event()

    async def run(self) -> None:
        """Serve until `leave`, or until cancelled. Raises SetupError if the router refuses us."""
        config = self._config
        engine = asyncio.create_task(self._loop.run())
        try:
            async with listen(config.listen_host, 0, config.secret, self._receiver.serve) as bound:
                member = asyncio.create_task(self._stay_member(bound[1]))
                leave = asyncio.create_task(self._leaving.wait())
                tasks = {engine, member, leave}
                try:
                    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    if leave in done:
                        await self._drain()
                    else:
                        done.pop().result()
                finally:
                    for task in (member, leave):
                        task.cancel()
                    await asyncio.gather(member, leave, return_exceptions=True)
        finally:
            await self._free_all()
            self._sender.close()
            engine.cancel()
            await asyncio.gather(engine, return_exceptions=True)

    def leave(self) -> None:
        """Take nothing new, finish what runs (at most DRAIN_S), then end `run`."""
        self._leaving.set()

    # ── membership ──────────────────────────────────────────────────────────────────────────────

    async def _stay_member(self, port: int) -> None:
        pause = REJOIN_FIRST_S
        while True:
            try:
                await self._attend(port)
                pause = REJOIN_FIRST_S
            except ProtocolError as error:
                raise SetupError(f"the router refused this worker: {error}") from error
            except (OSError, TimeoutError) as error:
                logger.warning("no router at %s (%r); trying again", self._config.router, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, REJOIN_MAX_S)

    async def _attend(self, port: int) -> None:
        """One membership, until the router is lost."""
        config = self._config
        connection = await dial(config.router.host, config.router.port, config.secret)
        heart: asyncio.Task[None] | None = None
        try:
            host = config.advertise_host or connection.local[0]
            await connection.send(self._introduction(Address(host, port)))
            async with asyncio.timeout(10):
                joined = await connection.expect(Joined)
            logger.info("joined the router at %s:%s", *connection.remote)
            self._router = connection
            heart = asyncio.create_task(self._beat(connection, joined.heartbeat_s))
            await self._obey(connection)
        except ConnectionError as error:
            if self._router is None:
                raise
            logger.warning("the router is lost: %s", error)
        finally:
            self._router = None
            connection.close()
            if heart:
                heart.cancel()
            await self._free_all()

    def _introduction(self, address: Address) -> Join:
        config, text = self._config, self._engine.text
        return Join(
            name=config.name,
            model=config.model,
            role=config.role,
            address=address,
            fingerprint=self._fingerprint,
            context_length=text.context_length,
            kv_blocks=self._engine.batcher.pool.size,
            rates=self._rates,
            pid=os.getpid(),
        )

    async def _beat(self, connection: Connection, every_s: float) -> None:
        with suppress(ConnectionError):
            while True:
                await connection.send(self._load())
                await asyncio.sleep(every_s)

    def _load(self) -> Load:
        engine, batcher = self._engine, self._engine.batcher
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
        )

    async def _drain(self) -> None:
        await self._tell(Leaving())
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await asyncio.gather(*self._jobs.values(), return_exceptions=True)
                await self._loop.empty.wait()

    # ── jobs ────────────────────────────────────────────────────────────────────────────────────

    async def _obey(self, connection: Connection) -> None:
        while True:
            message, _ = await connection.receive()
            if isinstance(message, Submit):
                key = (message.job.id, message.job.epoch)
                task = asyncio.create_task(self._serve(message.job, message.handoff))
                self._jobs[key] = task
                task.add_done_callback(partial(self._done, key))
            elif isinstance(message, Tokenise):
                key = (message.id, 0)
                self._jobs[key] = asyncio.create_task(self._tokenise(message))
                self._jobs[key].add_done_callback(partial(self._done, key))
            elif isinstance(message, Cancel):
                self._cancel((message.id, message.epoch))
            else:
                raise ProtocolError(f"the router said {type(message).__name__} out of turn")

    def _done(self, key: Key, task: asyncio.Task[None]) -> None:
        del self._jobs[key]

    def _cancel(self, key: Key) -> None:
        if task := self._jobs.get(key):
            task.cancel()
        if not self._receiver.cancel(key):
            self._loop.cancel(key)

    async def _free_all(self) -> None:
        """Nobody waits for our answers any more."""
        tasks = list(self._jobs.values())
        for key in {*self._jobs, *self._engine.keys}:
            self._cancel(key)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, job: Job, handoff: Peer | None) -> None:
        """Take one job as far as this worker does. Always ends in outputs or in one Failed."""
        try:
            prompt = await asyncio.to_thread(self._engine.text.encode, job.prompt, job.created)
            self._engine.check(job, prompt)
            await self._loop.prepare(job)
            job = msgspec.structs.replace(job, prompt=Prompt(ids=prompt))
            await self._tell(Accepted(job.id, job.epoch, prompt))
            if handoff and not job.prefill_only:
                await self._hand_over(job, prompt, handoff)
            else:
                await self._loop.add(job, prompt)
        except BadRequest as error:
            await self._fail(job, FailureKind.BAD_REQUEST, error.message, error.param, error.code)
        except HandoffFailed as error:
            await self._fail(job, FailureKind.HANDOFF, str(error))
        except Exception as error:  # the job goes elsewhere, the worker goes on
            logger.exception("job %s failed", job.id)
            await self._fail(job, FailureKind.INTERNAL, f"{type(error).__name__}: {error}")

    async def _tokenise(self, question: Tokenise) -> None:
        """Always ends in a Tokenised or in one Failed."""
        text, kind = self._engine.text, FailureKind.BAD_REQUEST
        try:
            ids = await asyncio.to_thread(text.encode, question.prompt, question.created)
            said = b"".join(map(text.token_bytes, ids)).decode(errors="replace")
            await self._tell(Tokenised(question.id, ids, tuple(map(text.token_text, ids)), said))
        except BadRequest as error:
            await self._tell(Failed(question.id, 0, kind, error.message, error.param, error.code))
        except Exception as error:  # whoever asked hears of it, the worker goes on
            logger.exception("question %s failed", question.id)
            reason = f"{type(error).__name__}: {error}"
            await self._tell(Failed(question.id, 0, FailureKind.INTERNAL, reason))

    async def _hand_over(self, job: Job, prompt: list[int], peer: Peer) -> None:
        """Reserve there, compute the prompt here, push."""
        try:
            async with self._sender.reserve(job, peer) as lease:
                held = await self._loop.prefill(job, prompt)
                if held.firsts:
                    await lease.push(held)
            await self._tell(HandedOver(job.id, job.epoch))
        finally:
            self._loop.release((job.id, job.epoch))

    # ── reports ─────────────────────────────────────────────────────────────────────────────────

    async def _tell(self, message: Wire) -> None:
        """Send to the router; if it is lost, there is nobody to tell.

        Whoever is cancelled meanwhile leaves the frame whole: the connection is everybody's.
        """
        if self._router:
            with suppress(ConnectionError):
                await asyncio.shield(self._router.send(message))

    async def _fail(
        self,
        job: Job,
        kind: FailureKind,
        message: str,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        await self._tell(Failed(job.id, job.epoch, kind, message, param, code))

    async def _on_outputs(self, outputs: list[Output]) -> None:
        await self._tell(Outputs(tuple(outputs)))

    async def _on_broken(self, key: Key, error: str | BadRequest) -> None:
        if isinstance(error, BadRequest):
            kind, reason = FailureKind.BAD_REQUEST, error.message
            await self._tell(Failed(*key, kind, reason, error.param, error.code))
        else:
            await self._tell(Failed(*key, FailureKind.INTERNAL, error))
