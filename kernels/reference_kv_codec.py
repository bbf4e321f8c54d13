"""kernels/kv_codec.py's format in numpy: what the C++ writes and reads, lane by lane.

Steps are chosen here by plain means, so the bytes may differ from those of the C++; each reads what
the other wrote, and to the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

Array = np.ndarray[Any, Any]

LANES, CLASSES, SYMBOLS, ESCAPE, MIDDLE = 32, 8, 64, 63, 31
BITS = 11
LEAST = 1 << 15


def upper(values: Array) -> Array:
    """float32 -> its upper half, rounded to nearest even, uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def floats(halves: Array) -> Array:
    """Upper halves -> float32."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def encode_int8(values: Array) -> bytes:
    """[planes, tokens, C] float32 -> bytes."""
    parts = []
    for plane in values:
        middle = upper((plane.min(0) + plane.max(0)) * np.float32(0.5))
        step = upper(np.abs(plane - floats(middle)).max(0) / np.float32(126))
        parts += [middle.tobytes(), step.tobytes()]
        parts.append(_counts(plane, middle, step, 127).astype(np.int8).tobytes())
    return b"".join(parts)


def decode_int8(packed: bytes, planes: int, tokens: int, channels: int) -> Array:
    """Bytes -> [planes, tokens, C] float32."""
    out, at = np.empty((planes, tokens, channels), np.float32), _Reader(packed)
    for plane in out:
        middle, step = floats(at.take(channels, np.uint16)), floats(at.take(channels, np.uint16))
        plane[:] = middle + at.take(tokens * channels, np.int8).reshape(tokens, -1) * step
    return out


def encode_int4(values: Array, fineness: tuple[float, float]) -> bytes:
    """[planes, tokens, C] float32 -> bytes."""
    planes, _, channels = values.shape
    scales, ways = [], np.empty((planes, channels), np.uint8)
    counts = np.empty(values.shape, np.int64)
    for number, plane in enumerate(values):
        middle, spread = plane.mean(0), np.abs(plane - plane.mean(0)).mean(0)
        halves = upper(middle), upper(np.float32(fineness[number % 2]) * spread)
        scales += [half.tobytes() for half in halves]
        plain = _counts(plane, *halves, 8191)
        delta = np.diff(plain, axis=0, prepend=0)
        differ = np.abs(delta).sum(0) < np.abs(plain).sum(0)
        counts[number] = np.where(differ, delta, plain)
        kinds = np.floor(2 * np.log2(np.abs(counts[number]).mean(0) + 0.25)) + 3
        ways[number] = kinds.clip(0, CLASSES - 1).astype(np.uint8) << 1 | differ
    flat = counts.ravel()
    fits = np.abs(flat) <= MIDDLE
    symbols = np.where(fits, flat + MIDDLE, ESCAPE)
    kinds = np.repeat(ways >> 1, values.shape[1], axis=0).ravel()
    frequencies = _frequencies(kinds, symbols)
    states, words = _push(symbols, kinds, frequencies)
    escapes = flat[~fits].astype(np.int16)
    sizes = np.array([len(escapes), len(words)], np.uint32)
    tail = (ways, frequencies, sizes, escapes, states, words)
    return b"".join([*scales, *(array.tobytes() for array in tail)])


def decode_int4(packed: bytes, planes: int, tokens: int, channels: int) -> Array:
    """Bytes -> [planes, tokens, C] float32."""
    at = _Reader(packed)
    scales = floats(at.take(planes * 2 * channels, np.uint16)).reshape(planes, 2, 1, channels)
    ways = at.take(planes * channels, np.uint8).reshape(planes, channels)
    frequencies = at.take(CLASSES * SYMBOLS, np.uint16).reshape(CLASSES, SYMBOLS).astype(np.int64)
    escapes, words = at.take(2, np.uint32)
    escaped, states = at.take(int(escapes), np.int16), at.take(LANES, np.uint32)
    kinds = np.repeat(ways >> 1, tokens, axis=0).ravel()
    symbols = _pull(kinds, frequencies, states.astype(np.int64), at.take(int(words), np.uint16))
    counts = symbols - MIDDLE
    counts[symbols == ESCAPE] = escaped
    counts = counts.reshape(planes, tokens, channels)
    sums = counts.cumsum(1)
    whole = np.where((ways & 1)[:, None], sums, counts)
    return scales[:, 0] + whole.astype(np.float32) * scales[:, 1]


def _counts(plane: Array, middle: Array, step: Array, limit: int) -> Array:
    steps = floats(step)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)
    counts: Array = np.rint((plane - floats(middle)) * inverse)
    return counts.clip(-limit, limit).astype(np.int64)


def _frequencies(kinds: Array, symbols: Array) -> Array:
    """Of each class, 2^BITS in all, and none that occurs is 0."""
    histogram = np.zeros((CLASSES, SYMBOLS), np.int64)
    np.add.at(histogram, (kinds, symbols), 1)
    scaled = histogram * (1 << BITS) // np.maximum(histogram.sum(1, keepdims=True), 1)
    scaled = np.where(histogram > 0, np.maximum(scaled, 1), 0)
    for kind in np.flatnonzero(histogram.any(1)):
        row = scaled[kind]
        while lacking := (1 << BITS) - int(row.sum()):
            row[row.argmax()] += max(lacking, -int(row.max()) // 2)
    return scaled.astype(np.uint16)


def _push(symbols: Array, kinds: Array, frequencies: Array) -> tuple[Array, Array]:
    """The lanes' last states and the words, from the last symbols to the first."""
    starts = np.cumsum(frequencies, axis=1) - frequencies
    states, words = np.full(LANES, LEAST, np.int64), []
    for lanes, at in reversed(list(_rounds(len(symbols)))):
        frequency = frequencies[kinds[at], symbols[at]].astype(np.int64)
        x = states[lanes]
        full = x >= frequency << 31 - BITS
        words.append((x[full] & 0xFFFF)[::-1])
        x = np.where(full, x >> 16, x)
        states[lanes] = (x // frequency << BITS) + x % frequency + starts[kinds[at], symbols[at]]
    return states.astype(np.uint32), np.concatenate(words)[::-1].astype(np.uint16)


def _pull(kinds: Array, frequencies: Array, states: Array, words: Array) -> Array:
    """Symbols, as many as there are kinds."""
    starts = np.cumsum(frequencies, axis=1) - frequencies
    slots = [np.repeat(np.arange(SYMBOLS), row) for row in frequencies]
    tables = np.array([s if len(s) else np.zeros(1 << BITS, np.int64) for s in slots])
    symbols, read = np.empty(len(kinds), np.int64), 0
    for lanes, at in _rounds(len(kinds)):
        x, kind = states[lanes], kinds[at]
        slot = x & (1 << BITS) - 1
        symbol = symbols[at] = tables[kind, slot]
        x = frequencies[kind, symbol] * (x >> BITS) + slot - starts[kind, symbol]
        low = x < LEAST
        count = int(low.sum())
        x[low] = x[low] << 16 | words[read : read + count]
        read += count
        states[lanes] = x
    return symbols


def _rounds(count: int) -> Iterator[tuple[slice, slice]]:
    """The lanes, and the symbols, of each round."""
    for first in range(0, count, LANES):
        last = min(count, first + LANES)
        yield slice(0, last - first), slice(first, last)


class _Reader:
    def __init__(self, packed: bytes) -> None:
        self._packed, self._at = packed, 0

    def take(self, count: int, dtype: Any) -> Array:
        values = np.frombuffer(self._packed, dtype, count, self._at)
        self._at += values.nbytes
        return values
