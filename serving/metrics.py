"""What the router tells Prometheus of the requests that it serves.

A request counts into its own record; the record is added to its model's numbers when it ends.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from itertools import accumulate
from typing import TYPE_CHECKING, Self

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from serving.ask import Delta

# The label of a model that nobody serves: clients must not make new time series by asking.
UNKNOWN_MODEL = "unknown"
OK = 200
CLIENT_LEFT = 499  # nginx's code for a client that closed before its answer was complete

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKEN_SECONDS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_HISTOGRAMS = (  # field of Served, name, help
    (
        "duration",
        "request_duration",
        "From arrival to the last byte handed to the socket, of requests served in full.",
    ),
    ("ttft", "request_ttft", "From arrival to the first token."),
    ("tpot", "request_tpot", "Mean time between two tokens of one choice."),
)
_COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "Tokens of accepted prompts."),
    (
        "cached_tokens",
        "prompt_tokens_cached",
        "Tokens of accepted prompts that were found in the prefix cache.",
    ),
    ("generation_tokens", "generation_tokens", "Tokens generated."),
)


class RequestRecord:
    """What is known of one request so far. Times are in seconds of `clock`.

    A context: at its end, whatever that is, the request has `ended`.
    """

    def __init__(self, clock: Callable[[], float], ended: Callable[[RequestRecord], None]) -> None:
        self._clock = clock
        self._ended = ended
        self._start = clock()
        self.model = UNKNOWN_MODEL
        self.code = CLIENT_LEFT  # until the handler has said something else
        self.prompt_tokens = 0
        self.cached_tokens = 0  # of the prompts', found in the prefix cache
        self.completion_tokens = 0
        self.choices = 1
        self._first: float | None = None
        self._last = self._start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended(self)

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


class Tally:
    """A histogram of numbers."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self._bounds = bounds

    def add(self, number: float) -> None:
        self.counts[bisect_left(self._bounds, number)] += 1
        self.sum += number

    def show(self, family: HistogramMetricFamily, label: str) -> None:
        """Add it to a metric of one label."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        family.add_metric(
            (label,), list(zip(names, accumulate(self.counts), strict=True)), self.sum
        )


class Served:
    """The requests of one model that have ended."""

    def __init__(self) -> None:
        self.codes: Counter[int] = Counter()
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.duration, self.ttft = Tally(_SECONDS), Tally(_SECONDS)
        self.tpot = Tally(_TOKEN_SECONDS)

    def add(self, record: RequestRecord) -> None:
        self.codes[record.code] += 1
        self.prompt_tokens += record.prompt_tokens
        self.cached_tokens += record.cached_tokens
        self.generation_tokens += record.completion_tokens
        if record.code == OK:
            self.duration.add(record.age)
        if (ttft := record.ttft) is not None:
            self.ttft.add(ttft)
        if (tpot := record.tpot) is not None:
            self.tpot.add(tpot)


class Metrics:
    """The router's own registry: nothing is global, and others may register collectors in it.

    Requests are counted in plain numbers, which Prometheus' classes are made of when it asks: its
    locks and label look-ups for each request cost as much as routing it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._in_flight = 0
        self._served: defaultdict[str, Served] = defaultdict(Served)  # by model
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def request(self) -> RequestRecord:
        """One request begins; it is counted when its record ends, however it does."""
        self._in_flight += 1
        return RequestRecord(self._clock, self._ended)

    def _ended(self, record: RequestRecord) -> None:
        self._in_flight -= 1
        self._served[record.model].add(record)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        said = "Requests being served now."
        yield GaugeMetricFamily("motley_requests_in_flight", said, self._in_flight)
        said = "Requests by the code they ended with; 499: the client left."
        codes = CounterMetricFamily("motley_requests", said, labels=("model", "code"))
        for model, served in self._served.items():
            for code, count in served.codes.items():
                codes.add_metric((model, str(code)), count)
        yield codes
        for field, name, said in _HISTOGRAMS:
            histogram = HistogramMetricFamily(f"motley_{name}_seconds", said, labels=("model",))
            for model, served in self._served.items():
                getattr(served, field).show(histogram, model)
            yield histogram
        for field, name, said in _COUNTERS:
            counter = CounterMetricFamily(f"motley_{name}", said, labels=("model",))
            for model, served in self._served.items():
                counter.add_metric((model,), getattr(served, field))
            yield counter
