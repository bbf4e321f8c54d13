"""A model written as GGUF is the model that its safetensors are.

What a converter does is written here anew, from llama.cpp's key and tensor names: q and k of Llama,
Mistral and Mixtral have their rows interleaved, experts are stacked, and Llama 3's rotary scaling
is a tensor of divisors.
"""

from __future__ import annotations

import math

import gguf
import msgspec
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from workers.weights.checkpoint import open_checkpoint

Q8_0 = GGMLQuantizationType.Q8_0
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
# name → transformers' family, its configuration, GGUF's architecture and further metadata
MODELS = {
    "Llama 2": ("Llama", {"tie_word_embeddings": False}, "llama", {}),
    "Llama, linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "llama",
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
    ),
    "Llama, linear, as older files say": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "llama",
        {"rope.scale_linear": 2.0},
    ),
    "Llama 3.1": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "llama",
        {"rope.freq_base": 500.0},
    ),
    "Mistral": ("Mistral", {"sliding_window": None}, "llama", {}),
    "Mistral, windowed": (
        "Mistral",
        {"sliding_window": 24},
        "llama",
        {"attention.sliding_window": 24},
    ),
    "Qwen2": ("Qwen2", {}, "qwen2", {}),
    "Qwen2.5, YaRN": (
        "Qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}},
        "qwen2",
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
        },
    ),
    "YaRN with its own factors": (
        "Qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                **YARN,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 1.5 * (1 + 0.1 * math.log(4)),
            }
        },
        "qwen3",
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.attn_factor": 1.5,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
        },
    ),
    "Qwen3": ("Qwen3", {"head_dim": 24}, "qwen3", {}),
    "Mixtral": (
        "Mixtral",
        {"num_local_experts": 3, "sliding_window": None, "rope_parameters": None},
        "llama",
        {"expert_count": 3, "expert_used_count": 2, "rope.freq_base": 1e6},
    ),
    "Qwen3-MoE": (
        "Qwen3Moe",
        {**MOE, "norm_topk_prob": True, "head_dim": 24},
        "qwen3moe",
        {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 40},
    ),
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}


def interleave(rows, heads):
    """Rows i and i + E/2 of each head become neighbours."""
    low, high = rows.reshape(heads, 2, -1, rows.shape[-1]).transpose(1, 0, 2, 3)
    return np.stack([low, high], axis=2).reshape(rows.shape)


def converted(checkpoint, architecture, stacked=True):
    """GGUF's name → array."""
    tensors, stacks = {}, {}
    for name in checkpoint.names:
        values = checkpoint.array(name)
        if name in TOP:
            tensors[TOP[name]] = values
            continue
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        part, _, kind = part.rpartition(".")
        if architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = checkpoint.shape.heads if "q_proj" in part else checkpoint.shape.kv_heads
            values = interleave(values, heads)
        if part.startswith("mlp.experts."):
            _, _, expert, part = part.split(".")
            part = PARTS[f"mlp.{part}"]
            if stacked:
                stacks.setdefault(f"blk.{layer}.{part}_exps.{kind}", []).append(values)
            else:
                tensors[f"blk.{layer}.{part}.{expert}.{kind}"] = values
        else:
            tensors[f"blk.{layer}.{PARTS[part]}.{kind}"] = values
    return tensors | {name: np.stack(experts) for name, experts in stacks.items()}


def llama3_divisors(rope, head_dim):
    """By wavelength, as the authors of Llama 3.1 published it."""
    original = rope["original_max_position_embeddings"]
    long, short = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
    divisors = []
    for i in range(head_dim // 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (2 * i / head_dim)
        smooth = (original / wave - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        divisors.append(1.0 if wave < short else rope["factor"] if wave > long else between)
    return np.array(divisors, np.float32)


def write(path, checkpoint, architecture, metadata, tensors, kind=None):
    """Matrices of whole blocks are quantised to `kind`."""
    shape = checkpoint.shape
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(shape.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    for key, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a"])
    for name, values in tensors.items():
        values = np.ascontiguousarray(values)
        if kind is None or values.ndim == 1 or values.shape[-1] % 32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(path)


def assert_same(ours, theirs):
    """Shapes but for the float32 of GGUF's metadata, and every weight to the bit."""
    near = ("norm_eps", "rope_divisors", "rope_magnitude")
    for field in msgspec.structs.fields(ours.shape):
        mine, other = getattr(ours.shape, field.name), getattr(theirs.shape, field.name)
        assert mine == (pytest.approx(other, rel=1e-6) if field.name in near else other), field
    assert ours.names == theirs.names
    assert all(np.array_equal(ours.array(name), theirs.array(name)) for name in ours.names)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_gguf_file_is_the_model_that_its_safetensors_are(tiny_model, tmp_path, model):
    family, config, architecture, metadata = model
    hf, folder = tiny_model(family, **config)
    theirs = open_checkpoint(folder)
    tensors = converted(theirs, architecture)
    rope = hf.config.rope_parameters
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = llama3_divisors(rope, theirs.shape.head_dim)
    ours = write(tmp_path / "a.gguf", theirs, architecture, metadata, tensors)
    assert_same(ours, theirs)


def test_experts_may_lie_apart_as_in_older_files(tiny_model, tmp_path):
    family, config, architecture, metadata = MODELS["Mixtral"]
    theirs = open_checkpoint(tiny_model(family, **config)[1])
    tensors = converted(theirs, architecture, stacked=False)
    ours = write(tmp_path / "a.gguf", theirs, architecture, metadata, tensors)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["Llama 2", "Qwen2", "Mixtral"])
def test_quantised_rows_move_as_they_are(tiny_model, tmp_path, name):
    """A converter quantises after it interleaved; the file's blocks are then those of our rows."""
    family, config, architecture, metadata = MODELS[name]
    theirs = open_checkpoint(tiny_model(family, **config)[1])
    tensors = converted(theirs, architecture)
    ours = write(tmp_path / "a.gguf", theirs, architecture, metadata, tensors, kind=Q8_0)
    quantised = 0
    for name in ours.names:
        plain, stored = theirs.array(name), ours.stored(name)
        quantised += stored.kind == Q8_0
        expected = quantize(plain, Q8_0) if stored.kind == Q8_0 else plain.view(np.uint8)
        assert np.array_equal(stored.data, expected)
        assert stored.dims == plain.shape
        assert np.array_equal(dequantize(stored.data, stored.kind), ours.array(name))
    assert quantised > 10


@pytest.mark.model
def test_smollm2s_weights_are_what_its_stored_blocks_say(smollm2):
    for name in (*smollm2.names, "lm_head.weight"):
        stored, weight = smollm2.stored(name), smollm2.array(name)
        assert stored.dims == tuple(weight.shape)
        assert np.array_equal(dequantize(stored.data, stored.kind), weight)
