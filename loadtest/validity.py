"""Whether a run may be believed. A late client makes false misses and false passes alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from loadtest.stats import quantile

if TYPE_CHECKING:
    from loadtest.measure import Run
    from loadtest.outcome import Outcome

_LAG_LIMIT = 0.005
_LAG_OF_TTFT = 0.1
_RATE_LIMIT = 0.01
_CPU_LIMIT = 0.7


class Check(msgspec.Struct):
    """One condition: `value` must not exceed `limit`; `unit` is s, share or count."""

    name: str
    value: float
    limit: float
    unit: str
    advice: str
    ok: bool = False  # derived, for readers of the JSON

    def __post_init__(self) -> None:
        self.ok = self.value <= self.limit


def check(run: Run) -> list[Check]:
    """All conditions of a valid run, held or not."""
    cut_short = Check(
        "runs cut short",
        float(any(part.stopped for part in run.parts)),
        0,
        "count",
        "let the run end by itself",
    )
    return [*check_client(run), cut_short]


def check_client(run: Run) -> list[Check]:
    """The conditions of a run that may be stopped when enough is known."""
    sent = [outcome for outcome in run.outcomes if not outcome.warmup]
    cpu = max((part.cpu / part.wall for part in run.parts if part.wall), default=0.0)
    checks = [
        Check(
            "the client's CPU, share of a core",
            cpu,
            _CPU_LIMIT,
            "share",
            "give it more --processes, or a quieter machine",
        ),
        Check("requests missing to measure", float(not sent), 0, "count", "send some"),
    ]
    if not run.spec.closed:
        checks += _punctuality(run, sent)
    return checks


def _punctuality(run: Run, sent: list[Outcome]) -> list[Check]:
    limits = [group.slo.ttft for group in run.spec.classes if group.slo.ttft]
    lag_limit = min([_LAG_LIMIT, *(limit * _LAG_OF_TTFT for limit in limits)])
    lags = sorted(outcome.lag for outcome in sent)
    advice = "the client was late: more --processes, a lower rate, or a quieter machine"
    return [
        Check("schedule lag, p99", quantile(lags, 0.99), lag_limit, "s", advice),
        Check("sending rate off the asked", rate_error(sent), _RATE_LIMIT, "share", advice),
    ]


def rate_error(sent: list[Outcome]) -> float:
    """|achieved / asked - 1|, each from its own first to its own last request."""
    asked = max((o.scheduled for o in sent), default=0) - min(
        (o.scheduled for o in sent), default=0
    )
    took = max((o.sent for o in sent), default=0) - min((o.sent for o in sent), default=0)
    return abs(asked / took - 1) if took > 0 and asked > 0 else 0.0
