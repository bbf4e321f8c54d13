"""DistServe's question: the highest request rate per GPU at which the SLO holds, and on what.

The placement search of arXiv 2401.09670 (algorithm 2: prefill and decode share a node) with a
simulation of its own: requests arrive by a Poisson process, prefill batches all that wait, first
come first served, through PP stages; decode takes a request when its KV cache fits and makes one
token per step. Between two changes of the batch, steps are summed in closed form, so a run costs as
many operations as it has arrivals and departures.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from scheduler.profiles import StepProfile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


Attainment = Literal["joint", "marginal"]


class Phase(msgspec.Struct, frozen=True):
    """One worker of a phase: its step times at its TP degree, PP stages, and KV tokens it holds."""

    profile: StepProfile
    pp: int
    kv_tokens: int

    @property
    def gpus(self) -> int:
        return self.profile.tp * self.pp

    def __str__(self) -> str:
        return f"TP{self.profile.tp}" + (f" PP{self.pp}" if self.pp > 1 else "")


class Requests(msgspec.Struct, frozen=True):
    """`gaps` between arrivals in units of the mean gap, the first 0; sizes in tokens."""

    gaps: tuple[float, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Target(msgspec.Struct, frozen=True):
    """`joint`: `share` of requests meet both limits; `marginal`: each limit by itself."""

    ttft_ms: float
    tpot_ms: float
    share: float = 0.9
    attainment: Attainment = "joint"


class Attained(msgspec.Struct, frozen=True):
    """Shares of requests that met each limit, and both."""

    ttft: float
    tpot: float
    joint: float

    def meets(self, target: Target) -> bool:
        if target.attainment == "joint":
            return self.joint >= target.share
        return min(self.ttft, self.tpot) >= target.share


class Found(msgspec.Struct, frozen=True):
    """The best rate of a pair of phases; `attained` at that rate."""

    prefill: Phase
    decode: Phase
    rate_per_gpu: float  # requests/s
    attained: Attained | None
    simulations: int

    @property
    def gpus(self) -> int:
        return self.prefill.gpus + self.decode.gpus

    @property
    def rate(self) -> float:
        return self.rate_per_gpu * self.gpus


class Answer(msgspec.Struct, frozen=True):
    """`placements` best first; `replicas` of the best one for the rate that was asked for."""

    attainment: str
    placements: list[Found]
    replicas: int | None
    simulations: int
    seconds: float


def draw_requests(
    sizes: Sequence[tuple[int, int]], count: int, rng: np.random.Generator
) -> Requests:
    """`count` requests of sizes drawn from `sizes`, at Poisson times."""
    chosen = rng.integers(0, len(sizes), count)
    gaps = rng.exponential(1.0, count)
    gaps[0] = 0.0
    return Requests(
        tuple(gaps.tolist()),
        tuple(sizes[at][0] for at in chosen),
        tuple(sizes[at][1] for at in chosen),
    )


def attained(
    prefill: Phase, decode: Phase, requests: Requests, rate: float, target: Target
) -> Attained:
    """One simulated run at `rate` requests/s on one worker of each phase."""
    arrivals = (np.cumsum(requests.gaps) * (1e3 / rate)).tolist()
    first = run_prefill(prefill, arrivals, requests.inputs)
    last = run_decode(decode, first, requests.inputs, requests.outputs)
    ttft = np.subtract(first, arrivals)
    gaps = np.maximum(np.array(requests.outputs) - 1, 1)
    tpot = np.subtract(last, first) / gaps
    early, steady = ttft <= target.ttft_ms, tpot <= target.tpot_ms
    return Attained(float(early.mean()), float(steady.mean()), float((early & steady).mean()))


def run_prefill(phase: Phase, arrivals: Sequence[float], inputs: Sequence[int]) -> list[float]:
    """When each request's first token is there, in ms. Stage times are those of the whole / PP."""
    free = [0.0] * phase.pp  # when each stage can take the next batch
    done: list[float] = []
    at = 0
    while at < len(arrivals):
        start = max(free[0], arrivals[at])
        end = at
        tokens = squares = 0
        while end < len(arrivals) and arrivals[end] <= start:
            if end > at and tokens + inputs[end] > phase.kv_tokens:
                break
            tokens += inputs[end]
            squares += inputs[end] ** 2
            end += 1
        stage = phase.profile.prefill_ms(tokens, squares) / phase.pp
        moment = start + phase.profile.overhead_ms(tokens)
        for number in range(phase.pp):
            moment = max(moment, free[number]) + stage
            free[number] = moment
        done += [moment] * (end - at)
        at = end
    return done


