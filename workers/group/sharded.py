"""A checkpoint cut to one rank's share: the model built from it knows no ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from workers.weights import families
from workers.weights.gguf_header import StoredTensor
from workers.weights.random_model import RandomModel

if TYPE_CHECKING:
    import numpy.typing as npt

    from workers.group.partition import Range, Share
    from workers.weights.checkpoint import Checkpoint, Weights

Array: TypeAlias = "npt.NDArray[np.float32]"


class Sharded:
    """The weights of one rank, by the same names as the whole model's."""

    def __init__(self, whole: Checkpoint, share: Share) -> None:
        self.shape = share.shape(whole.shape)
        self._whole = whole
        self._share = share
        self._head_dim = whole.shape.head_dim

    @property
    def names(self) -> tuple[str, ...]:
        """In execution order; the vocabulary's table only as the head, see Embedder."""
        body = (name for name in self._whole.names if name != families.EMBEDDING)
        tied = (families.LM_HEAD,) if self.shape.tied_embeddings else ()
        return (*body, *tied)

    def array(self, name: str) -> Array:
        """See Weights.array."""
        rows, columns = self._cut(name)
        array = self._whole.array(name)
        if rows is not None:
            array = array[rows.first : rows.last]
        if columns is not None:
            array = array[:, columns.first : columns.last]
        return np.ascontiguousarray(array)

    def stored(self, name: str) -> StoredTensor | None:
        """See Weights.stored; None too where a cut goes through the middle of a block."""
        rows, columns = self._cut(name)
        stored = self._whole.stored(name)
        if stored is None:
            return None
        height, width = stored.dims[0], stored.dims[-1]
        data = stored.data
        if rows is not None:
            data, height = data[rows.first : rows.last], rows.count
        if columns is not None:
            block, size = GGML_QUANT_SIZES[stored.kind]
            if columns.first % block or columns.last % block:
                return None
            data = data[:, columns.first // block * size : columns.last // block * size]
            width = columns.count
        dims = (height, width) if len(stored.dims) > 1 else (height,)
        return StoredTensor(stored.kind, dims, data)

    def _cut(self, name: str) -> tuple[Range | None, Range | None]:
        """The rows and the columns that are ours; None: all."""
        share, dim = self._share, self._head_dim
        part = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        ffn = share.expert_ffn if ".experts." in name else share.ffn
        rows = {
            "q_proj": share.heads.times(dim),
            "k_proj": share.kv_heads.times(dim),
            "v_proj": share.kv_heads.times(dim),
            "gate_proj": ffn,
            "up_proj": ffn,
            "lm_head": share.vocab,
        }
        columns = {"o_proj": share.heads.times(dim), "down_proj": ffn}
        return rows.get(part), columns.get(part)


def cut(whole: Checkpoint, share: Share) -> Weights:
    """One rank's weights."""
    if isinstance(whole, RandomModel):
        return whole.narrowed(share.shape(whole.shape), seed=share.vocab.first)
    return Sharded(whole, share)


class Embedder:
    """Rows of the vocabulary's table by token, read where they lie: no rank holds the table."""

    def __init__(self, whole: Checkpoint) -> None:
        self._stored = whole.stored(families.EMBEDDING)
        self._table = None if self._stored else whole.array(families.EMBEDDING)

    def rows(self, tokens: list[int]) -> Array:
        """[T] -> [T, D]."""
        if self._table is not None:
            return np.ascontiguousarray(self._table[tokens], np.float32)
        assert self._stored is not None
        rows = dequantize(self._stored.data[tokens], self._stored.kind)
        return np.ascontiguousarray(rows, np.float32)
