"""Mixture of experts of the library: routing, products by expert, and the sums of each row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference, reference_quant
from kernels.buffers import Routing
from kernels.program import Pool, Program

quick = settings(max_examples=15, deadline=None)
EPS = 1e-5
KINDS = {"Q4_0": 32, "Q4_1": 32, "Q8_0": 32, "Q4_K": 256, "Q6_K": 256}  # columns of a block


@dataclass(frozen=True)
class Layer:
    """Packed matrices of each expert, and what they mean, float32."""

    norm: np.ndarray  # [D]
    router: np.ndarray  # [experts, D]
    packed: dict[str, list]
    weights: dict[str, list[torch.Tensor]]
    used: int
    sum_to_one: bool

    @property
    def hidden(self):
        return self.router.shape[1]

    @property
    def ffn(self):
        return self.packed["down"][0].inputs


@pytest.fixture(scope="session")
def layer(random_matrix):
    def make(kind, experts, used, hidden, ffn, seed=0, sum_to_one=True):
        rng = np.random.default_rng(seed)
        dims = {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
        packed, weights = {}, {}
        for at, (name, (outputs, inputs)) in enumerate(dims.items()):
            pairs = [
                random_matrix(kind, outputs, inputs, 100 * at + seed + e) for e in range(experts)
            ]
            packed[name] = [matrix for matrix, _ in pairs]
            weights[name] = [torch.from_numpy(w) for _, w in pairs]
        return Layer(
            rng.normal(1, 0.2, hidden).astype(np.float32),
            rng.normal(0, 0.1, (experts, hidden)).astype(np.float32),
            packed,
            weights,
            used,
            sum_to_one,
        )

    return make


def rows_of(count, width, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    x[:, seed % width] *= 20  # an outlier in each row
    return x


def compute(run, pool, layer, x, before=np.nan):
    """What the operations leave: the routing, and out [T, D], added to `before` if it is a number.

    Every buffer is poisoned; that of the copies' sums is read again only where it was written.
    """
    hidden, ffn, used = layer.hidden, layer.ffn, layer.used

    def add(program):
        source, normed = program.floats(hidden), program.acts(hidden)
        copies, inner = program.acts(hidden, used), program.acts(ffn, used)
        gate_up, out = program.floats(2 * ffn, used), program.floats(hidden, used)
        result = program.floats(hidden)
        source.data[:], result.data[:] = x, before
        program.norm(source, layer.norm, EPS, normed)
        matrix = layer.router * layer.norm
        routing = program.route(source, matrix, EPS, used, sum_to_one=layer.sum_to_one)
        for array in (routing.chosen, routing.weights):
            array[:] = -1
        program.spread(normed, routing, copies)
        gate, up = gate_up.columns(0, ffn), gate_up.columns(ffn, 2 * ffn)
        program.expert_matmul(layer.packed["gate"], copies, routing, gate)
        program.expert_matmul(layer.packed["up"], copies, routing, up, wait=False)
        program.silu_mul(gate_up, inner)
        program.expert_matmul(layer.packed["down"], inner, routing, out)
        program.combine(out, routing, result, add=bool(np.isfinite(before)))
        return routing, result.data

    return run(pool, len(x), add)


def normed(layer, x):
    return reference.rms_norm(torch.from_numpy(x), torch.from_numpy(layer.norm), EPS)


def route(run, pool, x, norm, router, used, sum_to_one):
    """(chosen, weights) of rows x [T, D]."""

    def add(program):
        source = program.floats(x.shape[1])
        source.data[:] = x
        routing = program.route(source, router * norm, EPS, used, sum_to_one=sum_to_one)
        routing.chosen[:] = routing.weights[:] = -1
        return routing

    routing = run(pool, len(x), add)
    return routing.chosen, routing.weights


@quick
@given(
    rows=st.integers(1, 6),
    experts=st.integers(1, 40),
    groups=st.integers(1, 6),
    sum_to_one=st.booleans(),
    data=st.data(),
)
def test_rows_go_to_their_likeliest_experts(pool, run, rows, experts, groups, sum_to_one, data):
    used, seed = data.draw(st.integers(1, experts)), data.draw(st.integers(0, 99))
    x, norm = rows_of(rows, 32 * groups, seed), rows_of(1, 32 * groups, seed + 1)[0]
    router = rows_of(experts, 32 * groups, seed + 2) / (32 * groups)
    chosen, weights = route(run, pool, x, norm, router, used, sum_to_one)
    normed = reference.rms_norm(torch.from_numpy(x), torch.from_numpy(norm), EPS)
    expected = reference.route(normed @ torch.from_numpy(router).t(), used, sum_to_one)
    order = expected[1].argsort(-1)
    assert np.array_equal(chosen, expected[1].gather(-1, order))
    assert np.allclose(weights, expected[0].gather(-1, order), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("sum_to_one", "share"), [(True, 1 / 2), (False, 1 / 5)])
def test_of_equals_the_first_are_chosen_and_large_logits_are_no_trouble(
    pool, run, sum_to_one, share
):
    x, router = np.ones((1, 32), np.float32), np.zeros((5, 32), np.float32)
    chosen, weights = route(run, pool, x, x[0], router, 2, sum_to_one)
    assert chosen.tolist() == [[0, 1]]
    assert np.allclose(weights, share)
    router[3] = 1e4
    chosen, weights = route(run, pool, x, x[0], router, 2, sum_to_one)
    assert chosen.tolist() == [[0, 3]]
    assert weights.tolist() == [[0, 1]]


@quick
@given(
    kind=st.sampled_from(sorted(KINDS)),
    rows=st.integers(1, 30),
    experts=st.integers(1, 5),
    blocks=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    add=st.booleans(),
    data=st.data(),
)
def test_a_row_gets_the_weighted_sum_of_its_experts(
    pool, run, layer, kind, rows, experts, blocks, add, data
):
    used, seed = data.draw(st.integers(1, experts)), data.draw(st.integers(0, 99))
    hidden, ffn = (KINDS[kind] * count for count in blocks)
    made = layer(kind, experts, used, hidden, ffn, seed)
    x = rows_of(rows, hidden, seed)
    before = np.float32(3 if add else np.nan)
    routing, out = compute(run, pool, made, x, before)
    pairs = zip(made.weights["gate"], made.weights["up"], strict=True)
    expected = reference_quant.experts(
        normed(made, x),
        torch.from_numpy(routing.weights),
        torch.from_numpy(routing.chosen).long(),
        [torch.cat(pair) for pair in pairs],
        made.weights["down"],
    ).numpy()
    error = (out - (3 if add else 0) - expected) / expected.std()
    # An activation that falls to the other side of a rounding step is off by a 127th at most.
    assert np.sqrt(np.square(error).mean()) < 0.005


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q6_K"])
def test_a_row_is_the_same_in_any_company_and_on_any_threads(pool, two_threads, run, layer, kind):
    made = layer(kind, 6, 2, 256, 256)
    x = rows_of(150, 256)
    _, together = compute(run, pool, made, x)
    assert np.array_equal(compute(run, two_threads, made, x)[1], together)
    for first, last in [(0, 1), (3, 5), (16, 31), (77, 150)]:
        assert np.array_equal(compute(run, pool, made, x[first:last])[1], together[first:last])


def test_many_layers_on_many_threads_are_computed_alike_each_time(instruction_set, run, layer):
    """A thread that is late counts an operation's parts while others are layers ahead."""
    made, x = layer("Q4_0", 8, 2, 64, 32), rows_of(5, 64)
    program = Program(Pool(4, instruction_set), len(x))
    source = program.floats(64)
    normed, copies, inner = program.acts(64), program.acts(64, 2), program.acts(32, 2)
    gate_up, out = program.floats(64, 2), program.floats(64, 2)
    for number in range(40):
        program.norm(source, made.norm, EPS, normed)
        router = np.roll(made.router, number, 0) * made.norm
        routing = program.route(source, router, EPS, 2, sum_to_one=True)
        program.spread(normed, routing, copies)
        program.expert_matmul(made.packed["gate"], copies, routing, gate_up.columns(0, 32))
        program.expert_matmul(
            made.packed["up"], copies, routing, gate_up.columns(32, 64), wait=False
        )
        program.silu_mul(gate_up, inner)
        program.expert_matmul(made.packed["down"], inner, routing, out)
        program.combine(out, routing, source, add=True)
    found = set()
    for _ in range(20):
        source.data[:] = x
        program.run([0] * len(x), [], [])
        found.add(source.data.tobytes())
    assert len(found) == 1
    assert np.isfinite(source.data).all()


@pytest.mark.parametrize("used", [0, 5])
def test_rows_use_some_of_the_experts(used):
    with pytest.raises(ValueError, match=f"uses {used} of 4"):
        Routing(1, 4, used)


def test_a_matrix_for_each_expert_and_widths_that_meet(layer):
    made = layer("Q4_0", 3, 1, 64, 32)
    program = Program(Pool(1), 2)
    routing = program.route(program.floats(64), made.router, EPS, 1, sum_to_one=True)
    with pytest.raises(ValueError, match="2 matrices for 3 experts"):
        program.expert_matmul(made.packed["up"][:2], program.acts(64), routing, program.floats(32))
    with pytest.raises(ValueError, match="columns"):
        program.expert_matmul(made.packed["up"], program.acts(64), routing, program.floats(64))
