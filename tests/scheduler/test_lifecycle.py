"""One prompt's life: for each event in each state, the whole list of instructions."""

from __future__ import annotations

import msgspec
import pytest

from scheduler.errors import BadRequest, Unavailable
from scheduler.lifecycle import (
    FRUITLESS,
    MOST_ATTEMPTS,
    Deliver,
    End,
    Generation,
    Outcome,
    Phase,
    Place,
    Send,
    Started,
)
from scheduler.messages import (
    Address,
    Cancel,
    Failed,
    FailureKind,
    FinishReason,
    Output,
    Peer,
    Submit,
)
from scheduler.request import Job, Limits, Prompt, Sampling
from scheduler.routing import Route

IDS = [5, 6, 7]
SPLIT = Route("p", Peer("d", Address("h", 1)))
WHOLE = Route("m")
NOBODY = frozenset()


def fresh(*choices: int) -> Job:
    return Job("r", 0, "m", Prompt(text="hi"), Sampling(seed=1), Limits(), 0.0, choices=choices)


def job(epoch: int, *choices: int, emitted=(), sent: int = 0, accepted: bool = True) -> Job:
    """What a worker is sent in this attempt."""
    return msgspec.structs.replace(
        fresh(*choices),
        epoch=epoch,
        prompt=Prompt(ids=IDS) if accepted else Prompt(text="hi"),
        emitted=list(emitted),
        sent=sent,
    )


def out(epoch: int, position: int, *, choice: int = 0, finish: FinishReason | None = None):
    text = f"<{choice}.{position}>"
    return Output("r", epoch, choice, position, [10 * choice + position], text, finish=finish)


def last(epoch: int, position: int, choice: int = 0) -> Output:
    return out(epoch, position, choice=choice, finish=FinishReason.STOP)


def placed(*choices: int, route: Route = SPLIT) -> Generation:
    generation = Generation(fresh(*choices or (0,)))
    generation.start()
    generation.routed(1, route)
    return generation


def accepted(*choices: int, route: Route = SPLIT) -> Generation:
    generation = placed(*choices, route=route)
    generation.accepted(1, IDS)
    return generation


def failure(epoch: int, kind: FailureKind = FailureKind.INTERNAL) -> Failed:
    return Failed("r", epoch, kind, "why", param="prompt", code="c")


# ── the straight way ────────────────────────────────────────────────────────────────────────────


def test_a_split_request_from_start_to_end():
    generation = Generation(fresh(0))
    first = job(1, 0, accepted=False)
    assert generation.start() == [Place(first, NOBODY, split=True)]
    assert generation.routed(1, SPLIT) == [Send("p", Submit(first, SPLIT.handoff))]
    assert generation.accepted(1, IDS) == [Started(3)]
    assert generation.output(out(1, 0)) == [Deliver(out(1, 0))]
    assert generation.handed_over(1, "p") == []
    assert generation.output(out(1, 1)) == [Deliver(out(1, 1))]
    assert generation.output(last(1, 2)) == [Deliver(last(1, 2)), End()]
    assert generation.ended
    generation.check_integrity()


def test_choices_end_one_by_one_and_the_request_with_the_last():
    generation = accepted(0, 1, route=WHOLE)
    assert generation.output(last(1, 0, choice=1)) == [Deliver(last(1, 0, choice=1))]
    assert generation.output(last(1, 0)) == [Deliver(last(1, 0)), End()]


def test_a_second_token_that_overtakes_the_first_waits_for_it():
    generation = accepted()
    assert generation.output(out(1, 1)) == []
    assert generation.output(last(1, 2)) == []
    assert generation.output(out(1, 0)) == [
        Deliver(out(1, 0)),
        Deliver(out(1, 1)),
        Deliver(last(1, 2)),
        Send("p", Cancel("r", 1)),
        End(),
    ]


def test_a_token_said_twice_is_given_once():
    generation = accepted()
    generation.output(out(1, 0))
    assert generation.output(out(1, 0)) == []
    assert generation.output(out(1, 1)) == [Deliver(out(1, 1))]


