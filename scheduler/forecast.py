"""What one model's requests look like, learned from those that have passed."""

from __future__ import annotations

import math

LEARN = 0.05  # weight of the newest request in a running average
OUTPUT_TOKENS = 128.0  # of a request before any has finished
EARLY = 20  # requests of a size that count as so many in the first averages


class Forecast:
    """Tokens of a prompt from its characters, and of an output from its prompt's size."""

    def __init__(self) -> None:
        self.chars_per_token = 4.0
        self._outputs: dict[int, tuple[int, float]] = {}  # octave of prompt: seen, mean output

    def prompt_tokens(self, chars: int) -> int:
        return max(1, round(chars / self.chars_per_token))

    def output_tokens(self, prompt_tokens: int) -> float:
        """The mean of what prompts of like size had, or of the nearest size that is known."""
        at = _octave(prompt_tokens)
        if not self._outputs:
            return OUTPUT_TOKENS
        if at not in self._outputs:
            at = min(self._outputs, key=lambda known: (abs(known - at), known))
        return self._outputs[at][1]

    def learn_prompt(self, chars: int, tokens: int) -> None:
        """A prompt of so many characters had so many tokens."""
        self.chars_per_token += LEARN * (chars / max(tokens, 1) - self.chars_per_token)

    def learn_output(self, prompt_tokens: int, tokens: int) -> None:
        """A choice after such a prompt ended after so many tokens."""
        at = _octave(prompt_tokens)
        seen, mean = self._outputs.get(at, (0, 0.0))
        weight = max(LEARN, 1 / (seen + 1)) if seen < EARLY else LEARN
        self._outputs[at] = seen + 1, mean + weight * (tokens - mean)


def _octave(tokens: int) -> int:
    return int(math.log2(max(tokens, 1)))
