"""What a worker kind can do: how long its steps take, and where each number comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from scheduler.cost import Provenance

if TYPE_CHECKING:
    from scheduler.cost import CostModel

Coefficients = tuple[float, float, float]


class Bounds(NamedTuple):
    """Of an engine: of a step, and of its KV cache; None is what its memory holds."""

    step_tokens: int = 2048  # a prompt in few pieces, as GPUs' engines are run
    sequences: int = 256
    kv_tokens: int | None = None

    def kv(self, fits: int) -> int:
        """Tokens of KV cache where memory holds so many."""
        return fits if self.kv_tokens is None else self.kv_tokens


class Profile(Protocol):
    """Step times in ms; each takes what `StepProfile` says."""

    @property
    def provenance(self) -> Provenance: ...

    @property
    def source(self) -> str: ...

    @property
    def bounds(self) -> Bounds: ...

    @property
    def line(self) -> CostModel | None:
        """All steps as one line, where the profile is one."""
        ...

    def prefill_ms(self, tokens: float, squares: float) -> float: ...

    def decode_ms(self, batch: int, context: float) -> float: ...

    def overhead_ms(self, tokens: float) -> float: ...


class StepProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Step times in ms, in the form of DistServe's simulator (arXiv 2401.09670, appendix A).

    prefill = a + b·Σ tokens + c·Σ tokens²; decode = a + b·Σ context + c·sequences, with other
    coefficients from `large_from` sequences on. `overhead` is (ms per step, ms per token in it).
    The engine holds at most `batch_tokens` of KV in a decode batch, where that is its own bound.
    """

    model: str
    gpu: str
    tp: int
    prefill: Coefficients
    decode: Coefficients
    provenance: Provenance
    source: str
    decode_large: Coefficients | None = None
    large_from: int = 0
    overhead: tuple[float, float] = (0.0, 0.0)
    batch_tokens: int = 0

    @property
    def bounds(self) -> Bounds:
        return Bounds()

    @property
    def line(self) -> CostModel | None:
        return None

    def prefill_ms(self, tokens: float, squares: float) -> float:
        """One step over prompts of `tokens` in all; `squares` is the sum of their squares."""
        a, b, c = self.prefill
        return a + b * tokens + c * squares

    def decode_line(self, batch: int) -> tuple[float, float]:
        """(ms, ms per token of context) of a step of `batch` sequences."""
        large = self.decode_large is not None and batch >= self.large_from
        a, b, c = self.decode_large if large and self.decode_large else self.decode
        return a + c * batch, b

    def decode_ms(self, batch: int, context: float) -> float:
        """One step of `batch` sequences of `context` tokens in all."""
        start, slope = self.decode_line(batch)
        return start + slope * context

    def overhead_ms(self, tokens: float) -> float:
        start, slope = self.overhead
        return start + slope * tokens
