"""What each step takes: from its start to the next one's, where that follows at once.

What lies between two steps (words to the router, a CPU quota that is used up) is part of what the
next token costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.cost import StepShape
    from scheduler.cost_fit import Learner

LATE_STEP = 3.0  # times its prediction: a step that takes longer has something in its way


class Stopwatch:
    """Times the steps of one engine, and teaches its learner."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.learner: Learner | None = None  # of what steps cost; whoever serves gives one
        self._clock = clock
        self._running: tuple[StepShape, float] | None = None  # the step that runs, since when
        self._ended: tuple[StepShape, float, float] | None = None  # the last one: from when to when

    def start(self, shape: StepShape) -> None:
        """A step of this shape begins; if none has since the last one, that ends only now."""
        now = self._clock()
        if self._ended:
            last, begun, _ = self._ended
            self._teach(last, now - begun)
        self._running = shape, now

    def stop(self) -> float:
        """It is done: the seconds that it took by itself."""
        assert self._running, "a step was started"
        (shape, begun), now = self._running, self._clock()
        self._running, self._ended = None, (shape, begun, now)
        return now - begun

    def drop(self) -> None:
        """It failed: its time says nothing."""
        self._running = None

    def rest(self) -> None:
        """No step follows at once. Idempotent."""
        if self._ended:
            shape, begun, ended = self._ended
            self._teach(shape, ended - begun)

    def standing_s(self) -> float:
        """How long the step that runs has taken beyond what it should have, at the most."""
        running, learner = self._running, self.learner
        if not (running and learner):
            return 0.0
        shape, since = running
        return max(0.0, self._clock() - since - LATE_STEP * learner.model.predict(shape))

    def _teach(self, shape: StepShape, seconds: float) -> None:
        self._ended = None
        if self.learner:
            self.learner.see(shape, seconds)
