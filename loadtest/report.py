"""What a run has shown, as one document with a versioned schema."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Literal

import msgspec

from loadtest.arrivals import Realised
from loadtest.faults import FaultReport
from loadtest.histogram import Histogram
from loadtest.slo import Slo, SloClass
from loadtest.spec import Spec
from loadtest.stats import (
    Quantiles,
    design_effect,
    quantile,
    quantiles,
    warmup_length,
    wilson,
    z_value,
)
from loadtest.timeline import Window, timeline
from loadtest.validity import Check, check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.measure import Run
    from loadtest.outcome import Outcome

SCALES = (0.25, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0)  # of DistServe's sweep and beyond


class Attainment(msgspec.Struct):
    """Of one SLO class: `met` of `scheduled` met every limit; the interval is 95 %."""

    name: str
    slo: Slo
    scheduled: int
    met: int
    share: float
    low: float
    high: float
    design_effect: float
    ttft: float  # at the SLO's percentile, over answered requests, in seconds
    tpot: float
    attained: bool  # by the SLO's own rule


class Kind(msgspec.Struct):
    """A kind of error and what one of them said."""

    count: int
    example: str


class Totals(msgspec.Struct):
    """Rates are per second of the schedule; `seconds` is its length."""

    seconds: float
    scheduled: int
    answered: int
    met: int
    asked_rate: float
    achieved_rate: float
    goodput: float  # of the asked rate, what met its SLO
    input_tokens: int
    output_tokens: int
    output_rate: float
    asked_input_tokens: int
    asked_output_tokens: int
    late_token_share: float  # behind the line scheduled + TTFT + i × TPOT
    prefix_hit_share: float  # of prompt tokens, as the endpoint says
    block_sharing: float  # of a trace's prompt blocks, had the cache no limit
    coalesced_share: float  # chunks that came in one read with an earlier one
    cost_per_million_output: float | None = None
    cost_per_million_met: float | None = None  # output tokens of requests that met their SLO


class Client(msgspec.Struct):
    """The machine and the process that measured."""

    system: str
    python: str
    cores: int
    cpu_seconds: float
    peak_rss: int  # bytes, the largest process


class Report(msgspec.Struct):
    started: str
    load: str
    spec: Spec
    checks: list[Check]
    classes: list[Attainment]
    totals: Totals
    latencies: dict[str, Quantiles]
    histograms: dict[str, Histogram]
    errors: dict[str, Kind]
    scales: list[tuple[float, float]]  # (SLO × this, attainment)
    timeline: list[Window]
    realised: Realised
    warmup_detected: float  # seconds, by MSER-5 on TTFT
    client: Client
    columns: dict[str, list[float]]  # per request in order of schedule
    faults: FaultReport | None = None
    valid: bool = False  # these three are derived, for readers of the JSON
    attained: bool = False
    share: float = 0.0  # joint attainment over all classes
    schema: Literal["motley.loadtest.run/1"] = "motley.loadtest.run/1"

    def __post_init__(self) -> None:
        self.valid = all(check.ok for check in self.checks)
        self.attained = all(group.attained for group in self.classes)
        self.share = self.totals.met / max(1, self.totals.scheduled)


def build(
    run: Run, cost_per_hour: float | None = None, faults: FaultReport | None = None
) -> Report:
    """`cost_per_hour` is of all machines that served, in any currency."""
    counted = [outcome for outcome in run.outcomes if not outcome.warmup]
    answered = [outcome for outcome in counted if outcome.ok]
    spec = run.spec
    met = [spec.classes[outcome.group].slo.met(outcome) for outcome in counted]
    gaps = [part.gaps for part in run.parts]
    for other in gaps[1:]:
        gaps[0].merge(other)
    values = _values(answered, counted)
    histograms = {name: _histogram(found) for name, found in values.items()}
    histograms |= {"itl_chunk": gaps[0].chunk, "itl_token": gaps[0].token}
    latencies = {name: quantiles(found) for name, found in values.items()}
    latencies |= {name: _of_histogram(histograms[name]) for name in ("itl_chunk", "itl_token")}
    cut = 0 if faults else warmup_length([outcome.ttft for outcome in answered])
    return Report(
        started=datetime.datetime.fromtimestamp(run.began, datetime.UTC).isoformat(
            timespec="seconds"
        ),
        load=spec.load(),
        spec=spec.without_secrets(),
        checks=check(run),
        classes=[_attainment(group, at, counted) for at, group in enumerate(spec.classes)],
        totals=_totals(run, counted, met, cost_per_hour),
        latencies=latencies,
        histograms=histograms,
        errors=_errors(counted),
        scales=[(scale, _share(spec, counted, scale)) for scale in SCALES],
        timeline=timeline(counted, met),
        realised=run.workload.realised,
        warmup_detected=answered[cut].scheduled - answered[0].scheduled if cut else 0.0,
        client=_client(run),
        columns=_columns(counted, met),
        faults=faults,
    )


def _values(answered: Sequence[Outcome], counted: Sequence[Outcome]) -> dict[str, list[float]]:
    return {
        "ttft": [o.ttft for o in answered],
        "ttft_from_send": [o.ttft_from_send for o in answered],
        "tpot": [o.tpot for o in answered if o.tokens > 1],
        "e2e": [o.e2e for o in answered],
        "largest_gap": [o.largest_gap for o in answered if o.chunks > 1],
        "lag": [o.lag for o in counted],
    }


def _histogram(values: Sequence[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


def _of_histogram(found: Histogram) -> Quantiles:
    p50, p90, p95, p99 = (found.quantile(share) for share in (0.5, 0.9, 0.95, 0.99))
    return Quantiles(found.count, found.mean, p50, p90, p95, p99, found.largest)


def _attainment(group: SloClass, at: int, counted: Sequence[Outcome]) -> Attainment:
    slo = group.slo
    mine = [outcome for outcome in counted if outcome.group == at]
    flags = [slo.met(outcome) for outcome in mine]
    met = sum(flags)
    design = design_effect(flags)
    low, high = wilson(met, len(mine), z_value(0.95), design)
    share = met / len(mine) if mine else 0.0
    answered = [outcome for outcome in mine if outcome.ok]
    ttft = sorted(outcome.ttft for outcome in answered)
    tpot = sorted(outcome.tpot for outcome in answered)
    return Attainment(
        group.name,
        slo,
        len(mine),
        met,
        share,
        low,
        high,
        design,
        quantile(ttft, slo.share),
        quantile(tpot, slo.share),
        _attained(slo, share, mine),
    )


def _attained(slo: Slo, joint: float, mine: Sequence[Outcome]) -> bool:
    """By the SLO's rule. What failed counts as a value above every limit."""
    if slo.rule == "joint":
        return joint >= slo.share
    if not mine or (slo.rule == "mean" and not all(outcome.ok for outcome in mine)):
        return False
    if slo.rule == "each":
        held = zip(*(slo.criteria(outcome) for outcome in mine), strict=True)
        return all(sum(flags) >= slo.share * len(mine) for flags in held)
    limits = (("ttft", slo.ttft), ("tpot", slo.tpot), ("e2e", slo.e2e))
    return all(
        limit is None or statistics.fmean(getattr(outcome, name) for outcome in mine) <= limit
        for name, limit in limits
    )