def test_started_is_said_once():
    generation = accepted()
    assert generation.accepted(1, IDS) == []


def test_an_answer_that_ends_with_its_first_token_ends_the_decode_workers_lease():
    generation = accepted()
    assert generation.output(last(1, 0)) == [
        Deliver(last(1, 0)),
        Send("d", Cancel("r", 1)),
        End(),
    ]


def test_a_prefill_worker_that_never_heard_of_the_hand_over_is_told_that_all_is_over():
    """Between the two the network parted after the KV had arrived."""
    generation = accepted()
    generation.output(out(1, 0))
    assert generation.output(last(1, 1)) == [
        Deliver(last(1, 1)),
        Send("p", Cancel("r", 1)),
        End(),
    ]


# ── what ends it ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("route", "cancels"),
    [
        (SPLIT, [Send("d", Cancel("r", 1)), Send("p", Cancel("r", 1))]),
        (WHOLE, [Send("m", Cancel("r", 1))]),
    ],
    ids=["split", "whole"],
)
def test_when_the_client_leaves_whoever_holds_something_frees_it(route, cancels):
    generation = accepted(route=route)
    assert generation.cancel() == [*cancels, End()]
    assert generation.cancel() == []


def test_after_the_hand_over_only_the_decode_worker_holds_something():
    generation = accepted()
    generation.output(out(1, 0))
    generation.handed_over(1, "p")
    assert generation.cancel() == [Send("d", Cancel("r", 1)), End()]


def test_a_hand_over_that_is_told_before_the_first_token_leaves_it_owed():
    generation = accepted()
    generation.handed_over(1, "p")
    assert generation.worker_lost("p") == [
        Send("d", Cancel("r", 1)),
        Place(job(2, 0), frozenset({"p"}), split=True),
    ]


def test_leaving_before_a_route_is_found_tells_nobody():
    generation = Generation(fresh(0))
    generation.start()
    assert generation.cancel() == [End()]


def test_no_route():
    generation, error = Generation(fresh(0)), Unavailable("nobody")
    generation.start()
    assert generation.unroutable(1, error) == [End(error)]


def test_a_bad_request_is_not_tried_again():
    generation = placed()
    cancel, end = generation.failed("p", failure(1, FailureKind.BAD_REQUEST))
    assert cancel == Send("d", Cancel("r", 1))
    assert isinstance(end.error, BadRequest)
    assert (end.error.message, end.error.param, end.error.code) == ("why", "prompt", "c")


def test_it_gives_up_after_so_many_attempts():
    generation = accepted(route=WHOLE)
    for epoch in range(1, FRUITLESS):
        (place,) = generation.failed("m", failure(epoch))
        assert isinstance(place, Place)
        generation.routed(epoch + 1, WHOLE)
    (end,) = generation.worker_lost("m")
    assert isinstance(end.error, Unavailable)
    assert "worker m was lost" in end.error.message


EVENTS = {
    "routed": lambda g: g.routed(1, SPLIT),
    "unroutable": lambda g: g.unroutable(1, Unavailable("late")),
    "accepted": lambda g: g.accepted(1, IDS),
    "output": lambda g: g.output(last(1, 0)),
    "handed over": lambda g: g.handed_over(1, "p"),
    "failed": lambda g: g.failed("d", failure(1)),
    "worker lost": lambda g: g.worker_lost("d"),
}


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_after_the_end_every_event_is_ignored(event):
    generation = accepted()
    generation.cancel()
    assert event(generation) == []
    generation.check_integrity()


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_words_about_an_older_attempt_are_ignored(event):
    generation = accepted()
    generation.failed("p", failure(1))
    generation.routed(2, WHOLE)
    assert event(generation) == []
    generation.check_integrity()


def test_a_choice_that_is_not_the_attempts_is_ignored():
    assert accepted(0).output(out(1, 0, choice=1)) == []


# ── phases ──────────────────────────────────────────────────────────────────────────────────────


