"""The shape of a model from a GGUF file's metadata, by llama.cpp's key names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scheduler.errors import SetupError
from scheduler.models import ModelShape
from workers.weights.families import EMBEDDING, FAMILIES, LM_HEAD, Family
from workers.weights.rope import Rope, stretch, yarn_magnitude

if TYPE_CHECKING:
    from collections.abc import Mapping

# By `general.architecture`. Mistral and Mixtral are "llama" there.
_ARCHITECTURES = {
    "llama": FAMILIES["LlamaForCausalLM"],
    "qwen2": FAMILIES["Qwen2ForCausalLM"],
    "qwen3": FAMILIES["Qwen3ForCausalLM"],
    "qwen3moe": FAMILIES["Qwen3MoeForCausalLM"],
}
_SOFTMAX = 1  # of `expert_gating_func`


@dataclass(frozen=True, slots=True)
class Keys:
    """The metadata keys of the file's architecture."""

    architecture: str
    metadata: Mapping[str, Any]

    def number(self, key: str, default: float | None = None) -> float:
        """ValueError if it is no number, or absent without a default."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int | float):
            raise ValueError(f"{self.architecture}.{key} is {value!r}, not a number")
        return value

    def text(self, key: str) -> str | None:
        value = self.metadata.get(f"{self.architecture}.{key}")
        return None if value is None else str(value)


def read_shape(
    metadata: Mapping[str, Any],
    dims: Mapping[str, tuple[int, ...]],
    rope_divisors: tuple[float, ...],
) -> ModelShape:
    """Metadata, the dimensions of each tensor by our name, and what `rope_freqs.weight` holds.

    Raises SetupError for what is not supported, and KeyError or ValueError where it is damaged.
    """
    keys = Keys(metadata["general.architecture"], metadata)
    family = _family(keys)
    heads, hidden = int(keys.number("attention.head_count")), int(keys.number("embedding_length"))
    head_dim = int(keys.number("attention.key_length", hidden // heads))
    layers, theta = int(keys.number("block_count")), keys.number("rope.freq_base", 10_000.0)
    rope = _rope(keys, head_dim)
    stretched = stretch(rope, head_dim, theta, int(keys.number("context_length")))
    if rope_divisors and stretched.rope_divisors:
        raise SetupError("it scales its rotary embeddings in two ways, which is not supported")
    window = int(keys.number("attention.sliding_window", 0))
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(keys.number("attention.head_count_kv", heads)),
        head_dim=head_dim,
        ffn=int(keys.number("feed_forward_length")),
        vocab=dims[EMBEDDING][0],
        context_length=stretched.context_length,
        rope_theta=theta,
        norm_eps=float(keys.number("attention.layer_norm_rms_epsilon")),
        tied_embeddings=LM_HEAD not in dims,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_divisors=rope_divisors or stretched.rope_divisors,
        rope_magnitude=stretched.rope_magnitude,
        window=window,
        window_layers=tuple(range(layers if window and layers <= len(dims) else 0)),
        **_experts(keys, dims),
    )


def _family(keys: Keys) -> Family:
    if keys.architecture not in _ARCHITECTURES:
        raise SetupError(
            f"its architecture is {keys.architecture!r}; supported are {', '.join(_ARCHITECTURES)}"
        )
    return _ARCHITECTURES[keys.architecture]


def _rope(keys: Keys, head_dim: int) -> Rope:
    """A factor of 0 or 1 stretches nothing; one without a type is linear, as in llama.cpp."""
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    kind = keys.text("rope.scaling.type") or "linear"
    if kind == "yarn":
        for key, usual in (("ext_factor", 1.0), ("log_multiplier", 0.0)):
            if keys.number(f"rope.scaling.yarn_{key}", usual) not in (usual, -1.0):
                raise SetupError(f"its rope.scaling.yarn_{key} is unusual and not supported")
    elif kind == "none" or factor == 1.0:
        kind = "default"
    attention = keys.number("rope.scaling.attn_factor", 1.0)  # beside YaRN's own
    return Rope(
        rope_type=kind,
        factor=factor,
        original_max_position_embeddings=int(keys.number("rope.scaling.original_context_length", 0))
        or None,
        partial_rotary_factor=keys.number("rope.dimension_count", head_dim) / head_dim,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 0.0) or None,
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 0.0) or None,
        attention_factor=None if attention == 1.0 else attention * yarn_magnitude(factor),
    )


def _experts(keys: Keys, dims: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of ModelShape that say so; the layers with a router are those with experts."""
    layers = sorted(int(name.split(".")[2]) for name in dims if name.endswith(".mlp.gate.weight"))
    if not layers:
        return {}
    if keys.number("expert_gating_func", _SOFTMAX) != _SOFTMAX:
        raise SetupError("its experts are not chosen by a softmax, which is not supported")
    if keys.number("expert_weights_scale", 1.0) not in (0.0, 1.0):
        raise SetupError("it scales the weights of its experts, which is not supported")
    ffn = keys.number("feed_forward_length")
    return {
        "experts": int(keys.number("expert_count")),
        "experts_used": int(keys.number("expert_used_count")),
        "expert_ffn": int(keys.number("expert_feed_forward_length", ffn)),
        "expert_layers": tuple(layers),
        "expert_weights_sum_to_one": bool(keys.number("expert_weights_norm", 1)),
    }
