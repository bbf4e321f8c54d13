"""What a rank returns of its logits: of each row only those that can decide the draws from it.

A token drawn greedily or under top-k lies among the k best of some rank, so that is all that
travels: ids and logits. Other rows travel whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workers.sampling import decisive, largest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.sampling import Draw

    Array = np.ndarray[Any, np.dtype[np.float32]]


def wanted(draws: Sequence[Draw], rows: int) -> tuple[int, ...]:
    """Of each of so many rows, how many of the largest logits decide its draws; 0: all of them."""
    counts: list[set[int]] = [set() for _ in range(rows)]
    for draw in draws:
        counts[draw.row].add(decisive(draw))
    return tuple(0 if 0 in few else max(few, default=0) for few in counts)


def packed_bytes(counts: Sequence[int], width: int) -> int:
    """Of an answer about rows of `width` logits."""
    return sum(8 * count if _few(count, width) else 4 * width for count in counts)


def pack(logits: Array, counts: Sequence[int]) -> bytes:
    """[n, V_r] -> of each row its best ids (int32) and logits, or all logits (float32)."""
    parts: list[bytes] = []
    for row, count in zip(logits, counts, strict=True):
        if not _few(count, len(row)):
            parts.append(row.tobytes())
            continue
        ids = largest(row, count).astype(np.int32)
        if len(ids) < count:  # the logits are no numbers
            ids = np.arange(count, dtype=np.int32)
        parts += [ids.tobytes(), row[ids].tobytes()]
    return b"".join(parts)


def unpack(data: memoryview, counts: Sequence[int], out: Array) -> None:
    """Into `out` [n, V_r], a rank's part of the whole rows; what did not travel is -inf."""
    at = 0
    for row, count in zip(out, counts, strict=True):
        width = len(row)
        if not _few(count, width):
            row[:] = np.frombuffer(data, np.float32, width, at)
            at += 4 * width
            continue
        row[:] = -np.inf
        ids = np.frombuffer(data, np.int32, count, at)
        row[ids] = np.frombuffer(data, np.float32, count, at + 4 * count)
        at += 8 * count


def _few(count: int, width: int) -> bool:
    """Whether they take less than the whole row."""
    return 0 < 2 * count < width
