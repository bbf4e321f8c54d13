"""A step of a model as one call: a list of operations on buffers, run by a pool of threads.

The caller describes a model by adding operations in order; kernels/cpu knows no model. Numbers are
of `fast` mode (kernels/reference_quant.py). A row's results are the same whatever rows are computed
beside it, however its sequence was cut into steps, and on any number of threads.

Shapes: T rows (tokens) of a step, n drawn rows, D hidden, F ffn, H query heads, K kv heads, E head
dim.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kernels import dispatch, library
from kernels.buffers import Acts, Floats, Routing, aligned
from kernels.kv_rows import kv_layer
from kernels.library import OP_KINDS, OP_STRUCTS, BatchStruct, Heads, MatrixStruct, Op

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kernels.mark import Mark

    Array = np.ndarray[Any, Any]

GROUP = 32  # columns that share a scale
FORMATS = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14}  # as GGUF numbers them
PACKING = 1  # raised when kernels/cpu/formats.h changes: packed files of another are made anew


class Matrix:
    """Quantised weights [outputs, inputs], packed in panels of 16 rows (kernels/cpu/formats.h)."""

    def __init__(self, kind: str, outputs: int, inputs: int, blocks: Array) -> None:
        """Pack `blocks`, uint8 [outputs, bytes of a row], GGUF's rows of blocks of format `kind`.

        Raises ValueError if the format is unknown, or the bytes are not that many rows of it.
        """
        self.kind, self.outputs, self.inputs = kind, outputs, inputs
        lib, number = library.load(), FORMATS.get(kind, -1)
        size = packed_bytes(kind, outputs, inputs)
        blocks = np.ascontiguousarray(blocks)
        if not size or blocks.nbytes != outputs * row_bytes(kind, inputs):
            raise ValueError(
                f"{blocks.nbytes} bytes are not {outputs} rows of {inputs} weights in {kind}; "
                f"known are {', '.join(FORMATS)}, in whole blocks"
            )
        self.data = aligned(size, np.uint8)
        lib.motley_pack(number, outputs, inputs, blocks.ctypes.data, self.data.ctypes.data)
        self.struct = MatrixStruct(number, outputs, inputs, self.data.ctypes.data)

    @classmethod
    def packed(cls, kind: str, outputs: int, inputs: int, data: Array) -> Matrix:
        """Around the `data` of a matrix that was packed before, by the same PACKING.

        Raises ValueError if it is not as long as that.
        """
        if data.nbytes != (size := packed_bytes(kind, outputs, inputs)):
            raise ValueError(f"{data.nbytes} bytes where {outputs} rows of {inputs} take {size}")
        matrix = cls.__new__(cls)
        matrix.kind, matrix.outputs, matrix.inputs, matrix.data = kind, outputs, inputs, data
        matrix.struct = MatrixStruct(FORMATS[kind], outputs, inputs, data.ctypes.data)
        return matrix

    def rows(self, first: int, count: int) -> Array:
        """Rows dequantised, float32 [count, inputs], equal to the gguf package's."""
        if not 0 <= first <= first + count <= self.outputs:
            raise IndexError(f"rows {first} to {first + count} of {self.outputs}")
        out = np.empty((count, self.inputs), np.float32)
        library.load().motley_unpack(ctypes.byref(self.struct), first, count, out.ctypes.data)
        return out


def packed_bytes(kind: str, outputs: int, inputs: int) -> int:
    """Bytes of a packed matrix; 0 for what cannot be packed."""
    size: int = library.load().motley_packed_bytes(FORMATS.get(kind, -1), outputs, inputs)
    return size


def row_bytes(kind: str, inputs: int) -> int:
    """Bytes of a row of GGUF blocks."""
    columns, size = {
        "Q4_0": (32, 18),
        "Q4_1": (32, 20),
        "Q8_0": (32, 34),
        "Q4_K": (256, 144),
        "Q6_K": (256, 210),
    }[kind]
    return inputs // columns * size


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [first, first + count) are one sequence's tokens from position `start` on."""

    first: int
    count: int
    start: int
    blocks: Sequence[int]  # of the cache, 16 tokens each; at least (start + count) / 16 of them


class HeadCounts(NamedTuple):
    queries: int  # H
    keys: int  # K
    dim: int  # E


class QkvExtras(NamedTuple):
    """What some models do to queries, keys and values before rotating them."""

    bias: Array | None = None  # [(H + 2K)·E]
    query_norm: Array | None = None  # [E]
    key_norm: Array | None = None  # [E]
    eps: float = 0.0  # of the norms


class Pool:
    """Threads that run programs, one at a time; the caller is one of them."""

    def __init__(self, threads: int, instruction_set: str | None = None) -> None:
        """Raises ValueError if the machine lacks the instruction set; the default is the best."""
        known = dispatch.instruction_sets()
        self.instruction_set = instruction_set or next(iter(known), "none")
        if self.instruction_set not in known or threads < 1:
            raise ValueError(
                f"{threads} threads with {self.instruction_set!r}: one thread is the least, and "
                f"this machine has {known or 'no library of kernels'}"
            )
        lib = library.load()
        self.threads = threads
        self.handle = lib.motley_pool_new(threads, self.instruction_set.encode())
        weakref.finalize(self, lib.motley_pool_free, self.handle)


