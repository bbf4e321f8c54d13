"""KV between caches that keep other numbers, and which codec a link gets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import dispatch
from kernels.reference_quant import kv_rounded
from scheduler.messages import KvBlocks
from workers.kv_pack import SINKS, choose, from_floats, pack, raw_bytes, to_floats, unpack

TOKENS, HEADS, DIM, LAYERS = 50, 2, 16, 3
MB = 1e6


def message(dtype="float32", codec="raw", first_token=0) -> KvBlocks:
    return KvBlocks("job", 1, 0, LAYERS, TOKENS, HEADS, DIM, dtype, codec, first_token)


def values(seed=0):
    normal = np.random.default_rng(seed).normal(size=(2 * LAYERS, TOKENS, HEADS * DIM))
    return normal.astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_type_goes_to_float32_and_back_to_the_same_bytes(dtype):
    raw = from_floats(values(), dtype, DIM)
    assert raw.nbytes == raw_bytes(message(dtype))
    assert np.array_equal(from_floats(to_floats(raw, message(dtype)), dtype, DIM), raw)


def test_int8_is_as_the_kernels_round_it():
    rounded = kv_rounded(torch.from_numpy(values().reshape(-1, 1, DIM))).numpy()
    raw = from_floats(values(), "int8", DIM)
    assert np.array_equal(to_floats(raw, message("int8")).reshape(-1, 1, DIM), rounded)


@pytest.mark.skipif(not dispatch.instruction_sets(), reason="the kernels are not built")
@pytest.mark.parametrize(("codec", "most"), [("int8", 0.02), ("int4", 0.2)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("first_token", [0, 7])
def test_what_is_packed_is_nearly_the_same_and_a_prompts_first_token_exactly(
    codec, most, dtype, first_token
):
    said = message(dtype, codec, first_token)
    raw = from_floats(values(), dtype, DIM)
    found, right = unpack(pack(codec, raw, said), said), to_floats(raw, said)
    assert np.abs(found - right).max() < most
    exact = np.float16(right[:, :SINKS])
    assert np.array_equal(found[:, :SINKS], exact) is (first_token == 0)


@pytest.mark.skipif(not dispatch.instruction_sets(), reason="the kernels are not built")
@pytest.mark.parametrize("size", [0, 1, 100, 1000])
def test_bytes_that_are_no_packed_kv_are_a_value_error(size):
    said = message(codec="int4")
    packed = pack("int4", from_floats(values(), "float32", DIM), said)
    with pytest.raises(ValueError):
        unpack(packed[:size], said)


ALL = ("raw", "int8", "int4")
# codecs, type, bytes per second of the link, numbers per second of prefill → codec
TABLE = [
    (ALL, "float16", None, 10 * MB, "raw"),
    (ALL, "float16", 10 * MB, None, "raw"),
    (ALL, "float16", 20 * MB, 10 * MB, "raw"),
    (ALL, "float16", 19 * MB, 10 * MB, "int8"),
    (ALL, "float32", 39 * MB, 10 * MB, "int8"),
    (ALL, "int8", 11 * MB, 10 * MB, "raw"),
    (ALL, "float16", 10 * MB, 10 * MB, "int4"),
    (ALL, "float16", 1 * MB, 10 * MB, "int4"),
    (("raw", "int8"), "float16", 1 * MB, 10 * MB, "int8"),
    (("raw",), "float32", 1 * MB, 10 * MB, "raw"),
    (("int8",), "float16", 99 * MB, 10 * MB, "int8"),
]


@pytest.mark.parametrize(("codecs", "dtype", "link", "made", "codec"), TABLE)
def test_the_best_codec_that_lets_a_link_hide_behind_prefill(codecs, dtype, link, made, codec):
    assert choose(codecs, dtype, link, made) == codec
