"""What the router tells Prometheus of the requests that it serves.

A request counts into its own record; the record reaches the registry once, when the request ends.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from serving.ask import Delta

Metric = TypeVar("Metric", Counter, Histogram)

# The label of a model that nobody serves: clients must not make new time series by asking.
UNKNOWN_MODEL = "unknown"
OK = 200
CLIENT_LEFT = 499  # nginx's code for a client that closed before its answer was complete

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKEN_SECONDS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class RequestRecord:
    """What is known of one request so far. Times are in seconds of `clock`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start = clock()
        self.model = UNKNOWN_MODEL
        self.code = CLIENT_LEFT  # until the handler has said something else
        self.prompt_tokens = 0
        self.cached_tokens = 0  # of the prompts', found in the prefix cache
        self.completion_tokens = 0
        self.choices = 1
        self._first: float | None = None
        self._last = self._start

    def saw(self, delta: Delta) -> None:
        self._last = self._clock()
        if self._first is None and delta.tokens:
            self._first = self._last
        self.completion_tokens += delta.tokens
        self.cached_tokens += delta.cached

    @property
    def age(self) -> float:
        """Seconds since arrival."""
        return self._clock() - self._start

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token of any choice."""
        return None if self._first is None else self._first - self._start

    @property
    def tpot(self) -> float | None:
        """Mean seconds between two tokens of one choice; choices run side by side."""
        if self._first is None or self.completion_tokens <= self.choices:
            return None
        return (self._last - self._first) / (self.completion_tokens / self.choices - 1)


class Metrics:
    """The router's own registry: nothing is global, and others may register collectors in it."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._series: dict[tuple[Any, tuple[str, ...]], Any] = {}
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "motley_requests_total",
            "Requests by the code they ended with; 499: the client left.",
            ("model", "code"),
            registry=registry,
        )
        self._in_flight = Gauge(
            "motley_requests_in_flight", "Requests being served now.", registry=registry
        )
        self._duration = Histogram(
            "motley_request_duration_seconds",
            "From arrival to the last byte handed to the socket, of requests served in full.",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._ttft = Histogram(
            "motley_request_ttft_seconds",
            "From arrival to the first token.",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._tpot = Histogram(
            "motley_request_tpot_seconds",
            "Mean time between two tokens of one choice.",
            ("model",),
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "motley_prompt_tokens_total",
            "Tokens of accepted prompts.",
            ("model",),
            registry=registry,
        )
        self._cached_tokens = Counter(
            "motley_prompt_tokens_cached_total",
            "Tokens of accepted prompts that were found in the prefix cache.",
            ("model",),
            registry=registry,
        )
        self._generation_tokens = Counter(
            "motley_generation_tokens_total", "Tokens generated.", ("model",), registry=registry
        )

    @contextmanager
    def request(self) -> Iterator[RequestRecord]:
        """Counts one request, however it ends."""
        record = RequestRecord(self._clock)
        self._in_flight.inc()
        try:
            yield record
        finally:
            self._in_flight.dec()
            self._export(record)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _export(self, record: RequestRecord) -> None:
        model = record.model
        self._of(self._requests, model, str(record.code)).inc()
        if record.code == OK:
            self._of(self._duration, model).observe(record.age)
        if (ttft := record.ttft) is not None:
            self._of(self._ttft, model).observe(ttft)
        if (tpot := record.tpot) is not None:
            self._of(self._tpot, model).observe(tpot)
        if record.prompt_tokens:
            self._of(self._prompt_tokens, model).inc(record.prompt_tokens)
            self._of(self._cached_tokens, model).inc(record.cached_tokens)
        if record.completion_tokens:
            self._of(self._generation_tokens, model).inc(record.completion_tokens)

    def _of(self, metric: Metric, *labels: str) -> Metric:
        """The time series of these labels: the client's own look-up costs much more."""
        key = (metric, labels)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = metric.labels(*labels)
        return series