def phase_and_owner(generation: Generation, epoch: int = 1):
    attempt = generation.attempts[epoch]
    return attempt.phase, attempt.owner


def test_a_split_attempt_passes_its_phases_and_the_kv_has_one_owner_in_each():
    generation = Generation(fresh(0))
    generation.start()
    assert phase_and_owner(generation) == (Phase.QUEUED, None)
    generation.routed(1, SPLIT)
    assert phase_and_owner(generation) == (Phase.PREFILLING, "p")
    generation.output(out(1, 0))
    assert phase_and_owner(generation) == (Phase.STAGED, "p")
    generation.handed_over(1, "p")
    assert phase_and_owner(generation) == (Phase.DECODING, "d")


def test_a_whole_attempt_is_never_staged():
    generation = accepted(route=WHOLE)
    generation.output(out(1, 0))
    assert phase_and_owner(generation) == (Phase.DECODING, "m")


def test_a_replay_is_staged_by_its_own_first_token():
    generation = accepted()
    generation.output(out(1, 0))
    generation.worker_lost("d")
    generation.routed(2, SPLIT)
    generation.output(out(2, 1))
    assert phase_and_owner(generation, 2) == (Phase.STAGED, "p")
    generation.output(out(2, 2))
    assert phase_and_owner(generation, 2) == (Phase.DECODING, "d")


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (lambda g: g.output(last(1, 0)), Outcome.FINISHED),
        (lambda g: g.cancel(), Outcome.CANCELLED),
        (lambda g: g.failed("p", failure(1, FailureKind.BAD_REQUEST)), Outcome.REFUSED),
        (lambda g: g.unroutable(1, Unavailable("nobody")), Outcome.REFUSED),
    ],
)
def test_outcomes(end, outcome):
    generation = accepted()
    assert generation.outcome is None
    end(generation)
    generation.cancel()  # too late
    assert generation.outcome is outcome


# ── replays ─────────────────────────────────────────────────────────────────────────────────────


def test_before_the_prompt_is_accepted_a_replay_sends_it_as_it_came():
    assert placed().worker_lost("p") == [
        Send("d", Cancel("r", 1)),
        Place(job(2, 0, accepted=False), frozenset({"p"}), split=True),
    ]


def test_a_replay_carries_what_the_client_has():
    generation = accepted()
    generation.output(out(1, 0))
    generation.output(out(1, 1))
    assert generation.worker_lost("d") == [
        Send("p", Cancel("r", 1)),
        Place(job(2, 0, emitted=[0, 1], sent=10), frozenset({"d"}), split=True),
    ]


def test_what_came_before_its_turn_is_computed_again():
    generation = accepted()
    generation.output(out(1, 1))
    assert generation.worker_lost("p") == [
        Send("d", Cancel("r", 1)),
        Place(job(2, 0), frozenset({"p"}), split=True),
    ]
    generation.routed(2, WHOLE)
    assert generation.output(out(2, 0)) == [Deliver(out(2, 0))]


def test_choices_that_had_begun_go_on_alone_and_the_others_together():
    generation = accepted(0, 1, 2, 3, route=WHOLE)
    generation.output(out(1, 0, choice=1))
    generation.output(last(1, 0, choice=3))
    assert generation.worker_lost("m") == [
        Place(job(2, 1, emitted=[10], sent=5), frozenset({"m"}), split=True),
        Place(job(3, 0, 2), frozenset({"m"}), split=True),
    ]
    generation.check_integrity()


def test_a_lost_prefill_worker_does_not_matter_after_the_hand_over():
    generation = accepted()
    generation.output(out(1, 0))
    generation.handed_over(1, "p")
    assert generation.worker_lost("p") == []


@pytest.mark.parametrize(
    "event", [lambda g: g.worker_lost("p"), lambda g: g.failed("p", failure(1))], ids=str
)
def test_nor_once_the_decode_worker_speaks_though_nobody_said_that_it_was_handed_over(event):
    generation = accepted(0, 1)
    generation.output(out(1, 0))
    generation.output(out(1, 0, choice=1))
    generation.output(out(1, 1))
    assert event(generation) == []
    assert generation.output(out(1, 2)) == [Deliver(out(1, 2))]
    assert generation.cancel() == [Send("d", Cancel("r", 1)), End()]


