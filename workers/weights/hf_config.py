"""config.json of a Hugging Face model, and the shape that it describes."""

from __future__ import annotations

from typing import Any

import msgspec

from scheduler.errors import SetupError
from scheduler.models import ModelShape
from workers.weights.families import FAMILIES, Family, Window
from workers.weights.rope import Rope, stretch

Ids = int | list[int] | None


class Config(msgspec.Struct):
    """What decides how a model of these families computes."""

    architectures: list[str]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rope_theta: float | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None  # newer files: theta and scaling together
    tie_word_embeddings: bool = False
    eos_token_id: Ids = None
    quantization_config: dict[str, Any] | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int = 0
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool | None = None
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None


def read_shape(config: Config) -> ModelShape:
    """Raises SetupError if the model is not supported."""
    family = _family(config)
    heads = config.num_attention_heads
    head_dim = config.head_dim or family.head_dim or config.hidden_size // max(heads, 1)
    newer = config.rope_parameters or Rope()
    theta = config.rope_theta or newer.rope_theta or family.rope_theta
    rope = config.rope_scaling or newer
    stretched = stretch(rope, head_dim, theta, config.max_position_embeddings)
    window_layers = _window_layers(config, family)
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=head_dim,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        context_length=stretched.context_length,
        rope_theta=theta,
        norm_eps=config.rms_norm_eps,
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_divisors=stretched.rope_divisors,
        rope_magnitude=stretched.rope_magnitude,
        window=(config.sliding_window or 0) if window_layers else 0,
        window_layers=window_layers,
        **_experts(config, family),
    )


def _family(config: Config) -> Family:
    family = FAMILIES.get(",".join(config.architectures))
    if family is None:
        names = ", ".join(config.architectures) or "unknown"
        raise SetupError(f"its architecture is {names}; supported are {', '.join(FAMILIES)}")
    if config.quantization_config is not None:
        raise SetupError("its safetensors are quantised; use a GGUF file of this model")
    if config.hidden_act != "silu":
        raise SetupError(f"its activation is {config.hidden_act!r}; supported is 'silu'")
    return family


def _window_layers(config: Config, family: Family) -> tuple[int, ...]:
    layers = range(config.num_hidden_layers)
    asked = config.use_sliding_window or family.window is Window.EVERY_LAYER
    if not config.sliding_window or not asked or family.window is Window.NO_LAYER:
        return ()
    if family.window is not Window.LAYERS_IF_ASKED:
        return tuple(layers)
    if config.layer_types is not None:
        kinds = enumerate(config.layer_types)
        return tuple(layer for layer, kind in kinds if kind == "sliding_attention")
    return tuple(layers)[config.max_window_layers :]


def _experts(config: Config, family: Family) -> dict[str, Any]:
    """The fields of ModelShape that say so."""
    dense, step = config.mlp_only_layers or (), max(config.decoder_sparse_step, 1)
    layers = [
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in dense and (layer + 1) % step == 0
    ]
    if not family.experts or not layers:
        return {}
    sums = config.norm_topk_prob
    return {
        "experts": config.num_experts or config.num_local_experts or 0,
        "experts_used": config.num_experts_per_tok,
        "expert_ffn": config.moe_intermediate_size or config.intermediate_size,
        "expert_layers": tuple(layers),
        "expert_weights_sum_to_one": family.expert_weights_sum_to_one if sums is None else sums,
    }
