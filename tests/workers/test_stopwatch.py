"""Step times as the learner gets them, on a clock that the test turns."""

from __future__ import annotations

import pytest

from scheduler.cost import CostModel, StepShape
from workers.stopwatch import LATE_STEP, Stopwatch

ONE, TWO = StepShape(0, 0, 1, 10), StepShape(0, 0, 2, 20)


class Pupil:
    """A learner that keeps what it is taught."""

    model = CostModel(0.0, 0.0, 0.0, 1.0, 0.0, "measured")

    def __init__(self) -> None:
        self.seen: list = []

    def see(self, shape, seconds) -> None:
        self.seen.append((shape, seconds))


# Each event comes so many seconds after the one before it.
STORIES = {
    "a step that another follows lasts until then": (
        [(0, "start", ONE), (2, "stop"), (3, "start", TWO)],
        [(ONE, 5)],
    ),
    "the last one until its end": (
        [(0, "start", ONE), (2, "stop"), (3, "rest"), (9, "start", TWO)],
        [(ONE, 2)],
    ),
    "a rest is told once": ([(0, "start", ONE), (2, "stop"), (3, "rest"), (1, "rest")], [(ONE, 2)]),
    "a step that failed is none": (
        [(0, "start", ONE), (2, "drop"), (1, "rest"), (3, "start", TWO), (4, "stop"), (1, "rest")],
        [(TWO, 4)],
    ),
}


@pytest.mark.parametrize(("events", "seen"), STORIES.values(), ids=STORIES)
def test_what_is_learned(events, seen):
    now = 0.0
    watch = Stopwatch(lambda: now)
    watch.learner = Pupil()
    for pause, event, *shape in events:
        now += pause
        getattr(watch, event)(*shape)
    assert watch.learner.seen == seen


def test_a_step_stands_still_when_it_takes_much_longer_than_was_thought():
    now = 0.0
    watch = Stopwatch(lambda: now)
    watch.learner = Pupil()
    watch.start(ONE)
    now = LATE_STEP
    assert watch.standing_s() == 0
    now += 5
    assert watch.standing_s() == 5
    watch.stop()
    assert watch.standing_s() == 0
