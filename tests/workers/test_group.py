"""A group of ranks beside the same model on one: tiny models, real sockets, members as threads."""

from __future__ import annotations

import threading
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from scheduler.batching import Batcher, Sequence, Slice
from scheduler.blocks import BlockPool, blocks_for
from scheduler.errors import SetupError
from scheduler.request import Job, Limits, Prompt, Sampling
from workers.engine import Engine
from workers.fake import FakeText
from workers.fast import FastRunner
from workers.group.demand import demand_of
from workers.group.member import run_member
from workers.group.plan import Box, load_of
from workers.group.runner import SETTLED_STEPS
from workers.group.shard_file import Manifest
from workers.native import NativeRunner
from workers.runner import CacheLost, Reading, Wishes
from workers.weights.checkpoint import open_checkpoint

# 4 query heads share 2 kv heads; the widths are those that the kernels take.
SHAPE = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 320}
BLOCKS = 12  # of the groups' caches


@pytest.fixture
def group(make_group):
    return make_group()


@pytest.fixture
def make_runner(group):
    """Makes the runner of a group: the weights of its ranks, rank 0's first."""
    return group.runner


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("Llama", **SHAPE)[1]


def job(tokens, **fields):
    return Job(
        id="job",
        epoch=0,
        model="",
        prompt=Prompt(ids=tokens),
        sampling=Sampling(seed=3, **({"temperature": 0.0} | fields)),
        limits=Limits(max_tokens=20),
        created=0.0,
    )


def sequence(tokens, **fields):
    blocks = list(range(blocks_for(len(tokens) + 16)))
    return Sequence(job(tokens, **fields), 0, list(tokens), len(tokens), 20, blocks=blocks)


PROMPT = [7 * i % 300 for i in range(37)]


def generate(runner, count=12, **fields):
    """A prompt in two chunks, then token after token."""
    s = sequence(PROMPT, **fields)
    runner.run([Slice(s, 0, 20)])
    s.tokens.append(runner.run([Slice(s, 20, len(PROMPT))])[0].token)
    for _ in range(count - 1):
        s.tokens.append(runner.run([Slice(s, len(s.tokens) - 1, len(s.tokens))])[0].token)
    return s.tokens[len(PROMPT) :]


# ── the same tokens, however the model is cut ───────────────────────────────────────────────────


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (3.0, 1.0), (1, 2, 1), (1, 1, 1, 1)])
def test_a_group_says_what_one_worker_says(make_runner, folder, weights):
    alone = NativeRunner(open_checkpoint(folder), BLOCKS, 1)
    group = make_runner(folder, weights)
    assert generate(group) == generate(alone)
    assert generate(group, temperature=1.0) == generate(alone, temperature=1.0)


@pytest.mark.parametrize("way", ["star", "direct", "two-shot", "ring"])
def test_sums_may_travel_any_way(make_runner, folder, way):
    alone = NativeRunner(open_checkpoint(folder), BLOCKS, 1)
    assert generate(make_runner(folder, (1, 1, 1), way=way)) == generate(alone)


@pytest.mark.parametrize("way", ["direct", "two-shot", None])
def test_int8_sums_cost_little(make_runner, folder, way):
    options = {"mode": "fast", "quantize": "int8"}
    truth = np.array(score(NativeRunner(open_checkpoint(folder, "int8"), BLOCKS, 1)))
    group = score(make_runner(folder, (1, 1), way=way, sums="int8", **options))
    assert np.abs(group - truth).mean() < 0.1


def test_layers_that_are_read_anew_for_every_step_change_no_token(make_runner, group, folder):
    alone = NativeRunner(open_checkpoint(folder), BLOCKS, 1)
    group.means = replace(group.means, memory_cap=1 << 40)
    assert generate(make_runner(folder, (1, 1))) == generate(alone)


def test_a_cap_changes_no_number_of_a_fast_rank(make_runner, group, folder):
    without = score(make_runner(folder, mode="fast", quantize="int8"))
    group.means = replace(group.means, memory_cap=1 << 40)
    assert score(make_runner(folder, mode="fast", quantize="int8")) == without


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16}),
    ],
)
@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_experts_may_have_a_cap(make_runner, group, tiny_model, mode, family, config):
    _, folder = tiny_model(family, **SHAPE, num_experts_per_tok=2, **config)
    options = {"mode": mode, "quantize": "int8"}
    without = generate(make_runner(folder, **options))
    group.means = replace(group.means, memory_cap=1 << 40)
    assert generate(make_runner(folder, **options)) == without


