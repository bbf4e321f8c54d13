"""One *.safetensors file: float32 arrays of what it holds.

The layout is the format's own (safetensors' README): the header's length in 8 bytes, the header as
JSON, the tensors. The library checks a file but gives bfloat16 to torch only, and importing that
takes 190 MB.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from safetensors import safe_open

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

LENGTH_BYTES = 8
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class _Place(msgspec.Struct):
    """Where a tensor is, in the header's words."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]  # bytes after the header


class SafetensorsFile:
    """An open file; to be closed."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, or SafetensorError for a damaged file."""
        with safe_open(path, framework="numpy"):
            pass  # every offset of the header has been checked
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = LENGTH_BYTES + int.from_bytes(self._map[:LENGTH_BYTES], "little")
        header: dict[str, Any] = msgspec.json.decode(self._map[LENGTH_BYTES : self._start])
        header.pop("__metadata__", None)
        self._places = msgspec.convert(header, dict[str, _Place])
        self.dims = {name: place.shape for name, place in self._places.items()}
        self.kinds = {name: place.dtype for name, place in self._places.items()}

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A contiguous copy. Raises ValueError unless it is floats of 16 bits or more."""
        place = self._places[name]
        if place.dtype not in _TYPES:
            raise ValueError(f"it is stored as {place.dtype}; supported are {', '.join(_TYPES)}")
        first, last = place.data_offsets
        dtype = np.dtype(_TYPES[place.dtype])
        count = (last - first) // dtype.itemsize
        stored = np.frombuffer(self._map, dtype, count, self._start + first).reshape(place.shape)
        if place.dtype == "BF16":  # the upper half of a float32
            wide = stored.astype(np.uint32)
            wide <<= 16
            values = wide.view(np.float32)
        else:
            values = stored.astype(np.float32)
        self._map.madvise(mmap.MADV_DONTNEED)  # or a whole file would be in memory twice
        return values

    def close(self) -> None:
        self._map.close()
