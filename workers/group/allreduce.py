"""Sums over the ranks of a group: one interface, several ways through the network.

Every rank gives a part and gets the whole, in place. Whichever way is taken, all ranks end with the
same bits: a sum is made once and copied, or made by everybody in the order of ranks. What each
way costs is in workers.group.sum_cost.

    star      through rank 0: few connections, one hub (TPI-LLM, §3.2)
    direct    everybody to everybody: one hop
    two-shot  reduce-scatter, then all-gather, both direct
    ring      neighbours only
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from workers.group.links import exchange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.group.links import Link

    Array = np.ndarray[Any, np.dtype[np.float32]]


class Mesh:
    """One rank's links to the others, and buffers for what they send."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.links: dict[int, Link] = {}  # to all others
        self.kv_links: dict[int, Link] = {}  # between rank 0 and each other, for another thread
        # From the next one on: when all send at once, no rank gets everything first.
        self.others = [(rank + step) % size for step in range(1, size)]
        self._buffers: Array = np.empty((0,), np.float32)

    def add(self, other: int, link: Link, *, kv: bool) -> None:
        (self.kv_links if kv else self.links)[other] = link

    @property
    def complete(self) -> bool:
        kv_links = 1 if self.rank else self.size - 1
        return (len(self.links), len(self.kv_links)) == (self.size - 1, kv_links)

    def buffers(self, count: int, length: int) -> Array:
        """[count, length], kept from call to call."""
        if self._buffers.size < count * length:
            self._buffers = np.empty(count * length, np.float32)
        return self._buffers[: count * length].reshape(count, length)

    def close(self) -> None:
        for link in (*self.links.values(), *self.kv_links.values()):
            link.close()


class Allreduce(Protocol):
    def __call__(self, mesh: Mesh, part: Array) -> None:
        """`part`, flat float32, becomes the sum over ranks in place."""
        ...


def star(mesh: Mesh, part: Array) -> None:
    data = _bytes(part)
    if mesh.rank:
        hub = mesh.links[0]
        hub.send(data)
        hub.receive_into(data)
        return
    received = mesh.buffers(mesh.size - 1, part.size)
    for other, row in zip(mesh.others, received, strict=True):
        mesh.links[other].receive_into(_bytes(row))
        part += row
    for other in mesh.others:
        mesh.links[other].send(data)


def direct(mesh: Mesh, part: Array) -> None:
    received = mesh.buffers(mesh.size, part.size)
    data = _bytes(part)
    outgoing = [(mesh.links[other], data) for other in mesh.others]
    exchange(outgoing, [(mesh.links[other], _bytes(received[other])) for other in mesh.others])
    received[mesh.rank] = part
    _sum(received, part)


def two_shot(mesh: Mesh, part: Array) -> None:
    bounds = _bounds(part.size, mesh.size)
    own = part[bounds[mesh.rank] : bounds[mesh.rank + 1]]
    received = mesh.buffers(mesh.size, own.size)
    chunks = {other: _bytes(part[bounds[other] : bounds[other + 1]]) for other in mesh.others}
    exchange(
        [(mesh.links[other], chunks[other]) for other in mesh.others if chunks[other]],
        [(mesh.links[other], _bytes(received[other])) for other in mesh.others if own.size],
    )
    received[mesh.rank] = own
    _sum(received, own)
    exchange(
        [(mesh.links[other], _bytes(own)) for other in mesh.others if own.size],
        [(mesh.links[other], chunks[other]) for other in mesh.others if chunks[other]],
    )


def ring(mesh: Mesh, part: Array) -> None:
    bounds = _bounds(part.size, mesh.size)
    after, before = (mesh.rank + 1) % mesh.size, (mesh.rank - 1) % mesh.size
    received = mesh.buffers(1, part.size // mesh.size + 1)[0]

    def chunk(number: int) -> Array:
        number %= mesh.size
        return part[bounds[number] : bounds[number + 1]]

    def turn(sent: Array, taken: Array) -> None:
        exchange(
            [(mesh.links[after], _bytes(sent))] if sent.size else [],
            [(mesh.links[before], _bytes(taken))] if taken.size else [],
        )

    for step in range(mesh.size - 1):
        target = chunk(mesh.rank - step - 1)
        turn(chunk(mesh.rank - step), received[: target.size])
        target += received[: target.size]
    for step in range(mesh.size - 1):
        turn(chunk(mesh.rank - step + 1), chunk(mesh.rank - step))


ALGORITHMS: dict[str, Allreduce] = {
    "star": star,
    "direct": direct,
    "two-shot": two_shot,
    "ring": ring,
}


def _sum(rows: Array, out: Array) -> None:
    """The rows' sum, from the first to the last."""
    np.copyto(out, rows[0])
    for row in rows[1:]:
        out += row


def _bounds(length: int, parts: int) -> Sequence[int]:
    return [length * number // parts for number in range(parts + 1)]


def _bytes(array: Array) -> memoryview:
    return array.data.cast("B") if array.size else memoryview(b"")
