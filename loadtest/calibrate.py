"""Proves the harness on this machine, against a server whose times are known.

Steady: constant arrivals; every request's TTFT and TPOT are compared with the server's. Stall: the
server is stopped for some seconds; the share of requests that miss their SLO must be the share that
arithmetic says, which a tool that waits for a stalled server before it sends again cannot show.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Literal

import msgspec

from loadtest.api import Endpoint
from loadtest.arrivals import Arrivals
from loadtest.errors import LoadtestError
from loadtest.faults import Fault, Plan, Saboteur
from loadtest.measure import Measurement, Run
from loadtest.server import Behaviour
from loadtest.sizes import Sizes
from loadtest.slo import Slo, SloClass
from loadtest.spec import Spec
from loadtest.stats import Quantiles, quantiles
from loadtest.validity import Check, check

_START_LIMIT = 10.0


class Load(msgspec.Struct, frozen=True):
    """Requests/s, seconds of each phase, tokens per answer, seconds of the stall."""

    rate: float = 100.0
    duration: float = 20.0
    tokens: int = 16
    stall: float = 5.0
    slo: Slo = Slo(ttft=0.25, tpot=0.1)


class Calibration(msgspec.Struct):
    """Errors are |measured - known| in seconds; shares are of requests that missed the SLO."""

    behaviour: Behaviour
    load: Load
    ttft_error: Quantiles
    ttft_error_from_send: Quantiles
    tpot_error: Quantiles
    itl_error: Quantiles
    lag: Quantiles
    checks: list[Check]
    stall_expected: float
    stall_measured: float
    accurate: bool = False  # median within 1 ms, p99 within 3 ms, the stall within one point
    valid: bool = False
    schema: Literal["motley.loadtest.calibration/1"] = "motley.loadtest.calibration/1"

    def __post_init__(self) -> None:
        errors = (self.ttft_error, self.tpot_error, self.itl_error)
        self.accurate = (
            all(error.p50 <= 1e-3 and error.p99 <= 3e-3 for error in errors)
            and abs(self.stall_measured - self.stall_expected) <= 0.01
        )
        self.valid = all(check.ok for check in self.checks)


async def calibrate(behaviour: Behaviour, load: Load) -> Calibration:
    """Some `2 × load.duration` seconds. Raises LoadtestError when the server does not start."""
    process, port = await _start(behaviour)
    try:
        spec = _spec(port, load)
        steady = await Measurement(spec).run()
        stalled = await _stalled(spec, process.pid, load.stall)
    finally:
        process.terminate()
        await process.wait()
    begin = load.duration / 4
    expected = [
        _misses(at / load.rate, begin, begin + load.stall, behaviour, load)
        for at in range(round(load.duration * load.rate))
    ]
    measured = [not load.slo.met(outcome) for outcome in stalled.outcomes]
    answered = [outcome for outcome in steady.outcomes if outcome.ok]
    if not answered:
        raise LoadtestError("no request was answered by the built-in server")
    gaps = steady.parts[0].gaps.chunk
    return Calibration(
        behaviour=behaviour,
        load=load,
        ttft_error=_errors([outcome.ttft for outcome in answered], behaviour.ttft),
        ttft_error_from_send=_errors([o.ttft_from_send for o in answered], behaviour.ttft),
        tpot_error=_errors([outcome.tpot for outcome in answered], behaviour.itl),
        itl_error=_errors(
            [gap for gap, times in gaps.values() for _ in range(times)], behaviour.itl
        ),
        lag=quantiles([outcome.lag for outcome in steady.outcomes]),
        checks=check(steady),
        stall_expected=sum(expected) / len(expected),
        stall_measured=sum(measured) / len(measured),
    )


async def _start(behaviour: Behaviour) -> tuple[asyncio.subprocess.Process, int]:
    """A server in a process of its own, which can be stopped and whose CPU is not the client's."""
    words = ["server", "--port", "0", "--ttft", str(behaviour.ttft), "--itl", str(behaviour.itl)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest", *words, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None, "a pipe was asked for"
    try:
        line = await asyncio.wait_for(process.stdout.readline(), _START_LIMIT)
        return process, int(line.rpartition(b":")[2])
    except (TimeoutError, ValueError):
        process.kill()
        await process.wait()
        raise LoadtestError(
            "the built-in server does not start; try `motley bench server`"
        ) from None


def _spec(port: int, load: Load) -> Spec:
    return Spec(
        endpoint=Endpoint(f"http://127.0.0.1:{port}", "known"),
        classes=[SloClass("known", load.slo)],
        arrivals=Arrivals("constant", load.rate),
        duration=load.duration,
        output=Sizes(load.tokens, load.tokens),
    )


async def _stalled(spec: Spec, pid: int, lasts: float) -> Run:
    measurement = Measurement(spec)
    fault = Fault("stop", at=(spec.duration or 0) / 4, lasts=lasts, pid=pid)
    saboteur = Saboteur(Plan([fault]), lambda: measurement.start)
    running = asyncio.ensure_future(measurement.run())
    await measurement.started.wait()
    await saboteur.work()
    return await running


def _errors(measured: list[float], known: float) -> Quantiles:
    return quantiles([abs(value - known) for value in measured])


def _misses(at: float, begin: float, end: float, behaviour: Behaviour, load: Load) -> bool:
    """Whether a request due `at` must miss, the server being stopped from `begin` to `end`.

    What arrives meanwhile is read at `end`; a token that falls due meanwhile leaves at `end`.
    """
    read = end if begin <= at < end else at
    last_gap = behaviour.itl * (load.tokens - 1)
    first, last = (
        end if begin <= due < end else due
        for due in (read + behaviour.ttft, read + behaviour.ttft + last_gap)
    )
    tpot = (last - first) / (load.tokens - 1) if load.tokens > 1 else 0.0
    ttft_limit, tpot_limit = load.slo.ttft or 0.0, load.slo.tpot or 0.0
    return first - at > ttft_limit or tpot > tpot_limit
