"""DistServe's search: its simulation against one that takes every step, and the known example."""

from __future__ import annotations

import argparse
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numpy", reason="the planner is the extra `plan`")

import numpy as np

from scheduler import goodput_command
from scheduler.errors import SetupError
from scheduler.goodput import (
    Phase,
    Requests,
    Target,
    attained,
    draw_requests,
    run_decode,
    run_prefill,
    search,
)
from scheduler.profiles import StepProfile

STEPS = StepProfile(
    model="m",
    gpu="g",
    tp=1,
    prefill=(10.0, 0.1, 0.0),
    decode=(5.0, 0.001, 0.5),
    decode_large=(4.0, 0.001, 0.6),
    large_from=3,
    overhead=(1.0, 0.0),
    provenance="assumed",
    source="a test",
)


def phase(pp=1, kv_tokens=10**6):
    return Phase(STEPS, pp, kv_tokens)


def step_by_step(phase, ready, inputs, outputs):
    """The same queue, one token at a time."""
    last, now, free = list(ready), 0.0, phase.kv_tokens
    waiting = [at for at in np.argsort(ready, kind="stable").tolist() if outputs[at] > 1]
    running: dict[int, int] = {}  # request -> tokens it has
    while waiting or running:
        while waiting and ready[waiting[0]] <= now:
            need = inputs[waiting[0]] + outputs[waiting[0]]
            if running and need > free:
                break
            running[waiting.pop(0)] = 1
            free -= need
        if not running:
            now = max(now, ready[waiting[0]])
            continue
        context = sum(inputs[at] + tokens for at, tokens in running.items())
        now += STEPS.decode_ms(len(running), context) + STEPS.overhead_ms(context)
        for at in list(running):
            running[at] += 1
            if running[at] == outputs[at]:
                last[at] = now
                free += inputs[at] + outputs[at]
                del running[at]
    return last


requests = st.lists(
    st.tuples(st.floats(0, 500), st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=25
)


@settings(max_examples=200, deadline=None)
@given(requests, st.sampled_from([200, 700, 10**6]))
def test_summed_steps_are_the_steps(asked, kv_tokens):
    ready, inputs, outputs = (list(column) for column in zip(*asked, strict=True))
    one = phase(kv_tokens=kv_tokens)
    expected = step_by_step(one, ready, inputs, outputs)
    assert run_decode(one, ready, inputs, outputs) == pytest.approx(expected, abs=1e-6)


def test_prefill_batches_what_waits_and_keeps_the_order():
    # 10 + 0.1·100 + 1 of overhead; the two that came meanwhile go together.
    assert run_prefill(phase(), [0, 5, 15, 100], [100, 100, 200, 50]) == [21, 62, 62, 116]


def test_prefill_batches_hold_no_more_than_memory():
    assert run_prefill(phase(kv_tokens=250), [0, 5, 15], [100, 100, 200]) == [21, 42, 73]


def test_stages_overlap_but_a_prompt_passes_all():
    # Two stages of 10 ms each: the second prompt starts when the first leaves stage one.
    assert run_prefill(phase(pp=2), [0, 1], [100, 100]) == [21, 32]


def test_a_single_token_needs_no_decode():
    assert run_decode(phase(), [7.0], [10], [1]) == [7.0]


def test_joint_attainment_is_never_above_either():
    draws = draw_requests([(100, 20), (2000, 5)], 200, np.random.default_rng(0))
    for rate in (1, 5, 20):
        outcome = attained(phase(), phase(), draws, rate, Target(150, 8))
        assert outcome.joint <= min(outcome.ttft, outcome.tpot)
        assert outcome.joint >= outcome.ttft + outcome.tpot - 1 - 1e-12


def test_search_finds_the_edge_to_within_the_step():
    draws = [Requests((0.0, *[1.0] * 99), (100,) * 100, (2,) * 100)]
    target = Target(ttft_ms=21.5, tpot_ms=1e6)  # evenly spaced, 21 ms each: no queue below 47.6/s
    (found,) = search([(phase(), phase())], draws, target, max_rate=64, step=0.1)
    assert found.rate == pytest.approx(1000 / 21, rel=0.02)
    assert found.attained.ttft >= 0.9


def options(*arguments):
    parser = argparse.ArgumentParser()
    goodput_command.add_arguments(parser)
    return parser.parse_args(list(arguments))


@pytest.mark.parametrize("seed", ["0", "100", "200"])
def test_distserves_example_within_one_grid_step(seed):
    """Published: 1.56 requests/s per GPU, prefill TP 2 and decode TP 1, steps of 5/32."""
    answer = goodput_command.run(
        options("--attainment", "marginal", "--seed", seed), time.perf_counter
    )
    rates = {(str(p.prefill), str(p.decode)): p.rate_per_gpu for p in answer.placements}
    step = 5 / 32 + 1e-9
    assert rates["TP2", "TP1"] == pytest.approx(1.5625, abs=step)
    assert max(rates.values()) == pytest.approx(rates["TP2", "TP1"], abs=step)
    assert all(pair[0] == "TP2" for pair, rate in rates.items() if rate > 1.2)
    assert answer.seconds / answer.simulations < 4 / 50  # theirs takes 4-9 s


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--ttft-ms", "-1"), "--ttft-ms"),
        (("--step", "nan"), "--step"),
        (("--share", "1.5"), "--share"),
        (("--gpu", "A1000"), "A1000"),
        (("--model", "opt-1t"), "opt-1t"),
        (("--gpus", "1"), "--gpus"),
        (("--workload", "/nowhere.csv"), "/nowhere.csv"),
    ],
)
def test_bad_options_are_named(arguments, named):
    with pytest.raises(SetupError, match=named):
        goodput_command.run(options(*arguments), time.perf_counter)
