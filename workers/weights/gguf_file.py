"""A checkpoint in one GGUF file (llama.cpp's format)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.quants import dequantize

from scheduler.errors import SetupError
from workers.weights import families
from workers.weights.gguf_header import StoredTensor, read_gguf
from workers.weights.gguf_names import by_our_names
from workers.weights.gguf_shape import read_shape
from workers.weights.gguf_tokenizer import build_tokenizer
from workers.weights.quantise import tally

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy.typing as npt
    from tokenizers import Tokenizer

# What reading damaged bytes raises, in numpy and in the reader.
DAMAGE = (OSError, ValueError, LookupError, TypeError, OverflowError, ArithmeticError)

_ROPE_FREQUENCIES = "rope_freqs.weight"  # [E/2], what each rotary frequency is divided by
_EOS_KEYS = {"eos": "eos_token_id", "eot": "eot_token_id", "eom": "eom_token_id"}
_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class GgufFile:
    """The weights, tokenizer and chat template of one file, which is read once."""

    def __init__(self, path: Path) -> None:
        """Raises SetupError if the file is damaged or of a model that is not supported."""
        self._path = path
        try:
            self._metadata, tensors = read_gguf(path)
            frequencies = tensors.pop(_ROPE_FREQUENCIES, None)
            divisors = () if frequencies is None else _numbers(frequencies).tolist()
            self._tensors = by_our_names(tensors)
            dims = {name: tensor.dims for name, tensor in self._tensors.items()}
            self.shape = read_shape(self._metadata, dims, tuple(divisors))
            self.eos_ids = frozenset(self._ids(_EOS_KEYS).values())
            self.special_tokens = self._special_tokens()
        except SetupError as error:
            raise SetupError(f"{path}: {error}") from error
        except DAMAGE as error:
            raise self._damaged(error) from error
        # Its q and k are in the order of Meta's Llama; the other architectures keep Hugging Face's.
        self._interleaved = self._metadata["general.architecture"] == "llama"
        self.chat_template: str | None = self._metadata.get("tokenizer.chat_template")
        families.check_shape(path, self.shape)
        families.check_tensors(path, self.shape, dims)
        self.quantisation = tally(tensor.kind.name for tensor in self._tensors.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(families.model_tensors(self.shape))

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """In Hugging Face's layout; see Checkpoint."""
        stored = self.stored(name)
        try:
            return np.array(_numbers(stored), np.float32, order="C")
        except NotImplementedError as error:
            raise SetupError(
                f"{self._path}: {name} is quantised as {stored.kind.name}, which is not "
                "supported; choose another quantisation of this model, such as Q8_0 or Q4_K_M"
            ) from error

    def stored(self, name: str) -> StoredTensor:
        """The same numbers in the same rows as the file has them; see Checkpoint."""
        if name == families.LM_HEAD and self.shape.tied_embeddings:
            name = families.EMBEDDING
        stored = self._tensors[name]
        if self._interleaved and name.endswith("q_proj.weight"):
            return _rotate_half_order(stored, self.shape.heads)
        if self._interleaved and name.endswith("k_proj.weight"):
            return _rotate_half_order(stored, self.shape.kv_heads)
        return stored

    def tokenizer(self) -> Tokenizer:
        try:
            return build_tokenizer(self._metadata)
        except SetupError as error:
            raise SetupError(f"{self._path}: {error}") from error
        except DAMAGE as error:
            raise self._damaged(error) from error

    def close(self) -> None:
        """Let go of the file. Arrays already given stay; nothing more may be asked."""
        self._tensors.clear()
        self._metadata.clear()

    def _damaged(self, error: Exception) -> SetupError:
        return SetupError(
            f"{self._path} is not a whole GGUF file ({type(error).__name__}: {error}); "
            "delete it and fetch it again"
        )

    def _ids(self, keys: Mapping[str, str]) -> dict[str, int]:
        """The token ids that the file gives, by the names that `keys` maps them to."""
        found = {name: self._metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
        return {name: int(token) for name, token in found.items() if token is not None}

    def _special_tokens(self) -> dict[str, str]:
        tokens = self._metadata["tokenizer.ggml.tokens"]
        return {name: tokens[token] for name, token in self._ids(_SPECIAL_KEYS).items()}


def _numbers(stored: StoredTensor) -> np.ndarray[Any, Any]:
    """NotImplementedError for a block format whose arithmetic is not known."""
    values: np.ndarray[Any, Any] = dequantize(stored.data, stored.kind)
    return values


def _rotate_half_order(stored: StoredTensor, heads: int) -> StoredTensor:
    """Undo the row order that GGUF's llama uses for interleaved rotary embeddings.

    There the two rows that one angle turns are neighbours, [heads, E/2, 2, D]; Hugging Face keeps
    them half a head apart, [heads, 2, E/2, D] (RoFormer, 2104.09864, §3.4.2, in either order).
    Rows are quantised one by one, so whole rows of bytes move.
    """
    pairs = stored.data.reshape(heads, -1, 2, stored.data.shape[-1])
    rows = pairs.swapaxes(1, 2).reshape(stored.data.shape)
    return StoredTensor(stored.kind, stored.dims, rows)
