"""The KV cache of a group as other workers know it: whole heads, though each rank keeps its own.

A hand-over speaks with rank 0 only, in the canonical form of the wire, [layers, 2, tokens, K, E].
Rank 0 cuts it between kv heads for the ranks that keep them (neighbours may keep the same one), or
puts it together of what they have. That goes over links and threads of its own, chunk by chunk: it
waits for no step, however long one takes, and rank 0 needs no more memory than for a chunk.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from scheduler.errors import HandoffFailed, ProtocolError
from workers.group.words import KV_KEPT, KV_ORDER, KvKept, KvPut, KvTake
from workers.kv_cache import KvCache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scheduler.models import ModelShape
    from workers.group.links import Link
    from workers.group.partition import Range
    from workers.kv_cache import KvPiece

    Array = np.ndarray[Any, Any]
    Copy = Callable[[list[tuple[int, int]]], None]

Value = TypeVar("Value")


class Keeper(NamedTuple):
    """A rank, and the kv heads that it keeps."""

    heads: Range
    link: Link | None  # None: rank 0 itself


class Exchange:
    """Rank 0's side, for one formation; used by one thread at a time.

    Methods raise OSError or ProtocolError when a rank is lost; from then on the exchange is broken.
    """

    def __init__(self, generation: int, own: KvCache, keepers: Sequence[Keeper]) -> None:
        """`own` is rank 0's cache; `generation` is never 0."""
        self.generation = generation
        self.broken = False
        self._own = own
        self._keepers = keepers

    def gather(self, piece: KvPiece, whole: Array) -> None:
        """Fill `whole`, [layers, 2, tokens, K, row]."""
        covered, asked = 0, []
        for keeper in self._keepers:
            if keeper.heads.first >= covered:  # else a neighbour has given this head
                covered = keeper.heads.last
                asked.append(keeper)
                if keeper.link:
                    keeper.link.say(KvTake(*_words(piece)))
        for heads, link in asked:
            part = np.empty_like(_cut(whole, heads), order="C")
            if link:
                link.receive_into(_bytes(part))
            else:
                _bytes(part)[:] = b"".join(_views(self._own, piece))
            _cut(whole, heads)[:] = part

    def scatter(self, piece: KvPiece, whole: Array) -> None:
        """Keep what is in `whole`."""
        for heads, link in self._keepers:
            part = _bytes(np.ascontiguousarray(_cut(whole, heads)))
            if link:
                link.say(KvPut(*_words(piece)))
                link.send(part)
            else:
                _fill(_views(self._own, piece), part)
        for _, link in self._keepers:
            if link:
                link.hear(KV_KEPT)


class GroupCache(KvCache):
    """What the engine and hand-overs know of the group's cache; a formation is a generation."""

    def __init__(self, shape: ModelShape, blocks: int, dtype: str, copy: Copy) -> None:
        super().__init__(shape, blocks, dtype)  # its data is never touched, so takes no memory
        self._copy = copy
        self._thread = ThreadPoolExecutor(1, "kv")
        self.exchange: Exchange | None = None  # of the formation that stands

    @property
    def generation(self) -> int:
        return self.exchange.generation if self.exchange else 0

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        self._copy(pairs)

    async def taken(self, piece: KvPiece) -> list[memoryview]:
        whole = self._whole(piece, bytearray(self._size(piece)))
        await self._do(piece, lambda exchange: exchange.gather(piece, whole))
        return [_bytes(whole)]

    def room(self, piece: KvPiece) -> list[memoryview]:
        return [memoryview(bytearray(self._size(piece)))]

    async def keep(self, piece: KvPiece, room: list[memoryview]) -> None:
        whole = self._whole(piece, room[0])
        await self._do(piece, lambda exchange: exchange.scatter(piece, whole))

    def close(self) -> None:
        self._thread.shutdown()

    def _size(self, piece: KvPiece) -> int:
        return len(piece.layers) * len(piece.tokens) * self.token_bytes

    def _whole(self, piece: KvPiece, data: bytearray | memoryview) -> Array:
        heads_and_rows = self.data.shape[-2:]
        shape = (len(piece.layers), 2, len(piece.tokens), *heads_and_rows)
        return np.frombuffer(data, self.dtype).reshape(shape)

    async def _do(self, piece: KvPiece, work: Callable[[Exchange], None]) -> None:
        """Have it done, by the formation that the piece belongs to. Raises HandoffFailed.

        Nobody writes any more when this returns, even if it was cancelled: the piece's blocks may
        be another's then.
        """
        exchange = self.exchange
        if exchange is None or piece.generation != exchange.generation:
            raise HandoffFailed("a rank was lost or came, and the KV cache with it")
        job = self._thread.submit(work, exchange)
        ended = asyncio.wrap_future(job)
        try:
            await asyncio.shield(ended)
        except (OSError, ProtocolError) as error:
            exchange.broken = True
            raise HandoffFailed(f"a rank does not give or take KV: {error}") from error
        finally:
            job.cancel()  # if it has not begun
            while not job.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({ended})


def serve_kv(link: Link, cache: KvCache) -> None:
    """A rank's side: give and take its heads' KV until the link ends."""
    with suppress(OSError, ProtocolError):  # then rank 0 notices, and forms the group anew
        while True:
            order = link.hear(KV_ORDER)
            views = cache.views(list(order.blocks), range(*order.tokens), range(*order.layers))
            if isinstance(order, KvTake):
                link.send(b"".join(views))
            else:
                for view in views:
                    link.receive_into(view)
                link.say(KvKept())


def _words(piece: KvPiece) -> tuple[list[int], tuple[int, int], tuple[int, int]]:
    tokens, layers = piece.tokens, piece.layers
    return piece.blocks, (tokens.start, tokens.stop), (layers.start, layers.stop)


def _cut(whole: Array, heads: Range) -> Array:
    return whole[..., heads.first : heads.last, :]


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _views(cache: KvCache, piece: KvPiece) -> list[memoryview]:
    return cache.views(piece.blocks, piece.tokens, piece.layers)


def _fill(views: list[memoryview], data: memoryview) -> None:
    for view in views:
        view[:], data = data[: view.nbytes], data[view.nbytes :]
