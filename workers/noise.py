"""The noise of a draw, and the race that it decides: Gumbel-max in its exponential form.

Token i arrives after E_i / w_i, where E_i is exponential noise and w_i the token's weight; the
first to arrive is token i with probability w_i / Σ w. Noise is a function of (seed, prompt index,
choice, position, token id) alone. It is counter-based (Philox 4x64-10, Salmon et al. 2011), so a
token's own is computed without the others'. Only the generator's raw words are used: numpy keeps
those stable over its versions.

E_i = -log(1 - v_i), where v_i = (coarse_i + fine_i) / 2^16 has 52 random bits. The upper 16 alone
bound when a token can arrive, and so rule out all tokens but a few: the others' 36 bits, and most
logarithms and exponentials of a vocabulary, are never computed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

Coarse: TypeAlias = "npt.NDArray[np.uint16]"  # [V]
Ids: TypeAlias = "npt.NDArray[np.int64]"
Row: TypeAlias = "npt.NDArray[np.float64]"
Logits: TypeAlias = "npt.NDArray[np.float32] | Row"  # [V]

STEPS = 2.0**16  # of `coarse`
RARE = 2**8  # a token whose `coarse` is less may arrive first though it is unlikely
_WORD = 2**64
_FINE_FROM = 2**32  # where in the counter the fine bits begin, one block a token
_FINE_BITS = 36
_FINE_STEP = 2.0**-_FINE_BITS
_ROUNDING, _ROUNDING_32 = 1e-9, 1e-6  # more than float64 and float32 err by, relative


class Noise:
    """The noise of one draw at a time: first `seek` it."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(0)
        self._next = 0  # block of 4 words; its number is the low word of the counter

    def seek(self, seed: int, prompt_index: int, choice: int, position: int) -> None:
        counter = np.array([0, position, choice, prompt_index], np.uint64)
        self._philox.state = {  # a new generator takes several times as long
            "bit_generator": "Philox",
            "state": {"counter": counter, "key": np.array([seed % _WORD, 0], np.uint64)},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        self._next = 0

    def coarse(self, vocab: int) -> Coarse:
        """The upper bits of every token's v, uniform in 0 .. 2^16 - 1."""
        words = self._words(0, -(-vocab // 16))  # 16 tokens a block
        return words.astype("<u8", copy=False).view("<u2")[:vocab]

    def exponential(self, coarse: Coarse, tokens: Ids) -> Row:
        """E [n] of `tokens` [n], whose upper bits are `coarse` [n]."""
        words = np.array([self._words(_FINE_FROM + t, 1)[0] for t in tokens.tolist()], np.uint64)
        fine = (words >> np.uint64(64 - _FINE_BITS)).astype(np.float64)
        return -np.log1p(-(coarse + (fine + 0.5) * _FINE_STEP) / STEPS)

    def _words(self, block: int, blocks: int) -> npt.NDArray[np.uint64]:
        self._philox.advance(block - self._next)
        self._next = block + blocks
        return self._philox.random_raw(4 * blocks)


def winner(noise: Noise, logits: Logits, temperature: float, ids: Ids | None = None) -> int:
    """A token drawn from softmax(logits [V] / temperature), out of `ids` [n] alone if given."""
    coarse = noise.coarse(len(logits))
    if ids is not None:
        logits, coarse = logits[ids], coarse[ids]
    with np.errstate(all="ignore"):  # at the lowest temperatures; a weight of 0 never wins
        places, weights = _rivals(logits, coarse, temperature)
        tokens = places if ids is None else ids[places]
        times = noise.exponential(coarse[places], tokens) / weights
    return int(tokens[times.argmin()])


def _rivals(logits: Logits, coarse: Coarse, temperature: float) -> tuple[Ids, Row]:
    """Indices of those who may arrive first, one at least, and their weights.

    Whoever arrives after `latest` is ruled out: first by the arrival of the likeliest token, whose
    weight is 1 (who weighs less than RARE / latest / 2^16 needs a `coarse` below RARE), then by
    that of the one who seems to be the first.
    """
    best = int(logits.argmax())
    highest, latest = float(logits[best]), _latest(coarse[best])
    floor = highest + temperature * math.log(RARE / (latest * STEPS))
    likely = logits >= floor - _ROUNDING_32 * abs(floor)
    likely |= coarse < RARE
    likely[best] = True
    places = likely.nonzero()[0]
    weights = np.exp((logits[places].astype(np.float64) - highest) / temperature)
    steps = coarse[places].astype(np.float64)
    early = int(((steps + 1) / weights).argmin())
    latest = _latest(steps[early]) / weights[early]
    able = weights * (latest * STEPS * (1 + _ROUNDING)) >= steps
    if not able.any():  # the logits are no numbers
        return places[:1], weights[:1]
    return places[able], weights[able]


def _latest(coarse: np.uint16 | np.float64) -> float:
    """What E is at most."""
    return -math.log1p(-(float(coarse) + 1 - _FINE_STEP) / STEPS)
