"""The C library's allocator, told what this process does with memory."""

from __future__ import annotations

import ctypes
import platform

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
