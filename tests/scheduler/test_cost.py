"""The cost of a step: predicted from what is in it, fitted and learned from steps that ran."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from scheduler.batching import Batcher, Sequence, Slice, Step
from scheduler.blocks import BlockPool
from scheduler.cost import CostModel, StepShape, check, context_sum, of_rates
from scheduler.cost_fit import Learner, fit, of_profile
from scheduler.hardware import read_catalogue
from scheduler.messages import Rates
from scheduler.request import Job, Limits, Prompt, Sampling
from scheduler.roofline import roofline

TRUE = CostModel(0.02, 1e-3, 2e-7, 2e-3, 1e-6, "measured", 46080.0, 1e9)
JOB = Job("a", 1, "m", Prompt(ids=[]), Sampling(seed=0), Limits(), created=0.0)


def sequence(tokens: int) -> Sequence:
    return Sequence(JOB, 0, list(range(tokens)), tokens, 100)


def shapes(rng: np.random.Generator, count: int) -> list[StepShape]:
    """What steps of a busy mixed worker look like: decodes always, prompts sometimes."""
    found = []
    for _ in range(count):
        batch = int(rng.integers(0, 32))
        tokens = int(rng.integers(1, 512)) if rng.random() < 0.4 or not batch else 0
        start = int(rng.integers(0, 2000))
        context = batch * int(rng.integers(100, 3000))
        found.append(StepShape(tokens, context_sum(start, start + tokens), batch, context))
    return found


def wrong(model: CostModel, truth: CostModel, rng: np.random.Generator) -> float:
    """The largest relative error over many steps."""
    return max(abs(model.predict(s) / truth.predict(s) - 1) for s in shapes(rng, 200))


# ── shapes ──────────────────────────────────────────────────────────────────────────────────────


def test_a_token_attends_to_itself_and_to_all_before_it():
    assert context_sum(0, 4) == 1 + 2 + 3 + 4
    assert context_sum(10, 12) == 11 + 12
    assert context_sum(7, 7) == 0


def test_the_shape_of_a_step_is_what_its_slices_hold():
    prompt, decode = sequence(40), sequence(9)
    step = Step((Slice(decode, 8, 9), Slice(prompt, 16, 40)), ())
    assert StepShape.of(step) == StepShape(24, context_sum(16, 40), 1, 9)


def test_drafted_tokens_are_rows_beside_the_sure_one():
    step = Step((Slice(sequence(9), 8, 9, draft=(1, 2)),), ())
    assert StepShape.of(step) == StepShape(2, 10 + 11, 1, 9)


def test_the_batchers_own_steps_have_the_shapes_that_they_compute():
    batcher = Batcher(BlockPool(64), max_step_tokens=32)
    batcher.add(sequence(40))
    first = batcher.next_step()
    batcher.advance(first)
    assert StepShape.of(first) == StepShape(32, context_sum(0, 32), 0, 0)
    assert StepShape.of(batcher.next_step()) == StepShape(8, context_sum(32, 40), 0, 0)


# ── predictions ─────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_costs_a_step_per_chunk_its_tokens_and_their_contexts():
    assert TRUE.prefill_s(1000, chunk=512) == pytest.approx(
        2 * 0.02 + 1000 * 1e-3 + 2e-7 * context_sum(0, 1000)
    )
    assert TRUE.prefill_s(1000, cached=900) == pytest.approx(
        0.02 + 100 * 1e-3 + 2e-7 * context_sum(900, 1000)
    )
    assert TRUE.prefill_s(1000, cached=1000) == 0


def test_a_decode_step_grows_with_its_sequences_and_their_contexts():
    assert TRUE.decode_step_s(4, 4000) == pytest.approx(0.02 + 4 * 2e-3 + 4000e-6)
    assert TRUE.decode_step_s(4, 4000) == TRUE.predict(StepShape(0, 0, 4, 4000))


def test_kv_takes_its_bytes_over_the_links_rate():
    assert TRUE.kv_s(1000) == pytest.approx(1000 * 46080 / 1e9)


def test_a_model_survives_the_wire_as_it_was():
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(TRUE), type=CostModel) == TRUE


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"token": -1e-9}, "worker.token"),
        ({"step": float("nan")}, "worker.step"),
        ({"link_bytes_s": 0.0}, "worker.link_bytes_s"),
        ({"step": 0.0, "token": 0.0, "sequence": 0.0}, "takes no time"),
    ],
)
def test_a_model_that_cannot_be_meant_names_what_is_wrong(changed, said):
    assert said in (check(msgspec.structs.replace(TRUE, **changed), "worker") or "")
    assert check(TRUE, "worker") is None


# ── where it comes from ─────────────────────────────────────────────────────────────────────────


def test_measured_rates_are_reproduced_where_they_were_measured():
    model = of_rates(Rates(prefill_tokens_per_s=500.0, decode_s_per_token=0.02))
    assert model.prefill_s(128) == pytest.approx(128 / 500)
    assert model.decode_step_s(1, 100) == pytest.approx(0.02)
    assert model.provenance == "measured"


def test_a_prompt_token_costs_something_even_where_a_lone_step_seems_to_cost_more_than_a_prompt():
    assert of_rates(Rates(1e6, 0.02)).token > 0


def test_a_fit_finds_the_coefficients_that_made_the_steps():
    rng = np.random.default_rng(1)
    model = fit([(s, TRUE.predict(s)) for s in shapes(rng, 100)])
    assert model.coefficients == pytest.approx(TRUE.coefficients, rel=1e-6)
    assert model.provenance == "fitted"


def test_a_fit_is_within_a_tenth_although_some_steps_were_held_up():
    rng = np.random.default_rng(2)
    steps = [
        (s, TRUE.predict(s) * rng.uniform(0.95, 1.05) * (10 if rng.random() < 0.05 else 1))
        for s in shapes(rng, 400)
    ]
    assert wrong(fit(steps), TRUE, rng) < 0.1


def test_no_coefficient_of_a_fit_is_negative_whatever_the_noise():
    rng = np.random.default_rng(3)
    for _ in range(20):
        steps = [(s, TRUE.predict(s) * rng.uniform(0.3, 3)) for s in shapes(rng, 12)]
        assert min(fit(steps).coefficients) >= 0


def test_a_roofline_is_a_line_and_so_is_its_cost_model():
    catalogue = read_catalogue()
    profile = roofline(catalogue.models["llama-3.1-8b"], catalogue.gpus["L4"], 1)
    model = of_profile(profile)
    shape = StepShape(0, 0, 32, 32 * 700)
    assert model.predict(shape) == pytest.approx(profile.decode_ms(32, 32 * 700) / 1e3, rel=0.01)
    assert model.prefill_s(1500, chunk=2048) == pytest.approx(
        profile.prefill_ms(1500, 1500**2) / 1e3, rel=0.01
    )
    assert model.provenance == "modelled"


def test_a_profile_with_a_bend_stays_within_a_fifth():
    for profile in read_catalogue().steps:
        model = of_profile(profile)
        for batch, each in ((1, 500), (16, 800), (64, 800), (120, 400)):
            ms = profile.decode_ms(batch, batch * each) + profile.overhead_ms(batch * each)
            assert model.decode_step_s(batch, batch * each) == pytest.approx(ms / 1e3, rel=0.2)


# ── learning ────────────────────────────────────────────────────────────────────────────────────


def taught(learner: Learner, truth: CostModel, rng: np.random.Generator, count: int) -> Learner:
    for shape in shapes(rng, count):
        learner.see(shape, truth.predict(shape) * rng.uniform(0.95, 1.05))
    return learner


def test_from_two_rates_the_whole_line_is_learned():
    rng = np.random.default_rng(4)
    learner = taught(Learner(of_rates(Rates(900.0, 0.024))), TRUE, rng, 600)
    assert wrong(learner.model, TRUE, rng) < 0.15
    assert learner.model.provenance == "fitted"


def test_a_worker_that_becomes_three_times_slower_is_known_within_twenty_steps():
    rng = np.random.default_rng(5)
    learner = taught(Learner(TRUE), TRUE, rng, 200)
    taught(learner, TRUE.slower(3), rng, 20)
    assert wrong(learner.model, TRUE.slower(3), rng) < 0.2


def test_one_that_only_decodes_while_it_is_throttled_is_known_to_prefill_slowly_too():
    rng = np.random.default_rng(6)
    learner = taught(Learner(TRUE), TRUE, rng, 200)
    throttled = TRUE.slower(2)
    for _ in range(40):
        shape = StepShape(0, 0, 8, 8000)
        learner.see(shape, throttled.predict(shape))
    assert learner.model.prefill_s(800) == pytest.approx(throttled.prefill_s(800), rel=0.25)


def test_long_decoding_does_not_unlearn_what_prompts_cost():
    rng = np.random.default_rng(7)
    learner = taught(Learner(TRUE), TRUE, rng, 100)
    for _ in range(5000):
        shape = StepShape(0, 0, 8, int(8 * rng.integers(100, 3000)))
        learner.see(shape, TRUE.predict(shape) * rng.uniform(0.95, 1.05))
    assert learner.model.prefill_s(800) == pytest.approx(TRUE.prefill_s(800), rel=0.25)
    taught(learner, TRUE, rng, 5)
    assert wrong(learner.model, TRUE, rng) < 0.3


def test_one_step_that_something_held_up_moves_little():
    rng = np.random.default_rng(8)
    learner = taught(Learner(TRUE), TRUE, rng, 200)
    shape = StepShape(0, 0, 8, 8000)
    learner.see(shape, 50 * TRUE.predict(shape))
    assert learner.model.predict(shape) < 1.3 * TRUE.predict(shape)


@pytest.mark.parametrize("period", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("cap", [0.5, 0.165])
def test_under_a_cpu_quota_the_pace_in_the_long_run_is_learned(cap, period):
    """Most steps run at full speed, and some wait for the next period."""
    rng, truth = np.random.default_rng(3), CostModel(2.4e-3, 5e-4, 0.0, 6e-4, 1e-6, "measured")
    learner, left = Learner(of_rates(Rates(1000.0, 0.003))), period * cap
    for _ in range(2000):
        batch = int(rng.integers(1, 4))
        step = StepShape(0, 0, batch, 150 * batch)
        if rng.random() < 0.06:
            step = StepShape(int(rng.integers(20, 300)), 0, batch, 150 * batch)
        seconds, work = 0.0, truth.predict(step)
        while work > left:
            seconds += left + period * (1 - cap)
            work, left = work - left, period * cap
        left -= work
        learner.see(step, seconds + work)
    capped, found = truth.slower(1 / cap), learner.model
    assert found.decode_step_s(2, 300) == pytest.approx(capped.decode_step_s(2, 300), rel=0.2)
    assert found.prefill_s(128) == pytest.approx(capped.prefill_s(128), rel=0.2)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_time_teaches_nothing(seconds):
    learner = Learner(TRUE)
    learner.see(StepShape(0, 0, 1, 10), seconds)
    assert learner.model == TRUE


def test_no_coefficient_is_ever_negative_whatever_the_steps_take():
    rng = np.random.default_rng(9)
    learner = Learner(TRUE)
    for shape in shapes(rng, 500):
        learner.see(shape, float(rng.exponential(0.1)))
        assert check(learner.model, "learned") is None