@pytest.mark.parametrize("cap", [None, 1 << 40])
def test_a_rank_without_the_model_computes_by_what_rank_0_sends(make_runner, group, folder, cap):
    options = {"mode": "fast", "quantize": "int8"}
    with_model = score(make_runner(folder, (1, 2), **options))
    group.lose("rank-1")
    group.means = replace(group.means, memory_cap=cap)
    group.join("poor", 2.0, None, True)
    group.leader.wait_for(1, 20)
    assert score(make_runner(folder, **options)) == with_model


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_any_family_can_be_cut(make_runner, tiny_model, family, config):
    _, folder = tiny_model(family, **SHAPE, **config)
    alone = NativeRunner(open_checkpoint(folder), BLOCKS, 1)
    assert generate(make_runner(folder, (1, 1, 1))) == generate(alone)


@pytest.mark.parametrize(
    ("family", "quantize", "kv_dtype", "error"),
    [
        ("Llama", "int4", "float16", 0.1),
        ("Llama", "int8", "float16", 0.1),
        ("Llama", "int8", "int8", 0.1),
        ("Mixtral", "int4", "float16", 0.3),  # rounding also makes rows go to other experts
    ],
)
def test_fast_parts_hold_the_same_quantised_weights(
    make_runner, tiny_model, family, quantize, kv_dtype, error
):
    """Sums are made in another order, so activations round differently, but no worse."""
    config = {"num_local_experts": 4} if family == "Mixtral" else {}
    _, folder = tiny_model(family, **SHAPE, **config)
    truth = np.array(score(NativeRunner(open_checkpoint(folder, quantize), BLOCKS, 1)))
    alone = score(FastRunner(open_checkpoint(folder, quantize), BLOCKS, 1, 64, kv_dtype))
    group = score(make_runner(folder, (2, 1), mode="fast", quantize=quantize, kv_dtype=kv_dtype))
    assert np.abs(group - truth).mean() < 1.5 * np.abs(alone - truth).mean() < error


def score(runner):
    """Logprobs of a prompt's tokens, which every rank helps to compute."""
    s = sequence(PROMPT)
    s.read = True
    reading = Reading(top=0, embed=True)
    runner.run([Slice(s, 0, len(PROMPT))], Wishes(readings={s: reading}))
    assert np.linalg.norm(np.frombuffer(reading.embedding, "<f4")) == pytest.approx(1)
    return [sampled.logprob for sampled in reading.scores]


def test_prompts_are_scored_over_all_ranks(make_runner, folder):
    alone = NativeRunner(open_checkpoint(folder), BLOCKS, 1)
    assert score(make_runner(folder, (1, 1))) == pytest.approx(score(alone), abs=1e-4)


def test_blocks_are_copied_on_every_rank(make_runner, folder):
    runner = make_runner(folder, (1, 1))
    s = sequence(PROMPT)
    s.tokens.append(runner.run([Slice(s, 0, len(PROMPT))])[0].token)
    following = runner.run([Slice(s, len(PROMPT), len(PROMPT) + 1)])
    pairs = [(block, block + 6) for block in s.blocks]
    runner.cache.copy(pairs)
    s.blocks = [target for _, target in pairs]
    assert runner.run([Slice(s, len(PROMPT), len(PROMPT) + 1)]) == following


# ── ranks come and go ───────────────────────────────────────────────────────────────────────────


def test_shards_of_earlier_cuts_are_deleted(make_runner, folder, group):
    group.means = replace(group.means, memory_cap=1 << 40)
    runner = make_runner(folder, (1, 1), mode="fast", quantize="int8")

    def cuts():
        manifests = group.means.shards.path.glob("*/manifest.json")
        shapes = [msgspec.json.decode(path.read_bytes(), type=Manifest).shape for path in manifests]
        return sorted(shape.ffn for shape in shapes)

    assert cuts() == [96, 96]
    group.lose("rank-1")
    with pytest.raises(CacheLost):
        generate(runner)
    assert {96, 192} == set(cuts())  # what rank 0 had stays for a while
    group.threads.pop().join(10)
    group.join("rank-1", 3.0)
    group.leader.wait_for(1, 20)
    with pytest.raises(CacheLost):
        generate(runner, 2 * SETTLED_STEPS)
    assert cuts() == [32, 160, 192]


