"""A model of a known shape with random weights: to measure machines before tens of GB are fetched.

Its weights are blocks of Q4_0 (4.5 bits a weight) of random bits, so they cannot be compressed,
with small scales, so that nothing overflows. It has no tokenizer: it computes, it cannot read.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import numpy as np
from gguf.constants import GGMLQuantizationType

from kernels.program import Matrix, packed_bytes
from scheduler.errors import SetupError
from scheduler.models import ModelShape
from workers.weights.families import EMBEDDING, model_tensors
from workers.weights.gguf_header import StoredTensor

if TYPE_CHECKING:
    import numpy.typing as npt

PREFIX = "random:"
Array: TypeAlias = "npt.NDArray[np.uint8]"
KIND, BLOCK, BLOCK_BYTES = "Q4_0", 32, 18
PANEL_ROWS = 16  # kernels/cpu/formats.h


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> ModelShape:
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn=ffn,
        vocab=vocab,
        context_length=4096,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tied_embeddings=False,
    )


SHAPES = {  # from the models' own config.json
    "llama2-7b": _llama(32, 4096, 32, 32, 11008, 32_000),
    "llama2-13b": _llama(40, 5120, 40, 40, 13824, 32_000),
    "llama2-70b": _llama(80, 8192, 64, 8, 28672, 32_000),
    "llama3-8b": _llama(32, 4096, 32, 8, 14336, 128_256),
    "llama3-70b": _llama(80, 8192, 64, 8, 28672, 128_256),
}


class RandomModel:
    """Checkpoint (see there) that is made up as it is read."""

    chat_template: str | None = None
    eos_ids: frozenset[int] = frozenset()
    quantisation = "random"

    def __init__(self, shape: ModelShape, seed: int = 0) -> None:
        self.shape = shape
        self.special_tokens: dict[str, str] = {}
        self._seed = seed
        self._dims = model_tensors(shape)

    @classmethod
    def named(cls, location: str) -> RandomModel:
        """From `random:SHAPE`. Raises SetupError for an unknown shape."""
        name = location.removeprefix(PREFIX)
        if name not in SHAPES:
            raise SetupError(f"no shape {name!r}: known are {', '.join(SHAPES)}")
        return cls(SHAPES[name])

    def narrowed(self, shape: ModelShape, seed: int) -> RandomModel:
        """Of the same kind, for a rank: cutting what is made up would make all of it for each."""
        return RandomModel(shape, seed)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._dims)

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """Norms are ones."""
        return np.ones(self._dims[name], np.float32)

    def stored(self, name: str) -> StoredTensor | None:
        """The table of tokens has one row for all of them, since nobody should keep it."""
        dims = self._dims[name]
        if len(dims) == 1:
            return None
        rows, size = (1 if name == EMBEDDING else dims[0]), dims[1] // BLOCK * BLOCK_BYTES
        blocks = self._bits(name, rows * size).reshape(-1, BLOCK_BYTES)
        blocks[:, :2] = _scales(len(blocks))
        data = np.broadcast_to(blocks.reshape(rows, size), (dims[0], size))
        return StoredTensor(GGMLQuantizationType.Q4_0, dims, data)

    def matrix(self, name: str) -> Matrix:
        """One of the same kind, made up as it would be packed: faster than packing that one."""
        outputs, inputs = self._dims[name]
        size = packed_bytes(KIND, outputs, inputs)
        panels = self._bits(name, size).reshape(-1, PANEL_ROWS * BLOCK_BYTES)
        panels[:, : 2 * PANEL_ROWS] = _scales(len(panels) * PANEL_ROWS).reshape(len(panels), -1)
        return Matrix.packed(KIND, outputs, inputs, panels.reshape(-1))

    def _bits(self, name: str, size: int) -> Array:
        bits = np.random.SFC64([self._seed, zlib.crc32(name.encode())])
        words: npt.NDArray[np.uint64] = bits.random_raw(-(-size // 8))
        return words.view(np.uint8)[:size]

    def tokenizer(self) -> NoReturn:
        raise SetupError("a model of random weights cannot read text")

    def close(self) -> None:
        """It holds nothing."""


def _scales(count: int) -> Array:
    """float16 [count] of 0.001 to 0.002, as bytes [count, 2]."""
    spread = np.arange(count, dtype=np.uint32) * 2_654_435_761 >> 22
    return (0x1419 + spread).astype(np.uint16).view(np.uint8).reshape(-1, 2)
