"""An engine that writes down what was in each of its steps, and when it began and ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from scheduler.cost import StepShape
from workers.engine import Engine

if TYPE_CHECKING:
    from scheduler.batching import Step
    from workers.engine import StepResult
    from workers.runner import Sampled


class Recorded(NamedTuple):
    """One step, whole: planned, computed, sampled, made text of. Times by the engine's clock."""

    shape: StepShape
    begun: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


class RecordingEngine(Engine):
    """Guesses nothing ahead, so that a step is what its shape says."""

    def __init__(self, engine: Engine) -> None:
        """In place of `engine`, which has not begun."""
        made = engine.runner, engine.text, engine.batcher, engine.clock
        super().__init__(*made, speculate=False)
        self.recorded: list[Recorded] = []
        self._shape: StepShape | None = None

    def step(self) -> StepResult:
        begun = self.clock()
        result = super().step()
        if self._shape:
            self.recorded.append(Recorded(self._shape, begun, self.clock()))
            self._shape = None
        return result

    def _run(self, plan: Step, result: StepResult) -> list[Sampled]:
        self._shape = StepShape.of(plan)
        return super()._run(plan, result)