@pytest.fixture
def make_engine(make_runner, folder):
    def make(weights):
        runner = make_runner(folder, weights)
        return Engine(runner, FakeText(200), Batcher(BlockPool(BLOCKS)), speculate=False)

    return make


def answer(engine, between=lambda count: None):
    """A job's tokens; `between` is called with their number after each step."""
    engine.add(job(PROMPT), PROMPT)
    ids = []
    while engine.has_work:
        for output in engine.step().outputs:
            ids += output.ids
        engine.check_integrity()
        between(len(ids))
    return ids


def test_an_answer_goes_on_when_a_rank_is_lost_in_its_middle(make_engine, group):
    engine = make_engine((1, 1, 1))
    unbroken = answer(engine)
    assert len(unbroken) > 5

    def lose(count):
        if count == 4 and engine.runner.ranks == 3:
            group.lose("rank-1")

    assert answer(engine, lose) == unbroken
    assert engine.runner.ranks == 2


def test_a_rank_that_comes_joins_without_a_restart(make_engine, group):
    engine = make_engine((1, 1))
    unbroken = answer(engine)

    def grow(count):
        if count == 3 and len(group.stops) == 1:
            group.join("rank-2")
            group.leader.wait_for(2, 20)

    assert answer(engine, grow) == unbroken
    assert engine.runner.ranks == 3


def test_a_step_of_a_broken_group_says_that_its_cache_is_lost(make_runner, folder, group):
    runner = make_runner(folder, (1, 1))
    group.lose("rank-1")
    with pytest.raises(CacheLost):
        generate(runner)
    assert runner.ranks == 1
    assert len(generate(runner)) == 12


def measured(name, rate=1e4, **fields):
    return Box(name, rate, 0.0, 1e12, **fields)


def test_a_slow_rank_is_a_spare_until_the_model_needs_its_memory(make_runner, folder, group):
    whole = open_checkpoint(folder, "int8")
    demand = demand_of(whole, "int8", "fast", "float16", BLOCKS * 16, 64)
    needed = load_of(demand, whole.shape)
    first = measured("rank 0", cap=int(needed.streamable + needed.resident) - 1)
    for name, rate in (("good", 1e4), ("slow", 10.0), ("slower", 1.0)):
        group.join(name, None, measured(name, rate))
    group.leader.wait_for(3, 20)
    runner = make_runner(folder, [None], first, mode="fast", quantize="int8")

    def ranks():
        return [member.hello.name for member in runner._members]

    assert ranks() == ["good"]
    together = generate(runner)
    group.lose("slower")
    assert generate(runner) == together  # nobody minds
    group.lose("good")
    with pytest.raises(CacheLost):
        generate(runner)
    assert ranks() == ["slow"]
    assert len(generate(runner)) == 12


def test_ranks_that_the_model_has_no_part_for_are_spares(make_runner, folder, group):
    """4 heads of 16 numbers are two blocks."""
    fast = {"mode": "fast", "quantize": "int8"}
    runner = make_runner(folder, (1, 1, 1, 1), **fast)
    assert runner.ranks == 2
    together = generate(runner)
    group.lose(runner._members[0].hello.name)
    with pytest.raises(CacheLost):
        generate(runner)
    assert runner.ranks == 2
    assert generate(runner) == together


def test_measured_ranks_of_an_exact_group_share_by_their_rates(make_runner, folder, group):
    group.join("half", None, measured("half", 1e4))
    group.leader.wait_for(1, 20)
    runner = make_runner(folder, [None], measured("rank 0", 2e4))
    first, second = (share.ffn.count for share in runner._shares)
    assert first > second
    assert generate(runner) == generate(NativeRunner(open_checkpoint(folder), BLOCKS, 1))


def test_ranks_that_never_come_are_asked_for(group):
    with pytest.raises(SetupError, match="0 of 2 ranks joined"):
        group.leader.wait_for(2, 0.01)


def test_a_rank_of_another_model_is_refused(group):
    config = replace(group.config("rank-1"), model="another")
    with pytest.raises(SetupError, match="serves m, not another"):
        run_member(config, threading.Event())
