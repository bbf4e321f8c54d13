"""KV caches made small for slow links, after CacheGen (arXiv 2310.07240): `int8` and `int4`.

Values [planes, tokens, C] float32, keys in even planes. Each channel of a plane has a middle and a
step, kept as the upper halves of float32 (uint16), and value ≈ middle + count · step.

int8: for each plane middles [C], steps [C], counts [tokens, C] int8; 254 steps span a channel.

int4: for each plane middles [C], steps [C]; a step is `fineness` times the mean distance from the
mean. Then ways [planes, C] uint8: bit 0 says that counts are differences of neighbouring tokens,
the bits above it the class of the channel, by how far its counts spread. Then frequencies
[8 classes, 64 symbols] uint16, 2048 in each class: symbols 0 to 62 are counts -31 to 31, and 63
stands for one of the escapes. Then the numbers of escapes and of words, uint32; escapes int16;
32 lanes' states uint32; words uint16. Symbol i, in the order of the values, is in lane i mod 32 of
interleaved rANS: state s in [2^15, 2^31) gives slot s mod 2048, becomes frequency · (s div 2048)
+ slot - start, and takes a word below its 16 bits when it has fallen under 2^15.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from kernels import library

Array = np.ndarray[Any, Any]

CODECS = {"int8": 8, "int4": 4}
FINENESS = (0.25, 0.25)  # of keys and of values: bench/kv_codec.py shows what they give


def encode(codec: str, values: Array, fineness: tuple[float, float] = FINENESS) -> Array:
    """Values [planes, tokens, C] float32 -> bytes. Raises OSError without the library."""
    planes, tokens, channels = values.shape
    values = np.ascontiguousarray(values, np.float32)
    out = np.empty(4 * values.size + 8 * planes * channels + 4096, np.uint8)
    size = library.load().motley_kv_encode(
        CODECS[codec],
        values.ctypes.data,
        planes,
        tokens,
        channels,
        (ctypes.c_float * 2)(*fineness),
        out.ctypes.data,
        out.nbytes,
    )
    assert size >= 0, "there is room for any values"
    return out[:size]


def decode(codec: str, packed: Array, planes: int, tokens: int, channels: int) -> Array:
    """Bytes [n] uint8 -> values [planes, tokens, C]. Raises ValueError if they do not fit that."""
    packed = np.ascontiguousarray(packed)
    out = np.empty((planes, tokens, channels), np.float32)
    fits = library.load().motley_kv_decode(
        CODECS[codec],
        packed.ctypes.data,
        packed.nbytes,
        planes,
        tokens,
        channels,
        out.ctypes.data,
    )
    if not fits:
        raise ValueError(f"{packed.nbytes} bytes are not {out.shape} values in {codec}")
    return out
