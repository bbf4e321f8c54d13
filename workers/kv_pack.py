"""KV on its way between caches that keep other numbers, or over links that are too slow for them.

On the wire KV is [layers, 2, tokens, K, E] of the sender's own type, or packed by a codec of
kernels/kv_codec. Whatever comes, the receiver turns it into float32 and then into its own type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels import dispatch, kv_codec
from kernels.kv_rows import KV_TYPES, STEP_BYTES, row_length

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.messages import KvBlocks

    Array = np.ndarray[Any, Any]

RAW = "raw"
LEAST_TOKENS = 32  # fewer are not worth a codec's tables
SINKS = 1  # first tokens of a prompt that stay exact: attention looks at them from everywhere
BITS = {"int8": 8.2, "int4": 4.6}  # of a number, packed; bench/kv_codec.py measures it


def known() -> tuple[str, ...]:
    """Codecs that this machine can pack and unpack, best quality first."""
    return (RAW, *BITS) if dispatch.instruction_sets() else (RAW,)


def choose(codecs: Sequence[str], dtype: str, link: float | None, made: float | None) -> str:
    """The codec, of those with the best quality first, whose transfer hides behind prefill.

    `link` is what the link takes, in bytes per second, and `made` what prefill makes, in numbers
    per second of type `dtype`. While one is not known, raw. If none keeps up, the smallest.
    """
    if not link or not made:
        return RAW
    bits = {RAW: 8.0 * np.dtype(dtype).itemsize} | BITS
    return next((codec for codec in codecs if made * bits[codec] / 8 <= link), codecs[-1])


def pack(codec: str, raw: Array, message: KvBlocks) -> Array:
    """Bytes of a cache's own type -> bytes of the codec."""
    values = to_floats(raw, message)
    exact = min(SINKS - message.first_token, message.tokens) if message.first_token < SINKS else 0
    head = np.ascontiguousarray(values[:, :exact], np.float16).view(np.uint8).ravel()
    packed = kv_codec.encode(codec, values[:, exact:])
    return np.concatenate([np.array([exact], np.uint8), head, packed])


def unpack(packed: Array, message: KvBlocks) -> Array:
    """What arrived -> float32 [layers · 2, tokens, K·E]. Raises ValueError if it is no such KV."""
    if message.codec == RAW:
        return to_floats(packed, message)
    planes, channels = 2 * message.layers, message.kv_heads * message.head_dim
    if not len(packed):
        raise ValueError("no bytes at all")
    exact = min(int(packed[0]), message.tokens)
    split = 1 + 2 * planes * exact * channels
    head = packed[1:split].view(np.float16).reshape(planes, exact, channels)
    rest = message.tokens - exact
    body = kv_codec.decode(message.codec, packed[split:], planes, rest, channels)
    return np.concatenate([head, body], axis=1, dtype=np.float32)


def to_floats(raw: Array, message: KvBlocks) -> Array:
    """Bytes of a type that caches keep -> float32 [layers · 2, tokens, K·E]."""
    rows = raw.view(message.dtype).reshape(-1, row_length(message.dtype, message.head_dim))
    if message.dtype == "int8":
        steps = rows[:, -STEP_BYTES:].copy().view(np.uint16).astype(np.uint32) << 16
        rows = rows[:, :-STEP_BYTES] * steps.view(np.float32)
    return rows.astype(np.float32, copy=False).reshape(2 * message.layers, message.tokens, -1)


def from_floats(values: Array, dtype: str, head_dim: int) -> Array:
    """Values [planes, tokens, K·E] -> bytes as a cache of that type keeps them, in the same order.

    int8 as the kernels do it: one step for each token and head, max|x| / 127 rounded up to
    bfloat16.
    """
    if dtype != "int8":
        return values.astype(dtype, copy=False).view(np.uint8).ravel()
    rows = values.reshape(-1, head_dim)
    steps = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    above = steps.view(np.uint32) + 0xFFFF >> 16
    steps = np.where(steps > 0, (above << 16).view(np.float32), np.float32(1))
    out = np.empty((len(rows), head_dim + STEP_BYTES), np.int8)
    out[:, :head_dim] = np.rint(rows / steps)
    out[:, head_dim:] = (steps.view(np.uint32) >> 16).astype(np.uint16).view(np.int8)
    return out.view(np.uint8).ravel()


def raw_bytes(message: KvBlocks) -> int:
    """Of such a message's KV, not packed; 0 for a type that nobody keeps."""
    if message.dtype not in KV_TYPES:
        return 0
    row = row_length(message.dtype, message.head_dim) * np.dtype(message.dtype).itemsize
    return 2 * message.layers * message.tokens * message.kv_heads * row
