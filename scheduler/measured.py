"""What `motley profile` found of one worker: measured steps, and a line fitted to them.

It is a `profiles.Profile` as it is, so that planner and simulator work with the worker's own times
and with the bounds of its engine.
"""

from __future__ import annotations

import datetime
import math
from typing import TYPE_CHECKING, Literal

import msgspec

from scheduler import cost
from scheduler.cost import CostModel, Provenance, StepShape
from scheduler.cost_fit import fit
from scheduler.errors import SetupError
from scheduler.hardware import Model
from scheduler.models import BLOCK_TOKENS
from scheduler.profiles import Bounds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FORMAT: Literal["motley-profile-1"] = "motley-profile-1"
Phase = Literal["prefill", "decode", "mixed"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "mixed")


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Steps of one kind, as `cost.StepShape` says it: `ms` is the median of `runs` of them."""

    prompt_tokens: int
    prompt_context: int
    decodes: int
    decode_context: int
    ms: float
    runs: int
    provenance: Provenance = "measured"

    @property
    def shape(self) -> StepShape:
        return StepShape(self.prompt_tokens, self.prompt_context, self.decodes, self.decode_context)

    @property
    def phase(self) -> Phase:
        if not self.decodes:
            return "prefill"
        return "mixed" if self.prompt_tokens else "decode"

    @property
    def context(self) -> int:
        """Of a sequence that decodes; where none does, of the prompt before these tokens."""
        if self.decodes:
            return self.decode_context // self.decodes
        return self.prompt_context // self.prompt_tokens - (self.prompt_tokens + 1) // 2


class Error(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the fitted line against what was measured: shares of the measured time."""

    mean: float
    worst: float
    steps: int  # points


class Worker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured, and on what. `memory` in 1e9 bytes; `numbers`: mode and weights.

    `load`: processes that wanted a core when it began, itself included.
    """

    cpu: str
    cores: int
    memory: float
    threads: int
    numbers: str
    kv_tokens: int
    step_tokens: int
    sequences: int
    load: float


class WorkerProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A profile file. `cost` is fitted to `steps`, `errors` says how well, by phase."""

    format: Literal["motley-profile-1"]
    model: Model
    worker: Worker
    date: datetime.date
    cost: CostModel
    errors: dict[Phase, Error]
    steps: tuple[Point, ...]

    @property
    def provenance(self) -> Provenance:
        return self.cost.provenance

    @property
    def source(self) -> str:
        worker = self.worker
        mean = sum(each.mean * each.steps for each in self.errors.values()) / len(self.steps)
        return (
            f"{len(self.steps)} kinds of step measured on {worker.threads} of {worker.cores} cores "
            f"of {worker.cpu}, {worker.numbers}, {self.date}; error {mean:.0%}"
        )

    @property
    def bounds(self) -> Bounds:
        worker = self.worker
        return Bounds(worker.step_tokens, worker.sequences, worker.kv_tokens)

    @property
    def line(self) -> CostModel:
        return self.cost

    def prefill_ms(self, tokens: float, squares: float) -> float:
        """In pieces of `step_tokens`; `squares` is the sum of the prompts' squared lengths."""
        cost, pieces = self.cost, math.ceil(tokens / self.worker.step_tokens)
        # A token's context counts itself: Σ context of a prompt of t tokens is (t² + t) / 2.
        attended = (squares + tokens) / 2
        return 1e3 * (pieces * cost.step + cost.token * tokens + cost.attend * attended)

    def decode_ms(self, batch: int, context: float) -> float:
        """One step of `batch` sequences of `context` tokens in all."""
        return 1e3 * self.cost.decode_step_s(batch, context)

    def overhead_ms(self, tokens: float) -> float:
        """None: what was measured are whole steps."""
        return 0.0


def summarise(
    model: Model,
    worker: Worker,
    date: datetime.date,
    points: Sequence[Point],
    kv_token_bytes: float,
) -> WorkerProfile:
    """Fits a line to the points, each as heavy as the others. Raises ValueError without any."""
    line = fit([(point.shape, point.ms / 1e3) for point in points], kv_token_bytes=kv_token_bytes)
    errors: dict[Phase, Error] = {}
    for phase in PHASES:
        off = [
            abs(1e3 * line.predict(point.shape) / point.ms - 1)
            for point in points
            if point.phase == phase
        ]
        if off:
            errors[phase] = Error(sum(off) / len(off), max(off), len(off))
    return WorkerProfile(FORMAT, model, worker, date, line, errors, tuple(points))


def read_worker_profile(path: Path) -> WorkerProfile:
    """Raises SetupError naming the file and the field."""
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=WorkerProfile)
    except OSError as error:
        raise SetupError(f"{path}: {error}") from None
    except msgspec.MsgspecError as error:
        said = str(error).replace("`$.", "`")
        raise SetupError(f"{path}: {said}; is it what `motley profile --output` wrote?") from None
    if wrong := _wrong(profile):
        raise SetupError(f"{path}: {wrong}")
    return profile


def _wrong(profile: WorkerProfile) -> str | None:
    """What cannot be meant, or None."""
    worker = profile.worker
    if not profile.steps:
        return "steps: none; what was measured?"
    for at, point in enumerate(profile.steps):
        if not (math.isfinite(point.ms) and point.ms > 0):
            return f"steps[{at}].ms: {point.ms:g} is not a number above 0"
    for field in ("step_tokens", "sequences"):
        if getattr(worker, field) < 1:
            return f"worker.{field}: {getattr(worker, field)} is below 1"
    if worker.kv_tokens < BLOCK_TOKENS:
        return f"worker.kv_tokens: {worker.kv_tokens} hold no block of KV cache"
    return cost.check(profile.cost, "cost")
