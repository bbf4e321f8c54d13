"""How a model's context was stretched: what its rotary frequencies are divided by."""

from __future__ import annotations

import math

import msgspec

from scheduler.errors import SetupError


class Rope(msgspec.Struct, frozen=True):
    """Rotary embeddings as config.json describes them; older files say `type`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def kind(self) -> str:
        return self.rope_type or self.type or "default"


class Stretch(msgspec.Struct, frozen=True):
    """What ModelShape keeps of it."""

    context_length: int
    rope_divisors: tuple[float, ...] = ()
    rope_magnitude: float = 1.0


def stretch(rope: Rope, head_dim: int, theta: float, context_length: int) -> Stretch:
    """Divisors of the frequencies theta^(-2i/E), and the context that they allow.

    `context_length` is what the configuration states: before or after stretching, usage differs, so
    the longer of it and factor × original counts. Raises SetupError for what is not supported.
    """
    if rope.partial_rotary_factor != 1.0:
        raise SetupError("it rotates only a part of each head, which is not supported")
    original = rope.original_max_position_embeddings or context_length
    factor = rope.factor or context_length / original
    if not factor > 0 or not theta > 1:
        raise SetupError(f"its rotary factor is {factor} and theta {theta}; fetch it again")
    stretched = max(context_length, round(factor * original))
    match rope.kind:
        # `dynamic` changes nothing up to the stated context. Beyond, its frequencies depend on a
        # sequence's final length, so cached keys would be wrong: the context ends there.
        case "default" | "dynamic":
            return Stretch(context_length)
        case "linear":
            return Stretch(stretched, (factor,) * (head_dim // 2))
        case "llama3":
            return Stretch(context_length, _llama3(rope, head_dim, theta, factor, original))
        case "yarn":
            divisors = _yarn(rope, head_dim, theta, factor, original)
            return Stretch(stretched, divisors, _attention_factor(rope, factor))
    raise SetupError(
        f"it scales its rotary embeddings ({rope.kind}); supported are "
        "default, linear, dynamic, llama3 and yarn"
    )


def _llama3(
    rope: Rope, head_dim: int, theta: float, factor: float, original: int
) -> tuple[float, ...]:
    """Long waves are stretched, short ones kept, those between interpolated (Llama 3.1)."""
    divisors = []
    for i in range(head_dim // 2):
        turns = original / (2 * math.pi * theta ** (2 * i / head_dim))  # in the original context
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        divisors.append(_blend(kept, factor))
    return tuple(divisors)


def _yarn(
    rope: Rope, head_dim: int, theta: float, factor: float, original: int
) -> tuple[float, ...]:
    """NTK-by-parts with the ramp over pairs (Peng et al. 2023, YaRN, §3.2, and its code)."""

    def pair(turns: float) -> float:
        """The pair that turns so often in the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope.beta_fast or 32.0), pair(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    return tuple(_blend(1 - (i - low) / width, factor) for i in range(head_dim // 2))


def _attention_factor(rope: Rope, factor: float) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_magnitude(factor, rope.mscale) / yarn_magnitude(factor, rope.mscale_all_dim)
    return yarn_magnitude(factor)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """sqrt(1/t) of Peng et al. 2023, eq. 22; the weight is DeepSeek's addition."""
    return 1.0 + 0.1 * weight * math.log(factor) if factor > 1 else 1.0


def _blend(kept: float, factor: float) -> float:
    """What divides f so that `kept` of it (0 to 1) stays f and the rest becomes f / factor."""
    kept = min(max(kept, 0.0), 1.0)
    return 1.0 / (kept + (1.0 - kept) / factor)
