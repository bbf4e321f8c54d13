"""What is asked for: a histogram of request sizes with a rate, from a trace or a distribution.

Traces: Azure's CSV, Mooncake's JSONL, and the per-request CSV of `motley bench --csv`.
"""

from __future__ import annotations

import bisect
import csv
import datetime
import json
import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

# Upper edges of Mélange's buckets (arXiv 2404.14527, figure 5); larger sizes share the last one.
INPUT_EDGES = (25, 100, 250, 500, 1000, 2000, 4000, 8000, 12000, 16000)
OUTPUT_EDGES = (25, 100, 250, 500, 1000, 2000)
WINDOW_S = 10.0  # arrivals are counted in such windows to see how bursty they are


class Arrival(NamedTuple):
    """`at` in seconds; sizes in tokens.

    `prefix` as in Mooncake's traces: an id per 512 tokens of the prompt; equal ids mean equal
    prompts up to there.
    """

    at: float
    input: int
    output: int
    prefix: tuple[int, ...] = ()


class SizeBucket(msgspec.Struct, frozen=True):
    """Requests of like size: `size` is their mean (input, output) tokens, not the bucket's edge."""

    name: str
    size: tuple[float, float]
    rate: float


class Workload(msgspec.Struct, frozen=True):
    """`dispersion`: variance over mean of arrivals per window; 1 is Poisson.

    `arrivals`: what the buckets sum up; a simulation draws from them.
    """

    buckets: tuple[SizeBucket, ...]
    dispersion: float = 1.0
    arrivals: tuple[Arrival, ...] = ()

    @property
    def traced(self) -> bool:
        """Whether its arrivals have times of their own."""
        return bool(self.arrivals) and self.arrivals[-1].at > self.arrivals[0].at

    @property
    def sizes(self) -> tuple[Arrival, ...]:
        """Sizes to draw requests from; of a workload without arrivals, in parts of a thousand."""
        return self.arrivals or tuple(
            Arrival(0.0, max(1, round(bucket.size[0])), max(1, round(bucket.size[1])))
            for bucket in self.buckets
            for _ in range(math.ceil(1000 * bucket.rate / self.rate))
        )

    @property
    def rate(self) -> float:
        return sum(bucket.rate for bucket in self.buckets)

    def scaled(self, factor: float) -> Workload:
        """The same mix at `factor` times the rate."""
        return msgspec.structs.replace(
            self,
            buckets=tuple(
                msgspec.structs.replace(bucket, rate=bucket.rate * factor)
                for bucket in self.buckets
            ),
        )


def from_arrivals(arrivals: Sequence[Arrival]) -> Workload:
    """The histogram of a trace, at its mean rate. `arrivals` is not empty and in order."""
    span = arrivals[-1].at - arrivals[0].at
    if span <= 0:
        raise SetupError("the trace's requests all arrive at one moment: it has no rate")
    # n arrivals span n-1 gaps
    counted = count_sizes(arrivals, span * len(arrivals) / (len(arrivals) - 1))
    return msgspec.structs.replace(
        counted,
        dispersion=dispersion([arrival.at for arrival in arrivals]),
        arrivals=tuple(arrivals),
    )


def count_sizes(arrivals: Iterable[Arrival], seconds: float) -> Workload:
    """The histogram of what came within so many seconds."""
    cells: dict[tuple[int, int], list[Arrival]] = {}
    for arrival in arrivals:
        cell = _cell(arrival.input, INPUT_EDGES), _cell(arrival.output, OUTPUT_EDGES)
        cells.setdefault(cell, []).append(arrival)
    return Workload(
        tuple(
            SizeBucket(
                name=f"{_edge(INPUT_EDGES, i)}/{_edge(OUTPUT_EDGES, o)}",
                size=(
                    sum(arrival.input for arrival in inside) / len(inside),
                    sum(arrival.output for arrival in inside) / len(inside),
                ),
                rate=len(inside) / seconds,
            )
            for (i, o), inside in sorted(cells.items())
        )
    )


def dispersion(times: Sequence[float]) -> float:
    """Variance over mean of counts in windows, at least 1: a calm trace is no promise of calm."""
    windows = int((times[-1] - times[0]) // WINDOW_S)
    if windows < 2:
        return 1.0
    counts, _ = np.histogram(times, bins=windows, range=(times[0], times[0] + windows * WINDOW_S))
    return max(1.0, float(counts.var(ddof=1) / counts.mean()))


def _cell(tokens: int, edges: Sequence[int]) -> int:
    return bisect.bisect_left(edges, tokens)


def _edge(edges: Sequence[int], at: int) -> str:
    return f"≤{edges[at]}" if at < len(edges) else f">{edges[-1]}"


# ── traces ──────────────────────────────────────────────────────────────────────────────────────


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals in order. Raises SetupError that names the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{path}: {error}") from None
    rows = _jsonl(path, text) if path.suffix == ".jsonl" else _csv(path, text)
    arrivals = sorted(rows)
    if not arrivals:
        raise SetupError(f"{path}: no requests in it")
    return arrivals


def _jsonl(path: Path, text: str) -> Iterable[Arrival]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            at = row["timestamp"] / 1e3
            prefix = tuple(map(int, row.get("hash_ids", ())))
            yield _checked(at, row["input_length"], row["output_length"], prefix)
        except (KeyError, TypeError, ValueError) as error:
            raise SetupError(f"{path}: line {number}: {_said(error)}") from None


def _csv(path: Path, text: str) -> Iterable[Arrival]:
    reader = csv.reader(text.splitlines())
    header = next(reader, [])
    form = next((fields for fields in _CSV_FORMS if set(fields) <= set(header)), None)
    if form is None:
        forms = " or ".join(",".join(fields) for fields in _CSV_FORMS)
        raise SetupError(f"{path}: line 1 names neither {forms}")
    columns, clock = [header.index(field) for field in form], _CSV_FORMS[form]
    for row in reader:
        try:
            at, asked, answered = (row[column] for column in columns)
            yield _checked(clock(at), int(asked), int(answered))
        except (IndexError, ValueError) as error:
            raise SetupError(f"{path}: line {reader.line_num}: {_said(error)}") from None


def _timestamp(text: str) -> float:
    whole, _, fraction = text.partition(".")
    moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return moment.timestamp() + float(f"0.{fraction or 0}")


_CSV_FORMS: dict[tuple[str, str, str], Callable[[str], float]] = {
    ("arrival_s", "input_tokens", "output_tokens"): float,
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): _timestamp,
    ("scheduled", "asked_input", "asked_output"): float,
}


def _checked(at: float, inputs: int, outputs: int, prefix: tuple[int, ...] = ()) -> Arrival:
    if not math.isfinite(at):
        raise ValueError(f"time {at} is not a number")
    if inputs < 1 or outputs < 1:
        raise ValueError(f"{inputs} tokens in and {outputs} out: both are at least 1")
    return Arrival(at, int(inputs), int(outputs), prefix)


def _said(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
