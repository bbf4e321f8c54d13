"""The circuit breaker: who may be asked, after what, and when."""

from __future__ import annotations

import pytest

from scheduler.breaker import (
    FAILURES,
    FIRST_PAUSE_S,
    MOST_PAUSE_S,
    ONE_EVENT_S,
    TRIAL_S,
    Breaker,
    State,
)

T = 100.0  # any moment
AFTER = T + FIRST_PAUSE_S


def opened(at: float = T) -> Breaker:
    """Its last failure is at `at`."""
    breaker = Breaker()
    for number in range(FAILURES - 1, -1, -1):
        breaker.failed(at - 2 * ONE_EVENT_S * number)
    return breaker


def test_a_few_failures_change_nothing():
    breaker = Breaker()
    for number in range(FAILURES - 1):
        breaker.failed(T - number)
    assert (breaker.state(T), breaker.allows(T)) == (State.CLOSED, True)


def test_a_success_in_between_starts_the_count_anew():
    breaker = Breaker()
    for number in range(3 * FAILURES):
        breaker.failed(T + number)
        breaker.succeeded()
    assert breaker.allows(T + 3 * FAILURES)


def test_all_that_a_death_fails_is_one_failure():
    breaker = Breaker()
    for _ in range(3 * FAILURES):
        breaker.failed(T)
    assert breaker.allows(T)


@pytest.mark.parametrize(
    ("now", "state", "allows"),
    [
        (T, State.OPEN, False),
        (AFTER - 0.01, State.OPEN, False),
        (AFTER, State.HALF_OPEN, True),
    ],
)
def test_failures_in_a_row_open_it_for_a_pause(now, state, allows):
    breaker = opened()
    assert (breaker.state(now), breaker.allows(now)) == (state, allows)


def test_half_open_lets_one_request_through():
    breaker = opened()
    assert breaker.allows(AFTER)
    breaker.tried(AFTER)
    assert not breaker.allows(AFTER)
    assert not breaker.allows(AFTER + TRIAL_S - 1)
    assert breaker.allows(AFTER + TRIAL_S)  # the trial said nothing: another may try


def test_a_trial_that_ends_without_a_word_lets_another_try():
    breaker = opened()
    breaker.tried(AFTER)
    breaker.untried()
    assert (breaker.state(AFTER), breaker.allows(AFTER)) == (State.HALF_OPEN, True)


def test_a_trial_that_succeeds_closes_it():
    breaker = opened()
    breaker.tried(AFTER)
    breaker.succeeded()
    assert (breaker.state(AFTER), breaker.allows(AFTER)) == (State.CLOSED, True)


def test_a_trial_that_fails_doubles_the_pause_up_to_a_limit():
    breaker, now, pauses = opened(), T, []
    for _ in range(8):
        start = now
        while not breaker.allows(now):
            now += 0.5
        pauses.append(now - start)
        breaker.tried(now)
        breaker.failed(now)
    assert pauses == [1, 2, 4, 8, 16, MOST_PAUSE_S, MOST_PAUSE_S, MOST_PAUSE_S]


def test_what_was_under_way_when_it_opened_does_not_make_the_pause_longer():
    breaker = opened()
    for _ in range(50):
        breaker.failed(T + 0.1)
    assert breaker.allows(AFTER)


def test_trying_a_closed_one_changes_nothing():
    breaker = Breaker()
    breaker.tried(T)
    assert breaker.allows(T)
