"""The way from one set of workers to another: exact, ordered, and without a gap."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="the planner is the extra `plan`")

from scheduler.messages import Role
from scheduler.problem import Bucket, Column, Limit, Problem
from scheduler.shortfall import unserved
from scheduler.switching import Running, Step, switch

M, P, D = Role.MIXED, Role.PREFILL, Role.DECODE


def column(name, gpu, role, rate, gpus=1):
    return Column(
        name=name, model="m", gpu=gpu, gpus=gpus, role=role, price=1.0, capacity={"b": rate}
    )


COLUMNS = {
    each.name: each
    for each in (
        column("small prefill", "small", P, 2.0),
        column("small decode", "small", D, 3.0),
        column("small mixed", "small", M, 1.0),
        column("big prefill", "big", P, 8.0),
        column("big decode", "big", D, 9.0),
        column("big mixed", "big", M, 4.0),
    )
}


def problem(rate):
    return Problem((Bucket("b", "m", rate),), tuple(COLUMNS.values()))


def load(rate):
    asked = problem(rate)
    known = {}

    def left(replicas):
        key = tuple(sorted(replicas.items()))
        return known.setdefault(key, unserved(asked, replicas))

    return left


def within(gpu, gpus):
    limit = Limit(gpu, gpus)
    return lambda replicas: (
        sum(n * COLUMNS[c].gpus for c, n in replicas.items() if limit.covers(COLUMNS[c])) <= gpus
    )


def anything(replicas):
    return True


def workers(**counts):
    """`small_mixed=2` as workers that are ready."""
    return [
        Running(f"{name} {number}", name.replace("_", " "))
        for name, count in counts.items()
        for number in range(count)
    ]


def carried_out(running, stages, asked=None):
    """The columns at the end, and the least that was ready during any stage's steps."""
    exists = {worker.name: worker for worker in running}
    worst = asked(ready(exists)) if asked else 0.0
    for stage in stages:
        for step in stage:
            if step.action in ("flip", "drain"):
                assert exists[step.worker].state != "draining"
                exists[step.worker] = Running(step.worker, step.column, "draining")
        if asked:
            worst = max(worst, asked(ready(exists)))
        for step in stage:
            if step.action == "stop":
                assert exists.pop(step.worker).state != "ready"
            elif step.action in ("flip", "start"):
                exists[step.worker] = Running(step.worker, step.column)
    assert all(worker.state != "draining" for worker in exists.values())
    return Counter(worker.column for worker in exists.values()), worst


def ready(exists):
    return Counter(worker.column for worker in exists.values() if worker.state == "ready")


# ── tables ──────────────────────────────────────────────────────────────────────────────────────


def test_nothing_to_change_is_no_stage():
    assert switch(workers(small_mixed=2), {"small mixed": 2}, COLUMNS, load(2), anything) == ()


def test_a_substitute_is_ready_before_what_it_replaces_is_drained_and_stopped():
    assert switch(workers(small_mixed=1), {"big mixed": 1}, COLUMNS, load(1), anything) == (
        (Step("start", "big mixed #0", "big mixed"),),
        (Step("drain", "small_mixed 0", "small mixed"),),
        (Step("stop", "small_mixed 0", "small mixed"),),
    )


def test_a_role_is_flipped_rather_than_a_machine_rented():
    running = workers(small_prefill=2, small_decode=1)
    assert switch(running, {"small prefill": 1, "small decode": 2}, COLUMNS, load(2), anything) == (
        (Step("flip", "small_prefill 0", "small decode"),),
    )


def test_a_flip_that_would_leave_a_gap_waits_for_the_machines_that_are_rented_anyway():
    running = workers(small_prefill=2, small_decode=1)
    wanted = {"small prefill": 1, "small decode": 2, "big mixed": 1}
    assert switch(running, wanted, COLUMNS, load(3), anything) == (
        (Step("start", "big mixed #0", "big mixed"),),
        (Step("flip", "small_prefill 0", "small decode"),),
    )


def test_a_flip_that_would_leave_a_gap_becomes_a_start_and_a_stop():
    running = workers(big_prefill=1, big_decode=1, small_mixed=1)
    wanted = {"big mixed": 2, "small mixed": 1}
    stages = switch(running, wanted, COLUMNS, load(5), anything)
    assert [step.action for stage in stages for step in stage] == ["start", "flip", "drain", "stop"]
    assert carried_out(running, stages, load(5)) == (Counter(wanted), 0.0)