def _share(spec: Spec, counted: Sequence[Outcome], scale: float) -> float:
    met = sum(spec.classes[outcome.group].slo.met(outcome, scale) for outcome in counted)
    return met / len(counted) if counted else 0.0


def _totals(
    run: Run, counted: Sequence[Outcome], met: Sequence[bool], cost_per_hour: float | None
) -> Totals:
    answered = [outcome for outcome in counted if outcome.ok]
    span = (
        _span([o.scheduled for o in counted])
        if not run.spec.closed
        else _span([o.end for o in counted])
    )
    seconds = span or 1.0
    tokens = sum(outcome.tokens for outcome in answered)
    prompts = sum(outcome.prompt_tokens for outcome in answered)
    chunks = sum(outcome.chunks for outcome in counted)
    good = sum(o.tokens for o, held in zip(counted, met, strict=True) if held)
    all_tokens = sum(outcome.tokens for outcome in counted)
    asked_rate = max(0, len(counted) - 1) / seconds
    return Totals(
        seconds=span,
        scheduled=len(counted),
        answered=len(answered),
        met=sum(met),
        asked_rate=asked_rate,
        achieved_rate=max(0, len(counted) - 1) / (_span([o.sent for o in counted]) or 1.0),
        goodput=asked_rate * sum(met) / max(1, len(counted)),
        input_tokens=prompts,
        output_tokens=tokens,
        output_rate=tokens / (_span([0.0, *(o.end for o in counted)]) or 1.0),
        asked_input_tokens=sum(o.asked_input for o in answered),
        asked_output_tokens=sum(o.asked_output for o in answered),
        late_token_share=sum(o.late_tokens for o in counted) / (all_tokens or 1),
        prefix_hit_share=sum(o.cached_tokens for o in answered) / (prompts or 1),
        block_sharing=run.workload.block_sharing,
        coalesced_share=sum(o.coalesced for o in counted) / (chunks or 1),
        cost_per_million_output=_cost(cost_per_hour, seconds, tokens),
        cost_per_million_met=_cost(cost_per_hour, seconds, good),
    )


def _span(times: Sequence[float]) -> float:
    return max(times) - min(times) if times else 0.0


def _cost(per_hour: float | None, seconds: float, tokens: int) -> float | None:
    if per_hour is None or not tokens:
        return None
    return per_hour / 3600 * seconds / tokens * 1e6


def _errors(counted: Sequence[Outcome]) -> dict[str, Kind]:
    counts = Counter(outcome.error for outcome in counted if outcome.error)
    examples = {outcome.error: outcome.detail for outcome in counted if outcome.error}
    return {kind: Kind(count, examples[kind]) for kind, count in counts.most_common()}


def _client(run: Run) -> Client:
    return Client(
        f"{platform.system()} {platform.release()} {platform.machine()}",
        platform.python_version(),
        os.cpu_count() or 0,
        sum(part.cpu for part in run.parts),
        max((part.peak_rss for part in run.parts), default=0),
    )


def _columns(counted: Sequence[Outcome], met: Sequence[bool]) -> dict[str, list[float]]:
    """What `compare` resamples; -1 where a request has no such value."""
    return {
        "scheduled": [round(o.scheduled, 6) for o in counted],
        "met": [float(held) for held in met],
        "ttft": [round(o.ttft, 6) if o.ok else -1.0 for o in counted],
        "tpot": [round(o.tpot, 6) if o.ok and o.tokens > 1 else -1.0 for o in counted],
        "e2e": [round(o.e2e, 6) if o.ok else -1.0 for o in counted],
    }