def run_decode(
    phase: Phase, ready: Sequence[float], inputs: Sequence[int], outputs: Sequence[int]
) -> list[float]:
    """When each request's last token is there, in ms; its first one was there at `ready`.

    PP stages work on different tokens at once: a token's latency is that of the whole, and PP
    batches are under way at a time; each is simulated as a lane of its own with its share of KV.
    """
    last = list(ready)
    lanes = [
        _Lane(phase, phase.kv_tokens // phase.pp, last, inputs, outputs) for _ in range(phase.pp)
    ]
    for number, request in enumerate(at for at in np.argsort(ready, kind="stable").tolist()):
        if outputs[request] > 1:
            lanes[number % phase.pp].add(request)
    for lane in lanes:
        lane.run()
    return last


class _Lane:
    """One decode batch from start to end. `last` holds the ready times, and takes the last ones."""

    def __init__(
        self,
        phase: Phase,
        kv_tokens: int,
        last: list[float],
        inputs: Sequence[int],
        outputs: Sequence[int],
    ) -> None:
        self._phase = phase
        self._free_kv = kv_tokens
        self._last = last
        self._inputs = inputs
        self._outputs = outputs
        self._waiting: deque[int] = deque()
        self._running: list[tuple[int, int]] = []  # heap of (step after which it ends, request)
        self._context = 0  # tokens
        self._step = 0
        self._now = 0.0

    def add(self, request: int) -> None:
        """In the order of readiness."""
        self._waiting.append(request)

    def run(self) -> None:
        while self._waiting or self._running:
            self._admit()
            if not self._running:
                self._now = max(self._now, self._last[self._waiting[0]])
                continue
            self._advance()
            self._release()

    def _admit(self) -> None:
        """First come, first served; each holds what its last token will need. One always fits."""
        while self._waiting:
            request = self._waiting[0]
            need = self._inputs[request] + self._outputs[request]
            if self._last[request] > self._now or (self._running and need > self._free_kv):
                return
            self._waiting.popleft()
            self._free_kv -= need
            self._context += self._inputs[request] + 1
            heapq.heappush(self._running, (self._step + self._outputs[request] - 1, request))

    def _advance(self) -> None:
        """All steps until the next departure, or until a waiting request may come in."""
        batch = len(self._running)
        start, slope = self._phase.profile.decode_line(batch)
        fixed, per_token = self._phase.profile.overhead
        slope += per_token
        first = start + fixed + slope * self._context  # ms of the next step
        growth = slope * batch  # by so much is each longer than the one before
        steps = self._running[0][0] - self._step
        if self._waiting and (wait := self._last[self._waiting[0]] - self._now) > 0:
            steps = min(steps, _steps_to_cover(wait, first, growth))
        self._now += steps * first + growth * steps * (steps - 1) / 2
        self._context += steps * batch
        self._step += steps

    def _release(self) -> None:
        while self._running and self._running[0][0] <= self._step:
            _, request = heapq.heappop(self._running)
            self._last[request] = self._now
            held = self._inputs[request] + self._outputs[request]
            self._free_kv += held
            self._context -= held


def _steps_to_cover(wait: float, first: float, growth: float) -> int:
    """The fewest steps n with n·first + growth·n(n-1)/2 ≥ wait."""
    if growth == 0:
        return max(1, math.ceil(wait / first))
    half = first - growth / 2
    steps = math.ceil((math.sqrt(half * half + 2 * growth * wait) - half) / growth)
    return max(1, steps)


def search(
    pairs: Iterable[tuple[Phase, Phase]],
    runs: Sequence[Requests],
    target: Target,
    *,
    max_rate: float,
    step: float,
) -> list[Found]:
    """The best rate per GPU of each pair, best first; ties go to fewer GPUs.

    Bisection on the rate per GPU until it is known to `step`; attainment is the mean over `runs`,
    which are the same at every rate, so that rates differ by nothing but their speed.
    """
    found = [_best_rate(*pair, runs, target, max_rate, step) for pair in pairs]
    return sorted(found, key=lambda each: (-each.rate_per_gpu, each.gpus))


def _best_rate(
    prefill: Phase,
    decode: Phase,
    runs: Sequence[Requests],
    target: Target,
    high: float,
    step: float,
) -> Found:
    low, best, simulations = 0.0, None, 0
    while high - low > step:
        middle = (low + high) / 2
        rate = middle * (prefill.gpus + decode.gpus)
        outcome = _mean([attained(prefill, decode, run, rate, target) for run in runs])
        simulations += len(runs)
        if outcome.meets(target):
            low, best = middle, outcome
        else:
            high = middle
    return Found(prefill, decode, low, best, simulations)


def _mean(runs: Sequence[Attained]) -> Attained:
    return Attained(
        *(
            sum(values) / len(runs)
            for values in zip(*map(msgspec.structs.astuple, runs), strict=True)
        )
    )
