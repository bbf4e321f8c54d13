"""What one sum over the ranks of a group costs on a network, by formula (workers.group.allreduce).

Times with N ranks, Z bytes, one-way latency a and a link of rate β (one transfer at a time on each
rank):

    star      2a + 2(N-1)·Z/β
    direct     a +  (N-1)·Z/β
    two-shot  2a + 2(N-1)/N·Z/β
    ring      2(N-1)·a + 2(N-1)/N·Z/β
"""

from __future__ import annotations

WAYS = ("star", "direct", "two-shot", "ring")


def predicted_s(name: str, ranks: int, size: int, latency_s: float, bytes_per_s: float) -> float:
    """Seconds of one sum of `size` bytes; the formulas at the top."""
    others, wire = ranks - 1, size / bytes_per_s
    hops = {"star": 2, "direct": 1, "two-shot": 2, "ring": 2 * others}[name]
    volume = {"star": 2 * others, "direct": others}.get(name, 2 * others / ranks)
    return hops * latency_s + volume * wire


def fastest(ranks: int, size: int, latency_s: float, bytes_per_s: float) -> str:
    """The way that the formulas say is the fastest; of equals the earlier in WAYS."""
    return min(WAYS, key=lambda name: predicted_s(name, ranks, size, latency_s, bytes_per_s))
