"""The machine that bench/engine.py runs on: its memory's rate, its name, how busy it is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import msgspec

from workers.machine import cpu_info, cpu_name, memory_bytes

READ_BYTES = 512 << 20  # far more than any cache
READS = 9


class Conditions(msgspec.Struct):
    """What a figure is worth nothing without."""

    cpu: str
    cores: int
    flags: list[str]  # of its instruction sets, those that decide which kernels run
    memory_gb: float
    python: str
    torch: str
    began: str  # UTC
    load_before: tuple[float, float, float]
    load_after: tuple[float, float, float] = (0.0, 0.0, 0.0)


def conditions() -> Conditions:
    info = cpu_info()
    flags = info.get("flags", info.get("Features", "")).split()
    telling = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "i8mm")
    return Conditions(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        flags=[flag for flag in telling if flag in flags],
        memory_gb=round(memory_bytes() / 1e9, 1),
        python=sys.version.split()[0],
        torch=version("torch"),
        began=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        load_before=os.getloadavg(),
    )


def read_rate(threads: int) -> float:
    """Bytes a second that so many threads read from memory: the best of a few sums."""
    import torch  # here: it takes a second, which a mistyped option need not wait for

    torch.set_num_threads(threads)
    data = torch.ones(READ_BYTES // 4)
    best = float("inf")
    for _ in range(READS):
        begin = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begin)
    return READ_BYTES / best


def bare_torch_rss() -> int:
    """Peak bytes of a process that only imports torch: what engines of the field begin with."""
    probe = "import os, torch; from engine_process import peak_rss; print(peak_rss(os.getpid()))"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=Path(__file__).parent,
        capture_output=True,
        check=True,
        timeout=120,
    )
    return int(done.stdout)
