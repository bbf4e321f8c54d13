"""How many prompt tokens may share a step with decodes, so that their gaps stay within a bound.

A step of d decodes and p prompt tokens is modelled as  seconds = s + c · p,  with s the time of a
step that only decodes and c the time of a prompt token, both learned from the steps that ran. The
largest p with  s + c · p ≤ bound  is the budget. It needs no profile, and follows a machine that
slows down or a context that grows.
"""

from __future__ import annotations

MARGIN = 0.7  # of the bound: the model is a line, steps vary, and other processes compute too
# Weights of the newest step in the averages. A prompt's tokens get dearer as its context grows, and
# an average that lags behind them breaks the bound: slower is believed at once, faster by and by.
SLOWER, FASTER = 1.0, 0.3
FIRST_CHUNK = 32  # prompt tokens beside decodes before anything was learned
LEAST_CHUNK = 16  # below this a prompt would never end, whatever the bound


class Pace:
    """Learns the speed of steps. `bound_s` None: prompts take all that a step may hold."""

    def __init__(self, bound_s: float | None = None) -> None:
        self.bound_s = bound_s
        self._decode_s: float | None = None  # s
        self._token_s: float | None = None  # c

    def prompt_tokens(self, decodes: int, most: int) -> int:
        """Prompt tokens for a step with so many decodes; `most` if nobody would notice."""
        if self.bound_s is None or decodes == 0:
            return most
        if self._token_s is None:
            return min(most, FIRST_CHUNK)
        spare = MARGIN * self.bound_s - (self._decode_s or 0.0)
        return max(LEAST_CHUNK, min(most, int(spare / self._token_s)))

    def learn(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """A step with these numbers took so long."""
        if prompt_tokens == 0:
            self._decode_s = _mean(self._decode_s, seconds)
        elif prompt_tokens >= LEAST_CHUNK:  # a shorter piece tells more of the step than of itself
            own = seconds - (self._decode_s or 0.0 if decodes else 0.0)
            self._token_s = _mean(self._token_s, max(own, 0.1 * seconds) / prompt_tokens)


def _mean(old: float | None, new: float) -> float:
    if old is None:
        return new
    return old + (SLOWER if new > old else FASTER) * (new - old)
