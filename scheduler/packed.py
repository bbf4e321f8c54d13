"""Token ids as they lie in a message: counted, kept and handed on, but read only if need be.

A router never looks at a prompt's ids; it sends them again if a worker is lost. To make 50,000
numbers of them and to drop these again costs it more than all else that a long prompt needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from scheduler.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FEW, _FEW_MASK = 0x90, 0x0F  # MessagePack's arrays: up to 15 items, counted in the first byte;
_COUNTED = {0xDC: 2, 0xDD: 4}  # or in so many bytes after it
_decoder = msgspec.msgpack.Decoder(list[int])


class PackedIds:
    """An array of MessagePack. Raises ProtocolError if it is none."""

    def __init__(self, packed: bytes) -> None:
        self._packed = packed
        self._count = _count(packed)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(_decoder.decode(self._packed))


def _count(packed: bytes) -> int:
    kind = packed[0]
    if kind & ~_FEW_MASK == _FEW:
        return kind & _FEW_MASK
    if kind in _COUNTED:
        return int.from_bytes(packed[1 : 1 + _COUNTED[kind]], "big")
    raise ProtocolError("a prompt's token ids are not an array")
