"""A checkpoint in one GGUF file (llama.cpp's format), of the architecture "llama"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf.quants import dequantize

from scheduler.errors import SetupError
from scheduler.models import ModelShape
from workers.weights import llama
from workers.weights.gguf_header import read_gguf
from workers.weights.gguf_tokenizer import build_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tokenizers import Tokenizer

# What reading damaged bytes raises, in numpy and in the reader.
DAMAGE = (OSError, ValueError, LookupError, TypeError, OverflowError, ArithmeticError)

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
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
            self._check_architecture()
            self._tensors = {_hugging_face_name(name): tensor for name, tensor in tensors.items()}
            self.shape = self._read_shape()
            self.eos_ids = frozenset(self._ids(_EOS_KEYS).values())
            self.special_tokens = self._special_tokens()
        except DAMAGE as error:
            raise self._damaged(error) from error
        self.chat_template: str | None = self._metadata.get("tokenizer.chat_template")
        llama.check_shape(path, self.shape)
        dims = {name: tensor.dims for name, tensor in self._tensors.items()}
        llama.check_tensors(path, self.shape, dims)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(llama.llama_tensors(self.shape))

    def tensor(self, name: str) -> torch.Tensor:
        """float32, contiguous, in Hugging Face's layout; a copy that the caller owns."""
        if name == llama.LM_HEAD and self.shape.tied_embeddings:
            name = llama.EMBEDDING
        stored = self._tensors[name]
        try:
            values = dequantize(stored.data, stored.kind)
        except NotImplementedError as error:
            raise SetupError(
                f"{self._path}: {name} is quantised as {stored.kind.name}, which is not "
                "supported; choose another quantisation of this model, such as Q8_0 or Q4_K_M"
            ) from error
        if name.endswith("q_proj.weight"):
            values = _rotate_half_order(values, self.shape.heads)
        elif name.endswith("k_proj.weight"):
            values = _rotate_half_order(values, self.shape.kv_heads)
        return torch.from_numpy(np.array(values, np.float32, order="C"))

    def tokenizer(self) -> Tokenizer:
        try:
            return build_tokenizer(self._metadata)
        except SetupError as error:
            raise SetupError(f"{self._path}: {error}") from error
        except DAMAGE as error:
            raise self._damaged(error) from error

    def close(self) -> None:
        """Let go of the file. Tensors already given stay; nothing more may be asked."""
        self._tensors.clear()
        self._metadata.clear()

    def _damaged(self, error: Exception) -> SetupError:
        return SetupError(
            f"{self._path} is not a whole GGUF file ({type(error).__name__}: {error}); "
            "delete it and fetch it again"
        )

    def _check_architecture(self) -> None:
        architecture = self._metadata["general.architecture"]
        if architecture != "llama":
            raise SetupError(
                f"{self._path}: its architecture is {architecture!r}; "
                f"supported is {llama.SUPPORTED}"
            )
        # llama.cpp's keys for stretched contexts; a factor of 0 or 1 stretches nothing.
        kind = self._metadata.get("llama.rope.scaling.type", "none")
        factors = [self._number(f"rope.{key}", 1.0) for key in ("scaling.factor", "scale_linear")]
        if kind != "none" or any(factor not in (0.0, 1.0) for factor in factors):
            raise SetupError(
                f"{self._path}: it scales its rotary embeddings ({kind}); "
                f"supported is {llama.SUPPORTED}"
            )

    def _read_shape(self) -> ModelShape:
        heads = int(self._number("attention.head_count"))
        hidden = int(self._number("embedding_length"))
        head_dim = int(self._number("attention.key_length", hidden // heads))
        if self._number("rope.dimension_count", head_dim) != head_dim:
            raise SetupError(
                f"{self._path}: it rotates only a part of each head; supported is {llama.SUPPORTED}"
            )
        return ModelShape(
            layers=int(self._number("block_count")),
            hidden=hidden,
            heads=heads,
            kv_heads=int(self._number("attention.head_count_kv", heads)),
            head_dim=head_dim,
            ffn=int(self._number("feed_forward_length")),
            vocab=self._tensors[llama.EMBEDDING].dims[0],
            context_length=int(self._number("context_length")),
            rope_theta=float(self._number("rope.freq_base", 10_000.0)),
            norm_eps=float(self._number("attention.layer_norm_rms_epsilon")),
            tied_embeddings=llama.LM_HEAD not in self._tensors,
        )

    def _number(self, key: str, default: float | None = None) -> float:
        """The number `llama.<key>`; ValueError if it is none, or absent without a default."""
        value = self._metadata.get(f"llama.{key}", default)
        if not isinstance(value, int | float):
            raise ValueError(f"llama.{key} is {value!r}, not a number")
        return value

    def _ids(self, keys: Mapping[str, str]) -> dict[str, int]:
        """The token ids that the file gives, by the names that `keys` maps them to."""
        found = {name: self._metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
        return {name: int(token) for name, token in found.items() if token is not None}

    def _special_tokens(self) -> dict[str, str]:
        tokens = self._metadata["tokenizer.ggml.tokens"]
        return {name: tokens[token] for name, token in self._ids(_SPECIAL_KEYS).items()}


def _hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; others stay as they are."""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in _IN_LAYER:
            return f"model.layers.{layer}.{_IN_LAYER[part]}.weight"
        case [part, "weight"] if part in _TOP:
            return f"{_TOP[part]}.weight"
    return name


def _rotate_half_order(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo the row order that GGUF's llama uses for interleaved rotary embeddings.

    There the two rows that one angle turns are neighbours, [heads, E/2, 2, D]; Hugging Face keeps
    them half a head apart, [heads, 2, E/2, D] (RoFormer, 2104.09864, §3.4.2, in either order).
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
