from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as round_to_nearest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from scheduler.errors import SetupError
from workers.model import Model
from workers.weights.checkpoint import open_checkpoint
from workers.weights.quantise import KINDS, quantise

Q4_1, Q8_0 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
ORDINARY = st.floats(-1000, 1000, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


def values(stored):
    return dequantize(stored.data, stored.kind)


def normal(rows, columns, scale=0.02):
    return (np.random.default_rng(0).standard_normal((rows, columns)) * scale).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(np.float32, (3, 64), elements=ORDINARY))
def test_no_weight_moves_further_than_its_blocks_steps(weights):
    """Rounding moves a weight by half a step; float16 scales and minima add 2^-11 of the range."""
    blocks = weights.reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    moved = np.abs(values(quantise(weights, Q8_0)).reshape(-1, 32) - blocks)
    assert (moved <= largest / 127 * 0.57 + 1e-6).all()
    # The search may move single weights further, but never makes a block worse on the whole.
    ours = np.square(values(quantise(weights, Q4_1)) - weights).reshape(-1, 32).sum(axis=1)
    step = np.ptp(blocks, axis=1) * 1.12 / 15
    half = (np.abs(blocks).max(axis=1) + 16 * step) * 2**-11
    assert (ours <= 32 * (step / 2 + 2 * half) ** 2 + 1e-6).all()


@pytest.mark.parametrize("weight", [0.0, 1.0, -3.5, 1e-9, 60000.0])
@pytest.mark.parametrize("kind", [Q4_1, Q8_0])
def test_blocks_of_one_number_are_that_number(kind, weight):
    stored = quantise(np.full((2, 32), weight, np.float32), kind)
    np.testing.assert_allclose(values(stored), weight, rtol=2e-3, atol=1e-7)


def test_numbers_that_blocks_can_hold_are_kept():
    steps = np.arange(32, dtype=np.float32) % 16
    assert np.array_equal(values(quantise(0.25 * steps[None] - 1, Q4_1)), 0.25 * steps[None] - 1)
    signed = np.linspace(-127, 127, 64, dtype=np.float32).round()[None]
    signed[0, [0, 32]] = -127
    assert np.array_equal(values(quantise(signed, Q8_0)), signed)


def test_the_search_pays():
    weights = normal(64, 512)
    plain = dequantize(round_to_nearest(weights, Q4_1), Q4_1)

    def error(of):
        return float(np.sqrt(np.square(of - weights).mean() / np.square(weights).mean()))

    assert error(plain) == pytest.approx(0.078, abs=0.002)
    assert error(values(quantise(weights, Q4_1))) == pytest.approx(0.073, abs=0.002)
    assert error(values(quantise(weights, Q8_0))) < 0.006


def test_chunks_do_not_show():
    weights = normal(300, 320)  # more blocks than are worked on at a time
    whole = quantise(weights, Q4_1).data
    assert np.array_equal(whole[290:], quantise(weights[290:], Q4_1).data)


@pytest.mark.parametrize("weight", [np.inf, np.nan, 7e4])
def test_what_no_scale_can_hold_is_refused(weight):
    weights = normal(1, 32)
    weights[0, 3] = weight
    with pytest.raises(ValueError, match="a weight is not below 65504"):
        quantise(weights, Q8_0)


# ── a folder of safetensors ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bits", ["int4", "int8"])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Qwen2", {}),
        ("Llama", {"tie_word_embeddings": False}),
        ("Mixtral", {"num_local_experts": 2, "sliding_window": None, "intermediate_size": 40}),
    ],
)
def test_a_folder_opened_to_be_quantised_is_one_rounded_model(tiny_model, family, config, bits):
    _, folder = tiny_model(family, **config)
    plain, rounded = open_checkpoint(folder), open_checkpoint(folder, bits)
    assert rounded.names == plain.names
    assert rounded.shape == plain.shape
    for name in (*plain.names, "lm_head.weight"):
        weight, stored = plain.array(name), rounded.stored(name)
        assert plain.stored(name) is None
        whole_blocks = weight.ndim == 2 and weight.shape[1] % 32 == 0
        if stored is None:
            assert not whole_blocks or "mlp.gate.weight" in name
            assert np.array_equal(rounded.array(name), weight)
            continue
        table = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert stored.kind == (Q8_0 if table else KINDS[bits])
        assert stored.dims == tuple(weight.shape)
        assert np.array_equal(values(stored), rounded.array(name))
        moved = np.square(rounded.array(name) - weight).mean() / np.square(weight).mean()
        assert 0 < moved < (1e-4 if stored.kind == Q8_0 else 1e-2)
    with pytest.raises(KeyError):
        rounded.stored("model.layers.9.mlp.up_proj.weight")
    Model(rounded)


def test_a_gguf_file_keeps_its_own_quantisation(smollm2_path):
    with pytest.raises(SetupError, match="keeps its own quantisation"):
        open_checkpoint(smollm2_path, "int4")


def test_a_weight_that_cannot_be_quantised_is_named(tiny_model):
    model, folder = tiny_model("Llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder, "int4")
    with pytest.raises(SetupError, match=r"layers\.1\.mlp\.up_proj\.weight cannot be quantised"):
        checkpoint.stored("model.layers.1.mlp.up_proj.weight")
