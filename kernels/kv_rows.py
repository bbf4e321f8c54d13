"""How keys and values lie in the kernels' cache: [2, blocks, 16, K, row], keys at 0.

A row is one token of one kv head: its E numbers, and behind int8 ones 2 bytes for the step that
they count in (kernels/cpu/motley.h, KvLayer).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernels.library import KvLayer

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

KV_TYPES = {"float32": 0, "float16": 1, "int8": 2}
STEP_BYTES = 2


def row_length(dtype: str, head_dim: int) -> int:
    """Elements of a row."""
    return head_dim + STEP_BYTES if dtype == "int8" else head_dim


def kv_layer(cache: Array, head_dim: int) -> KvLayer:
    """A layer's cache as the library takes it. Raises ValueError if it is no such cache."""
    name, length = cache.dtype.name, cache.shape[-1]
    if name not in KV_TYPES or not cache[0].flags.c_contiguous:
        raise ValueError(f"a layer's cache of {name}; it is {' or '.join(KV_TYPES)}")
    if length != row_length(name, head_dim):
        raise ValueError(f"rows of {length} {name} in a cache for heads of {head_dim}")
    return KvLayer(KV_TYPES[name], cache[0].ctypes.data, cache[1].ctypes.data)
