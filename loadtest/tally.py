"""From an exchange's stamps to an outcome and to the gaps between its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from loadtest.histogram import Histogram
from loadtest.outcome import Outcome

if TYPE_CHECKING:
    from loadtest.client import Exchange
    from loadtest.slo import Slo
    from loadtest.workload import Ask


class Gaps(msgspec.Struct):
    """ITL. A chunk may carry several tokens: `chunk` has one gap per chunk, as the user sees it;
    `token` spreads each gap evenly over the tokens that it brought."""

    chunk: Histogram = msgspec.field(default_factory=Histogram)
    token: Histogram = msgspec.field(default_factory=Histogram)

    def merge(self, other: Gaps) -> None:
        self.chunk.merge(other.chunk)
        self.token.merge(other.token)


def outcome(exchange: Exchange, ask: Ask, start: float, slo: Slo, gaps: Gaps) -> Outcome:
    """What became of `ask`; its gaps are added to `gaps`. `start` is the run's, monotonic."""
    stamps = exchange.stamps
    usage = exchange.usage
    chunks = len(stamps)
    tokens = usage.completion_tokens if usage is not None else chunks
    result = Outcome(
        index=ask.index,
        group=ask.group,
        scheduled=ask.at,
        sent=exchange.sent - start,
        end=exchange.end - start,
        error=exchange.error,
        detail=exchange.detail,
        chunks=chunks,
        tokens=tokens,
        coalesced=exchange.coalesced,
        asked_input=ask.input,
        asked_output=ask.output,
        prompt_tokens=usage.prompt_tokens if usage is not None else 0,
        cached_tokens=usage.cached_tokens if usage is not None else 0,
        session=ask.session,
        turn=ask.turn,
    )
    if chunks:
        result.first = stamps[0] - start
        result.last = stamps[-1] - start
        per_chunk = max(1.0, tokens / chunks)
        result.largest_gap = _add_gaps(stamps, per_chunk, gaps)
        if slo.ttft is not None and slo.tpot is not None:
            line = start + ask.at + slo.ttft
            step = slo.tpot * per_chunk
            late = sum(stamp > line + step * at for at, stamp in enumerate(stamps))
            result.late_tokens = round(late * per_chunk)
    return result


def _add_gaps(stamps: list[float], per_chunk: float, gaps: Gaps) -> float:
    """Returns the largest gap in seconds."""
    largest = 0.0
    before = stamps[0]
    single = per_chunk < 1.5
    for stamp in stamps[1:]:
        gap = stamp - before
        before = stamp
        gaps.chunk.add(gap)
        gaps.token.add(gap if single else gap / per_chunk, 1 if single else round(per_chunk))
        if gap > largest:
            largest = gap
    return largest
