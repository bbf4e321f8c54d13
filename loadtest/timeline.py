"""A run cut into windows of time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from loadtest.stats import quantile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.outcome import Outcome

_WINDOWS = 60
_WIDTHS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)


class Window(msgspec.Struct):
    """The requests scheduled in [at, at + width) seconds; latencies of those answered."""

    at: float
    width: float
    scheduled: int
    met: int
    failed: int
    ttft_p50: float
    ttft_p99: float


def timeline(outcomes: Sequence[Outcome], met: Sequence[bool]) -> list[Window]:
    """At most some 60 windows of a round width; `outcomes` ascend in time."""
    if not outcomes:
        return []
    span = outcomes[-1].scheduled - outcomes[0].scheduled
    width = next((width for width in _WIDTHS if span / width <= _WINDOWS), _WIDTHS[-1])
    first = int(outcomes[0].scheduled / width)
    count = int(outcomes[-1].scheduled / width) - first + 1
    cells: list[list[tuple[Outcome, bool]]] = [[] for _ in range(count)]
    for outcome, held in zip(outcomes, met, strict=True):
        cells[int(outcome.scheduled / width) - first].append((outcome, held))
    return [_window(cell, (first + at) * width, width) for at, cell in enumerate(cells)]


def _window(cell: list[tuple[Outcome, bool]], at: float, width: float) -> Window:
    ttft = sorted(outcome.ttft for outcome, _ in cell if outcome.ok)
    return Window(
        at=at,
        width=width,
        scheduled=len(cell),
        met=sum(held for _, held in cell),
        failed=sum(not outcome.ok for outcome, _ in cell),
        ttft_p50=quantile(ttft, 0.5),
        ttft_p99=quantile(ttft, 0.99),
    )
