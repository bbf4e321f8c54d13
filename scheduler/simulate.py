"""Discrete events that drive the live objects: routing, each request's state machine, batching.

    arrival ─► Generation.start ─► choose ─► Submit ─► prefill worker ─► first token
                                             │ split: Reserve ◄─► decode worker, then prefill,
                                             │ then the KV cache over the link, then Commit
                                             └─► … ─► last token ─► Generation ends

Only time is modelled: a step's by the worker's cost model, a hand-over's by its bytes over the
link. Nothing is drawn here; the requests that come in bring all chance with them.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import math
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from scheduler.errors import Unavailable
from scheduler.lifecycle import Deliver, End, Generation, Place, Send
from scheduler.messages import Failed, FailureKind, FinishReason, Output, Submit
from scheduler.request import Job, Limits, Prompt, Sampling
from scheduler.routing import priced
from scheduler.simulate_engine import PreemptedUnnamed, Simulated, Told, Worker
from scheduler.simulate_router import Placed, Router
from scheduler.simulate_spec import Outcome, Timing, check_requests, check_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from scheduler.capacity import Slo
    from scheduler.lifecycle import Instruction
    from scheduler.request import TokenIds
    from scheduler.routing import Policy
    from scheduler.simulate_spec import WorkerSpec
    from scheduler.workload import Arrival

TAIL = 1 / 16  # of a KV cache, its last layers, is still to be pushed when the prefill ends
GREEDY = Sampling(seed=0, temperature=0.0)


def simulate(
    workers: Sequence[WorkerSpec],
    requests: Sequence[Arrival],
    timing: Timing | None = None,
    policy: Policy = priced,
    slo: Slo | None = None,
) -> Outcome:
    """Run all requests to their ends. Raises SetupError naming what cannot be simulated.

    With an `slo` each request comes to the router with its limits.
    """
    check_workers(workers)
    check_requests(requests)
    timing = timing or Timing()
    with no_collections():
        if not any(request.prefix for request in requests):
            # Nobody finds another's blocks: only one that is preempted would find its own.
            with suppress(PreemptedUnnamed):
                return Simulation(workers, requests, timing, policy, slo, named=False).run()
        return Simulation(workers, requests, timing, policy, slo).run()


@contextmanager
def no_collections() -> Iterator[None]:
    """While a simulation runs it drops nothing cyclic, and holds much that would be looked through.

    With ten thousand workers that is a fifth of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@dataclass(eq=False, slots=True)
class Live:
    """A request that is under way."""

    number: int
    request: Arrival
    generation: Generation
    epoch: int = 0
    placed: Placed | None = None
    reserved: Simulated | None = None  # at the decode worker of a split route


