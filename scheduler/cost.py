"""How long one step takes on a worker, as a line over what is in the step.

    seconds = step + token · n + attend · Σ context of the n + sequence · B + context · Σ context of
              the B

for n prompt tokens and B decoding sequences: launching and reading the weights; a prompt token's
arithmetic and its attention; a sequence's arithmetic and its attention. It is the form that
DistServe fits (arXiv 2401.09670, appendix A), with prompts and decodes in one step. No coefficient
is negative, so more work never looks faster.

Where the coefficients come from: `of_rates` (what a worker measured of itself), and in
`scheduler.cost_fit` steps that ran, once or while they run, and planner profiles.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.batching import Step
    from scheduler.messages import Rates

Provenance = Literal["measured", "fitted", "modelled", "assumed"]  # best first

STEP_TOKENS = 512  # a prompt is computed in pieces of at most so many: the engine's default
# A decode step reads the weights once for the whole batch, so B sequences cost much less than B
# times one: measured throughput grows about 4-fold from batch 1 to 16, i.e. step time by 1/5 of
# a lone step for each further sequence.
STEP_GROWTH = 0.2
MEASURED_PROMPT = 128  # tokens of the prompt that a worker times before it joins
LEAST_OWN = 0.1  # of that prompt's time is its tokens' own, whatever a lone step takes
LINK_BYTES_S = 1.25e9  # 10 Gbit/s, until a link was measured


class StepShape(NamedTuple):
    """What a step's time depends on. A token's context counts itself and all before it."""

    prompt_tokens: int = 0
    prompt_context: int = 0  # sum over the prompt tokens
    decodes: int = 0  # sequences
    decode_context: int = 0  # sum over these

    @classmethod
    def of(cls, step: Step) -> StepShape:
        """Drafted tokens count as a prompt's: rows beside the one that is sure."""
        tokens = attended = decodes = context = 0
        for piece in step.slices:
            start, end = piece.start, piece.end
            if end - start == 1:
                decodes += 1
                context += end
                start = end
            end += len(piece.draft)
            tokens += end - start
            attended += context_sum(start, end)
        return cls(tokens, attended, decodes, context)


def context_sum(start: int, end: int) -> int:
    """Sum of the contexts of tokens [start, end): (start + 1) + … + end."""
    return (end - start) * (start + end + 1) // 2


class CostModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """The line's coefficients in seconds, and what a hand-over costs. Travels in messages."""

    step: float
    token: float
    attend: float
    sequence: float
    context: float
    provenance: Provenance
    kv_token_bytes: float = 0.0  # of one token's KV cache on the wire
    link_bytes_s: float = LINK_BYTES_S

    @property
    def coefficients(self) -> tuple[float, float, float, float, float]:
        """In the order of (1, *StepShape)."""
        return self.step, self.token, self.attend, self.sequence, self.context

    def predict(self, shape: StepShape) -> float:
        """Seconds of one step."""
        return (
            self.step
            + self.token * shape.prompt_tokens
            + self.attend * shape.prompt_context
            + self.sequence * shape.decodes
            + self.context * shape.decode_context
        )

    def prefill_s(self, tokens: int, cached: int = 0, chunk: int = STEP_TOKENS) -> float:
        """Seconds of a prompt of `tokens`, the first `cached` of them known, on an idle worker."""
        steps = -(-(tokens - cached) // chunk)
        attended = context_sum(cached, tokens)
        return steps * self.step + self.token * (tokens - cached) + self.attend * attended

    def decode_step_s(self, sequences: float, context: float) -> float:
        """Seconds of a step of so many sequences with `context` tokens in all."""
        return self.step + self.sequence * sequences + self.context * context

    def kv_s(self, tokens: int) -> float:
        """Seconds that these tokens' KV cache spends on the link."""
        return tokens * self.kv_token_bytes / self.link_bytes_s

    def slower(self, factor: float) -> CostModel:
        """The same worker with every step `factor` times as long."""
        return self.with_coefficients([factor * each for each in self.coefficients])

    def with_coefficients(
        self, values: Sequence[float], provenance: Provenance | None = None
    ) -> CostModel:
        """Others in place of these, in their order."""
        step, token, attend, sequence, context = values
        return msgspec.structs.replace(
            self,
            step=step,
            token=token,
            attend=attend,
            sequence=sequence,
            context=context,
            provenance=provenance or self.provenance,
        )


def of_rates(
    rates: Rates, kv_token_bytes: float = 0.0, link_bytes_s: float = LINK_BYTES_S
) -> CostModel:
    """From a timed prompt and a timed lone step; how steps grow with their batch is assumed."""
    alone = rates.decode_s_per_token
    step = alone * (1 - STEP_GROWTH)
    prompt = 1 / rates.prefill_tokens_per_s
    return CostModel(
        step=step,
        token=max(LEAST_OWN * prompt, prompt - step / MEASURED_PROMPT),
        attend=0.0,
        sequence=alone - step,
        context=0.0,
        provenance="measured",
        kv_token_bytes=kv_token_bytes,
        link_bytes_s=link_bytes_s,
    )


def check(model: CostModel, where: str) -> str | None:
    """What is wrong with a model that came from elsewhere, or None."""
    for name in ("step", "token", "attend", "sequence", "context", "kv_token_bytes"):
        value = getattr(model, name)
        if not (math.isfinite(value) and value >= 0):
            return f"{where}.{name}: {value:g} is not a number of at least 0"
    if not model.link_bytes_s > 0:
        return f"{where}.link_bytes_s: {model.link_bytes_s:g} is not above 0"
    if not model.step + model.token + model.sequence > 0:
        return f"{where}: a step that takes no time"
    return None
