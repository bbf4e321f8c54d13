"""Shares for unlike boxes, by prediction: what bounds a token, and who is left out."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from motley import main
from scheduler.errors import SetupError
from workers.group.plan import BETTER, SUM_S, Box, Demand, choose, load_of, make_plan
from workers.group.sum_cost import predicted_s
from workers.weights.random_model import SHAPES

SHAPE = SHAPES["llama3-8b"]
DEMAND = Demand(SHAPE, 0.5625, 0.5625, 2.0 * SHAPE.kv_bytes_per_token(1), 4096, 64)
WHOLE = load_of(DEMAND, SHAPE)
GB = 10**9


def box(name="a", rate=5e9, latency_s=1e-4, link=125e6, **fields):
    return Box(name, rate, latency_s, link, **fields)


def parts(plan):
    return {rank.name: rank.part for rank in plan.ranks}


# ── shares ──────────────────────────────────────────────────────────────────────────────────────


def test_boxes_alike_share_alike_and_a_token_is_half_the_work_and_the_sums():
    plan = make_plan(DEMAND, [box("a"), box("b")])
    sum_s = SUM_S + predicted_s("direct", 2, 4 * SHAPE.hidden, 1e-4, 125e6)
    sums_s = 2 * SHAPE.layers * sum_s
    assert (plan.way, plan.sums_s) == ("direct", pytest.approx(sums_s))
    assert plan.token_s == pytest.approx(WHOLE.weights / 2 / 5e9 + sums_s, rel=0.01)
    assert plan.bound == "compute"


def test_a_box_twice_as_fast_takes_twice_as_much():
    plan = make_plan(DEMAND, [box("a", 10e9), box("b", 5e9)])
    assert parts(plan)["a"] == pytest.approx(2 / 3, abs=0.01)


def test_a_box_of_little_memory_takes_what_fits():
    capped = make_plan(DEMAND, [box("a"), box("b", cap=GB)])
    assert parts(capped)["b"] < 0.25
    assert capped.ranks[1].resident_bytes <= GB
    assert capped.ranks[1].streamed_bytes == 0


def test_a_disk_lets_it_take_more_as_long_as_it_reads_no_longer_than_others_compute():
    fast = make_plan(DEMAND, [box("a"), box("b", cap=GB, disk_bytes_per_s=2e9)])
    assert parts(fast)["b"] > 0.4
    assert fast.ranks[1].streamed_bytes > GB
    assert fast.ranks[1].disk_s <= 1.02 * fast.token_s
    slow = make_plan(DEMAND, [box("a", cap=2 * GB, disk_bytes_per_s=2e8)])
    assert (slow.bound, slow.token_s) == ("disk", pytest.approx(slow.ranks[0].streamed_bytes / 2e8))


def test_a_token_reads_the_experts_that_it_chooses_and_no_others():
    many = {"experts": 16, "expert_ffn": 1024, "expert_layers": tuple(range(32)), "ffn": 0}
    boxes = [box("a", 50e9, cap=2 * GB, disk_bytes_per_s=1e9)]
    read = {}
    for used in (2, 8, 16):
        shape = replace(SHAPE, experts_used=used, **many)
        (rank,) = make_plan(replace(DEMAND, shape=shape), boxes).ranks
        read[used] = rank.streamed_bytes
        assert rank.disk_s == pytest.approx(rank.streamed_bytes / 1e9)
    assert read[2] < read[8] < read[16]
    assert load_of(replace(DEMAND, shape=shape), shape).reread == 1


def test_far_boxes_are_bound_by_their_sums():
    assert make_plan(DEMAND, [box("a", 50e9), box("b", 50e9, 0.02)]).bound == "sums"


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([box("a", cap=GB)], "does not fit into 1 ranks: .* rank a lacks .* MiB. Raise memory"),
        ([box("a", cap=GB), box("b", cap=GB // 4)], "rank b lacks"),
        ([box("a", cap=GB // 8, disk_bytes_per_s=1e9)], "rank a lacks"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_rank_and_what_it_lacks(boxes, message):
    with pytest.raises(SetupError, match=message):
        choose(DEMAND, boxes)


# ── leaving boxes out ───────────────────────────────────────────────────────────────────────────


def test_a_box_that_makes_a_token_slower_is_left_out():
    choice = choose(DEMAND, [box("a"), box("b"), box("wifi", latency_s=0.02)])
    assert choice.plan.left_out == ("wifi",)
    assert choice.plan.names == ("a", "b")
    times = {other.left_out: other.token_s for other in choice.alternatives}
    assert times["wifi",] < times[()]
    assert times["b",] > times["wifi",]


def test_several_are_left_out_where_losing_one_helps_nothing():
    far = [box(name, latency_s=0.05) for name in ("b", "c", "d")]
    assert choose(DEMAND, [box("a"), *far]).plan.names == ("a",)


def test_a_box_is_kept_where_the_model_needs_its_memory():
    boxes = [box("a", cap=3 * GB), box("wifi", latency_s=0.02, cap=3 * GB)]
    choice = choose(DEMAND, boxes)
    assert choice.plan.names == ("a", "wifi")
    assert "rank a lacks" in choice.alternatives[1].reason


BOXES = st.builds(
    box,
    rate=st.floats(1e8, 2e10),
    latency_s=st.floats(1e-5, 2e-2),
    link=st.floats(1e6, 1e9),
    cap=st.none() | st.integers(GB // 4, 8 * GB),
    disk_bytes_per_s=st.just(0.0) | st.floats(1e8, 3e9),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(BOXES, min_size=1, max_size=5))
def test_no_rank_is_over_its_cap_and_no_comparison_is_much_faster(boxes):
    boxes = [replace(one, name=str(number)) for number, one in enumerate(boxes)]
    try:
        choice = choose(DEMAND, boxes)
    except SetupError:
        return
    plan = choice.plan
    assert plan.ranks[0].name == "0"
    assert sorted((*plan.names, *plan.left_out)) == [one.name for one in boxes]
    caps = {one.name: one.cap for one in boxes}
    for rank in plan.ranks:
        assert caps[rank.name] is None or rank.resident_bytes <= caps[rank.name] + 1
        assert max(rank.compute_s + plan.sums_s, rank.disk_s) <= plan.token_s
    times = [other.token_s for other in choice.alternatives if other.token_s]
    assert plan.token_s <= BETTER * min(times)


# ── the command ─────────────────────────────────────────────────────────────────────────────────


def test_the_command_prints_a_plan_as_json(capsys):
    words = ["group", "plan", "random:llama3-8b", "--link", "1Gbit,0.1ms", "--json"]
    words += ["--box", "a,compute=5G", "--box", "b,compute=5G,cap=2GB,disk=1GB,latency=20ms"]
    assert main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["plan"]["left_out"] == ["b"]
    assert [other["left_out"] for other in answer["alternatives"]] == [[], ["b"]]


def test_the_table_says_what_bounds_a_token_and_whom_to_leave_out(capsys):
    words = ["group", "plan", "random:llama3-8b", "--box", "a,compute=5G"]
    assert main([*words, "--box", "b,compute=5G,latency=20ms"]) == 0
    shown = capsys.readouterr().out
    assert "bound by compute" in shown
    assert "Faster without b: leave them out" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--box", "a"], "--box a: say how fast it is"),
        (["--box", "a,compute=5"], "is not a number above 0 with one of M, G"),
        (["--box", "a,speed=5G"], "no field 'speed'; known are compute"),
        (["--box", "a,compute=1G", "--link", "1Gbit"], "--link: latency"),
        (["--box", "a,compute=1G", "--box", "a,compute=1G"], "two have the same name"),
    ],
)
def test_what_is_not_a_box_is_refused_by_name(capsys, words, message):
    assert main(["group", "plan", "random:llama3-8b", *words]) == 2
    assert message in capsys.readouterr().err
