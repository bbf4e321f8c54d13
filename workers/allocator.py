"""Memory that this process keeps, and when it waits for the kernel to clear it."""

from __future__ import annotations

import ctypes
import mmap
import platform
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# mallopt(3), malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Freed memory stays with this process, to be used again: from now on, until it ends.

    In torch a step makes and frees tens of megabytes, on a thread other than the first. There glibc
    gives them back after each step, and the next one waits while the kernel clears new pages: 3 %
    of a prompt's time. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array that takes memory only where it was touched, a small page at a time.

    numpy asks for pages of 2 MB. In a KV cache, whose layers lie apart, a prompt that is the first
    to come so far touches one in each layer, keys and values: a step waited 0.3 s while the kernel
    cleared 120 MB, for 12 MB that the prompt needed.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # not Linux, or one without large pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)
