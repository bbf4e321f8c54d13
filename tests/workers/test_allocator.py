from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from workers.allocator import lazy_zeros

# Eight arrays of 2 MB made and freed on a thread: how many pages the kernel had to clear for them,
# once the first rounds have been.
PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
from resource import RUSAGE_SELF, getrusage
import numpy as np
from workers.allocator import keep_freed_memory

def touch():
    before = getrusage(RUSAGE_SELF).ru_minflt
    arrays = [np.ones(1 << 18) for _ in range(8)]
    return getrusage(RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_freed_memory()
with ThreadPoolExecutor(1) as thread:
    print([thread.submit(touch).result() for _ in range(4)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
@pytest.mark.parametrize("how", ["keep", "give back"])
def test_freed_memory_stays_if_it_is_told_so(how):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    pages = 8 * (2 << 20) // 4096
    assert (int(done.stdout) < pages // 10) == (how == "keep")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory is resident")
def test_an_array_takes_the_small_pages_that_were_touched_and_no_more():
    apart = 4 << 20
    array = lazy_zeros((32, apart), np.dtype(np.uint8))
    before = _resident()
    assert not array[:, 0].any()
    array[:, 0] = 1
    assert array[:, :2].tolist() == [[1, 0]] * 32
    assert _resident() - before < 4 << 20  # of 32 pages of 2 MB, were they large


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
