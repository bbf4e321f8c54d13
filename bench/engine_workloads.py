"""What bench/engine.py lets every engine compute, and the figures read off it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

VOCABULARY = range(100, 49_000)  # ordinary tokens: no control token among them


class Workload(msgspec.Struct, frozen=True):
    """So many requests at once, all of one size."""

    name: str
    requests: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self, round_number: int) -> list[list[int]]:
        """The same for every engine; no two alike, so that no cache of prefixes helps."""
        rng = random.Random(f"{self.name} {round_number}")
        return [rng.choices(VOCABULARY, k=self.prompt_tokens) for _ in range(self.requests)]

    @property
    def context(self) -> int:
        """Tokens of KV cache of one request, in whole blocks of 16."""
        return -(-(self.prompt_tokens + self.new_tokens) // 16) * 16


class Measured(msgspec.Struct, frozen=True):
    """One workload through one engine: when its tokens came, in seconds since its start."""

    times: list[float]
    cpu: list[float]  # the same on the clock of CPU time, all threads
    counts: list[int]  # tokens that came then
    firsts: list[int]  # each request's first token
    peak_rss: int  # bytes

    @property
    def seconds(self) -> float:
        return self.times[-1]

    @property
    def cores(self) -> float:
        """Cores that computed, on average."""
        return self.cpu[-1] / self.times[-1]


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table, in tokens a second."""

    key: str
    title: str
    workload: str
    of: Callable[[Workload, list[int], list[float]], float]  # of counts, on either clock


def prefill_rate(workload: Workload, _: list[int], times: list[float]) -> float:
    """Prompt tokens ÷ time to first token."""
    return workload.requests * workload.prompt_tokens / times[0]


def decode_rate(_: Workload, counts: list[int], times: list[float]) -> float:
    """1 ÷ TPOT: tokens after the first ÷ time from it to the last."""
    return (sum(counts) - counts[0]) / (times[-1] - times[0])


def output_rate(_: Workload, counts: list[int], times: list[float]) -> float:
    """Output tokens ÷ time from the start to the last of them: prompts are paid for."""
    return sum(counts) / times[-1]


FIGURES = (
    Figure("prefill", "prefill", "prefill", prefill_rate),
    Figure("decode", "decode", "one", decode_rate),
    Figure("one", "output, 1 request", "one", output_rate),
    Figure("eight", "output, 8 at once", "eight", output_rate),
    Figure("sixteen", "output, 16 at once", "sixteen", output_rate),
    Figure("short", "output, 16 at once, short", "short", output_rate),
)
FULL = (
    Workload("prefill", 1, 512, 1),
    Workload("one", 1, 512, 128),
    Workload("eight", 8, 512, 128),
    Workload("sixteen", 16, 512, 128),
    Workload("short", 16, 64, 64),
)
TINY = (
    Workload("prefill", 1, 32, 1),
    Workload("one", 1, 32, 4),
    Workload("eight", 2, 32, 4),
    Workload("sixteen", 4, 32, 4),
    Workload("short", 4, 8, 8),
)
WARM_UP = Workload("warm-up", 2, 40, 3)