class Simulation:
    def __init__(
        self,
        workers: Sequence[WorkerSpec],
        requests: Sequence[Arrival],
        timing: Timing,
        policy: Policy = priced,
        slo: Slo | None = None,
        *,
        named: bool = True,
    ) -> None:
        told = Told(self._first_token, self._finished, self._granted, self._held)
        self.workers = [
            Worker(number, spec, told, self._ask, named=named)
            for number, spec in enumerate(workers)
        ]
        self._router = Router(workers, policy, slo, timing.overlap, self._emitted)
        self._ttft_s = slo.ttft_ms / 1e3 if slo else math.inf
        self._requests = requests
        self._timing = timing
        self._named = named  # each block, as far as it is full
        self._live: dict[int, Live] = {}
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._sending = [0.0] * len(workers)  # until when each worker's link is taken
        self._receiving = [0.0] * len(workers)
        count = len(requests)
        self._first = np.full(count, np.nan)
        self._last = np.full(count, np.nan)
        self._refused = np.zeros(count, dtype=bool)
        self._by = np.full((2, count), -1, dtype=np.int32)
        self._transferred = 0.0

    def run(self) -> Outcome:
        count = 0
        for number, request in enumerate(self._requests):
            count += 1 + self._until(request.at)
            self._arrive(number, request.at)
        count += self._until(math.inf)
        assert not self._live, "every request ends"
        return Outcome(
            at=np.array([request.at for request in self._requests]),
            first=self._first,
            last=self._last,
            outputs=np.array([request.output for request in self._requests]),
            refused=self._refused,
            prefilled=self._by[0],
            decoded=self._by[1],
            busy=np.array([worker.busy for worker in self.workers]),
            events=count,
            preempted=sum(worker.batch.preempted for worker in self.workers),
            transferred=self._transferred,
        )

    def _until(self, end: float) -> int:
        """All that happens before `end`: how many events."""
        events = self._events
        count = 0
        while events and events[0][0] < end:
            now, _, call, arguments = heapq.heappop(events)
            call(*arguments, now)
            count += 1
        return count

    def _at(self, then: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call it with these and the time."""
        heapq.heappush(self._events, (then, next(self._order), call, arguments))

    def _ask(self, then: float, worker: Worker, version: int) -> None:
        self._at(then, worker.ended, version)

    # ── the router ──────────────────────────────────────────────────────────────────────────────

    def _arrive(self, number: int, now: float) -> None:
        request = self._requests[number]
        job = Job(
            id=str(number),
            epoch=0,
            model="",
            prompt=Prompt(ids=[]),  # tokens are only counted
            sampling=GREEDY,
            limits=Limits(max_tokens=request.output, ignore_eos=True),
            created=now,
        )
        live = self._live[number] = Live(number, request, Generation(job))
        self._obey(live, live.generation.start(), now)

    def _obey(self, live: Live, instructions: list[Instruction], now: float) -> None:
        for instruction in instructions:
            if isinstance(instruction, Place):
                self._place(live, instruction, now)
            elif isinstance(instruction, Send):
                if isinstance(instruction.message, Submit):
                    delay = self._timing.network_s + self._timing.tokenise_s
                    self._at(now + delay, self._submitted, live, instruction.message.job)
            elif isinstance(instruction, End):
                self._end(live, instruction, now)
            else:
                assert not isinstance(instruction, Deliver) or instruction.output.ids, "no tokens"

    def _place(self, live: Live, place: Place, now: float) -> None:
        epoch = place.job.epoch
        try:
            placed, route = self._router.place(live.number, live.request, now)
        except Unavailable as error:
            self._obey(live, live.generation.unroutable(epoch, error), now)
            return
        live.placed = placed
        live.epoch = epoch
        self._obey(live, live.generation.routed(epoch, route), now)

    def _end(self, live: Live, end: End, now: float) -> None:
        del self._live[live.number]
        if live.placed:
            self._router.ended(live.placed, live.request, served=not end.error, now=now)
        self._refused[live.number] = end.error is not None

    def _emitted(self, worker: int, now: float) -> dict[int, int]:
        """Tokens that each running request of this worker has given, by its number."""
        return self.workers[worker].emitted(now)

    # ── workers ─────────────────────────────────────────────────────────────────────────────────

    def _submitted(self, live: Live, job: Job, now: float) -> None:
        """The worker has tokenised it: it reserves blocks at its peer, or adds it to its batch."""
        placed, request = live.placed, live.request
        assert placed, "it was routed"
        prefill, decode = self._pair(placed)
        for worker in (prefill, decode):
            if not worker.check(request.input + request.output):
                failure = Failed(
                    job.id, job.epoch, FailureKind.BAD_REQUEST, "larger than the cache"
                )
                self._obey(live, live.generation.failed(worker.spec.name, failure), now)
                return
        self._obey(live, live.generation.accepted(job.epoch, [0]), now)
        sequence = self._sequence(live, job)
        if placed.split and not job.prefill_only:
            live.reserved = self._sequence(live, job)
            live.reserved.awaits_kv = True
            self._at(now + self._timing.network_s, self._add, decode, live.reserved)
        else:
            prefill.soon(lambda: prefill.batch.add(sequence), now)

    def _pair(self, placed: Placed) -> tuple[Worker, Worker]:
        return self.workers[placed.prefill], self.workers[placed.decode]

    def _sequence(self, live: Live, job: Job) -> Simulated:
        request = live.request
        return Simulated(
            job=job,
            choice=0,
            tokens=cast("TokenIds", bytearray(request.input)),  # only counted: in an eighth
            prompt_len=request.input,
            max_tokens=request.output,
            due=(0, 0, request.at + self._ttft_s),
            prefix=request.prefix,
            own=live.number.to_bytes(8, "little") if self._named else b"",
            number=live.number,
        )

    @staticmethod
    def _add(worker: Worker, sequence: Simulated, now: float) -> None:
        worker.soon(lambda: worker.batch.add(sequence), now)

    def _granted(self, sequence: Simulated, now: float) -> None:
        """Its blocks are held at the decode worker: the prompt may be computed."""
        live = self._live[sequence.number]
        assert live.placed, "it was routed"
        prefill, _ = self._pair(live.placed)
        held = self._sequence(live, sequence.job)
        held.hold = True
        self._at(now + self._timing.network_s, self._add, prefill, held)

    def _held(self, sequence: Simulated, now: float, begun: float) -> None:
        """The prompt is computed: its KV cache goes over the link."""
        live = self._live[sequence.number]
        assert live.placed, "it was routed"
        prefill, decode = self._pair(live.placed)
        size = sequence.prompt_len * prefill.cost.kv_token_bytes
        ready = begun if self._timing.overlap else now
        sent = max(ready, self._sending[prefill.number]) + size / prefill.cost.link_bytes_s
        taken = max(ready, self._receiving[decode.number]) + size / decode.cost.link_bytes_s
        self._sending[prefill.number], self._receiving[decode.number] = sent, taken
        slowest = min(prefill.cost.link_bytes_s, decode.cost.link_bytes_s)
        end = max(sent, taken, now + TAIL * size / slowest)
        self._transferred += size
        self._at(end + self._timing.network_s, self._committed, live, sequence)

    def _committed(self, live: Live, held: Simulated, now: float) -> None:
        """The decode worker goes on, the prefill worker frees what it held."""
        assert live.placed, "it was routed"
        assert live.reserved, "blocks were reserved for it"
        prefill, decode = self._pair(live.placed)
        reserved = live.reserved

        def resume() -> None:
            reserved.awaits_kv = False
            reserved.computed = len(reserved.tokens)
            reserved.tokens.append(0)
            decode.batch.resume(reserved)

        decode.soon(resume, now)
        prefill.soon(lambda: prefill.batch.remove(held), now)
        self._router.handed_over(live.placed, now)
        self._obey(live, live.generation.handed_over(live.epoch, prefill.spec.name), now)

    def _first_token(self, sequence: Simulated, now: float) -> None:
        live = self._live[sequence.number]
        assert live.placed, "it was routed"
        prefill, decode = self._pair(live.placed)
        self._by[:, live.number] = prefill.number, decode.number
        self._first[live.number] = now + self._timing.network_s
        self._router.prefilled(live.placed, sequence.cached, now)
        self._output(live, position=0, tokens=1, now=now)

    def _finished(self, sequence: Simulated, now: float) -> None:
        self._last[sequence.number] = now + self._timing.network_s
        if sequence.max_tokens > 1:  # else its first token ended it
            live = self._live[sequence.number]
            self._output(live, position=1, tokens=sequence.max_tokens - 1, now=now)

    def _output(self, live: Live, position: int, tokens: int, now: float) -> None:
        """Tokens reach the router; those between the first and the last one in one message."""
        last = position + tokens == live.request.output
        output = Output(
            id=live.generation.job.id,
            epoch=live.epoch,
            choice=0,
            position=position,
            ids=[0] * tokens,
            finish=FinishReason.LENGTH if last else None,
        )
        self._obey(live, live.generation.output(output), now)