class Program:
    """Operations in order, and their buffers, for steps of at most `max_rows` rows."""

    def __init__(self, pool: Pool, max_rows: int) -> None:
        self.pool, self.max_rows = pool, max_rows
        self._ops: list[Op] = []
        self._array: Any = None
        self._kept: list[Any] = []  # what the operations point to
        self._copies = 1  # of each row, that the next operation works on
        self._calls: list[tuple[int, int, Callable[[int], None]]] = []  # operations before; copies

    # Buffers

    def floats(self, width: int, copies: int = 1) -> Floats:
        """A new float32 buffer; its memory is taken as rows are first used.

        With `copies` it has room for so many of each row.
        """
        rows = self.max_rows * copies
        return Floats(aligned(rows * width, np.float32).reshape(rows, width))

    def acts(self, width: int, copies: int = 1) -> Acts:
        """A new buffer of quantised activations; `width` is a multiple of 32."""
        if width % GROUP:
            raise ValueError(f"{width} columns are not whole groups of {GROUP}")
        size = width // GROUP * ctypes.sizeof(library.Act)
        rows = self.max_rows * copies
        return Acts(aligned(rows * size, np.uint8).reshape(rows, size), width)

    # Operations; each waits for those before it unless `wait` is false

    def embed(self, table: Matrix, out: Floats) -> None:
        """out [T, D] = rows of the table [V, D], by token."""
        self._add("embed", (table.struct, out.pointer), table, out)

    def angles(self, frequencies: Array, out: Floats, magnitude: float = 1.0) -> None:
        """out [T, E] = magnitude · cosines and sines of position · frequencies [E / 2]."""
        frequencies = np.ascontiguousarray(frequencies, np.float32)
        fields = (frequencies.ctypes.data, out.pointer, out.width, magnitude)
        self._add("angles", fields, frequencies, out)

    def norm(self, x: Floats, weight: Array, eps: float, out: Acts) -> None:
        """out = quantised reference.rms_norm(x, weight [D], eps)."""
        weight = np.ascontiguousarray(weight, np.float32)
        fields = (x.pointer, weight.ctypes.data, out.pointer, x.width, eps)
        self._add("norm", fields, x, weight, out)

    def quantise(self, x: Floats, out: Acts) -> None:
        self._add("quantise", (x.pointer, out.pointer, x.width), x, out)

    def silu_mul(self, gate_up: Floats, out: Acts) -> None:
        """out [T, F] = quantised reference.silu_mul(gate_up [T, 2F])."""
        self._add("silu", (gate_up.pointer, out.pointer, out.width), gate_up, out)

    def matmul(
        self, matrix: Matrix, x: Acts, out: Floats, *, add: bool = False, wait: bool = True
    ) -> None:
        """out = x · matrixᵀ, or += where `add`. `out` may be columns of a wider buffer."""
        _check_widths(matrix, x, out)
        stride = out.data.strides[0] // 4
        fields = (matrix.struct, x.pointer, out.pointer, stride, int(add))
        self._add("matmul", fields, matrix, x, out, wait=wait)

    def rope(
        self, qkv: Floats, angles: Floats, heads: HeadCounts, cache: Array, extras: QkvExtras
    ) -> None:
        """Finish q, k and v of qkv [T, (H + 2K)·E] in place; store k and v in their slots.

        cache [2, blocks, 16, K, E], a layer's: see kernels/kv_rows.py.
        """
        vectors = (extras.bias, extras.query_norm, extras.key_norm)
        arrays = [None if v is None else np.ascontiguousarray(v, np.float32) for v in vectors]
        pointers = [None if a is None else a.ctypes.data for a in arrays]
        counts, layer = Heads(*heads), kv_layer(cache, heads.dim)
        fields = (qkv.pointer, angles.pointer, *pointers, extras.eps, counts, layer)
        self._add("rope", fields, qkv, angles, cache, arrays)

    def mark(self, mark: Mark, value: int) -> None:
        """Let the mark reach `value` when all before this is done; what follows need not wait."""
        self._add("mark", (mark.pointer, value), mark)

    def attention(
        self,
        qkv: Floats,
        heads: HeadCounts,
        cache: Array,
        out: Floats,
        window: int = 0,
        *,
        wait: bool = True,
    ) -> None:
        """out [T, H·E] = causal attention of qkv's queries over their sequences' cache.

        Each token sees the newest `window` ones, itself included, or all where it is 0.
        """
        fields = (qkv.pointer, out.pointer, Heads(*heads), kv_layer(cache, heads.dim), window)
        self._add("attention", fields, qkv, cache, out, wait=wait)

    def gather(self, x: Floats, out: Floats) -> None:
        """out [n, D] = the drawn rows of x [T, D]; what follows works on n rows."""
        self._add("gather", (x.pointer, out.pointer, x.width), x, out)

    def route(
        self, x: Floats, matrix: Array, eps: float, used: int, *, sum_to_one: bool
    ) -> Routing:
        """reference.route of rms_norm(x, norm, eps) · routerᵀ, where matrix is router · norm.

        x [T, D] float32, matrix [experts, D]. It does not wait: what norms x may go beside it.
        """
        matrix = np.ascontiguousarray(matrix, np.float32)
        routing = Routing(self.max_rows, len(matrix), used)
        fields = (x.pointer, matrix.ctypes.data, routing.struct, x.width, eps, int(sum_to_one))
        self._add("route", fields, x, matrix, routing, wait=False)
        return routing

    def spread(self, x: Acts, routing: Routing, out: Acts) -> None:
        """out [T · used, D] = x's rows [T, D] by expert; what follows works on T · used rows."""
        self._add("group", (routing.struct,), routing)
        self._add("spread", (x.pointer, out.pointer, routing.struct, x.width), x, out)
        self._copies = routing.used

    def expert_matmul(
        self,
        matrices: Sequence[Matrix],
        x: Acts,
        routing: Routing,
        out: Floats,
        *,
        wait: bool = True,
    ) -> None:
        """out = each copy · the matrix of its expert, transposed. See `matmul`."""
        if len(matrices) != routing.experts:
            raise ValueError(f"{len(matrices)} matrices for {routing.experts} experts")
        for matrix in matrices:
            _check_widths(matrix, x, out)
        array = (MatrixStruct * len(matrices))(*(matrix.struct for matrix in matrices))
        stride = out.data.strides[0] // 4
        fields = (ctypes.addressof(array), x.pointer, out.pointer, routing.struct, stride)
        self._add("experts", fields, matrices, array, x, out, wait=wait)

    def combine(self, x: Floats, routing: Routing, out: Floats, *, add: bool = False) -> None:
        """out [T, D] = weighted sums of x [T · used, D], or +=; what follows works on T rows."""
        fields = (x.pointer, out.pointer, routing.struct, out.width, int(add))
        self._add("combine", fields, x, out)
        self._copies = 1

    def sum(self, values: Array, out: Array) -> None:
        """out = sums of `values`, float32 each, 2^18 at a time: the fastest reading of memory."""
        if values.size != out.size << 18:
            raise ValueError(f"{out.size} sums of {values.size} values; each is of 2^18")
        self._add("sum", (values.ctypes.data, out.ctypes.data, values.size), values, out)

    def call(self, function: Callable[[int], None]) -> None:
        """Between the operations before it and those after it call `function(T)`, in Python."""
        self._calls.append((len(self._ops), self._copies, function))

    def run(self, tokens: Sequence[int], spans: Sequence[Span], drawn: Sequence[int]) -> None:
        """Run everything for one step's tokens; every row is in exactly one span.

        Results are in the buffers until the next run. Raises ValueError for too many rows.
        """
        if not 0 < len(tokens) <= self.max_rows:
            raise ValueError(f"{len(tokens)} rows in a program for 1 to {self.max_rows}")
        if self._array is None:
            self._array = (Op * len(self._ops))(*self._ops)
        token_ids = np.array(tokens, np.int32)
        drawn_rows = np.array(drawn, np.int32)
        described: list[int] = []
        tables: list[int] = []
        for span in spans:
            described += (span.first, span.count, span.start, len(tables))
            tables += span.blocks
        span_array, table_array = np.array(described, np.int32), np.array(tables, np.int32)
        batch = BatchStruct(
            len(tokens),
            len(spans),
            len(drawn),
            token_ids.ctypes.data,
            span_array.ctypes.data,
            table_array.ctypes.data,
            drawn_rows.ctypes.data,
        )
        done = 0
        for end, copies, function in self._calls:
            self._run(done, end, batch)
            function(len(tokens))
            done, batch.rows = end, copies * len(tokens)
        self._run(done, len(self._ops), batch)

    def _run(self, first: int, end: int, batch: BatchStruct) -> None:
        """The operations [first, end)."""
        if first < end:
            ops = ctypes.byref(self._array, first * ctypes.sizeof(Op))
            library.load().motley_run(self.pool.handle, ops, end - first, ctypes.byref(batch))

    def _add(self, kind: str, fields: tuple[Any, ...], *kept: Any, wait: bool = True) -> None:
        op = Op(kind=OP_KINDS[kind], wait=int(wait))
        setattr(op.of, kind, OP_STRUCTS[kind](*fields))
        self._ops.append(op)
        self._array = None
        self._kept.append(kept)


def _check_widths(matrix: Matrix, x: Acts, out: Floats) -> None:
    if (matrix.inputs, matrix.outputs) != (x.width, out.width):
        raise ValueError(
            f"[{matrix.outputs}, {matrix.inputs}] from {x.width} columns to {out.width}"
        )