def test_but_it_does_while_a_first_token_is_missing():
    generation = accepted(0, 1)
    generation.output(out(1, 0))
    generation.output(out(1, 1))
    cancel, *places = generation.worker_lost("p")
    assert cancel == Send("d", Cancel("r", 1))
    assert [place.job.choices for place in places] == [(0,), (1,)]


def test_an_attempt_that_gave_a_token_counts_as_a_new_beginning():
    generation, emitted = accepted(route=WHOLE), 0
    for epoch in range(1, 4 * FRUITLESS):
        if epoch % FRUITLESS == 1:
            generation.output(out(epoch, emitted))
            emitted += 1
        (place,) = generation.failed("m", failure(epoch))
        assert isinstance(place, Place)
        generation.routed(epoch + 1, WHOLE)


def test_however_many_tokens_it_gives_there_is_a_last_attempt():
    """A request that kills whoever gives it a token must not kill everybody."""
    generation = accepted(route=WHOLE)
    for epoch in range(1, MOST_ATTEMPTS + 1):
        generation.output(out(epoch, epoch - 1))
        (*_, after) = generation.failed("m", failure(epoch))
        generation.routed(epoch + 1, WHOLE)
    assert isinstance(after.error, Unavailable)


def test_a_worker_that_holds_nothing_of_it_may_be_lost():
    assert accepted().worker_lost("q") == []


def test_after_a_failed_hand_over_it_is_not_split_again():
    assert accepted().failed("p", failure(1, FailureKind.HANDOFF)) == [
        Send("d", Cancel("r", 1)),
        Place(job(2, 0), NOBODY, split=False),
    ]


def test_a_worker_with_an_error_of_its_own_is_avoided():
    assert accepted(route=WHOLE).failed("m", failure(1)) == [
        Place(job(2, 0), frozenset({"m"}), split=True)
    ]


def test_one_lost_worker_replays_every_attempt_on_it():
    generation = accepted(0, 1, route=WHOLE)
    generation.output(out(1, 0))
    generation.worker_lost("m")
    generation.routed(2, Route("n"))
    generation.routed(3, Route("n"))
    assert generation.worker_lost("n") == [
        Place(job(4, 0, emitted=[0], sent=5), frozenset({"m", "n"}), split=True),
        Place(job(5, 1), frozenset({"m", "n"}), split=True),
    ]


def test_the_last_attempt_of_one_choice_ends_the_others_too():
    generation = accepted(0, 1, route=WHOLE)
    generation.output(out(1, 0))
    generation.worker_lost("m")  # from here on two attempts: 2 and 3
    generation.routed(2, Route("n"))
    generation.routed(3, Route("o"))
    for epoch in (2, *range(4, FRUITLESS + 2)):
        generation.failed("n", failure(epoch))
        generation.routed(epoch + (2 if epoch == 2 else 1), Route("n"))
    *cancels, end = generation.worker_lost("n")
    assert cancels == [Send("o", Cancel("r", 3))]
    assert isinstance(end.error, Unavailable)


def test_the_last_attempt_of_one_choice_ends_others_that_the_same_loss_has_hit():
    generation = accepted(0, 1, route=WHOLE)
    generation.output(out(1, 0))
    generation.worker_lost("m")
    for epoch in (2, *range(4, FRUITLESS + 2)):  # choice 0 begins its last attempt, before ...
        generation.failed("n", failure(epoch))
    generation.failed("n", failure(3))  # ... choice 1 begins its second
    for epoch in (FRUITLESS + 2, FRUITLESS + 3):
        generation.routed(epoch, Route("n"))
    *cancels, end = generation.worker_lost("n")
    assert cancels == [Send("n", Cancel("r", FRUITLESS + 3))]
    assert isinstance(end.error, Unavailable)
    generation.check_integrity()
