"""The machine that a worker runs on, in words for whoever reads its figures."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def cpu_info() -> dict[str, str]:
    """What Linux says of the last core; empty elsewhere."""
    if not CPU_INFO.exists():
        return {}
    lines = (line.partition(":") for line in CPU_INFO.read_text(encoding="utf-8").splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def cpu_name() -> str:
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
