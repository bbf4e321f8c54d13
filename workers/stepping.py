"""Steps of an idle engine, timed over a grid: prompts, batches that decode, and both at once.

Every step is a whole one of the engine that serves: planned, computed, sampled, made text of.
Sequences that decode get there as a hand-over does, with blocks of their own, so nothing but the
timed steps is computed; what their KV cache holds does not change how long it takes.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from scheduler.blocks import blocks_for
from scheduler.messages import FirstToken
from scheduler.request import Job, Limits, Prompt, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.cost import CostModel
    from workers.engine import Key
    from workers.recording import Recorded, RecordingEngine

PROMPTS = (16, 64, 128, 256, 512, 2048)  # tokens
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # sequences
CONTEXTS = (64, 512, 2048)  # tokens of each
BESIDE = ((128, 4, 512), (256, 16, 256), (384, 8, 512))  # a prompt beside sequences of a context
DECODES = 3  # steps of a batch in a round
ROUNDS = 7  # a busy moment then spoils few steps of each cell
MOST_OF_ALL = 1 / 12  # of the time for a round's cell: slow machines leave out the large ones


class Cell(NamedTuple):
    """`prompt` tokens beside `batch` sequences of `context` tokens each."""

    prompt: int
    batch: int
    context: int


def grid(engine: RecordingEngine, expected: CostModel, seconds: float) -> list[Cell]:
    """The cells that fit the engine, quick ones first; `expected` says which take too long."""
    cells = [Cell(prompt, 0, 0) for prompt in PROMPTS]
    cells += [Cell(0, batch, context) for batch in BATCHES for context in CONTEXTS]
    cells += [Cell(*cell) for cell in BESIDE]
    times = {cell: _expected_s(cell, expected) for cell in cells if _fits(cell, engine)}
    kept = [cell for cell, time in times.items() if time <= seconds * MOST_OF_ALL]
    return sorted(kept or list(times)[:1], key=lambda cell: times[cell])


def _expected_s(cell: Cell, cost: CostModel) -> float:
    decode = cost.decode_step_s(cell.batch, cell.batch * cell.context) if cell.batch else 0.0
    return DECODES * decode + (cost.prefill_s(cell.prompt) if cell.prompt else 0.0)


def _fits(cell: Cell, engine: RecordingEngine) -> bool:
    longest = max(cell.prompt + 1, cell.context + DECODES + 2)
    blocks = blocks_for(cell.prompt + 1) + cell.batch * blocks_for(cell.context + DECODES + 2)
    batcher = engine.batcher
    return (
        longest <= engine.text.context_length
        and blocks <= batcher.pool.size
        and cell.batch + bool(cell.prompt) <= batcher.max_sequences
    )


def time_steps(
    engine: RecordingEngine,
    cells: list[Cell],
    seconds: float,
    on_cell: Callable[[], None] = lambda: None,
) -> list[list[Recorded]]:
    """By cell, its steps over up to ROUNDS rounds; those of the first, at least.

    The engine is idle before and after. `on_cell` is told of each one, also of those that were left
    out because the time was up.
    """
    stepper = _Stepper(engine)
    found: list[list[Recorded]] = [[] for _ in cells]
    begun = engine.clock()
    for number in range(ROUNDS):
        for cell, steps in zip(cells, found, strict=True):
            if not number or engine.clock() - begun < seconds:
                steps += stepper.run(cell)
            on_cell()
    return found


class _Stepper:
    """Brings the engine to each cell and away again."""

    def __init__(self, engine: RecordingEngine) -> None:
        self._engine = engine
        self._random = random.Random(0)  # prompts that nobody has cached
        self._touched: set[int] = set()
        self._number = 0

    def run(self, cell: Cell) -> list[Recorded]:
        """Every step in which the cell's prompt is computed, or else DECODES steps."""
        engine = self._engine
        before = len(engine.recorded)
        keys = self._decoding(cell)
        try:
            if cell.prompt:
                job = self._job(cell.prompt, 1)
                engine.add(job, self._ids(job))
                keys.append((job.id, job.epoch))
                while keys[-1] in engine.keys:
                    engine.step()
            else:
                for _ in range(DECODES):
                    engine.step()
        finally:
            for key in keys:
                engine.cancel(key)
        return engine.recorded[before:]

    def _decoding(self, cell: Cell) -> list[Key]:
        """So many sequences, each with blocks of its own, that have all but their last token."""
        engine = self._engine
        jobs = [self._job(cell.context, DECODES + 2) for _ in range(cell.batch)]
        for job in jobs:
            engine.reserve(job, self._ids(job))
        granted = engine.step().granted if jobs else {}
        for key, sequence in granted.items():
            self._touch(sequence.blocks)
            engine.resume(key, (FirstToken(0, 0, 0),))
        return list(granted)

    def _touch(self, blocks: list[int]) -> None:
        """A page that was never written is quicker to read than any of a worker in use."""
        if fresh := [block for block in blocks if block not in self._touched]:
            self._engine.runner.cache.data[:, :, fresh] = 1
            self._touched.update(fresh)

    @staticmethod
    def _ids(job: Job) -> list[int]:
        return list(job.prompt.ids or ())

    def _job(self, tokens: int, output: int) -> Job:
        self._number += 1
        ids = self._random.choices(range(self._engine.runner.vocab), k=tokens)
        return Job(
            id=f"profile-{self._number}",
            epoch=0,
            model="",
            prompt=Prompt(ids=ids),
            sampling=Sampling(seed=0, temperature=0.0),
            limits=Limits(max_tokens=output, ignore_eos=True),
            created=0.0,
        )
