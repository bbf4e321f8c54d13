"""What one model's requests look like, learned from those that have passed.

Short answers end first, so a mean of those that have ended is too short for as long as the long
ones still run. So what is learned is how many of the answers that come to 2^k tokens go on to
2^(k+1): those that still run count as far as they have come (Kaplan and Meier, 1958).
"""

from __future__ import annotations

from dataclasses import dataclass

LEARN = 0.05  # weight of the newest request in a running average
OUTPUT_TOKENS = 128.0  # of a request, on the mean, as far as nothing is known
SHORT = 4  # answers of fewer than 2^SHORT tokens are told apart by their mean only


@dataclass(slots=True)
class _Octave:
    """Answers that come to the least size of an octave of tokens."""

    going_on: float = 1.0  # their share that comes to the next octave
    mean: float = 0.0  # tokens of those that do not
    seen: int = 0
    ended: int = 0

    def learn(self, *, went_on: bool) -> None:
        self.seen += 1
        weight = 1 / self.seen
        self.going_on += (weight if weight > LEARN else LEARN) * (went_on - self.going_on)

    def learn_end(self, tokens: int) -> None:
        self.learn(went_on=False)
        self.ended += 1
        self.mean += max(LEARN, 1 / self.ended) * (tokens - self.mean)


class _Outputs:
    """Of prompts of like size."""

    def __init__(self) -> None:
        self._octaves: list[_Octave] = []
        self._mean: float | None = OUTPUT_TOKENS  # None: something was learned since

    def mean(self) -> float:
        if self._mean is None:
            there, mean = 1.0, 0.0
            for octave in self._octaves:
                ending = there * (1 - octave.going_on)
                mean += ending * octave.mean
                there -= ending
            most = 1 << (SHORT + len(self._octaves) - 1)
            self._mean = mean + there * (most + OUTPUT_TOKENS)
        return self._mean

    def grow(self, first: int, last: int) -> None:
        """An answer of the first of these octaves has come to the last."""
        for at in range(first, last):
            self.at(at).learn(went_on=True)

    def at(self, at: int) -> _Octave:
        """An octave of tokens, to learn of it."""
        self._mean = None
        while len(self._octaves) <= at:
            self._octaves.append(_Octave())
        return self._octaves[at]


class Forecast:
    """Tokens of a prompt from its characters, and of an output from its prompt's size."""

    def __init__(self) -> None:
        self.chars_per_token = 4.0
        self._outputs: dict[int, _Outputs] = {}  # by octave of the prompt

    def prompt_tokens(self, chars: int) -> int:
        return max(1, round(chars / self.chars_per_token))

    def output_tokens(self, prompt_tokens: int) -> float:
        """The mean of what prompts of like size have, or of the nearest size that is known."""
        at = _octave(prompt_tokens)
        if not self._outputs:
            return OUTPUT_TOKENS
        if at not in self._outputs:
            at = min(self._outputs, key=lambda known: (abs(known - at), known))
        return self._outputs[at].mean()

    def learn_prompt(self, chars: int, tokens: int) -> None:
        """A prompt of so many characters had so many tokens."""
        self.chars_per_token += LEARN * (chars / max(tokens, 1) - self.chars_per_token)

    def learn_growth(self, prompt_tokens: int, before: int, now: int) -> None:
        """An answer to such a prompt had so many tokens `before`, and has more `now`."""
        first, last = _bin(before), _bin(now)
        if first < last:
            self._of(prompt_tokens).grow(first, last)

    def learn_end(self, prompt_tokens: int, tokens: int) -> None:
        """One ended after so many tokens, as many as it had grown to."""
        self._of(prompt_tokens).at(_bin(tokens)).learn_end(tokens)

    def _of(self, prompt_tokens: int) -> _Outputs:
        at = _octave(prompt_tokens)
        if at not in self._outputs:
            self._outputs[at] = _Outputs()
        return self._outputs[at]


def _octave(tokens: int) -> int:
    return tokens.bit_length() - 1 if tokens > 0 else 0


def _bin(tokens: int) -> int:
    bits = tokens.bit_length()
    return bits - SHORT if bits > SHORT else 0
