"""How much memory a rank takes beside its weights."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from workers.weights.families import LM_HEAD, ROUTER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.models import ModelShape

SPARE = 24 << 20  # the interpreter's growth, links' buffers (passage.AREA), a step's lists
AHEAD = 3  # of the largest streamed weights, the ring that they pass through holds so many
SLOTS_BYTES = 16 << 20  # for experts that are read when they are chosen: more would save rounds
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
    if shape.expert_layers:
        floats += shape.experts_used * (2 * shape.expert_ffn + shape.hidden)
        acts += 3 * shape.experts_used * (shape.hidden + shape.expert_ffn) // 2
    return rows * (4 * floats + acts) + 8 * DRAWN_ROWS * shape.vocab + SPARE


def ring_bytes(sizes: Sequence[int]) -> int:
    """Memory that streamed weights pass through, if any of these may be streamed."""
    return min(AHEAD * max(sizes, default=0), sum(sizes))


def slots_bytes(sizes: Sequence[int]) -> int:
    """Slots that each hold any of these matrices of experts; at least one, if there are any."""
    width = max(sizes, default=0)
    return width and width * max(1, min(len(sizes), SLOTS_BYTES // width))


def streamable(name: str, dims: tuple[int, ...]) -> bool:
    """Whether it may pass through memory, if it does not fit: read ahead of its use in every step.

    Not what is small, nor the head, which more than one program reads. Experts are read when
    they are chosen (expert_slots).
    """
    small = len(dims) == 1 or name.endswith(ROUTER)
    return not (small or name == LM_HEAD or is_expert(name))


def is_expert(name: str) -> bool:
    """Whether it is a matrix of an expert."""
    return ".experts." in name
