"""Silence: what counts as one, and how long it may be."""

from __future__ import annotations

import pytest

from scheduler.suspicion import (
    DECAY,
    LOOK_S,
    MOST_PATIENCE_S,
    SUSPECT_S,
    Progress,
    Suspicion,
)


def silent(suspicion: Suspicion, seconds: float) -> float | None:
    """Look in vain for so long; the silence at which it was lost, or None."""
    for look in range(1, round(seconds / LOOK_S) + 1):
        if suspicion.look(heard=False, elapsed=LOOK_S):
            return look * LOOK_S
    return None


def talking(looks: int = 101, every: int = 2) -> Suspicion:
    """A worker that was heard in every second look, like a heartbeat of twice LOOK_S."""
    suspicion = Suspicion()
    for look in range(looks):
        assert not suspicion.look(heard=look % every == 0, elapsed=LOOK_S)
    return suspicion


def test_a_worker_that_stops_is_lost_after_a_second():
    assert silent(talking(), 10) == SUSPECT_S


def test_a_worker_that_never_spoke_too():
    assert silent(Suspicion(), 10) == SUSPECT_S


def test_whoever_is_heard_starts_anew():
    suspicion = talking()
    assert silent(suspicion, SUSPECT_S - LOOK_S) is None
    assert not suspicion.look(heard=True, elapsed=LOOK_S)
    assert suspicion.silence == 0


def test_halfway_it_is_doubtful():
    suspicion = talking()
    doubts = []
    while not suspicion.look(heard=False, elapsed=LOOK_S):
        doubts.append(suspicion.doubtful)
    assert doubts == [False] * 3 + [True] * 4


@pytest.mark.parametrize(("pause", "patience"), [(0.5, 1.0), (0.75, 1.125), (0.875, 1.3125)])
def test_irregular_speech_earns_patience(pause, patience):
    suspicion = talking()
    assert silent(suspicion, pause - LOOK_S) is None
    suspicion.look(heard=True, elapsed=LOOK_S)
    assert suspicion.patience == pytest.approx(patience)


def test_patience_wears_off():
    suspicion = talking()
    silent(suspicion, SUSPECT_S - LOOK_S)
    suspicion.look(heard=True, elapsed=LOOK_S)
    before = suspicion.patience
    for _ in range(3):
        suspicion.look(heard=True, elapsed=LOOK_S)
    assert suspicion.patience == pytest.approx(max(before * DECAY**3, SUSPECT_S))
    assert SUSPECT_S < suspicion.patience < before


def test_each_loss_that_may_have_been_wrong_earns_patience_up_to_a_limit():
    suspicion = talking()
    losses = [silent(suspicion, 10) for _ in range(6)]
    assert losses == [1.0, 1.5, 2.25, 3.375, MOST_PATIENCE_S, MOST_PATIENCE_S]


def test_a_watcher_that_was_itself_stopped_blames_nobody():
    suspicion = talking()
    assert not suspicion.look(heard=False, elapsed=3600.0)
    assert not suspicion.look(heard=True, elapsed=LOOK_S)


@pytest.mark.parametrize("elapsed", [LOOK_S, 2 * LOOK_S, 8 * LOOK_S])
def test_on_a_host_that_makes_us_late_a_worker_may_be_late_too(elapsed):
    """So many looks in vain are a loss, however long they took."""
    suspicion, looks = talking(), 1
    while not suspicion.look(heard=False, elapsed=elapsed):
        looks += 1
    assert looks * LOOK_S == SUSPECT_S


def test_a_worker_stands_still_while_it_has_work_and_takes_no_step():
    progress, still = Progress(), []
    for steps, busy, now in [
        (4, True, 10),
        (4, True, 15),
        (5, True, 20),
        (5, True, 28),
        (5, False, 40),
        (5, True, 41),
        (5, True, 44),
    ]:
        still.append(progress.report(steps, busy=busy, now=now))
    assert still == [0, 5, 0, 8, 0, 1, 4]
