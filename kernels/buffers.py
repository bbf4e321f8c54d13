"""Memory that operations of a program read and write: floats, quantised activations, routing."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.library import RoutingStruct

Array = np.ndarray[Any, Any]

ALIGNMENT = 64  # bytes of a cache line


@dataclass(frozen=True, slots=True)
class Floats:
    """A buffer [rows, width] of float32, or columns of one."""

    data: Array

    @property
    def width(self) -> int:
        return int(self.data.shape[1])

    @property
    def pointer(self) -> int:
        return int(self.data.ctypes.data)

    def columns(self, first: int, last: int) -> Floats:
        return Floats(self.data[:, first:last])


@dataclass(frozen=True, slots=True)
class Acts:
    """A buffer [rows, width] of quantised activations."""

    data: Array  # uint8 [rows, width / 32 · 48]
    width: int

    @property
    def pointer(self) -> int:
        return int(self.data.ctypes.data)


class Routing:
    """Which experts the rows of a layer go to, [rows, used] ascending, and with which weights."""

    def __init__(self, rows: int, experts: int, used: int) -> None:
        """Raises ValueError if no expert is used, or more than there are."""
        if not 1 <= used <= experts:
            raise ValueError(f"each row uses {used} of {experts} experts")
        self.experts, self.used = experts, used
        self.chosen = aligned(rows * used, np.int32).reshape(rows, used)
        self.weights = aligned(rows * used, np.float32).reshape(rows, used)
        self._place = aligned(rows * used, np.int32)
        self._start = aligned(experts + 1, np.int32)
        arrays = (self.chosen, self.weights, self._place, self._start)
        self.struct = RoutingStruct(experts, used, *(array.ctypes.data for array in arrays))

    def part(self) -> Routing:
        """The same rows and weights; who goes where is what `restrict` leaves of it."""
        part = copy(self)
        part._start = aligned(self.experts + 1, np.int32)
        shared = (self.chosen, self.weights, self._place)
        arrays = (*shared, part._start)
        part.struct = RoutingStruct(
            self.experts, self.used, *(array.ctypes.data for array in arrays)
        )
        return part

    def restrict(self, whole: Routing, experts: range) -> None:
        """Of the routing that this is a part of, only what goes to these experts."""
        start = whole._start
        np.clip(start, start[experts.start], start[experts.stop], out=self._start)

    def rows_of(self, expert: int) -> int:
        """How many copies of rows go to this expert, once they are grouped (Program.spread)."""
        return int(self._start[expert + 1] - self._start[expert])


def aligned(count: int, dtype: Any) -> Array:
    """An uninitialised array whose first byte is at the start of a cache line."""
    size = count * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype)
