"""From GGUF's tensor names to Hugging Face's, and from stacked experts to single ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.weights.gguf_header import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_OF_EXPERTS = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}


def by_our_names(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Hugging Face's name → tensor. Names that are not known stay as they are."""
    return {ours: part for name, tensor in tensors.items() for ours, part in _renamed(name, tensor)}


def _renamed(name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    match name.split("."):
        case [part, "weight"] if part in _TOP:
            yield f"{_TOP[part]}.weight", tensor
        case ["blk", layer, part, "weight" | "bias" as kind] if part in _IN_LAYER:
            yield f"model.layers.{layer}.{_IN_LAYER[part]}.{kind}", tensor
        case ["blk", layer, part, expert, "weight"] if part in _OF_EXPERTS:  # files before 2024-04
            yield f"model.layers.{layer}.mlp.experts.{expert}.{_OF_EXPERTS[part]}.weight", tensor
        case ["blk", layer, part, "weight"] if part.removesuffix("_exps") in _OF_EXPERTS:
            ours = _OF_EXPERTS[part.removesuffix("_exps")]
            for i in range(tensor.dims[0]):  # [experts, rows, columns]
                one = StoredTensor(tensor.kind, tensor.dims[1:], tensor.data[i])
                yield f"model.layers.{layer}.mlp.experts.{i}.{ours}.weight", one
        case _:
            yield name, tensor
