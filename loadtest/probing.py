"""Carries out a search: one open-loop run per rate, ended as soon as it is decided."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Literal

import msgspec

from loadtest.client import fetch
from loadtest.errors import LoadtestError, OptionError
from loadtest.measure import Measurement, Run
from loadtest.report import SCALES
from loadtest.search import Probe, Search, Trial, crossing
from loadtest.spec import Spec
from loadtest.validity import Check, check_client
from loadtest.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadtest.outcome import Outcome

_LOOK_EVERY = 0.25
_CALM_LIMIT = 60.0  # seconds for the endpoint to get over an overload


class Bounds(msgspec.Struct, frozen=True):
    """How long a probe may be, in requests and seconds, and how narrow the answer."""

    least: int = 300
    most: int = 3000
    seconds: float = 120.0
    tolerance: float = 0.05
    most_probes: int = 12


class Measured(msgspec.Struct):
    """One probe: its decision, whether the client was punctual, and the SLO-scale sweep."""

    probe: Probe
    checks: list[Check]
    scales: list[tuple[float, float]]

    @property
    def valid(self) -> bool:
        return all(check.ok for check in self.checks)


class SearchReport(msgspec.Struct):
    """`capacity` is None when not even the lowest rate held; `failed` when the highest held."""

    load: str
    spec: Spec
    share: float
    capacity: float | None
    held: float | None
    failed: float | None
    measured: list[Measured]
    valid: bool = False  # derived, for readers of the JSON
    schema: Literal["motley.loadtest.search/1"] = "motley.loadtest.search/1"

    def __post_init__(self) -> None:
        self.valid = all(measured.valid for measured in self.measured)


async def search(
    spec: Spec, start: float, bounds: Bounds, tell: Callable[[Measured], None]
) -> SearchReport:
    """Doubling and bisection from `start` requests/s. Raises LoadtestError, OptionError."""
    probing = _Probing(spec, bounds, tell)
    hunt = Search(probing.share, start, tolerance=bounds.tolerance, most_probes=bounds.most_probes)
    while (rate := hunt.next_rate()) is not None:
        hunt.tell(await probing.at(rate))
    return probing.report(hunt.capacity)


async def sweep(
    spec: Spec, rates: Sequence[float], bounds: Bounds, tell: Callable[[Measured], None]
) -> SearchReport:
    """Attainment at each of `rates`, and where it crosses the share between them."""
    probing = _Probing(spec, bounds, tell)
    probes = [await probing.at(rate) for rate in rates]
    return probing.report(crossing(probes, probing.share))


class _Probing:
    def __init__(self, spec: Spec, bounds: Bounds, tell: Callable[[Measured], None]) -> None:
        if spec.closed or spec.turns > 1:
            raise OptionError("--concurrency, --turns", "a search over the rate needs an open loop")
        if any(group.slo.rule == "mean" for group in spec.classes):
            raise OptionError(
                "--slo", "a search needs rule=joint or rule=each: a mean has no share"
            )
        self.share = max(group.slo.share for group in spec.classes)
        self._spec = spec
        self._bounds = bounds
        self._tell = tell
        self._natural = Workload(spec).realised.rate if spec.trace else 0.0
        self._measured: list[Measured] = []

    def report(self, capacity: float | None) -> SearchReport:
        spec, probes = self._spec, [measured.probe for measured in self._measured]
        load = spec.load() if spec.trace else f"{spec.arrivals.process} arrivals at each rate"
        failed = min((p.rate for p in probes if not p.held), default=None)
        held = [p.rate for p in probes if p.held and (failed is None or p.rate < failed)]
        return SearchReport(
            load=load,
            spec=spec.without_secrets(),
            share=self.share,
            capacity=capacity,
            held=max(held, default=None),
            failed=failed,
            measured=self._measured,
        )

    async def at(self, rate: float) -> Probe:
        bounds = self._bounds
        if self._measured:
            await _calm(self._spec)
        spec = self._spec.at_rate(rate, self._natural, self._spec.seed + len(self._measured))
        if spec.trace is None:
            spec = msgspec.structs.replace(spec, requests=bounds.most)
        spec = msgspec.structs.replace(spec, duration=bounds.seconds)
        measurement = Measurement(spec)
        judge = _Judge(measurement, self.share, bounds)
        running = asyncio.ensure_future(measurement.run())
        try:
            while not running.done():
                await asyncio.wait([running], timeout=_LOOK_EVERY)
                if judge.look(final=running.done()):
                    measurement.stop()
        finally:
            measurement.stop()
            run = await running
        measured = judge.measured(rate, run)
        self._measured.append(measured)
        self._tell(measured)
        return measured.probe


class _Judge:
    """Feeds a trial with requests in the order of their schedule, as soon as each is decided."""

    def __init__(self, measurement: Measurement, share: float, bounds: Bounds) -> None:
        self._measurement = measurement
        self._trials: list[Trial] = []
        self._share = share
        self._bounds = bounds
        self._ended: dict[int, Outcome] = {}
        self._seen = 0
        self._judged = 0

    def look(self, *, final: bool) -> bool:
        """Whether the rate is decided."""
        outcomes = self._measurement.outcomes
        self._ended |= {outcome.index: outcome for outcome in outcomes[self._seen :]}
        self._seen = len(outcomes)
        times = self._measurement.workload.times
        while self._judged < len(times):
            criteria = self._criteria(self._judged, final=final)
            if criteria is None:
                return False
            self._judged += 1
            if self._add(criteria):
                return True
        return False

    def _criteria(self, number: int, *, final: bool) -> tuple[bool, ...] | None:
        """None while it is open; what is past its deadline has missed, whatever comes yet."""
        measurement = self._measurement
        outcome = self._ended.pop(number, None)
        if outcome is not None:
            return measurement.spec.classes[outcome.group].slo.criteria(outcome)
        if final:
            return None
        ask = measurement.workload.arrival(number)
        slo = measurement.spec.classes[ask.group].slo
        if slo.rule == "joint" and monotonic() > measurement.start + ask.at + slo.deadline(
            ask.output
        ):
            return (False,)
        return None

    def _add(self, criteria: tuple[bool, ...]) -> bool:
        """The rate holds when each trial does, and fails when one fails."""
        while len(self._trials) < len(criteria):
            bounds = self._bounds
            self._trials.append(Trial(self._share, least=bounds.least, most=bounds.most))
        ends = [trial.add(flag) for trial, flag in zip(self._trials, criteria, strict=False)]
        return all(ends) or any(
            end and not trial.probe(0).held for end, trial in zip(ends, self._trials, strict=False)
        )

    def measured(self, rate: float, run: Run) -> Measured:
        if not self._trials:
            raise LoadtestError(f"at {rate:g} requests/s no request was due: give it more time")
        judged = run.outcomes[: self._judged]
        run = Run(run.spec, run.workload, judged, run.parts, run.began)
        classes = run.spec.classes
        scales = [
            (scale, sum(classes[o.group].slo.met(o, scale) for o in judged) / (len(judged) or 1))
            for scale in SCALES
        ]
        worst = min((trial.probe(rate) for trial in self._trials), key=lambda probe: probe.share)
        return Measured(worst, check_client(run), scales)


async def _calm(spec: Spec) -> None:
    """Waits until single requests meet their limits again: what one probe left must not burden
    the next. Raises LoadtestError when they never do."""
    endpoint = spec.endpoint
    limit = spec.classes[0].slo.deadline(1)
    end = monotonic() + _CALM_LIMIT
    while monotonic() < end:
        payload = endpoint.post([{"role": "user", "content": "calm"}], 1)
        began = monotonic()
        answer = await fetch(endpoint, payload, _CALM_LIMIT)
        if answer.error is None and monotonic() - began <= limit:
            return
        await asyncio.sleep(1)
    raise LoadtestError(f"no request within {limit:g} s for {_CALM_LIMIT:g} s after an overload")
