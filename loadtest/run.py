"""One client process of a run: sends what is due when it is due, and tells what became of it."""

from __future__ import annotations

import asyncio
import gc
import resource
from functools import partial
from time import monotonic, process_time
from typing import TYPE_CHECKING

import msgspec

from loadtest.client import Client, Exchange
from loadtest.deadlines import Deadlines
from loadtest.tally import Gaps, outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loadtest.outcome import Outcome
    from loadtest.spec import Spec
    from loadtest.workload import Ask, Workload

_PAUSE_AFTER_ERROR = 0.1  # so that a closed loop does not spin against a dead endpoint
_SWEEP = 0.25  # seconds between looks for requests past their time


class Part(msgspec.Struct):
    """What one client process says of itself at its end."""

    cpu: float  # seconds, user and system, while requests were due
    wall: float
    peak_rss: int  # bytes
    gaps: Gaps
    stopped: bool = False


class Runner:
    """Runs part `part` of `parts` of a workload. `told` gets every outcome, in order of ending."""

    def __init__(
        self,
        spec: Spec,
        workload: Workload,
        told: Callable[[Outcome], None],
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self._spec = spec
        self._workload = workload
        self._told = told
        self._first: Iterator[Ask] = workload.first(part, parts)
        self._due: Ask | None = None
        self._waiting = 0  # turns that wait for their user's thought
        self._flying: dict[Exchange, Ask] = {}  # in order of sending
        self._gaps = Gaps()
        self._ended = asyncio.Event()
        self._stopped = False
        self._cpu = self._wall = 0.0  # until the last sending

    async def run(self, start: float) -> Part:
        """Sends from `start` (of `time.monotonic()`) on, until all has ended or time is up."""
        self._start = start
        self._client = Client(self._spec.endpoint)
        self._deadlines = Deadlines(asyncio.get_running_loop())
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection of all that is kept takes longer than a request may be late
        try:
            self._deadlines.at(start, self._begin)
            await self._ended.wait()
        finally:
            gc.enable()
            gc.unfreeze()
            self._deadlines.close()
            await self._client.close()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Part(self._cpu, self._wall, peak, self._gaps, self._stopped)

    def stop(self) -> None:
        """Send no more and let go of what is under way."""
        if not self._ended.is_set():
            self._stopped = True
            self._abandon("the run was stopped")
            self._ended.set()

    def _begin(self) -> None:
        self._cpu_began = process_time()
        self._deadlines.at(monotonic() + _SWEEP, self._sweep)
        self._advance()

    def _advance(self) -> None:
        self._due = next(self._first, None)
        if self._due is not None:
            self._deadlines.at(self._start + self._due.at, self._send_due)
        else:
            self._set_last_call()
            self._end_if_idle()

    def _set_last_call(self) -> None:
        """Where answers bring further requests, each request's own time limit ends the run."""
        spec = self._spec
        if spec.closed and spec.duration is not None:
            self._deadlines.at(self._start + spec.duration + spec.grace, self._out_of_time)
        elif not spec.closed and spec.turns == 1:
            self._deadlines.at(monotonic() + spec.grace, self._out_of_time)

    def _send_due(self) -> None:
        ask = self._due
        assert ask is not None, "only armed with one"
        if not self._stopped:
            self._send(ask)
            self._advance()

    def _send(self, ask: Ask) -> None:
        endpoint = self._spec.endpoint
        headers: dict[str, str] = {}
        slo = self._spec.classes[ask.group].slo
        if endpoint.slo_headers:
            limits = {"ttft": slo.ttft, "tpot": slo.tpot}
            headers = {f"x-slo-{name}-ms": f"{v * 1e3:g}" for name, v in limits.items() if v}
        payload = endpoint.post(self._workload.messages(ask), ask.output, headers)
        keep_text = self._spec.keep_text or ask.session >= 0
        exchange = Exchange(payload, self._done, keep_text=keep_text)
        self._flying[exchange] = ask
        self._client.send(exchange)
        self._cpu = process_time() - self._cpu_began
        self._wall = monotonic() - self._start

    def _done(self, exchange: Exchange) -> None:
        ask = self._flying.pop(exchange)
        slo = self._spec.classes[ask.group].slo
        result = outcome(exchange, ask, self._start, slo, self._gaps)
        result.warmup = ask.at < self._spec.warmup
        answer = "".join(exchange.pieces)
        if self._spec.keep_text:
            result.text = answer
        self._told(result)
        if self._stopped:
            return
        broken = result.error is not None and ask.session >= 0  # nothing to answer to
        pause = _PAUSE_AFTER_ERROR if result.error else 0.0
        later = None if broken else self._workload.follow(ask, answer, result.end + pause)
        if later is not None:
            self._waiting += 1
            self._deadlines.at(self._start + later.at, partial(self._send_later, later))
        self._end_if_idle()

    def _send_later(self, ask: Ask) -> None:
        self._waiting -= 1
        if not self._stopped:
            self._send(ask)

    def _end_if_idle(self) -> None:
        if self._due is None and not self._flying and not self._waiting:
            self._ended.set()

    def _sweep(self) -> None:
        """Requests leave in the order in which they were sent, so the first are the oldest."""
        now = monotonic()
        limit = self._spec.timeout
        for exchange, ask in list(self._flying.items()):
            if self._start + ask.at + limit > now:
                break
            self._client.cancel(exchange, "timeout", f"no end within {limit:g} s")
        self._deadlines.at(now + _SWEEP, self._sweep)

    def _out_of_time(self) -> None:
        self._abandon(f"still under way {self._spec.grace:g} s after the last arrival")

    def _abandon(self, detail: str) -> None:
        for exchange in list(self._flying):
            self._client.cancel(exchange, "unfinished", detail)
