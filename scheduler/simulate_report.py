"""What a simulation says: latencies, attainment with its uncertainty, and the highest rate."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scheduler.capacity import Slo
    from scheduler.simulate_spec import Outcome, WorkerSpec

QUANTILES = (0.5, 0.9, 0.99)
CONFIDENCE = 0.95


class Quantiles(msgspec.Struct, frozen=True):
    """In ms."""

    p50: float
    p90: float
    p99: float


class KindReport(msgspec.Struct, frozen=True):
    """The workers of one kind: the share of requests that they prefill and decode."""

    workers: int
    prefilled: float
    decoded: float
    utilisation: float  # of their time, in steps


class Summary(msgspec.Struct, frozen=True):
    """`attainment`: the share of all requests that met both limits; refused ones met none."""

    requests: int
    refused: int
    rate: float  # requests/s that came
    served: float  # requests/s that ended, the last one's end included
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    attainment: float
    attainment_ttft: float
    attainment_tpot: float
    kinds: dict[str, KindReport]
    preempted: int
    transferred_gb: float
    events: int


def summarise(outcome: Outcome, workers: Sequence[WorkerSpec], slo: Slo) -> Summary:
    """Latencies are those of the requests that were served."""
    served = ~outcome.refused
    end = float(outcome.last[served].max()) if served.any() else float(outcome.at[-1])
    start = float(outcome.at[0])
    with np.errstate(invalid="ignore"):
        early = outcome.ttft <= slo.ttft_ms / 1e3
        steady = outcome.tpot <= slo.tpot_ms / 1e3
    count = len(outcome.at)
    return Summary(
        requests=count,
        refused=int(outcome.refused.sum()),
        rate=(count - 1) / max(float(outcome.at[-1]) - start, 1e-9) if count > 1 else 0.0,
        served=int(served.sum()) / max(end - start, 1e-9),
        ttft_ms=_quantiles(outcome.ttft[served]),
        tpot_ms=_quantiles(outcome.tpot[served & (outcome.outputs > 1)]),
        attainment=float((early & steady).mean()),
        attainment_ttft=float(early.mean()),
        attainment_tpot=float(steady.mean()),
        kinds=_kinds(outcome, workers, max(end - start, 1e-9)),
        preempted=outcome.preempted,
        transferred_gb=outcome.transferred / 1e9,
        events=outcome.events,
    )


def _quantiles(seconds: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Quantiles:
    if not len(seconds):
        return Quantiles(math.nan, math.nan, math.nan)
    return Quantiles(*(1e3 * float(value) for value in np.quantile(seconds, QUANTILES)))


def _kinds(
    outcome: Outcome, workers: Sequence[WorkerSpec], seconds: float
) -> dict[str, KindReport]:
    kinds: dict[str, list[int]] = {}
    for number, worker in enumerate(workers):
        kinds.setdefault(worker.kind or f"{worker.role}", []).append(number)
    served = max(1, int((outcome.prefilled >= 0).sum()))
    return {
        kind: KindReport(
            workers=len(numbers),
            prefilled=int(np.isin(outcome.prefilled, numbers).sum()) / served,
            decoded=int(np.isin(outcome.decoded, numbers).sum()) / served,
            utilisation=float(outcome.busy[numbers].sum()) / (seconds * len(numbers)),
        )
        for kind, numbers in kinds.items()
    }


class Interval(msgspec.Struct, frozen=True):
    """A mean over independent runs, and where it lies with CONFIDENCE."""

    mean: float
    low: float
    high: float
    runs: int


def interval(shares: Sequence[float], requests: int) -> Interval:
    """Of the attainment of runs of `requests` each.

    Several runs: the mean ± z standard errors of their spread, at least that of independent
    requests. One run: Wilson's interval, too narrow where requests hold each other up.
    """
    mean = sum(shares) / len(shares)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    count = requests * len(shares)
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + (z / count) ** 2 / 4)
    low, high = centre - half, centre + half
    if len(shares) > 1:
        spread = float(np.std(shares, ddof=1)) / math.sqrt(len(shares))
        low, high = min(low, mean - z * spread), max(high, mean + z * spread)
    return Interval(mean, max(0.0, min(low, mean)), min(1.0, max(high, mean)), len(shares))


def goodput(attained: Callable[[float], float], share: float, most: float, step: float) -> float:
    """The highest rate, to `step` requests/s, at which attainment is at least `share`; or 0.

    Bisection: `attained` must use the same draws at every rate, or chance decides.
    """
    low, high = 0.0, most
    while high - low > step:
        middle = (low + high) / 2
        low, high = (middle, high) if attained(middle) >= share else (low, middle)
    return low
