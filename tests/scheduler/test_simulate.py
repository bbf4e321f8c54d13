"""The simulator: it conserves requests and blocks, and its engine is the live one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.batching import Batcher, Sequence
from scheduler.blocks import BlockPool
from scheduler.capacity import Slo
from scheduler.cost import CostModel, StepShape
from scheduler.errors import SetupError, Unavailable
from scheduler.fleet import SAMPLE
from scheduler.messages import Role
from scheduler.policies import POLICIES
from scheduler.request import Job, Limits, Prompt, Sampling
from scheduler.routing import priced
from scheduler.simulate import Simulation, simulate
from scheduler.simulate_coarse import simulate_coarse
from scheduler.simulate_engine import Batch
from scheduler.simulate_load import Process, draw, parse_process
from scheduler.simulate_router import Router
from scheduler.simulate_spec import Timing, WorkerSpec
from scheduler.workload import Arrival, dispersion, read_trace

COST = CostModel(0.02, 2e-4, 2e-8, 2e-4, 2e-7, "assumed", kv_token_bytes=1e5)
INSTANT = Timing(network_s=0.0, tokenise_s=0.0)


def worker(name: str, role: Role = Role.MIXED, **fields) -> WorkerSpec:
    return WorkerSpec(name, role, COST, **{"kv_tokens": 16384, **fields})


MIXED = [worker("m0"), worker("m1")]
SPLIT = [worker("p0", Role.PREFILL), worker("d0", Role.DECODE)]


def requests(count: int, rate: float, seed: int = 0, most: int = 1500) -> list[Arrival]:
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    inputs = rng.integers(1, most, count).tolist()
    outputs = (1 + rng.geometric(0.02, count)).tolist()
    return [Arrival(*each) for each in zip(times, inputs, outputs, strict=True)]


def same(left, right) -> None:
    for field in ("first", "last", "busy"):
        np.testing.assert_allclose(getattr(left, field), getattr(right, field), rtol=1e-9)
    for field in ("refused", "prefilled", "decoded", "outputs"):
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field))
    assert left.preempted == right.preempted


# ── the engine ──────────────────────────────────────────────────────────────────────────────────


class OneByOne(Batch):
    """Never runs steps at once."""

    def alike(self) -> int:
        return 0


def step_by_step(workers, load, timing):
    simulation = Simulation(workers, load, timing)
    for each in simulation.workers:
        pool = BlockPool(each.batch.pool.size)
        each.batch = OneByOne(
            pool,
            max_step_tokens=each.spec.max_step_tokens,
            max_sequences=each.spec.max_sequences,
            pace=each.batch.pace,
        )
    return simulation.run()


@pytest.mark.parametrize("workers", [MIXED, SPLIT], ids=["mixed", "split"])
@pytest.mark.parametrize("fields", [{}, {"kv_tokens": 4000}, {"max_sequences": 4}])
@pytest.mark.parametrize("rate", [0.5, 6.0])
def test_runs_of_like_steps_are_what_steps_one_by_one_are(workers, fields, rate):
    specs = [worker(each.name, each.role, **fields) for each in workers]
    load = requests(120, rate)
    same(simulate(specs, load), step_by_step(specs, load, Timing()))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 3), st.integers(1, 700), st.integers(1, 60)), min_size=1, max_size=25
    ),
    st.integers(60, 300),
    st.integers(1, 8),
    st.sampled_from([None, 0.05]),
)
def test_that_holds_for_any_load_that_fits_or_not(drawn, blocks, sequences, bound):
    load = [Arrival(*each) for each in sorted(drawn)]
    specs = [
        worker(each.name, each.role, kv_tokens=16 * blocks, max_sequences=sequences)
        for each in (*MIXED[:1], *SPLIT)
    ]
    if bound:
        specs = [worker("m", max_sequences=sequences, itl_bound_s=bound)]
    same(simulate(specs, load), step_by_step(specs, load, Timing()))


def live_times(load: list[Arrival], kv_tokens: int) -> tuple[list[float], list[float]]:
    """The same load through a plain live Batcher with real tokens: (first, last) of each."""
    batcher = Batcher(BlockPool(kv_tokens // 16))
    first, last = [0.0] * len(load), [0.0] * len(load)
    sequences: dict[Sequence, int] = {}
    now, at = 0.0, 0
    while at < len(load) or batcher.has_work:
        if not batcher.has_work:
            now = max(now, load[at].at)
        while at < len(load) and load[at].at <= now:
            request = load[at]
            ids = [at * 10_000 + token for token in range(request.input)]
            job = Job(f"{at}", 1, "", Prompt(ids=ids), Sampling(seed=0), Limits(), created=0.0)
            sequence = Sequence(job, 0, ids, request.input, request.output)
            sequences[sequence] = at
            batcher.add(sequence)
            at += 1
        step = batcher.next_step()
        now += COST.predict(StepShape.of(step))
        batcher.advance(step)
        for piece in step.slices:
            if not piece.choices:
                continue
            piece.sequence.tokens.append(7)
            number = sequences[piece.sequence]
            first[number] = first[number] or now
            if piece.sequence.position == piece.sequence.max_tokens:
                last[number] = now
                batcher.remove(piece.sequence)
    return first, last


@pytest.mark.parametrize("kv_tokens", [4000, 16384])
def test_a_simulated_worker_is_the_live_batcher_with_the_models_clock(kv_tokens):
    load = requests(80, 1.5)
    outcome = simulate([worker("m", kv_tokens=kv_tokens)], load, INSTANT)
    first, last = live_times(load, kv_tokens)
    np.testing.assert_allclose(outcome.first, first, rtol=1e-9)
    np.testing.assert_allclose(outcome.last, last, rtol=1e-9)


# ── conservation ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [MIXED, SPLIT, [*MIXED, *SPLIT]], ids=["mixed", "split", "all"])
def test_every_request_ends_once_served_or_refused(workers):
    tight = [worker(each.name, each.role, kv_tokens=2000) for each in workers]
    load = requests(200, 20.0, most=3000)
    outcome = simulate(tight, load)
    larger = np.array([request.input + request.output > 2000 for request in load])
    np.testing.assert_array_equal(outcome.refused, larger)
    np.testing.assert_array_equal(np.isnan(outcome.last), outcome.refused)
    served = ~outcome.refused
    assert (outcome.first[served] > outcome.at[served]).all()
    assert (outcome.last[served] >= outcome.first[served]).all()


def test_no_worker_holds_more_blocks_than_it_has_and_in_the_end_none():
    specs = [worker(each.name, each.role, kv_tokens=3000) for each in (*MIXED, *SPLIT)]
    seen = []

    def watching(demand, lanes, now, draw):
        for each in simulation.workers:
            each.batch.check_integrity()
            seen.append(each.batch.pool.size - each.batch.pool.free)
        return priced(demand, lanes, now, draw)

    simulation = Simulation(specs, requests(150, 10.0, most=2000), Timing(), watching)
    simulation.run()
    assert max(seen) > 100
    assert all(each.batch.pool.free == each.batch.pool.size for each in simulation.workers)


def test_the_router_forgets_what_has_ended():
    specs = [*MIXED, *SPLIT]
    counts = []

    class Counting(Router):
        def place(self, number, request, now):
            placed = super().place(number, request, now)
            counts.append(sum(worker.running for worker in self.placer.fleet))
            return placed

    simulation = Simulation(specs, requests(100, 1.0), Timing())
    simulation._router = router = Counting(specs)
    simulation.run()
    assert max(counts) > 1
    assert all(worker.idle and not worker.moving for worker in router.placer.fleet)


def test_a_choice_among_many_workers_hears_only_those_that_it_looks_at():
    heard = []

    def emitted(worker, now):
        heard.append(worker)
        return {}

    router = Router([worker(f"m{at}") for at in range(500)], emitted=emitted)
    for number in range(20):
        router.place(number, Arrival(0.0, 100, 10), now=1.0 + number)
    assert 20 < len(heard) <= 20 * SAMPLE


def test_the_same_requests_give_the_same_outcome():
    load = requests(150, 4.0)
    same(simulate([*MIXED, *SPLIT], load), simulate([*MIXED, *SPLIT], load))


# ── time ────────────────────────────────────────────────────────────────────────────────────────


def test_one_request_alone_takes_its_prefill_and_its_steps():
    outcome = simulate(MIXED[:1], [Arrival(1.0, 900, 11)], INSTANT)
    assert outcome.ttft[0] == pytest.approx(COST.prefill_s(900))
    steps = sum(COST.decode_step_s(1, 901 + number) for number in range(10))
    assert outcome.tpot[0] * 10 == pytest.approx(steps)


def test_a_split_request_waits_for_its_kv_cache_and_hides_it_where_layers_are_pushed_early():
    slow = COST.slower(1)
    link = 1e5 * 900 / 0.3  # the whole cache takes 0.3 s
    cost = CostModel(*slow.coefficients, "assumed", 1e5, link)
    specs = [
        WorkerSpec("p", Role.PREFILL, cost, 16384),
        WorkerSpec("d", Role.DECODE, cost, 16384),
    ]
    load = [Arrival(0.0, 900, 2)]
    always = POLICIES["least-load"]
    plain = simulate(specs, load, Timing(0.0, 0.0, overlap=False), always)
    hidden = simulate(specs, load, INSTANT, always)
    assert plain.ttft[0] == hidden.ttft[0] == pytest.approx(cost.prefill_s(900))
    step = cost.decode_step_s(1, 901)
    assert plain.tpot[0] == pytest.approx(0.3 + step)
    assert hidden.tpot[0] == pytest.approx(0.3 - cost.prefill_s(900) + step)
    assert plain.transferred == 900 * 1e5


def test_a_prompt_that_begins_like_an_earlier_one_is_computed_from_there():
    load = [Arrival(0.0, 1600, 2, (1, 2, 3, 4)), Arrival(60.0, 1600, 2, (1, 2, 9, 10))]
    outcome = simulate(MIXED[:1], load, INSTANT)
    assert outcome.ttft[1] == pytest.approx(COST.prefill_s(1600, cached=1024))


def test_a_policy_may_refuse():
    def nobody(demand, lanes, now, draw):
        raise Unavailable("full", retry_after=1)

    outcome = simulate(MIXED, requests(5, 1.0), policy=nobody)
    assert outcome.refused.all()
    assert not outcome.met(10.0, 10.0).any()


@pytest.mark.parametrize(
    ("workers", "load", "said"),
    [
        ([], [Arrival(0.0, 1, 1)], "workers: none"),
        (MIXED, [], "requests: none"),
        (MIXED, [Arrival(1.0, 1, 1), Arrival(0.5, 1, 1)], r"requests\[1\].at"),
        (MIXED, [Arrival(0.0, 0, 1)], r"requests\[0\]"),
        ([*MIXED, MIXED[0]], [Arrival(0.0, 1, 1)], "one name"),
        ([worker("m", kv_tokens=8)], [Arrival(0.0, 1, 1)], r"workers\[0\].kv_tokens"),
    ],
)
def test_what_cannot_be_simulated_is_named(workers, load, said):
    with pytest.raises(SetupError, match=said):
        simulate(workers, load)


def test_decode_workers_do_not_take_the_prompts_that_prefill_workers_have_room_for():
    """Both routes' paces are those of the decode worker, which prompts make slow: a way in only."""
    cost = CostModel(0.02, 2e-4, 2e-8, 2e-4, 2e-7, "assumed", kv_token_bytes=1e5)
    workers = [WorkerSpec(f"p{at}", Role.PREFILL, cost, 60_000) for at in range(6)]
    workers += [WorkerSpec(f"d{at}", Role.DECODE, cost, 90_000) for at in range(2)]
    load = conversation(8.0, seed=1, count=800)
    met = [
        simulate(workers, load, policy=POLICIES[policy], slo=slo).met(1.0, 0.07).mean()
        for policy, slo in (("priced", Slo(1000, 70)), ("least-load", None))
    ]
    assert met[0] > met[1]


