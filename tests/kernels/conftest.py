"""What the tests of the CPU kernels share: pools of every instruction set here, random weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from kernels import dispatch
from kernels.program import Matrix, Pool, Program, Span

# Bytes of a GGUF block, and the half-precision numbers in it: random bits could be no numbers.
LAYOUTS = {
    "Q4_0": (32, 18, (0,)),
    "Q4_1": (32, 20, (0, 2)),
    "Q8_0": (32, 34, (0,)),
    "Q4_K": (256, 144, (0, 2)),
    "Q6_K": (256, 210, (208,)),
}


@pytest.fixture(scope="session", params=dispatch.instruction_sets() or [None])
def instruction_set(request):
    """Every one that this machine has."""
    if request.param is None:
        pytest.skip("the kernels' library is not built: there was no C++ compiler")
    return request.param


@pytest.fixture(scope="session")
def pool(instruction_set):
    return Pool(1, instruction_set)


@pytest.fixture(scope="session")
def two_threads(instruction_set):
    return Pool(2, instruction_set)


@pytest.fixture(scope="session")
def random_blocks():
    """(format, outputs, inputs, seed) -> GGUF blocks of random weights, uint8 [outputs, bytes]."""

    def make(kind, outputs, inputs, seed):
        rng = np.random.default_rng(seed)
        columns, size, halves = LAYOUTS[kind]
        blocks = rng.integers(0, 256, (outputs, inputs // columns, size), np.uint8)
        for at in halves:
            scale = rng.uniform(-0.02, 0.02, blocks.shape[:2]).astype(np.float16)
            blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
        return blocks.reshape(outputs, -1)

    return make


@pytest.fixture(scope="session")
def random_matrix(random_blocks):
    """(format, outputs, inputs, seed) -> a packed matrix, and its float32 weights by gguf."""

    def make(kind, outputs, inputs, seed=0):
        blocks = random_blocks(kind, outputs, inputs, seed)
        weights = dequantize(blocks, gguf.GGMLQuantizationType[kind])
        return Matrix(kind, outputs, inputs, blocks), weights

    return make


@pytest.fixture(scope="session")
def run():
    """Run operations on `rows` rows of one sequence from `start` on; buffers begin poisoned."""

    def run(pool, rows, add_operations, *, start=0, blocks=None, spans=None, drawn=(), tokens=None):
        program = Program(pool, rows)
        floats, acts = program.floats, program.acts

        def poisoned_floats(*width):
            buffer = floats(*width)
            buffer.data[:] = np.nan
            return buffer

        def poisoned_acts(*width):
            buffer = acts(*width)
            buffer.data[:] = 0xFF
            return buffer

        program.floats, program.acts = poisoned_floats, poisoned_acts
        result = add_operations(program)
        blocks = list(range((start + rows + 15) // 16)) if blocks is None else blocks
        spans = [Span(0, rows, start, blocks)] if spans is None else spans
        program.run([0] * rows if tokens is None else tokens, spans, drawn)
        return result

    return run
