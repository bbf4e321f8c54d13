"""What a checkpoint of the Llama family must hold: its weights' names and dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scheduler.models import ModelShape

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
SUPPORTED = "Llama (LlamaForCausalLM; GGUF architecture 'llama') with plain rotary embeddings"


def llama_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Each weight's dimensions, by the name that Hugging Face gives it; rows are outputs."""
    queries = shape.heads * shape.head_dim
    keys = shape.kv_heads * shape.head_dim
    layer = {
        "input_layernorm": (shape.hidden,),
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, queries),
        "post_attention_layernorm": (shape.hidden,),
        "mlp.gate_proj": (shape.ffn, shape.hidden),
        "mlp.up_proj": (shape.ffn, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.ffn),
    }
    table = (shape.vocab, shape.hidden)
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: table}
    for i in range(shape.layers):
        tensors |= {f"model.layers.{i}.{name}.weight": dims for name, dims in layer.items()}
    tensors["model.norm.weight"] = (shape.hidden,)
    if not shape.tied_embeddings:
        tensors[LM_HEAD] = table
    return tensors


def check_shape(path: Path, shape: ModelShape) -> None:
    """Raise SetupError unless the numbers fit together."""
    sizes = (shape.layers, shape.hidden, shape.ffn, shape.vocab, shape.context_length)
    if min(*sizes, shape.heads, shape.kv_heads, shape.head_dim) < 1:
        raise SetupError(f"{path}: a dimension of the model is not positive: {shape}")
    if shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise SetupError(
            f"{path}: {shape.heads} heads of {shape.head_dim} dimensions do not share "
            f"{shape.kv_heads} kv heads evenly; the file is damaged or not {SUPPORTED}"
        )


def check_tensors(path: Path, shape: ModelShape, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise SetupError unless `found` (name → dimensions) is exactly the model's weights.

    A weight that we would not use means a model that we would compute wrongly (biases, experts,
    scaled rotary frequencies), so it is refused like a missing one.
    """
    if shape.layers > len(found):  # before a damaged count makes a long list
        raise SetupError(f"{path}: it has {len(found)} weights for {shape.layers} layers")
    expected = llama_tensors(shape)
    for name, dims in expected.items():
        if name not in found:
            raise SetupError(f"{path}: the weight {name} is missing; fetch the file again")
        if found[name] != dims:
            raise SetupError(
                f"{path}: the weight {name} is {list(found[name])}, its configuration says "
                f"{list(dims)}; fetch the file again"
            )
    if unknown := sorted(found.keys() - expected.keys()):
        raise SetupError(f"{path}: it holds {unknown[0]}, unknown here; supported is {SUPPORTED}")
