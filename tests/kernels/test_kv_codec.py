"""Packed KV: the C++ reads and writes what its format says, and never more than it was given."""

from __future__ import annotations

import numpy as np
import pytest

from kernels import dispatch, kv_codec
from kernels import reference_kv_codec as reference

pytestmark = pytest.mark.skipif(
    not dispatch.instruction_sets(),
    reason="the kernels' library is not built: there was no C++ compiler",
)
SHAPES = [(2, 40, 32), (4, 64, 192), (6, 33, 1), (2, 1, 7)]


def values_of(planes: int, tokens: int, channels: int, seed: int = 0):
    """Channels of unlike sizes and middles; some drift slowly; an outlier here and there."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(planes, tokens, channels))
    drift = rng.normal(size=(planes, tokens, channels)).cumsum(1)
    mixed = np.where(rng.random(channels) < 0.5, noise, drift)
    sizes, middles = np.exp(rng.normal(size=channels)), rng.normal(size=channels)
    values = (mixed * sizes + 3 * middles).astype(np.float32)
    values[rng.random(values.shape) < 0.002] *= 100
    values[0, :, 0] = 1.5  # one that never changes
    return values


def decode_by_reference(codec, packed, shape):
    decode = {"int8": reference.decode_int8, "int4": reference.decode_int4}[codec]
    return decode(packed.tobytes(), *shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("codec", kv_codec.CODECS)
def test_the_reference_reads_what_the_library_writes_to_the_same_numbers(codec, shape):
    packed = kv_codec.encode(codec, values_of(*shape))
    ours = kv_codec.decode(codec, packed, *shape)
    assert np.array_equal(ours, decode_by_reference(codec, packed, shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_library_reads_what_the_reference_writes(shape):
    values = values_of(*shape)
    packed = {
        "int8": reference.encode_int8(values),
        "int4": reference.encode_int4(values, kv_codec.FINENESS),
    }
    for codec, data in packed.items():
        array = np.frombuffer(data, np.uint8)
        found = kv_codec.decode(codec, array, *shape)
        assert np.array_equal(found, decode_by_reference(codec, array, shape))


def test_int8_is_within_half_a_step_of_a_channels_range():
    values = values_of(4, 100, 64)
    found = kv_codec.decode("int8", kv_codec.encode("int8", values), *values.shape)
    reach = np.ptp(values, axis=1, keepdims=True)
    # The middle has 8 bits of its own, so a channel that never changes may be off by 2^-9.
    assert (np.abs(found - values) <= reach / 250 + np.abs(values) * 2**-8).all()


@pytest.mark.parametrize("fineness", [(0.25, 0.5), (0.5, 0.1)])
def test_int4_is_within_half_a_step_outliers_too(fineness):
    values = values_of(4, 100, 64)
    found = kv_codec.decode("int4", kv_codec.encode("int4", values, fineness), *values.shape)
    spread = np.abs(values - values.mean(1, keepdims=True)).mean(1, keepdims=True)
    steps = spread * np.resize(fineness, 4)[:, None, None]
    assert (np.abs(found - values) <= 0.51 * steps + np.abs(values) * 2**-8).all()


def test_finer_steps_are_nearer_and_larger():
    values = values_of(4, 100, 64)
    errors, sizes = [], []
    for step in (0.1, 0.2, 0.4, 0.8):
        packed = kv_codec.encode("int4", values, (step, step))
        found = kv_codec.decode("int4", packed, *values.shape)
        errors.append(np.abs(found - values).mean())
        sizes.append(len(packed))
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)


def test_what_is_no_number_harms_nobody_else():
    values = values_of(2, 50, 8)
    values[1, 3, 5] = np.nan
    for codec in kv_codec.CODECS:
        found = kv_codec.decode(codec, kv_codec.encode(codec, values), *values.shape)
        assert np.isfinite(np.delete(found, 5, axis=2)).all()


@pytest.mark.parametrize("codec", kv_codec.CODECS)
def test_bytes_that_are_no_such_values_are_refused_or_read_but_never_beyond(codec):
    shape = (2, 40, 32)
    packed = kv_codec.encode(codec, values_of(*shape))
    with pytest.raises(ValueError, match="are not"):
        kv_codec.decode(codec, packed, 2, 41, 32)
    for size in (0, 1, len(packed) // 2, len(packed) - 1):
        with pytest.raises(ValueError, match="are not"):
            kv_codec.decode(codec, packed[:size], *shape)
    rng = np.random.default_rng(0)
    for _ in range(200):
        harmed = packed.copy()
        harmed[rng.integers(len(harmed), size=20)] = rng.integers(256, size=20)
        try:
            kv_codec.decode(codec, harmed, *shape)
        except ValueError:
            continue