# ── the fast form ───────────────────────────────────────────────────────────────────────────────

SLO = Slo(ttft_ms=1200, tpot_ms=60)
SLOWER = [WorkerSpec(f"s{at}", Role.MIXED, COST.slower(2), 60_000) for at in range(3)]
POOLS = {
    "mixed": ([worker(f"m{at}", kv_tokens=60_000) for at in range(4)], (2.0, 4.0, 5.5)),
    "split": (
        [worker(f"p{at}", Role.PREFILL, kv_tokens=60_000) for at in range(2)]
        + [worker(f"d{at}", Role.DECODE, kv_tokens=60_000) for at in range(2)],
        (1.0, 3.0),
    ),
    "unlike": ([worker("m0", kv_tokens=60_000), *SLOWER], (1.0, 2.0)),
}


def conversation(rate: float, seed: int, count: int = 1500) -> list[Arrival]:
    sizes = read_trace(Path(__file__).parents[2] / "loadtest/traces/azure2023_conv_0_1200s.csv")
    return draw(sizes, Process(), np.random.default_rng(seed), count=count, rate=rate)


@pytest.mark.parametrize("pool", POOLS)
def test_the_fast_form_attains_what_the_steps_do_within_two_points(pool):
    workers, rates = POOLS[pool]
    for rate in rates:
        load = conversation(rate, seed=int(rate))
        met = [
            run(workers, load, slo=SLO).met(SLO.ttft_ms / 1e3, SLO.tpot_ms / 1e3).mean()
            for run in (simulate, simulate_coarse)
        ]
        assert met[1] == pytest.approx(met[0], abs=0.02), rate
        assert met[0] > 0.75, "the comparison is of a load that is served"


