"""Calls at absolute times.

An event loop's own timers tick in whole milliseconds, which is as long as the errors that this
package promises to stay below. A timerfd wakes the same loop within some 50 µs.
"""

from __future__ import annotations

import ctypes
import heapq
import math
import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_TIMER_ABSTIME = 1


class _Itimerspec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Deadlines:
    """`at(when, call)` runs `call()` on the loop once `time.monotonic()` has reached `when`.

    Calls that are due at the same wake-up run in order of their times. Close it to drop the rest.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._count = 0
        self._armed = math.inf
        self._fd = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            loop.add_reader(self._fd, self._ring)

    def at(self, when: float, call: Callable[[], object]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, call))
        if when < self._armed:
            self._arm(when)

    def close(self) -> None:
        self._heap.clear()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _arm(self, when: float) -> None:
        self._armed = when
        if self._fd < 0:
            self._loop.call_later(max(0.0, when - time.monotonic()), self._due)
            return
        nanoseconds = max(1, int(when * 1e9))  # 0 would disarm
        spec = _Itimerspec(0, 0, nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000)
        self._libc.timerfd_settime(self._fd, _TIMER_ABSTIME, ctypes.byref(spec), None)

    def _ring(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # armed anew between the wake-up and this read
        self._due()

    def _due(self) -> None:
        heap = self._heap
        self._armed = -math.inf  # calls that add deadlines leave the arming to the end of this
        while heap and heap[0][0] <= time.monotonic():
            heapq.heappop(heap)[2]()
        self._armed = math.inf
        if heap:
            self._arm(heap[0][0])
