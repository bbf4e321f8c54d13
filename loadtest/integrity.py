"""Whether a user got each token once: against an unbroken run, and against the endpoint's count.

With a deterministic endpoint (temperature 0 or a seed) the same request has the same answer, so a
text that lacks a stretch has lost it and one that says a stretch twice has repeated it.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.outcome import Outcome

_EXAMPLES = 5
_WORDS = re.compile(r"\s*\S+|\s+$")


class Difference(msgspec.Struct):
    """Between an answer and its reference, in words."""

    lost: int = 0
    repeated: int = 0
    changed: int = 0
    where: str = ""


class Integrity(msgspec.Struct):
    """Counts of requests; those that failed are in `failed` only."""

    failed: int = 0
    compared: int = 0  # with the reference run
    lost: int = 0
    repeated: int = 0
    changed: int = 0  # another text, neither lost nor repeated: not deterministic, or recomputed
    short: int = 0  # fewer tokens than max_tokens although ignore_eos was asked
    over: int = 0  # more chunks of text than tokens counted
    examples: list[str] = []

    @property
    def ok(self) -> bool:
        return not (self.lost or self.repeated or self.changed or self.short or self.over)


def inspect(
    outcomes: Sequence[Outcome], reference: Sequence[Outcome], *, ignore_eos: bool
) -> Integrity:
    """`reference` are outcomes of the same requests from an unbroken run, or none."""
    found = Integrity(failed=sum(not outcome.ok for outcome in outcomes), examples=[])
    expected = {outcome.index: outcome.text for outcome in reference if outcome.ok}
    for outcome in outcomes:
        if not outcome.ok:
            continue
        found.short += ignore_eos and outcome.tokens < outcome.asked_output
        found.over += outcome.chunks > outcome.tokens
        if outcome.index not in expected:
            continue
        found.compared += 1
        difference = differ(expected[outcome.index], outcome.text)
        found.lost += difference.lost > 0
        found.repeated += difference.repeated > 0
        found.changed += difference.changed > 0
        if difference.where and len(found.examples) < _EXAMPLES:
            found.examples.append(f"request {outcome.index}: {difference.where}")
    return found


def differ(expected: str, got: str) -> Difference:
    """What of `expected` is missing in `got`, what is there twice, and what is other."""
    result = Difference()
    if expected == got:
        return result
    before, after = _WORDS.findall(expected), _WORDS.findall(got)
    for what, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if what == "equal":
            continue
        extra = after[c:d]
        twice = extra and extra in (after[c - len(extra) : c], after[d : d + len(extra)])
        if what == "insert" and twice:
            result.repeated += len(extra)
        elif what == "delete":
            result.lost += b - a
        else:
            result.changed += max(b - a, d - c)
        if not result.where:
            result.where = f"at word {c}: expected {before[a:b][:8]}, got {extra[:8]}"
    return result
