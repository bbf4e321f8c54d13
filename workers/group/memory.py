"""How much memory a rank takes beside its weights."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from workers.weights.families import LM_HEAD

if TYPE_CHECKING:
    from scheduler.models import ModelShape

SPARE = 24 << 20  # the interpreter's growth, sockets' buffers, a step's lists
AHEAD = 3  # of the largest streamed weights, the ring that they pass through holds so many
DRAWN_ROWS = 64  # rows of logits that are ever wanted at once


def used_bytes() -> int:
    """Resident memory of this process now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak is an upper bound
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * os.sysconf("SC_PAGESIZE")


def step_bytes(shape: ModelShape, rows: int) -> int:
    """Buffers of a step of so many rows (workers/fast_model), and of its way over the links."""
    heads = shape.heads * shape.head_dim
    qkv = heads + 2 * shape.kv_heads * shape.head_dim
    floats = 5 * shape.hidden + shape.head_dim + qkv + heads + 2 * shape.ffn  # 2 to receive x
    acts = 3 * (shape.hidden + heads + shape.ffn) // 2  # 48 bytes for 32 columns
    return rows * (4 * floats + acts) + 8 * DRAWN_ROWS * shape.vocab + SPARE


def streamable(name: str, dims: tuple[int, ...]) -> bool:
    """Not what is small, nor the head, which more than one program reads, nor experts.

    An operation reads all experts that its rows chose, and only the weight needed last is there.
    """
    return len(dims) > 1 and name != LM_HEAD and ".experts." not in name