@pytest.mark.parametrize("workers", [MIXED, SPLIT, [*MIXED, *SPLIT]], ids=["mixed", "split", "all"])
def test_the_fast_form_ends_every_request_too(workers):
    tight = [worker(each.name, each.role, kv_tokens=2000) for each in workers]
    outcome = simulate_coarse(tight, requests(300, 20.0, most=3000))
    np.testing.assert_array_equal(np.isnan(outcome.last), outcome.refused)
    served = ~outcome.refused
    assert served.any()
    assert (outcome.first[served] > outcome.at[served]).all()
    assert (outcome.last[served] >= outcome.first[served]).all()
    again = simulate_coarse(tight, requests(300, 20.0, most=3000))
    np.testing.assert_array_equal(outcome.last, again.last)


def test_the_fast_form_times_one_request_as_the_steps_do():
    load = [Arrival(1.0, 900, 11)]
    fast, steps = simulate_coarse(MIXED[:1], load), simulate(MIXED[:1], load)
    assert fast.ttft[0] == pytest.approx(steps.ttft[0])
    assert fast.tpot[0] == pytest.approx(steps.tpot[0])


def test_hundreds_of_workers_share_the_load_by_samples():
    workers = [worker(f"m{at}", kv_tokens=60_000) for at in range(200)]
    outcome = simulate_coarse(workers, conversation(200.0, seed=1), slo=SLO)
    assert outcome.met(SLO.ttft_ms / 1e3, SLO.tpot_ms / 1e3).mean() > 0.95
    assert np.bincount(outcome.decoded, minlength=200).max() < 40


