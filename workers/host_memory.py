"""Memory that two processes of one host share: made by one, opened by the other.

It is a file that has no name (memfd). Its maker says which of its descriptors that is; a process of
the same user, in the same process namespace, opens it by way of /proc and knows it by a nonce that
only the two have. Nothing is left behind when both are gone, however they ended.
"""

from __future__ import annotations

import mmap
import os
import secrets
from functools import cache
from pathlib import Path

NONCE_BYTES = 16


@cache
def host() -> str:
    """What two processes have alike if they can share memory; empty where that is not possible."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.geteuid()}"
    except OSError:
        return ""  # not Linux


def make(name: str, size: int) -> tuple[int, mmap.mmap, bytes]:
    """Its descriptor, the memory, and the nonce that it begins with; `name` is for /proc only.

    Raises OSError if this system has no such files, or no memory.
    """
    descriptor = os.memfd_create(name)
    try:
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    nonce = secrets.token_bytes(NONCE_BYTES)
    memory[:NONCE_BYTES] = nonce
    return descriptor, memory, nonce


def attach(process: int, descriptor: int, nonce: bytes, size: int) -> mmap.mmap:
    """What another process made. Raises OSError if it is not to be had, or is another's."""
    own = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    try:
        if os.fstat(own).st_size < size:
            raise OSError("the peer's memory is smaller than it said")
        memory = mmap.mmap(own, size)
    finally:
        os.close(own)
    if memory[: len(nonce)] != nonce:
        memory.close()
        raise OSError("that descriptor is another's memory")
    return memory
