"""When a worker counts as lost though its connection stands: it is silent, or it stands still.

A connection that breaks says so at once; a host that stops, or a network that parts, says nothing.
Silence is counted in the watcher's own looks: one that comes late counts no more than one in time,
because what makes the watcher late (a host with more work than CPU, a stopped router) makes workers
late as well. A worker whose words come in fits and starts gets more patience, learned from its own
longest pauses.
"""

from __future__ import annotations

LOOK_S = 0.125  # between two looks
SUSPECT_S = 1.0  # patience with a worker that speaks regularly: four heartbeats
MOST_PATIENCE_S = 5.0
SLACK = 1.5  # patience is so many times the longest pause of late
STUCK_S = 30.0  # without a step; a step that is predicted to be long may take so many times that:
STUCK_STEPS = 10
DECAY = 0.98  # of the longest pause's memory, for each look that finds the worker talking


class Suspicion:
    """How long one worker has been silent, in seconds, and how long it may be."""

    def __init__(self) -> None:
        self.silence = 0.0
        self._longest = 0.0

    @property
    def patience(self) -> float:
        return min(max(SUSPECT_S, SLACK * self._longest), MOST_PATIENCE_S)

    @property
    def doubtful(self) -> bool:
        """Give it nothing new while others are there: it has missed half of what it may miss."""
        return self.silence >= self.patience / 2

    def look(self, *, heard: bool, elapsed: float) -> bool:
        """Was anything heard in the `elapsed` seconds since the last look? True: it is lost."""
        self.silence += min(elapsed, LOOK_S)
        lost = not heard and self.silence >= self.patience
        if heard or lost:  # a pause has ended, or it is one too long: both are remembered
            self._longest = max(self._longest * DECAY, self.silence)
            self.silence = 0.0
        return lost


class Progress:
    """For how long a worker has had work and taken no step: it talks, but its engine hangs."""

    def __init__(self) -> None:
        self._steps = -1
        self._since = 0.0

    def report(self, steps: int, *, busy: bool, now: float) -> float:
        """By this heartbeat, in seconds."""
        if not busy or steps != self._steps:
            self._steps, self._since = steps, now
        return now - self._since
