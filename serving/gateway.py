"""One live stream per request: carries out what each generation's state machine says.

`scheduler.lifecycle` decides; this shell knows the members, the clock and who waits. Worker
messages come in by `on_message`; deltas go out through each request's stream.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scheduler.errors import BadRequest, Unavailable
from scheduler.lifecycle import Deliver, End, Generation, Instruction, Place, Send, Started
from scheduler.messages import (
    AcceptedUnread,
    Failed,
    FailureKind,
    HandedOver,
    Outputs,
    Role,
    Tokenised,
    Wire,
)
from scheduler.packed import PackedIds
from scheduler.request import Job, job_id
from serving.ask import Delta, ModelInfo
from serving.inquiry import Inquiries
from serving.placing import Placing, RoutingOptions, Standing
from serving.stream import Stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from scheduler.messages import Echo, Output
    from scheduler.placing import Placement
    from scheduler.request import Prompt
    from serving.ask import Ask
    from serving.members import Members

logger = logging.getLogger(__name__)

REPLAY_WAIT_S = 30.0  # how long a request whose worker was lost waits for a place elsewhere
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 1.0  # between two tries, if nobody joins meanwhile


@dataclass(eq=False, slots=True)
class Live:
    """A generation with what surrounds it."""

    generation: Generation
    standing: Standing
    stream: Stream[Delta]
    first_index: int  # of its choices in the reply
    echo: Echo | None = None
    placements: dict[int, Placement] = field(default_factory=dict)
    waiting: set[asyncio.Task[None]] = field(default_factory=set)  # replays without a worker


class Gateway:
    """Implements serving.ask.Generator on the workers that have joined."""

    def __init__(
        self,
        members: Members,
        expected: frozenset[str] = frozenset(),
        routing: RoutingOptions | None = None,
    ) -> None:
        self.replayed = 0
        self.placing = Placing(members, routing or RoutingOptions())
        self._members = members
        self._expected = expected
        self._live: dict[str, Live] = {}
        self._models: dict[str, ModelInfo] = {}
        self._models_as_of = members.revision
        self._numbers = itertools.count()
        self._inquiries = Inquiries(members)
        members.on_message = self._on_message
        members.on_lost = self._on_lost

    def models(self) -> list[ModelInfo]:
        """See Generator.models."""
        if self._models_as_of != self._members.revision:
            self._models.clear()
            for member in self._members.of():
                join = member.join
                info = ModelInfo(join.model, join.context_length, member.since)
                self._models.setdefault(join.model, info)
            self._models_as_of = self._members.revision
        return list(self._models.values())

    @property
    def ready(self) -> bool:
        """Each expected model has workers for both phases; without any, somebody is here."""
        models = self._expected or {info.name for info in self.models()}
        return bool(models) and all(self._complete(model) for model in models)

    async def tokenise(self, model: str, prompt: Prompt, created: float) -> Tokenised:
        """See Generator.tokenise."""
        self._check_model(model)
        return await self._inquiries.tokenise(model, prompt, created)

    @asynccontextmanager
    async def open(self, ask: Ask) -> AsyncIterator[Stream[Delta]]:
        """See Generator.open."""
        self._check_model(ask.model)
        stream: Stream[Delta] = Stream(len(ask.prompts))
        lives = [self._begin(ask, index, stream) for index in range(len(ask.prompts))]
        try:
            for live in lives:
                self._obey(live, live.generation.start())
            await stream.accepted()
            yield stream
        finally:
            for live in lives:
                self._obey(live, live.generation.cancel())

    def _check_model(self, model: str) -> None:
        names = [info.name for info in self.models()]
        if model in names:
            return
        if model in self._expected or self._members.remembers(model):
            raise Unavailable(f"the workers of {model!r} are not ready", retry_after=2)
        known = ", ".join(sorted({*names, *self._expected})) or "none yet"
        raise BadRequest(
            f"The model {model!r} does not exist here. Served: {known}.",
            param="model",
            code="model_not_found",
            status=404,
        )

    def _complete(self, model: str) -> bool:
        roles = {m.join.role for m in self._members.of(model) if not m.worker.draining}
        return Role.MIXED in roles or {Role.PREFILL, Role.DECODE} <= roles

    def _begin(self, ask: Ask, index: int, stream: Stream[Delta]) -> Live:
        job = Job(
            id=job_id(self._members.router, next(self._numbers), ask.id),
            epoch=0,
            model=ask.model,
            prompt=ask.prompts[index],
            sampling=ask.sampling,
            limits=ask.limits,
            created=ask.created,
            prompt_index=index,
            choices=tuple(range(ask.n)),
            grammar=ask.grammar,
            tools=ask.tools,
            embed=ask.embed,
            echo=ask.echo,
            whole=ask.whole,
        )
        live = self._live[job.id] = Live(
            Generation(job), self.placing.enter(job, ask.wish), stream, index * ask.n
        )
        return live

    # ── events ──────────────────────────────────────────────────────────────────────────────────

    def _on_message(self, worker: str, message: Wire) -> None:
        if isinstance(message, Outputs):
            for output in message.items:
                if live := self._live.get(output.id):
                    self._output(worker, live, output)
        elif isinstance(message, AcceptedUnread):
            if live := self._live.get(message.id):
                prompt_ids = PackedIds(bytes(message.prompt_ids))
                self.placing.accepted(live.standing, len(prompt_ids))
                self._obey(live, live.generation.accepted(message.epoch, prompt_ids))
        elif isinstance(message, HandedOver):
            if live := self._live.get(message.id):
                self._handed_over(worker, live, message)
        elif isinstance(message, Tokenised):
            self._inquiries.answered(message)
        elif isinstance(message, Failed):
            if live := self._live.get(message.id):
                logger.info("worker %s gave up %s: %s", worker, message.id, message.message)
                self._blame(live, worker, message)
                self._obey(live, live.generation.failed(worker, message))
            else:
                self._inquiries.answered(message)
        else:
            logger.warning("worker %s said %s out of turn", worker, type(message).__name__)

    def _on_lost(self, worker: str) -> None:
        self._inquiries.lost(worker)
        for live in list(self._live.values()):
            self._obey(live, live.generation.worker_lost(worker))

    def _output(self, worker: str, live: Live, output: Output) -> None:
        if placement := live.placements.get(output.epoch):
            if placement.queued:
                self._members.praise(worker)
            self.placing.output(live.generation.job, live.standing, placement, output)
        if live.generation.follows(output):
            self._deliver(live, output)
        else:
            self._obey(live, live.generation.output(output))

    def _handed_over(self, worker: str, live: Live, said: HandedOver) -> None:
        if placement := live.placements.get(said.epoch):
            self._members.praise(worker, placement.decode.name)
            self.placing.handed_over(live.standing, placement, said)
        self._obey(live, live.generation.handed_over(said.epoch, worker))

    def _blame(self, live: Live, worker: str, failure: Failed) -> None:
        """Whoever failed; of a hand-over both ends: the one at fault soon has more failures."""
        placement = live.placements.get(failure.epoch)
        if failure.kind is FailureKind.INTERNAL:
            self._members.blame(worker)
        elif failure.kind is FailureKind.HANDOFF and placement:
            self._members.blame(placement.prefill.name, placement.decode.name)

    # ── instructions ────────────────────────────────────────────────────────────────────────────

    def _obey(self, live: Live, instructions: list[Instruction]) -> None:
        """Carry out what the state machine says, then settle the load that it left behind."""
        for instruction in instructions:
            if isinstance(instruction, Deliver):
                self._deliver(live, instruction.output)
            elif isinstance(instruction, Send):
                self._members.post(instruction.worker, instruction.message)
            elif isinstance(instruction, Place):
                self._place(live, instruction)
            elif isinstance(instruction, Started):
                live.stream.start(instruction.prompt_tokens)
            else:
                self._end(live, instruction)
        if not live.placements.keys() <= live.generation.attempts.keys():
            for epoch in live.placements.keys() - live.generation.attempts.keys():
                self.placing.end(live.standing, live.placements.pop(epoch))

    def _deliver(self, live: Live, output: Output) -> None:
        if output.echo:
            live.echo = output.echo  # sent once, for all choices
        live.stream.feed(
            Delta(
                live.first_index + output.choice,
                output.text,
                len(output.ids),
                output.logprobs,
                output.finish,
                output.calls,
                None if output.position else live.echo,
                output.cached,
                output.embedding,
            )
        )

    def _end(self, live: Live, instruction: End) -> None:
        generation = live.generation
        del self._live[generation.job.id]
        for task in live.waiting:
            task.cancel()
        ledgers = generation.ledgers.values()
        finished = [len(ledger.emitted) for ledger in ledgers if ledger.finished]
        self.placing.leave(generation.job, live.standing, finished)
        live.stream.end(instruction.error)

    def _place(self, live: Live, place: Place) -> None:
        """Choose a route now; a replay may wait for a worker to come, or for a queue to drain."""
        try:
            self._try(live, place)
        except Unavailable as error:
            if live.generation.attempts[place.job.epoch].number == 1:
                self._obey(live, live.generation.unroutable(place.job.epoch, error))
                return
            task = asyncio.create_task(self._place_later(live, place))
            live.waiting.add(task)
            task.add_done_callback(live.waiting.discard)

    def _try(self, live: Live, place: Place) -> None:
        """Raises Unavailable."""
        epoch = place.job.epoch
        placement, route = self.placing.place(place, live.standing)
        live.placements[epoch] = placement
        self.replayed += live.generation.attempts[epoch].number > 1
        self._obey(live, live.generation.routed(epoch, route))

    async def _place_later(self, live: Live, place: Place) -> None:
        """Try again whenever a worker joins, and now and then, for at most REPLAY_WAIT_S.

        Trying comes before waiting: a worker may have joined since the first try.
        """
        epoch, pause, reason = place.job.epoch, RETRY_FIRST_S, ""
        try:
            async with asyncio.timeout(REPLAY_WAIT_S):
                while epoch in live.generation.attempts:  # else the client left
                    try:
                        self._try(live, place)
                        return
                    except Unavailable as error:
                        reason = error.message
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await self._members.changed()
                    pause = min(2 * pause, RETRY_MAX_S)
        except TimeoutError:
            message = f"its worker was lost, and {REPLAY_WAIT_S:g} s later still {reason}"
            late = Unavailable(message, retry_after=REPLAY_WAIT_S)
            self._obey(live, live.generation.unroutable(epoch, late))
