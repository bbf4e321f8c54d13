"""A decoder of the Llama family as a program of CPU kernels (`fast` mode).

The same straight lines as workers/model.py, said once when the model is loaded: weights stay in
their quantised blocks, activations are rounded to int8, and a whole step is one call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from gguf.constants import GGMLQuantizationType

from kernels.program import FORMATS, HeadCounts, Matrix, Pool, Program, QkvExtras
from workers.weights.families import EMBEDDING
from workers.weights.quantise import quantise

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernels.buffers import Acts, Floats, Routing
    from scheduler.models import ModelShape
    from workers.kv_cache import KvCache
    from workers.weights.checkpoint import Weights
    from workers.weights.gguf_header import StoredTensor

    Array = np.ndarray[Any, Any]
    Combine: TypeAlias = Callable[[Array], None]

HEAD_ROWS = 16  # hidden rows that `FastModel.logits` takes at a time


def objection(shape: ModelShape) -> str | None:
    """Why this model cannot run in `fast` mode, or None."""
    widths = [shape.hidden, shape.heads * shape.head_dim]
    if shape.expert_layers:
        widths.append(shape.expert_ffn)
    if len(shape.expert_layers) < shape.layers:
        widths.append(shape.ffn)
    if any(width % 32 for width in widths):
        return "its widths are not multiples of 32"
    return None


class FastModel:
    """Weights in memory, and the program that runs a step over them.

    After `program.run`, `x` [T, D] holds the last layer's output and `drawn_logits` [n, V] the
    logits of the drawn rows.
    """

    def __init__(
        self,
        checkpoint: Weights,
        cache: KvCache,
        pool: Pool,
        max_rows: int,
        combine: Combine | None = None,
    ) -> None:
        """With `combine` the checkpoint is a part of a model, without its embedding.

        `combine` turns a part [T, D] of a layer's output, in place, into the whole; the tokens'
        rows are to be in `x` before `program.run`.
        """
        self._combine = combine
        shape = self.shape = checkpoint.shape
        self._checkpoint = checkpoint
        self._cache = cache
        program = self.program = Program(pool, max_rows)
        self._head = self._matrix("lm_head.weight")
        self.norm = self._vector("model.norm.weight")
        self.x = program.floats(shape.hidden)
        self._angles = program.floats(shape.head_dim)
        self._normed = program.acts(shape.hidden)
        self._qkv = program.floats((shape.heads + 2 * shape.kv_heads) * shape.head_dim)
        self._mixed = program.floats(shape.heads * shape.head_dim)
        self._mixed_acts = program.acts(shape.heads * shape.head_dim)
        if len(shape.expert_layers) < shape.layers:
            self._gate_up = program.floats(2 * shape.ffn)
            self._inner = program.acts(shape.ffn)
        if shape.expert_layers:
            self._expert_buffers(shape.experts_used)
        self._part = program.floats(shape.hidden)  # takes no memory until it is used
        if combine is None:
            tied = shape.tied_embeddings
            program.embed(self._head if tied else self._matrix(EMBEDDING), self.x)
        program.angles(_frequencies(shape), self._angles, shape.rope_magnitude)
        for number in range(shape.layers):
            self._attention(number)
            self._normalise(number, "post_attention_layernorm")
            feed_forward = self._experts if number in shape.expert_layers else self._feed_forward
            feed_forward(f"model.layers.{number}.")
        drawn = program.floats(shape.hidden)
        program.gather(self.x, drawn)
        self.drawn_logits = self._say(program, drawn, self._normed)
        self._reader = Program(pool, HEAD_ROWS)
        self._read_from = self._reader.floats(shape.hidden)
        self._read_logits = self._say(
            self._reader, self._read_from, self._reader.acts(shape.hidden)
        )
        del self._checkpoint  # everything is in memory

    def logits(self, hidden: Array) -> Array:
        """Rows of `x` [n, D], at most HEAD_ROWS -> [n, V], valid until the next call."""
        rows = len(hidden)
        self._read_from.data[:rows] = hidden
        self._reader.run([0] * rows, [], range(rows))
        return self._read_logits.data[:rows]

    def _attention(self, number: int) -> None:
        """x += attention(norm(x)), by way of the layer's cache."""
        shape, program = self.shape, self.program
        prefix = f"model.layers.{number}.self_attn."
        heads = HeadCounts(shape.heads, shape.kv_heads, shape.head_dim)
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        cache = self._cache.data[number]
        self._normalise(number, "input_layernorm")
        first = 0
        for name, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            columns = self._qkv.columns(first, first + width)
            matrix = self._matrix(f"{prefix}{name}.weight")
            program.matmul(matrix, self._normed, columns, wait=first == 0)
            first += width
        program.rope(self._qkv, self._angles, heads, cache, self._extras(prefix))
        window = shape.window if number in shape.window_layers else 0
        program.mark(self._cache.mark, number + 1)
        program.attention(self._qkv, heads, cache, self._mixed, window, wait=False)
        program.quantise(self._mixed, self._mixed_acts)
        self._contribute(f"{prefix}o_proj.weight", self._mixed_acts)

    def _feed_forward(self, layer: str) -> None:
        """x += down(silu(gate) · up) of norm(x)."""
        program, ffn = self.program, self.shape.ffn
        prefix = f"{layer}mlp."
        gate, up = self._gate_up.columns(0, ffn), self._gate_up.columns(ffn, 2 * ffn)
        program.matmul(self._matrix(f"{prefix}gate_proj.weight"), self._normed, gate)
        program.matmul(self._matrix(f"{prefix}up_proj.weight"), self._normed, up, wait=False)
        program.silu_mul(self._gate_up, self._inner)
        self._contribute(f"{prefix}down_proj.weight", self._inner)

    def _expert_buffers(self, used: int) -> None:
        """Of all layers with experts: room for `used` copies of each row."""
        shape, program = self.shape, self.program
        self._copies = program.acts(shape.hidden, used)
        self._expert_gate_up = program.floats(2 * shape.expert_ffn, used)
        self._expert_inner = program.acts(shape.expert_ffn, used)
        self._expert_out = program.floats(shape.hidden, used)

    def _experts(self, layer: str) -> None:
        """x += the weighted sum of what the chosen experts make of norm(x).

        The router reads x unrounded: who is chosen is not left to rounding.
        """
        shape, program, ffn = self.shape, self.program, self.shape.expert_ffn
        norm = self._vector(f"{layer}post_attention_layernorm.weight")
        router = self._vector(f"{layer}mlp.gate.weight") * norm
        routing = program.route(
            self.x,
            router,
            shape.norm_eps,
            shape.experts_used,
            sum_to_one=shape.expert_weights_sum_to_one,
        )
        program.spread(self._normed, routing, self._copies)
        gate_up = self._expert_gate_up
        gate, up = gate_up.columns(0, ffn), gate_up.columns(ffn, 2 * ffn)
        prefix = f"{layer}mlp.experts"
        self._expert_products(prefix, "gate_proj", self._copies, routing, gate)
        self._expert_products(prefix, "up_proj", self._copies, routing, up)
        program.silu_mul(gate_up, self._expert_inner)
        self._expert_products(prefix, "down_proj", self._expert_inner, routing, self._expert_out)
        if self._combine is None:
            program.combine(self._expert_out, routing, self.x, add=True)
        else:
            program.combine(self._expert_out, routing, self._part)
            program.call(self._add_parts)

    def _expert_products(
        self, prefix: str, name: str, x: Acts, routing: Routing, out: Floats
    ) -> None:
        """out = each copy · its expert's matrix of this name; up_proj may go beside gate_proj."""
        experts = range(self.shape.experts)
        matrices = [self._matrix(f"{prefix}.{expert}.{name}.weight") for expert in experts]
        self.program.expert_matmul(matrices, x, routing, out, wait=name != "up_proj")

    def _contribute(self, name: str, acts: Acts) -> None:
        """x += matrix · acts, of all parts of the model."""
        matrix = self._matrix(name)
        if self._combine is None:
            self.program.matmul(matrix, acts, self.x, add=True)
        else:
            self.program.matmul(matrix, acts, self._part)
            self.program.call(self._add_parts)

    def _add_parts(self, rows: int) -> None:
        assert self._combine, "only a part is added to others"
        part = self._part.data[:rows]
        self._combine(part)
        self.x.data[:rows] += part

    def _normalise(self, number: int, name: str) -> None:
        weight = self._vector(f"model.layers.{number}.{name}.weight")
        self.program.norm(self.x, weight, self.shape.norm_eps, self._normed)

    def _extras(self, prefix: str) -> QkvExtras:
        """Biases and head norms, where the model has them."""
        bias = query_norm = key_norm = None
        if self.shape.qkv_bias:
            names = ("q_proj", "k_proj", "v_proj")
            bias = np.concatenate([self._vector(f"{prefix}{name}.bias") for name in names])
        if self.shape.qk_norm:
            query_norm = self._vector(f"{prefix}q_norm.weight")
            key_norm = self._vector(f"{prefix}k_norm.weight")
        return QkvExtras(bias, query_norm, key_norm, self.shape.norm_eps)

    def _say(self, program: Program, hidden: Floats, normed: Acts) -> Floats:
        """The head: logits of the rows of `hidden`."""
        out = program.floats(self.shape.vocab)
        program.norm(hidden, self.norm, self.shape.norm_eps, normed)
        program.matmul(self._head, normed, out)
        return out

    def _vector(self, name: str) -> Array:
        return self._checkpoint.array(name)

    def _matrix(self, name: str) -> Matrix:
        stored = blocks_of(self._checkpoint, name)
        outputs, inputs = stored.dims
        matrix = Matrix(stored.kind.name, outputs, inputs, stored.data)
        stored.let_go()  # or a whole file would be in memory twice
        return matrix


def blocks_of(weights: Weights, name: str) -> StoredTensor:
    """A weight in its own blocks, or in Q8_0 where the kernels do not know its format."""
    stored = weights.stored(name)
    if stored is None or stored.kind.name not in FORMATS:
        return quantise(weights.array(name), GGMLQuantizationType.Q8_0)
    return stored


def _frequencies(shape: ModelShape) -> Array:
    """Rotary frequencies [E/2]: theta^(-2i/E), divided as the model's scaling says."""
    exponents = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    frequencies = shape.rope_theta**-exponents
    if shape.rope_divisors:
        frequencies = frequencies / np.array(shape.rope_divisors)
    return frequencies.astype(np.float32)