# ── requests ────────────────────────────────────────────────────────────────────────────────────

SIZES = [Arrival(float(at), 10 + at, 5) for at in range(50)]


@pytest.mark.parametrize("text", ["poisson", "trace", "gamma:3", "on-off:5,15"])
def test_every_process_keeps_its_rate_and_is_the_same_for_a_seed(text):
    process = parse_process(text)
    rng = np.random.default_rng(1)
    drawn = draw(SIZES, process, rng, count=20_000, rate=7.0)
    assert len(drawn) / drawn[-1].at == pytest.approx(7.0, rel=0.06)
    again = draw(SIZES, process, np.random.default_rng(1), count=20_000, rate=7.0)
    assert drawn == again


def test_bursty_processes_are():
    def measured(process: Process) -> float:
        rng = np.random.default_rng(1)
        return dispersion([a.at for a in draw(SIZES, process, rng, count=20_000, rate=7.0)])

    assert measured(Process("poisson")) < 1.3
    assert measured(Process("gamma", cv=3.0)) > 4
    assert measured(Process("on-off", on_s=5.0, off_s=15.0)) > 10


@pytest.mark.parametrize(
    "text", ["often", "gamma:0", "on-off:1", "poisson:3", "gamma:x", "trace:1"]
)
def test_a_process_that_is_none_is_named(text):
    with pytest.raises(SetupError, match="arrivals"):
        parse_process(text)
