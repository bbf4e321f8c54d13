"""Quantised weights and activations: the formats to the bit, products to float32 rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference_quant
from kernels.program import FORMATS, Matrix

ACT = np.dtype(
    [
        ("q", "i1", 32),
        ("d", "f4"),
        ("fine", "f4"),
        ("sum", "f4"),
        ("half", "f4", 2),
        ("rest", "i1", 32),
    ]
)
COLUMNS = {"Q4_0": 32, "Q4_1": 32, "Q8_0": 32, "Q4_K": 256, "Q6_K": 256}
quick = settings(max_examples=25, deadline=None)


def as_seen(acts, rows):
    """A buffer of activations as float64 [rows, width]."""
    groups = acts.data[:rows].view(ACT)
    rest = np.where(groups["fine"][..., None] > 0, groups["rest"].astype(float), 0.0)
    values = groups["q"] * groups["d"][..., None].astype(float)
    return (values + rest * groups["fine"][..., None]).reshape(rows, -1), groups


def activations(rows, width, seed):
    """Rows with outliers in some columns, as models have, and one row of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    x[:, rng.integers(0, width, 2)] *= 30
    x[rng.integers(0, rows)] *= 0 if rows > 1 else 1
    return x


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_weights_are_what_gguf_says_they_are(kind, random_matrix):
    for outputs in (1, 16, 37):
        matrix, weights = random_matrix(kind, outputs, 3 * COLUMNS[kind])
        assert np.array_equal(matrix.rows(0, outputs), weights)
        assert np.array_equal(matrix.rows(outputs - 1, 1), weights[-1:])


@pytest.mark.parametrize(
    ("kind", "growth"), [("Q4_0", 0), ("Q4_1", 0), ("Q8_0", 0), ("Q4_K", 4), ("Q6_K", 0)]
)
def test_packing_takes_no_more_memory_than_the_file(kind, growth, random_blocks):
    blocks = random_blocks(kind, 32, 512, 0)
    extra = Matrix(kind, 32, 512, blocks).data.nbytes - blocks.nbytes
    assert extra == growth * 32 * 512 // 256


def test_bytes_that_are_not_the_matrix_are_refused(random_blocks):
    blocks = random_blocks("Q4_0", 16, 64, 0)
    for kind, outputs, inputs in [("Q4_0", 17, 64), ("Q4_0", 16, 65), ("Q5_0", 16, 64)]:
        with pytest.raises(ValueError, match="in whole blocks"):
            Matrix(kind, outputs, inputs, blocks)


def test_rows_outside_the_matrix_are_refused(random_matrix):
    matrix, _ = random_matrix("Q8_0", 20, 32)
    with pytest.raises(IndexError):
        matrix.rows(19, 2)


@quick
@given(rows=st.integers(1, 9), groups=st.integers(1, 20), seed=st.integers(0, 1000))
def test_activations_are_quantised_as_the_reference_says(pool, run, rows, groups, seed):
    x = activations(rows, 32 * groups, seed)

    def add(program):
        source, out = program.floats(x.shape[1]), program.acts(x.shape[1])
        source.data[:] = x
        program.quantise(source, out)
        return out

    seen, acts = as_seen(run(pool, rows, add), rows)
    reference = reference_quant.quantised(torch.from_numpy(x)).numpy()
    step = np.where(acts["fine"] > 0, acts["fine"], acts["d"]).repeat(32, -1)
    assert (np.abs(seen - x) <= 0.501 * step + 1e-9).all()
    assert (np.abs(seen - reference) <= 1.001 * step + 1e-9).all()  # a tie may fall either way
    assert (np.abs(seen - reference) > 0.5 * step).mean() < 0.01
    halves = seen.reshape(rows, groups, 2, 16).sum(-1)
    assert np.allclose(acts["half"], halves, atol=1e-4 * np.abs(x).max())
    assert np.allclose(acts["sum"], halves.sum(-1), atol=1e-4 * np.abs(x).max())


def test_a_group_with_an_outlier_and_no_other_keeps_a_second_int8(pool, run):
    x = np.ones((1, 96), np.float32)
    x[0, 40] = 100

    def add(program):
        source, out = program.floats(96), program.acts(96)
        source.data[:] = x
        program.quantise(source, out)
        return out

    seen, acts = as_seen(run(pool, 1, add), 1)
    assert (acts["fine"][0] > 0).tolist() == [False, True, False]
    assert np.abs(seen - x).max() <= 100 / 127 / 254 / 2 * 1.001


@quick
@given(
    kind=st.sampled_from(sorted(FORMATS)),
    rows=st.integers(1, 40),
    outputs=st.integers(1, 70),
    blocks=st.integers(1, 3),
    add_to=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_products_are_the_sums_of_what_is_stored(
    pool, run, random_matrix, kind, rows, outputs, blocks, add_to, seed
):
    inputs = blocks * COLUMNS[kind]
    matrix, weights = random_matrix(kind, outputs, inputs, seed)
    x = activations(rows, inputs, seed)
    before = np.float32(3 if add_to else np.nan)

    def add(program):
        source, acts = program.floats(inputs), program.acts(inputs)
        wide = program.floats(outputs + 5)
        source.data[:] = x
        wide.data[:] = before
        program.quantise(source, acts)
        program.matmul(matrix, acts, wide.columns(3, outputs + 3), add=add_to)
        return acts, wide.data

    acts, wide = run(pool, rows, add)
    seen, _ = as_seen(acts, rows)
    expected = seen @ weights.T.astype(float) + (3 if add_to else 0)
    # The offset of unsigned weights is summed apart, so the bound has its size too.
    scale = np.abs(seen) @ np.abs(weights.T).astype(float) + 130 * np.abs(weights).max() * np.abs(
        seen
    ).max(-1, keepdims=True)
    assert (np.abs(wide[:, 3:-2] - expected) <= 2e-6 * scale + 1e-6).all()
    untouched = np.concatenate([wide[:, :3], wide[:, -2:]], axis=1)
    assert np.array_equal(untouched, np.full_like(untouched, before), equal_nan=True)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_is_the_same_in_any_company_and_on_any_threads(
    pool, two_threads, run, random_matrix, kind
):
    matrix, _ = random_matrix(kind, 150, 512)
    x = activations(150, 512, 1)

    def product(which, rows):
        def add(program):
            source, acts, out = program.floats(512), program.acts(512), program.floats(150)
            source.data[:] = rows
            program.quantise(source, acts)
            program.matmul(matrix, acts, out)
            return out.data

        return run(which, len(rows), add)

    together = product(pool, x)
    assert np.array_equal(product(two_threads, x), together)
    for first, last in [(0, 1), (3, 5), (16, 31), (77, 150)]:
        assert np.array_equal(product(pool, x[first:last]), together[first:last])
