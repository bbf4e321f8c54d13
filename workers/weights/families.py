"""Which models are supported, what sets each family apart, and which weights a shape asks for."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scheduler.models import ModelShape

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
ROUTER = "mlp.gate.weight"  # of a layer with experts


class Window(enum.Enum):
    """Which layers of a family attend to a sliding window only."""

    NO_LAYER = enum.auto()
    EVERY_LAYER = enum.auto()  # if the configuration gives a window
    IF_ASKED = enum.auto()  # every layer, if the configuration says use_sliding_window
    LAYERS_IF_ASKED = enum.auto()  # those in layer_types, or from max_window_layers on


@dataclass(frozen=True, slots=True)
class Family:
    """How a family's layers differ from Llama's."""

    qkv_bias: bool = False
    qk_norm: bool = False
    window: Window = Window.NO_LAYER
    experts: bool = False
    expert_weights_sum_to_one: bool = False  # where the configuration does not say
    rope_theta: float = 10_000.0  # where the configuration does not say
    head_dim: int = 0  # where the configuration does not say; 0 is D / H


# By the class that config.json names.
FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(window=Window.EVERY_LAYER),
    "MixtralForCausalLM": Family(
        window=Window.EVERY_LAYER, experts=True, expert_weights_sum_to_one=True, rope_theta=1e6
    ),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window=Window.LAYERS_IF_ASKED),
    "Qwen3ForCausalLM": Family(qk_norm=True, window=Window.LAYERS_IF_ASKED, head_dim=128),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, window=Window.IF_ASKED, experts=True),
}


def model_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Each weight's dimensions in execution order; rows are outputs.

    The names are those that Hugging Face gives to Llama's, Qwen2's (biases) and Qwen3's (norms of
    heads, experts).
    """
    table = (shape.vocab, shape.hidden)
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: table}
    for i in range(shape.layers):
        layer = _attention(shape) | _feed_forward(shape, i)
        tensors |= {f"model.layers.{i}.{name}": dims for name, dims in layer.items()}
    tensors["model.norm.weight"] = (shape.hidden,)
    if not shape.tied_embeddings:
        tensors[LM_HEAD] = table
    return tensors


def _attention(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    rows = {
        "q_proj": shape.heads * shape.head_dim,
        "k_proj": shape.kv_heads * shape.head_dim,
        "v_proj": shape.kv_heads * shape.head_dim,
    }
    tensors: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (shape.hidden,)}
    tensors |= {f"self_attn.{name}.weight": (out, shape.hidden) for name, out in rows.items()}
    if shape.qkv_bias:
        tensors |= {f"self_attn.{name}.bias": (out,) for name, out in rows.items()}
    if shape.qk_norm:
        tensors |= {f"self_attn.{name}.weight": (shape.head_dim,) for name in ("q_norm", "k_norm")}
    tensors["self_attn.o_proj.weight"] = (shape.hidden, rows["q_proj"])
    return tensors


def _feed_forward(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {"post_attention_layernorm.weight": (shape.hidden,)}
    parts, ffn = ["mlp"], shape.ffn
    if layer in shape.expert_layers:
        tensors[ROUTER] = (shape.experts, shape.hidden)
        parts, ffn = [f"mlp.experts.{i}" for i in range(shape.experts)], shape.expert_ffn
    for part in parts:
        tensors[f"{part}.gate_proj.weight"] = (ffn, shape.hidden)
        tensors[f"{part}.up_proj.weight"] = (ffn, shape.hidden)
        tensors[f"{part}.down_proj.weight"] = (shape.hidden, ffn)
    return tensors


def check_shape(path: Path, shape: ModelShape) -> None:
    """Raise SetupError unless the numbers fit together."""
    sizes = (shape.layers, shape.hidden, shape.ffn, shape.vocab, shape.context_length)
    if min(*sizes, shape.heads, shape.kv_heads, shape.head_dim) < 1:
        raise SetupError(f"{path}: a dimension of the model is not positive: {shape}")
    if shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise SetupError(
            f"{path}: {shape.heads} heads of {shape.head_dim} dimensions do not share "
            f"{shape.kv_heads} kv heads evenly; fetch the file again"
        )
    if shape.expert_layers and not 1 <= shape.experts_used <= shape.experts:
        raise SetupError(
            f"{path}: each token uses {shape.experts_used} of {shape.experts} experts; "
            "fetch the file again"
        )
    if shape.rope_divisors and len(shape.rope_divisors) != shape.head_dim // 2:
        raise SetupError(
            f"{path}: it scales {len(shape.rope_divisors)} rotary frequencies of "
            f"{shape.head_dim // 2}; fetch the file again"
        )


def check_tensors(path: Path, shape: ModelShape, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise SetupError unless `found` (name → dimensions) is exactly the model's weights.

    A weight that we would not use means a model that we would compute wrongly (other biases, shared
    experts), so it is refused like a missing one.
    """
    # Before a damaged count makes a long list.
    weights = shape.layers + len(shape.expert_layers) * shape.experts
    if weights > len(found):
        raise SetupError(f"{path}: it has {len(found)} weights for {shape.layers} layers")
    expected = model_tensors(shape)
    for name, dims in expected.items():
        if name not in found:
            raise SetupError(f"{path}: the weight {name} is missing; fetch the file again")
        if found[name] != dims:
            raise SetupError(
                f"{path}: the weight {name} is {list(found[name])}, its configuration says "
                f"{list(dims)}; fetch the file again"
            )
    if unknown := sorted(found.keys() - expected.keys()):
        raise SetupError(
            f"{path}: it holds {unknown[0]}, which no supported model of this architecture has; "
            "it would be computed wrongly"
        )
