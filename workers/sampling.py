"""From logits to tokens.

A row of logits passes, in this order: repetition, presence and frequency penalties, logit bias,
the grammar's mask, temperature, top-k, top-p, min-p, then one draw (workers/noise.py). Everything
after the logits is numpy, decided in float64, and looks at its own row alone, so a draw is a
function of (logits, sampling, prompt index, choice, tokens so far) whoever shares the batch.

Log-probabilities that are reported are those of the model's own distribution: log-softmax of the
raw logits, before any of the steps above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from scheduler.errors import BadRequest
from workers.noise import Noise, winner
from workers.runner import Sampled

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from scheduler.request import Sampling, TokenIds
    from workers.grammar import Mask
    from workers.noise import Logits

Row: TypeAlias = "npt.NDArray[np.float64]"  # [V]
Raw: TypeAlias = "npt.NDArray[np.float32]"  # [V]
Ids: TypeAlias = "npt.NDArray[np.int64]"


@dataclass(frozen=True, slots=True)
class Draw:
    """One token wanted, from row `row` of the logits."""

    row: int
    sampling: Sampling
    prompt_index: int
    choice: int
    tokens: TokenIds  # prompt, then what this choice has emitted
    prompt_len: int
    allowed: Mask | None = None  # by the grammar; None: all

    @property
    def position(self) -> int:
        """Index of the token wanted among those emitted."""
        return len(self.tokens) - self.prompt_len


def check(sampling: Sampling, vocab: int) -> None:
    """Raise BadRequest for what only a model's vocabulary size can tell to be wrong."""
    for token in sampling.logit_bias:
        if not 0 <= token < vocab:
            raise BadRequest(
                f"token {token} does not exist: this model's tokens are 0 to {vocab - 1}",
                param="logit_bias",
            )


def decisive(draw: Draw) -> int:
    """How many of a row's largest logits decide the draw, whatever the others are; 0: all do."""
    s = draw.sampling
    if draw.allowed is not None or s.logprobs is not None or _adjusts(s):
        return 0
    return 1 if s.temperature == 0 else s.top_k


class Sampler:
    """Draws tokens. Its noise forgets each draw."""

    def __init__(self) -> None:
        self._noise = Noise()

    def sample(self, logits: npt.NDArray[np.float32], draws: Sequence[Draw]) -> list[Sampled]:
        """One token for each draw. logits [n, V]; several draws may share a row."""
        return [self._sample_one(logits[draw.row], draw) for draw in draws]

    def _sample_one(self, raw: Raw, draw: Draw) -> Sampled:
        s = draw.sampling
        row = _adjust(raw.astype(np.float64), draw) if _adjusts(s) else raw
        if draw.allowed is not None:
            row = _restrict(row, draw.allowed)
        token = int(row.argmax()) if s.temperature == 0 else self._draw(row, draw)
        if s.logprobs is None:
            return Sampled(token)
        below = raw.astype(np.float64) - float(raw.max())
        logprobs = below - np.log(np.exp(below).sum())
        top = tuple((int(i), float(logprobs[i])) for i in largest(logprobs, s.logprobs))
        return Sampled(token, float(logprobs[token]), top)

    def _draw(self, row: Logits, draw: Draw) -> int:
        """Draw from softmax(row / temperature), truncated."""
        s = draw.sampling
        ids = kept(_weights(row, s.temperature), s) if _truncates(s) else None
        self._noise.seek(s.seed, draw.prompt_index, draw.choice, draw.position)
        return winner(self._noise, row, s.temperature, ids)


def kept(weights: Row, s: Sampling) -> Ids:
    """Token ids, ascending, that top-k, top-p and min-p leave, out of unnormalised weights [V]."""
    ids = np.arange(len(weights))
    if 0 < s.top_k < len(weights):
        ids = np.sort(largest(weights, s.top_k))
    if s.top_p < 1.0:
        ids = ids[_nucleus(weights[ids], s.top_p)]
    if s.min_p > 0.0:
        ids = ids[weights[ids] >= s.min_p * weights.max()]
    return ids


def _adjusts(s: Sampling) -> bool:
    return bool(
        s.logit_bias or s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0
    )


def _adjust(row: Row, draw: Draw) -> Row:
    """Penalties and bias, in place.

    Repetition (Keskar et al. 2019, §4.1, with the sign rule of later practice) sees prompt and
    emitted tokens; presence and frequency see emitted ones only, as OpenAI's reference defines.
    """
    s = draw.sampling
    if s.repetition_penalty != 1.0:
        seen = np.unique(np.array(draw.tokens, np.int64))
        values = row[seen]
        row[seen] = np.where(
            values > 0, values / s.repetition_penalty, values * s.repetition_penalty
        )
    if s.presence_penalty or s.frequency_penalty:
        emitted = np.array(draw.tokens[draw.prompt_len :], np.int64)
        ids, counts = np.unique(emitted, return_counts=True)
        row[ids] -= s.presence_penalty + s.frequency_penalty * counts
    for token, bias in s.logit_bias.items():
        row[token] += bias
    return row


def _restrict(row: Logits, allowed: Mask) -> Logits:
    """A copy without the tokens that are not allowed. A model may have more rows than tokens."""
    restricted = np.full_like(row, -np.inf)
    restricted[: len(allowed)][allowed] = row[: len(allowed)][allowed]
    return restricted


def _weights(row: Logits, temperature: float) -> Row:
    """Unnormalised probabilities [V], the largest 1."""
    below = row.astype(np.float64) - float(row.max())
    with np.errstate(over="ignore"):  # to -inf, at the lowest temperatures
        below /= temperature
    return np.exp(below, out=below)


def _truncates(s: Sampling) -> bool:
    return s.top_k > 0 or s.top_p < 1.0 or s.min_p > 0.0


def _nucleus(weights: Row, top_p: float) -> Ids:
    """Indices, ascending, of the smallest set that holds `top_p` of the mass, one at least.

    Holtzman et al. 2019, §3.1; of equal weights the lower index goes in first.
    """
    p = weights / weights.sum()
    # All that lie below this bound weigh less than 1 - top_p together, so none is in the set, and
    # sorting the rest is far less work than sorting a vocabulary.
    able = np.flatnonzero(p >= (1.0 - top_p) / len(p))
    order = able[np.argsort(-p[able], kind="stable")]
    before = np.cumsum(p[order]) - p[order]
    return np.sort(order[: max(1, int(np.count_nonzero(before < top_p)))])


def largest(row: Row | npt.NDArray[np.float32], count: int) -> Ids:
    """Indices of the `count` largest entries, best first; of equals the lower index is better."""
    count = min(count, len(row))
    if count == 0:
        return np.empty(0, np.int64)
    bound = np.partition(row, -count)[-count]
    able = np.flatnonzero(row >= bound)
    return able[np.argsort(-row[able], kind="stable")][:count]
