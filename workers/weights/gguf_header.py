"""The bytes of a GGUF file: its metadata, and each tensor as it is stored.

The layout is the GGUF specification's (ggml, docs/gguf.md), versions 2 and 3, little-endian. The
reader of the `gguf` package makes an array of each word of the vocabulary, which takes two seconds
for 49,152 tokens, and a damaged count can keep it busy for ever; this one takes a tenth of one, and
never reads past the end. Block formats and their arithmetic do come from that package.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import (
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.quants import quant_shape_to_byte_shape

if TYPE_CHECKING:
    from pathlib import Path

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4

_SCALARS = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's blocks, mapped from the file."""

    kind: GGMLQuantizationType
    dims: tuple[int, ...]  # elements, rows first
    data: np.ndarray[Any, np.dtype[np.uint8]]  # [rows…, bytes of a row]

    def let_go(self) -> None:
        """Free the memory that the file's pages take; they are read anew if touched again."""
        base: Any = self.data
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap):
            base.madvise(mmap.MADV_DONTNEED)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata by key and tensors by name. Raises OSError, or ValueError for a damaged file."""
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    cursor = _Cursor(data)
    if bytes(cursor.take(4)) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := cursor.number("<I")) not in VERSIONS:
        raise ValueError(f"version {version} is not one of {VERSIONS}")
    tensor_count, metadata_count = cursor.number("<Q"), cursor.number("<Q")
    metadata = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(GGUFValueType(cursor.number("<I")))
    places = [_place(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    return metadata, {place.name: _stored(data[start:], place) for place in places}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the file says that a tensor is."""

    name: str
    kind: GGMLQuantizationType
    dims: tuple[int, ...]
    offset: int  # bytes from the start of all tensors


def _place(cursor: _Cursor) -> _Place:
    name, count = cursor.string(), cursor.number("<I")
    if not 1 <= count <= MAX_DIMENSIONS:
        raise ValueError(f"{name} has {count} dimensions")
    dims = tuple(cursor.number("<Q") for _ in range(count))
    kind = GGMLQuantizationType(cursor.number("<I"))
    return _Place(name, kind, dims[::-1], cursor.number("<Q"))


def _stored(tensors: np.ndarray[Any, np.dtype[np.uint8]], place: _Place) -> StoredTensor:
    shape = quant_shape_to_byte_shape(place.dims, place.kind)
    end = place.offset + int(np.prod(shape, dtype=object))
    if end > len(tensors):
        raise ValueError(f"it ends before {place.name} does")
    data = tensors[place.offset : end].reshape(shape)
    return StoredTensor(place.kind, place.dims, data)


class _Cursor:
    """Reads from the front. ValueError at the end of the file."""

    def __init__(self, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self._data = data.data
        self.offset = 0

    def take(self, count: int) -> memoryview:
        start, self.offset = self.offset, self.offset + count
        if self.offset > len(self._data):
            raise ValueError(f"it ends after {len(self._data)} bytes, in its header")
        return self._data[start : self.offset]

    def number(self, form: str) -> int:
        """One integer in struct's format."""
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def string(self) -> str:
        return str(self.take(self.number("<Q")), "utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        """A metadata value: number, string, or a list of either."""
        if kind is GGUFValueType.STRING:
            return self.string()
        if kind is not GGUFValueType.ARRAY:
            return self._scalars(kind, 1)[0]
        element, count = GGUFValueType(self.number("<I")), self.number("<Q")
        if element is GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        if element is GGUFValueType.ARRAY:
            raise ValueError("it holds an array of arrays")
        return self._scalars(element, count)

    def _scalars(self, kind: GGUFValueType, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return values
