"""A circuit breaker: who keeps failing is left alone for a while, then tried with one request.

closed ── FAILURES in a row ──► open ── pause ──► half open ── a success ──► closed
                                 ▲                    │
                                 └── a failure: twice the pause
"""

from __future__ import annotations

import enum

FAILURES = 3
FIRST_PAUSE_S, MOST_PAUSE_S = 1.0, 30.0
TRIAL_S = 30.0  # a trial that says nothing for so long does not keep others from trying
ONE_EVENT_S = 0.1  # failures so close to each other are one: a death fails all that was under way


class State(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"


class Breaker:
    """Of one worker. Times are in seconds of any clock that only grows."""

    def __init__(self) -> None:
        self._failures = 0  # in a row
        self._pause = FIRST_PAUSE_S
        self._open_until = self._trial_until = 0.0
        self._failed_at = 0.0

    def state(self, now: float) -> State:
        if self._failures < FAILURES:
            return State.CLOSED
        return State.OPEN if now < self._open_until else State.HALF_OPEN

    def allows(self, now: float) -> bool:
        """May it be given a request now?"""
        return self._failures < FAILURES or now >= max(self._open_until, self._trial_until)

    def tried(self, now: float) -> None:
        """It was given one."""
        if self.state(now) is State.HALF_OPEN:
            self._trial_until = now + TRIAL_S

    def untried(self) -> None:
        """What it was given has ended, perhaps by the fault of others: the next one may try."""
        self._trial_until = 0.0

    def succeeded(self) -> None:
        self._failures = 0
        self._pause = FIRST_PAUSE_S
        self._trial_until = 0.0

    def failed(self, now: float) -> None:
        """What fails at once counts once, and only the first one after a pause makes it longer."""
        if self._failures and now - self._failed_at < ONE_EVENT_S:
            return
        self._failed_at = now
        self._failures += 1
        if self._failures < FAILURES or now < self._open_until:
            return
        self._open_until = now + self._pause
        self._trial_until = 0.0
        self._pause = min(2 * self._pause, MOST_PAUSE_S)
