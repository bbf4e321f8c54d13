"""Sums whose parts travel as int8: groups of 32 values with a scale, 36 bytes in place of 128.

All ranks decode everything, their own part too, and add in the order of ranks, so that they end
with the same bits. A value's error is at most half a step for each time that it was rounded, a
step being the largest value of its group / 127: once a rank, and in two-shot once more for the sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workers.group.links import exchange

if TYPE_CHECKING:
    from workers.group.allreduce import Allreduce, Array, Mesh

    Codes = np.ndarray[Any, np.dtype[np.void]]

GROUP = 32
CODE = np.dtype([("scale", "<f4"), ("values", "i1", GROUP)])


def direct(mesh: Mesh, part: Array) -> None:
    received = np.empty((mesh.size, -(-part.size // GROUP)), CODE)
    own = received[mesh.rank] = encode(part)
    exchange(
        [(mesh.links[other], _bytes(own)) for other in mesh.others],
        [(mesh.links[other], _bytes(received[other])) for other in mesh.others],
    )
    part[:] = _sum(received)[: part.size]


def two_shot(mesh: Mesh, part: Array) -> None:
    codes = encode(part)
    bounds = [len(codes) * number // mesh.size for number in range(mesh.size + 1)]
    chunks = [codes[bounds[rank] : bounds[rank + 1]] for rank in range(mesh.size)]
    own = chunks[mesh.rank]
    received = np.empty((mesh.size, len(own)), CODE)
    received[mesh.rank] = own
    exchange(
        [(mesh.links[other], _bytes(chunks[other])) for other in mesh.others if len(chunks[other])],
        [(mesh.links[other], _bytes(received[other])) for other in mesh.others if len(own)],
    )
    own[:] = encode(_sum(received))
    exchange(
        [(mesh.links[other], _bytes(own)) for other in mesh.others if len(own)],
        [(mesh.links[other], _bytes(chunks[other])) for other in mesh.others if len(chunks[other])],
    )
    part[:] = decode(codes)[: part.size]


ALGORITHMS_INT8: dict[str, Allreduce] = {"direct-int8": direct, "two-shot-int8": two_shot}


def encode(values: Array) -> Codes:
    """float32 [n] -> [ceil(n / 32)] groups, the last one filled up with zeros."""
    groups = -(-values.size // GROUP)
    padded = np.zeros((groups, GROUP), np.float32)
    padded.reshape(-1)[: values.size] = values
    codes = np.empty(groups, CODE)
    scale = np.abs(padded).max(1) / np.float32(127)
    codes["scale"] = scale
    with np.errstate(all="ignore"):  # values that are no numbers come out as none
        inverse = np.where(scale > 0, 1 / scale, 0).astype(np.float32)
        codes["values"] = np.rint(np.clip(padded * inverse[:, None], -127, 127))
    return codes


def decode(codes: Codes) -> Array:
    """float32, 32 for each group."""
    values: Array = codes["values"] * codes["scale"][:, None]
    return values.reshape(-1)


def _sum(rows: Codes) -> Array:
    """[N, groups] -> float32 [32 · groups], from the first row to the last."""
    total = decode(rows[0])
    for row in rows[1:]:
        total += decode(row)
    return total


def _bytes(codes: Codes) -> memoryview:
    return codes.view(np.uint8).data
