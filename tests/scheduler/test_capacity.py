"""What a replica sustains: laws of the formulas, and the memory that a model needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.capacity import Slo, capacity, step_ms, tightest
from scheduler.hardware import read_catalogue
from scheduler.messages import Role
from scheduler.roofline import ERROR, roofline

CATALOGUE = read_catalogue()
STEPS = CATALOGUE.steps[0]  # OPT-13B on one A100
KV = 60_000
sizes = st.tuples(st.integers(1, 4000), st.integers(1, 2000))
roles = st.sampled_from(list(Role))
slos = st.builds(Slo, st.floats(30, 5000), st.floats(10, 300))


@given(sizes, slos)
def test_mixed_is_never_more_than_each_phase_alone(size, slo):
    mixed = capacity(STEPS, Role.MIXED, KV, size, slo)
    if mixed:
        prompt = STEPS.prefill_ms(size[0], size[0] ** 2) + STEPS.overhead_ms(size[0])
        assert mixed.rate < 1e3 / prompt
        alone = capacity(STEPS, Role.DECODE, KV, size, slo)
        assert alone
        assert mixed.rate < alone.rate


@given(sizes, slos, roles, st.floats(1, 3), st.integers(1, 4))
def test_more_time_or_memory_never_gives_less(size, slo, role, looser, memory):
    before = capacity(STEPS, role, KV, size, slo)
    slack = Slo(slo.ttft_ms * looser, slo.tpot_ms * looser)
    after = capacity(STEPS, role, KV * memory, size, slack)
    if before:
        assert after
        assert after.rate >= before.rate * (1 - 1e-9)


@given(sizes, slos, roles)
def test_what_is_promised_keeps_the_slo_and_fits(size, slo, role):
    found = capacity(STEPS, role, KV, size, slo)
    if found and role is not Role.PREFILL:
        batch = round(found.places)
        assert step_ms(STEPS, batch, size) <= slo.tpot_ms
        assert batch * sum(size) <= KV


@given(sizes, roles)
def test_the_tightest_slo_is_the_edge(size, role):
    edge = tightest(STEPS, role, KV, size)
    if edge is None:
        assert sum(size) > KV
        return
    ttft, tpot = edge
    assert capacity(STEPS, role, KV, size, Slo(ttft * 1.001 + 1e-6, tpot * 1.001 + 1e-6))
    assert not capacity(STEPS, role, KV, size, Slo(ttft * 0.99 - 1e-6, tpot * 0.99 - 1e-6))


@pytest.mark.parametrize(
    ("model", "gpu", "tp", "fits"),
    [
        ("llama-3.1-70b", "A100-80GB", 1, False),  # 141 GB of weights
        ("llama-3.1-70b", "A100-80GB", 2, True),
        ("llama-3.1-70b", "L40S", 2, False),
        ("llama-3.1-8b", "T4", 1, False),
        ("llama-3.1-8b", "L4", 1, True),
        ("smollm2-135m", "Small-box", 1, True),
    ],
)
def test_weights_must_fit_and_leave_room_for_kv(model, gpu, tp, fits):
    assert bool(CATALOGUE.models[model].kv_tokens(CATALOGUE.gpus[gpu], tp)) is fits


def test_kv_tokens_come_near_what_distserve_measured():
    """Its table says 66,144 and 163,008 tokens for OPT-13B on one and on two A100."""
    opt, a100 = CATALOGUE.models["opt-13b"], CATALOGUE.gpus["A100-80GB"]
    assert opt.kv_tokens(a100, 1) == pytest.approx(66_144, rel=0.2)
    assert opt.kv_tokens(a100, 2) == pytest.approx(163_008, rel=0.2)


def test_kv_heads_are_copied_beyond_their_number():
    llama = CATALOGUE.models["llama-3.1-70b"]
    assert llama.kv_token_bytes(16) == 2 * llama.kv_token_bytes(8)


@pytest.mark.parametrize("steps", CATALOGUE.steps, ids=lambda steps: f"{steps.model} x{steps.tp}")
def test_the_roofline_keeps_the_error_that_it_states(steps):
    model, gpu = CATALOGUE.models[steps.model], CATALOGUE.gpus[steps.gpu]
    guess = roofline(model, gpu, steps.tp)
    for tokens in (256, 512, 1024, 2048):
        fitted = steps.prefill_ms(tokens, tokens**2) + steps.overhead_ms(tokens)
        assert guess.prefill_ms(tokens, tokens**2) == pytest.approx(fitted, rel=ERROR)
    for batch in (1, 8, 32, 64):
        context = 800 * batch
        fitted = steps.decode_ms(batch, context) + steps.overhead_ms(context)
        assert guess.decode_ms(batch, context) == pytest.approx(fitted, rel=ERROR)


def test_every_price_is_dated_and_every_gpu_has_one():
    assert {offer.gpu for offer in CATALOGUE.offers} == set(CATALOGUE.gpus)
    assert all(offer.source and offer.date.year >= 2024 for offer in CATALOGUE.offers)
