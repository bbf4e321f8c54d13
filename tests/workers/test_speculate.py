"""Drafts by prompt look-up, and when they are worth it."""

from __future__ import annotations

import pytest

from workers.speculate import MOST, PROBE_EVERY, Drafter, Payoff


@pytest.mark.parametrize(
    ("tokens", "most", "draft"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 8, [4, 5]),  # what followed 1 2 3 before
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 8, [5, 1]),  # the newest occurrence counts
        ([1, 2, 3, 4, 5, 1, 2, 3], 1, [4]),
        ([1, 2, 3, 4, 5, 1, 2, 3], 0, []),
        ([1, 2, 3, 4], 8, []),  # never seen before
        ([1, 2], 8, []),
        ([], 8, []),
        ([7, 7, 7, 7], 8, [7]),  # it may overlap itself
    ],
)
def test_a_draft_is_what_followed_the_newest_tokens_last_time(tokens, most, draft):
    assert Drafter().draft(tokens, most) == draft


def test_drafts_grow_while_they_are_right_and_shrink_when_not():
    drafter, tokens = Drafter(), [*range(30), 0, 1, 2]
    lengths = []
    for accepted in (2, 4, 8, 8, 3, 0):
        draft = drafter.draft(tokens, 99)
        lengths.append(len(draft))
        drafter.accepted(accepted, len(draft))
    assert lengths == [2, 4, MOST, MOST, MOST, 3]
    assert len(drafter.draft(tokens, 99)) == 1


def test_tokens_may_be_looked_up_as_they_come():
    tokens = [1, 2, 3, 9, 8, 1, 2, 3, 9, 8, 1]
    drafter = Drafter()
    for end in range(len(tokens) + 1):
        assert drafter.draft(tokens[:end], 2) == Drafter().draft(tokens[:end], 2)


def rows(payoff: Payoff, decodes: int, drafted: int, accepted: int, seconds: float) -> None:
    for _ in range(60):
        payoff.learn(decodes, drafted, accepted, seconds)


@pytest.mark.parametrize(
    ("accepted", "seconds", "pays"),
    [
        (3, 0.012, True),  # a row costs 0.5 ms, saves 7.5 ms
        (0, 0.012, False),  # nothing is ever right
        (1, 0.018, True),  # a row costs 2 ms and saves 2.5 ms
        (1, 0.022, False),  # a row costs 3 ms and saves 2.5 ms
    ],
)
def test_drafts_are_off_when_they_do_not_pay(accepted, seconds, pays):
    payoff = Payoff()
    rows(payoff, 1, 0, 0, 0.010)
    rows(payoff, 1, 4, accepted, seconds)
    assert payoff.pays is pays
    wanted = [payoff.wanted() for _ in range(2 * PROBE_EVERY)]
    assert sum(wanted) == (2 * PROBE_EVERY if pays else 2)


def test_a_large_batch_pays_less():
    """Eight sequences share a step: an accepted token saves an eighth of it."""
    payoff = Payoff()
    rows(payoff, 8, 0, 0, 0.016)
    rows(payoff, 8, 16, 8, 0.016 + 16 * 0.0015)
    assert not payoff.pays
