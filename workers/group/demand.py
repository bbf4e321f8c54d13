"""What a model on disk asks of the ranks of a group, in numbers (workers.group.plan)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from kernels.kv_rows import row_length
from kernels.program import FORMATS
from workers.group.plan import Demand
from workers.weights.families import LM_HEAD
from workers.weights.quantise import KINDS
from workers.weights.random_model import BLOCK, BLOCK_BYTES, RandomModel
from workers.weights.safetensors_folder import SafetensorsFolder

if TYPE_CHECKING:
    from workers.kv_cache import KvDtype
    from workers.weights.checkpoint import Checkpoint
    from workers.weights.gguf_header import StoredTensor
    from workers.weights.quantise import Quantize

# Weights that a file keeps as they are, so that it costs nothing to look at their kind.
ALIKE = ("o_proj.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight")


def demand_of(
    checkpoint: Checkpoint,
    quantize: Quantize | None,
    mode: Literal["fast", "exact"],
    kv_dtype: KvDtype,
    kv_tokens: int,
    max_rows: int,
) -> Demand:
    """The model as a group would hold it in this mode."""
    shape = checkpoint.shape
    dtype = kv_dtype if mode == "fast" else "float32"
    row = row_length(dtype, shape.head_dim) * np.dtype(dtype).itemsize
    body, head = (4.0, 4.0) if mode == "exact" else _bytes_per_weight(checkpoint, quantize)
    return Demand(
        shape=shape,
        bytes_per_weight=body,
        head_bytes_per_weight=head,
        kv_bytes_per_token=2.0 * shape.layers * shape.kv_heads * row,
        kv_tokens=kv_tokens,
        max_rows=max_rows,
    )


def _bytes_per_weight(checkpoint: Checkpoint, quantize: Quantize | None) -> tuple[float, float]:
    """Of the layers on average and of the head, as the kernels keep them (blocks_of)."""
    if isinstance(checkpoint, RandomModel):
        return BLOCK_BYTES / BLOCK, BLOCK_BYTES / BLOCK
    if isinstance(checkpoint, SafetensorsFolder):  # rounded as it is read: nothing to look at
        return _block(KINDS[quantize or "int8"]), _block(KINDS["int8"])
    weights, size = 0, 0.0
    for name in checkpoint.names:
        if name.endswith(ALIKE):
            stored = _stored(checkpoint, name)
            weights += math.prod(stored.dims)
            size += math.prod(stored.dims) * _block(stored.kind)
    return size / weights, _block(_stored(checkpoint, LM_HEAD).kind)


def _stored(checkpoint: Checkpoint, name: str) -> StoredTensor:
    stored = checkpoint.stored(name)
    assert stored is not None, "a GGUF file keeps every weight in blocks"
    return stored


def _block(kind: GGMLQuantizationType) -> float:
    known = kind if kind.name in FORMATS else GGMLQuantizationType.Q8_0
    count, size = GGML_QUANT_SIZES[known]
    return float(size / count)
