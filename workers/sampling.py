"""From logits to tokens.

A row of logits passes, in this order: repetition, presence and frequency penalties, logit bias,
the grammar's mask, temperature, top-k, top-p, min-p, then one draw. Everything after the logits is
float64 numpy and looks at its own row alone, so a draw is a function of (logits, sampling, prompt
index, choice, tokens so far) whoever shares the batch.

Log-probabilities that are reported are those of the model's own distribution: log-softmax of the
raw logits, before any of the steps above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from scheduler.errors import BadRequest
from workers.runner import Sampled

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from scheduler.request import Sampling, TokenIds
    from workers.grammar import Mask

Row: TypeAlias = "npt.NDArray[np.float64]"  # [V]
Ids: TypeAlias = "npt.NDArray[np.int64]"

_WORD = 2**64


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

    @property
    def plain(self) -> bool:
        """Greedy over the logits as they are, with nothing more to report."""
        s = self.sampling
        free = self.allowed is None and not _adjusts(s)
        return free and s.temperature == 0 and s.logprobs is None


def check(sampling: Sampling, vocab: int) -> None:
    """Raise BadRequest for what only a model's vocabulary size can tell to be wrong."""
    for token in sampling.logit_bias:
        if not 0 <= token < vocab:
            raise BadRequest(
                f"token {token} does not exist: this model's tokens are 0 to {vocab - 1}",
                param="logit_bias",
            )


def sample(logits: npt.NDArray[np.float32], draws: Sequence[Draw]) -> list[Sampled]:
    """One token for each draw. logits [n, V]; several draws may share a row."""
    if not draws:
        return []
    best = logits.argmax(-1).tolist()  # the lowest id of equals
    return [Sampled(best[d.row]) if d.plain else _sample_one(logits[d.row], d) for d in draws]


def noise(seed: int, prompt_index: int, choice: int, position: int, vocab: int) -> Row:
    """Uniform numbers in (0, 1) for each token id: the same for the same arguments, for ever.

    Counter-based (Philox 4x64-10, Salmon et al. 2011), the counter's low word left to the token
    ids. Only the generator's raw words are used: numpy keeps those stable over its versions.
    """
    counter = np.array([0, position, choice, prompt_index], np.uint64)
    key = np.array([seed % _WORD, 0], np.uint64)
    words = np.random.Philox(counter=counter, key=key).random_raw(vocab)
    words >>= np.uint64(12)
    uniform = words.astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-52
    return uniform


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


def _sample_one(raw: npt.NDArray[np.float32], draw: Draw) -> Sampled:
    s = draw.sampling
    row = raw.astype(np.float64)
    adjusted = _adjust(row.copy(), draw) if _adjusts(s) else row
    if draw.allowed is not None:
        adjusted = _restrict(adjusted, draw.allowed)
    token = int(adjusted.argmax()) if s.temperature == 0 else _draw(adjusted, draw)
    if s.logprobs is None:
        return Sampled(token)
    logprobs = row - (row.max() + np.log(np.exp(row - row.max()).sum()))
    top = tuple((int(i), float(logprobs[i])) for i in largest(logprobs, s.logprobs))
    return Sampled(token, float(logprobs[token]), top)


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


def _restrict(row: Row, allowed: Mask) -> Row:
    """A copy without the tokens that are not allowed. A model may have more rows than tokens."""
    restricted = np.full_like(row, -np.inf)
    restricted[: len(allowed)][allowed] = row[: len(allowed)][allowed]
    return restricted


def _draw(row: Row, draw: Draw) -> int:
    """Draw from softmax(row / temperature), truncated.

    Gumbel-max in its exponential form: the least of -log(u) / p wins with probability p, found as
    the largest of log(u) / p.
    """
    s = draw.sampling
    weights = row - row.max()
    with np.errstate(over="ignore"):  # to -inf, at the lowest temperatures
        weights /= s.temperature
    np.exp(weights, out=weights)
    u = noise(s.seed, draw.prompt_index, draw.choice, draw.position, len(row))
    ids = kept(weights, s) if _truncates(s) else None
    if ids is not None:
        u, weights = u[ids], weights[ids]
    with np.errstate(divide="ignore", over="ignore"):  # a weight of (nearly) 0 never wins
        np.divide(np.log(u, out=u), weights, out=u)
    best = int(u.argmax())
    return best if ids is None else int(ids[best])


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
