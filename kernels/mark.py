"""How far a running program has come, told to whoever waits for it on another thread."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from ctypes import Structure, c_int32


class MarkStruct(Structure):
    _fields_ = (("value", c_int32), ("descriptor", c_int32))


class Mark:
    """A number that a program raises while it runs, and a descriptor that it then writes a byte to.

    One thread writes, any may read: each access is of one aligned word.
    """

    def __init__(self) -> None:
        self._struct = MarkStruct(0, -1)

    @property
    def value(self) -> int:
        return int(self._struct.value)

    @property
    def pointer(self) -> int:
        return ctypes.addressof(self._struct)

    def wake(self, descriptor: int | None) -> None:
        """Write to this non-blocking descriptor, of a pipe say, from now on; None: to none."""
        self._struct.descriptor = -1 if descriptor is None else descriptor

    def reset(self) -> None:
        """Nothing is done yet; wakes nobody."""
        self._struct.value = 0

    def reach(self, value: int) -> None:
        """What the program's operation does, for programs that are not one."""
        self._struct.value = value
        if self._struct.descriptor >= 0:
            with suppress(BlockingIOError):  # full: then its reader is awake already
                os.write(self._struct.descriptor, b"\0")
