"""Speculation without a second model: drafts by prompt look-up, and whether they pay.

A draft is what followed the newest tokens the last time that they occurred, in the prompt or in the
answer (n-gram look-up). All draft tokens are verified in one pass: each position is drawn with its
own noise, as it would be without a draft, and the draft is accepted as far as it is equal. So the
output is the same with and without speculation, sampled or greedy; only its speed differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.batching import Sequence, Step
    from scheduler.request import TokenIds

NGRAM = 3  # tokens that must occur again before what followed them is a draft
MOST = 8  # draft tokens a step: beyond that one error spoils too much work
PROBE_EVERY = 64  # steps between two tries while drafts do not pay
MOST_ROWS = 16  # rows of the model in a step that drafts: more are bound by arithmetic
WEIGHT = 0.1  # of the newest step in the averages


class Drafter:
    """Finds drafts in one sequence's own tokens. Length adapts to what was accepted last."""

    def __init__(self) -> None:
        self._length = 2
        self._indexed = 0  # tokens whose n-grams are known
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → where its continuation starts

    def draft(self, tokens: TokenIds, most: int) -> TokenIds:
        """At most `most` tokens that may follow; empty if the newest n-gram is new."""
        for end in range(max(self._indexed, NGRAM), len(tokens)):
            self._after[tuple(tokens[end - NGRAM : end])] = end
        self._indexed = len(tokens)
        start = self._after.get(tuple(tokens[-NGRAM:]))
        if start is None:
            return []
        return tokens[start : start + min(self._length, most)]

    def accepted(self, count: int, drafted: int) -> None:
        """Of the last draft so many tokens were right: be bolder, or more careful."""
        if count == drafted:
            self._length = min(2 * self._length, MOST)
        else:
            self._length = max(1, count)


class Speculator:
    """Drafts for an engine's sequences, and what became of them."""

    def __init__(self) -> None:
        self.drafted = 0
        self.accepted = 0
        self._payoff = Payoff()
        self._drafters: dict[Sequence, Drafter] = {}

    def propose(self, decoding: list[Sequence]) -> None:
        """Give a draft to each of these that may have one; the batcher takes it if it fits."""
        if not decoding or not self._payoff.wanted():
            return
        room = max(0, MOST_ROWS - len(decoding)) // len(decoding)
        for sequence in decoding:
            most = min(room, sequence.max_tokens - sequence.position - 1)
            drafter = self._drafters.setdefault(sequence, Drafter())
            sequence.draft = drafter.draft(sequence.tokens, most)

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Of a draft so many tokens were right."""
        self.drafted += drafted
        self.accepted += accepted
        self._drafters[sequence].accepted(accepted, drafted)

    def learn(self, step: Step, accepted: int, seconds: float) -> None:
        """A step took so long, and so many draft tokens in it were right."""
        if step.prompt_tokens == 0:
            self._payoff.learn(step.decodes, step.drafted, accepted, seconds)

    def forget(self, sequence: Sequence) -> None:
        self._drafters.pop(sequence, None)


class Payoff:
    """Whether drafting is worth its time on this machine, with these requests.

    A step that also verifies r draft tokens takes r · c longer than one that does not, and saves
    a step for each token accepted. Both are learned; while it does not pay, one step in PROBE_EVERY
    tries again.
    """

    def __init__(self) -> None:
        self._plain_s: float | None = None  # a step without drafts
        self._row_s = 0.0  # each draft token on top of it
        self._rate = 1.0  # accepted per drafted token; starts hopeful
        self._since = 0

    @property
    def pays(self) -> bool:
        return self._plain_s is not None and self._rate * self._plain_s > self._row_s

    def wanted(self) -> bool:
        """Draft in the coming step? The first ones show what a step without drafts costs."""
        if self._plain_s is None:
            return False
        self._since += 1
        if self.pays or self._since >= PROBE_EVERY:
            self._since = 0
            return True
        return False

    def learn(self, decodes: int, drafted: int, accepted: int, seconds: float) -> None:
        """A step that only decoded took so long. Times are per sequence that decodes."""
        if drafted == 0:
            self._plain_s = _mean(self._plain_s, seconds / decodes)
        elif self._plain_s is not None:
            extra = max(0.0, seconds - decodes * self._plain_s)
            self._row_s = _mean(self._row_s, extra / drafted)
            self._rate = _mean(self._rate, accepted / drafted)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
