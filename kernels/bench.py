"""python -m kernels.bench [--json]: what each kernel reaches, beside what memory gives.

Weights and caches are cycled through more memory than the processor's cache holds, as a model does
in decoding. Times are medians, and the least one beside them says how busy the machine was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels import dispatch
from kernels.program import FORMATS, HeadCounts, Matrix, Pool, Program, Span, row_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS = (1, 2, 4, 16, 64, 512)
HEADS = HeadCounts(9, 3, 64)
CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Result:
    """One kernel at one size."""

    kernel: str
    rows: int
    threads: int
    median_ms: float
    best_ms: float
    gb_per_s: float  # bytes of weights or cache read, over the median time
    gweights_per_s: float  # weights read; 0 where there are none
    gmac_per_s: float  # multiplications of the product; 0 where there are none


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much to measure."""

    side: int  # of a square matrix
    total_bytes: int  # of all matrices or caches together
    budget_s: float  # for one result


def results(pool: Pool, sizes: Sizes) -> Iterator[Result]:
    """Memory first, then matrices in every format, torch's float32 ones, attention, rows."""
    yield _memory(pool, sizes)
    for kind in FORMATS:
        yield from _products(pool, kind, sizes)
    yield from _torch_products(pool, sizes)
    for dtype in ("float32", "float16"):
        yield _decode_attention(pool, dtype, sizes)
    yield from _row_operations(pool, sizes)


def _result(
    kernel: str, rows: int, pool: Pool, times: list[float], read: int, weights: int = 0
) -> Result:
    middle = median(times)
    return Result(
        kernel=kernel,
        rows=rows,
        threads=pool.threads,
        median_ms=1e3 * middle,
        best_ms=1e3 * min(times),
        gb_per_s=read / middle / 1e9,
        gweights_per_s=weights / middle / 1e9,
        gmac_per_s=weights * rows / middle / 1e9,
    )


def _times(action: Callable[[], object], budget_s: float) -> list[float]:
    """At least three, after one that does not count."""
    action()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget_s:
        begun = time.perf_counter()
        action()
        times.append(time.perf_counter() - begun)
    return times


def _run(program: Program, rows: int, budget_s: float, start: int = 0) -> list[float]:
    span = Span(0, rows, start, list(range((start + rows + 15) // 16)))
    tokens = [0] * rows
    return _times(lambda: program.run(tokens, [span], []), budget_s)


def _memory(pool: Pool, sizes: Sizes) -> Result:
    parts = max(1, sizes.total_bytes >> 20)
    values = np.ones(parts << 18, np.float32)
    program = Program(pool, 1)
    program.sum(values, np.empty(parts, np.float32))
    return _result("memory read", 1, pool, _run(program, 1, sizes.budget_s), values.nbytes)


def _products(pool: Pool, kind: str, sizes: Sizes) -> Iterator[Result]:
    side = sizes.side
    one = side * row_bytes(kind, side)
    count = max(1, sizes.total_bytes // one)
    blocks = np.random.default_rng(0).integers(0, 60, (side, row_bytes(kind, side)), np.uint8)
    matrices = [Matrix(kind, side, side, blocks) for _ in range(count)]
    for rows in ROWS:
        used = matrices if rows < 64 else matrices[:1]  # many rows keep the processor busy
        program = Program(pool, rows)
        acts, out = program.acts(side), program.floats(side)
        acts.data[:] = 0
        for matrix in used:
            program.matmul(matrix, acts, out)
        times = _run(program, rows, sizes.budget_s)
        weights = len(used) * side * side
        yield _result(f"matmul {kind}", rows, pool, times, len(used) * one, weights)


def _torch_products(pool: Pool, sizes: Sizes) -> Iterator[Result]:
    side = sizes.side
    before = torch.get_num_threads()
    torch.set_num_threads(pool.threads)
    count = max(1, sizes.total_bytes // (4 * side * side))
    weights = [torch.randn(side, side) for _ in range(count)]
    for rows in ROWS:
        used = weights if rows < 64 else weights[:1]
        x = torch.randn(rows, side)

        def multiply(used: list[torch.Tensor] = used, x: torch.Tensor = x) -> None:
            for weight in used:
                torch.nn.functional.linear(x, weight)

        times = _times(multiply, sizes.budget_s)
        elements = len(used) * side * side
        yield _result("torch float32", rows, pool, times, 4 * elements, elements)
    torch.set_num_threads(before)


def _decode_attention(pool: Pool, dtype: str, sizes: Sizes) -> Result:
    """One token over 512 others, in as many layers as make the caches exceed the processor's."""
    shape = (2, CONTEXT // 16 + 1, 16, HEADS.keys, HEADS.dim)
    count = max(1, sizes.total_bytes // (int(np.prod(shape)) * np.dtype(dtype).itemsize))
    caches = np.ones((count, *shape), dtype)
    program = Program(pool, 1)
    qkv = program.floats((HEADS.queries + 2 * HEADS.keys) * HEADS.dim)
    out = program.floats(HEADS.queries * HEADS.dim)
    qkv.data[:] = 1
    for cache in caches:
        program.attention(qkv, HEADS, cache, out)
    times = _run(program, 1, sizes.budget_s, CONTEXT)
    return _result(f"attention {dtype} over {CONTEXT}", 1, pool, times, caches.nbytes)


def _row_operations(pool: Pool, sizes: Sizes) -> Iterator[Result]:
    side = sizes.side
    for rows in (1, 512):
        program = Program(pool, rows)
        x, acts = program.floats(side), program.acts(side)
        x.data[:] = 1
        program.norm(x, np.ones(side), 1e-5, acts)
        yield _result("norm", rows, pool, _run(program, rows, sizes.budget_s), rows * side * 4)
        program = Program(pool, rows)
        x, acts = program.floats(2 * side), program.acts(side)
        x.data[:] = 1
        program.silu_mul(x, acts)
        yield _result("silu_mul", rows, pool, _run(program, rows, sizes.budget_s), rows * side * 8)


def _table(found: list[Result]) -> str:
    lines = [
        f"{'kernel':28} {'rows':>5} {'threads':>7} {'median ms':>10} {'best ms':>9} "
        f"{'GB/s':>7} {'Gweights/s':>10} {'GMAC/s':>8}"
    ]
    lines += [
        f"{r.kernel:28} {r.rows:5} {r.threads:7} {r.median_ms:10.3f} {r.best_ms:9.3f} "
        f"{r.gb_per_s:7.1f} {r.gweights_per_s:10.1f} {r.gmac_per_s:8.1f}"
        for r in found
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--instruction-set", choices=dispatch.instruction_sets())
    parser.add_argument("--side", type=int, default=2048, help="rows and columns of a matrix")
    parser.add_argument("--megabytes", type=int, default=96, help="weights to cycle through")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds for each result")
    options = parser.parse_args(arguments)
    if not dispatch.instruction_sets():
        parser.exit(1, "there are no kernels to measure\n")
    pool = Pool(options.threads, options.instruction_set)
    sizes = Sizes(options.side, options.megabytes << 20, options.budget)
    found = list(results(pool, sizes))
    if options.json:
        report = {
            "instruction_set": pool.instruction_set,
            "threads": pool.threads,
            "memory_gb_per_s": found[0].gb_per_s,
            "results": [asdict(result) for result in found],
        }
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        sys.stdout.write(f"instruction set: {pool.instruction_set}\n{_table(found)}\n")


if __name__ == "__main__":
    main()
