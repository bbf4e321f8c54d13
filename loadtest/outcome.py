"""One request, as it ended. All that is measured is derived from these."""

from __future__ import annotations

import msgspec


class Outcome(msgspec.Struct, array_like=True):
    """Times are seconds since the run's start, on the client's monotonic clock.

    `scheduled` is when the request was due, whatever the client or the server were doing then.
    `error` is None for an answer that came whole; otherwise its kind (see `docs/loadtest.md`).
    """

    index: int
    group: int  # position in the list of SLO classes
    scheduled: float
    sent: float
    end: float
    first: float = -1.0  # first and last token; negative: there was none
    last: float = -1.0
    error: str | None = None
    detail: str = ""  # what the endpoint said about an error
    chunks: int = 0  # events that carried text
    tokens: int = 0  # as the endpoint counted them, else chunks
    coalesced: int = 0  # chunks that came in one read with an earlier one
    late_tokens: int = 0  # tokens behind the line scheduled + TTFT + i × TPOT
    largest_gap: float = 0.0
    asked_input: int = 0
    asked_output: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    session: int = -1
    turn: int = 0
    warmup: bool = False
    text: str = ""  # kept only where it is needed: sessions, and the check for lost tokens

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def lag(self) -> float:
        return self.sent - self.scheduled

    @property
    def ttft(self) -> float:
        """From the scheduled time: what a user who pressed the key then has waited."""
        return self.first - self.scheduled

    @property
    def ttft_from_send(self) -> float:
        return self.first - self.sent

    @property
    def tpot(self) -> float:
        """(last token - first token) / (tokens - 1); 0 where there is no gap to speak of."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def e2e(self) -> float:
        return self.end - self.scheduled