def test_without_room_for_a_substitute_the_least_harmful_step_says_what_it_costs():
    running = workers(big_prefill=1, big_decode=1)
    stages = switch(running, {"big mixed": 2}, COLUMNS, load(6), within("big", 2))
    assert [[(step.action, step.short) for step in stage] for stage in stages] == [
        [("flip", 6.0)],
        [("flip", 0.0)],
    ]


def test_a_limit_makes_room_by_what_is_safe_first():
    running = workers(small_mixed=3)
    stages = switch(
        running, {"small prefill": 1, "small decode": 1}, COLUMNS, load(1), within("small", 3)
    )
    assert [[step.action for step in stage] for stage in stages] == [
        ["flip", "flip"],
        ["drain"],
        ["stop"],
    ]


def test_a_machine_that_is_no_longer_wanted_before_it_is_ready_is_stopped_at_once():
    running = [*workers(small_mixed=1), Running("late", "small mixed", "starting", 5.0)]
    assert switch(running, {"small mixed": 1}, COLUMNS, load(1), anything) == (
        (Step("stop", "late", "small mixed"),),
    )


def test_who_is_on_its_way_is_waited_for_before_another_is_drained():
    running = [*workers(small_mixed=1), Running("late", "big mixed", "starting")]
    stages = switch(running, {"big mixed": 1}, COLUMNS, load(1), anything)
    assert stages[0] == (Step("start", "late", "big mixed"),)
    assert [stage[0].action for stage in stages] == ["start", "drain", "stop"]


def test_the_youngest_is_drained():
    running = [Running("old", "small mixed", since=1.0), Running("young", "small mixed", since=9.0)]
    stages = switch(running, {"small mixed": 1}, COLUMNS, load(1), anything)
    assert [step.worker for stage in stages for step in stage] == ["young", "young"]


def test_who_drains_already_is_stopped_and_not_counted():
    running = [*workers(small_mixed=1), Running("leaving", "small mixed", "draining")]
    assert switch(running, {"small mixed": 2}, COLUMNS, load(1), anything) == (
        (Step("start", "small mixed #0", "small mixed"),),
        (Step("stop", "leaving", "small mixed"),),
    )


# ── laws ────────────────────────────────────────────────────────────────────────────────────────

SETS = st.fixed_dictionaries({name: st.integers(0, 3) for name in COLUMNS})
STATES = st.sampled_from(["ready", "ready", "ready", "starting", "draining"])


@st.composite
def fleets(draw):
    counts = draw(SETS)
    return [
        Running(f"{name} {number}", name, draw(STATES), draw(st.integers(0, 9)))
        for name, count in counts.items()
        for number in range(count)
    ]


@settings(max_examples=60, deadline=None)
@given(fleets(), SETS, st.integers(1, 12))
def test_every_list_of_steps_ends_in_exactly_what_is_wanted_and_never_serves_less_meanwhile(
    running, wanted, rate
):
    asked = load(rate)
    stages = switch(running, wanted, COLUMNS, asked, anything)
    end, worst = carried_out(running, stages, asked)
    assert end == +Counter(wanted)
    now = asked(Counter(worker.column for worker in running if worker.state == "ready"))
    assert worst <= max(now, asked(wanted)) + 1e-6
    assert all(step.short == 0 for stage in stages for step in stage)


@settings(max_examples=60, deadline=None)
@given(fleets(), SETS)
def test_where_no_load_is_in_the_way_no_machine_is_rented_that_a_flip_can_make(running, wanted):
    stages = switch(running, wanted, COLUMNS, lambda replicas: 0.0, anything)
    there = {worker.name for worker in running}
    rented = [
        step
        for stage in stages
        for step in stage
        if step.action == "start" and step.worker not in there
    ]
    kept = machines(Counter(worker.column for worker in running if worker.state != "draining"))
    assert len(rented) == (machines(wanted) - kept).total()


def machines(replicas):
    counted = Counter()
    for name, count in replicas.items():
        counted[COLUMNS[name].machine] += count
    return counted
