"""What both ends of a KV hand-over know: its chunks, its checksums, its limits.

A chunk is at most CHUNK_BYTES of KV, [layers, 2, tokens, K, E], with a checksum of its own over
payload and header; Reserve and Commit carry a seal over all their fields. TCP's own 16 bits miss
one fault in 65,536.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

import msgspec

from scheduler.messages import Commit, KvBlocks, KvPart, Reserve

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHUNK_BYTES = 2 << 20
# Best first. xxhash is of the `engine` extra; a worker without a model may be without it.
CHECKSUMS = ("xxh3", "crc32") if find_spec("xxhash") else ("crc32",)

Sealed = TypeVar("Sealed", Reserve, Commit)


@dataclass(frozen=True, slots=True)
class Limits:
    """How the ends of a hand-over deal with each other."""

    reserve_s: float = 120.0  # a decode pool that is full for longer is better replaced by a replay
    lease_s: float = 120.0  # from Reserved to Commit: the prefill of a long prompt on a slow node
    push_s: float = 60.0  # one chunk, or the answer to a Commit
    early_bytes: int = 256 << 10  # less than this waits for more, or for the end of the prompt
    share: bool = True  # memory, with a decode worker of this host
    codecs: tuple[str, ...] = ("raw",)  # that may be used, best quality first


def common(theirs: Iterable[str]) -> str:
    """The best checksum that both ends know; empty for none."""
    return next((kind for kind in CHECKSUMS if kind in theirs), "")


class Checksum:
    """Of a chunk: its header, the checksum itself left out, and then its bytes as they are seen."""

    def __init__(self, kind: str, message: KvBlocks) -> None:
        head = msgspec.msgpack.encode(msgspec.structs.replace(message, checksum=None))
        self._crc = zlib.crc32(head)
        self._xxh3 = None
        if kind == "xxh3":
            from xxhash import xxh3_64

            self._xxh3 = xxh3_64(head)

    def see(self, view: memoryview) -> None:
        if self._xxh3:
            self._xxh3.update(view)
        else:
            self._crc = zlib.crc32(view, self._crc)

    @property
    def value(self) -> int:
        return self._xxh3.intdigest() if self._xxh3 else self._crc


def seal(message: Sealed) -> Sealed:
    """The message as it will be read, with its seal."""
    packed = msgspec.msgpack.encode(message)
    read = msgspec.msgpack.decode(packed, type=type(message))
    return msgspec.structs.replace(read, seal=_seal(read))


def intact(message: Reserve | Commit) -> bool:
    """Whether its seal says that it is what was sent."""
    return message.seal == _seal(message)


def _seal(message: Reserve | Commit) -> int:
    return zlib.crc32(msgspec.msgpack.encode(msgspec.structs.replace(message, seal=None)))


def parts_of(spans: Iterable[tuple[int, int]]) -> Iterator[KvPart]:
    """One span of tokens, [start, stop), for each layer -> parts; empty spans are left out."""
    first = 0
    for (start, stop), group in groupby(spans):
        count = len(list(group))
        if start < stop:
            yield KvPart(first, count, start, stop - start)
        first += count


def chunks(part: KvPart, token_bytes: int) -> Iterator[KvPart]:
    """Cut a part of the KV; `token_bytes` are those of one token in one layer."""
    most = max(1, CHUNK_BYTES // token_bytes)
    layers_each = max(1, most // max(1, part.tokens))
    for layer in range(0, part.layers, layers_each):
        layers = min(layers_each, part.layers - layer)
        for token in range(0, part.tokens, most):
            tokens = min(most, part.tokens - token)
            yield KvPart(part.first_layer + layer, layers, part.first_token + token, tokens)
