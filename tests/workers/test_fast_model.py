"""`fast` mode's numbers: each family's logits are those of the model with quantised activations.

The model is written here once more as straight lines over plain matrices, a whole prompt at once:
weights dequantised, inputs of each product rounded by kernels/reference_quant.py. Kernels and torch
sum in another order, so now and then an activation falls to the other side of a rounding step, and
those that follow do too. Changing the inputs of the reference's own products by 10^-7 moves its
logits by 0.4 to 1.9 % of their standard deviation; leaving the rounding out, by 5 to 9 %.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from kernels import dispatch
from kernels import reference as ops
from kernels.program import FORMATS, Pool, Span
from kernels.reference_quant import kv_rounded, matmul
from workers.fast_model import HEAD_ROWS, FastModel, objection
from workers.kv_cache import KvCache
from workers.reading import ROWS
from workers.weights.checkpoint import open_checkpoint
from workers.weights.quantise import quantise

pytestmark = pytest.mark.skipif(
    not dispatch.instruction_sets(),
    reason="the kernels' library is not built: there was no C++ compiler",
)

LENGTH = 150  # past every window and every original context below
IDS = torch.randint(300, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
BLOCKS = [4, 1, 6, 0, 9, 11, 2, 3, 5, 7]
ROPE = {"rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = ROPE | {"rope_type": "yarn"}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
ASKED = {"use_sliding_window": True, "sliding_window": 24, "layer_types": MIXED}
UNTIED = {"tie_word_embeddings": False}
WIDE = {"hidden_size": 160, "intermediate_size": 352, "head_dim": 64}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 24}
FAMILIES = {
    "Llama 2": ("Llama", {**UNTIED, "num_key_value_heads": 4}),
    "Llama, one kv head, no power of two": ("Llama", {**WIDE, "num_key_value_heads": 1}),
    "Llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "Llama, YaRN": ("Llama", {"rope_parameters": YARN}),
    "Mistral": ("Mistral", {"sliding_window": 24}),
    "Mistral, a window of whole blocks": ("Mistral", {"sliding_window": 32, **UNTIED}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, some layers windowed": ("Qwen2", ASKED),
    "Qwen3": ("Qwen3", {"head_dim": 24}),
    "Qwen3, untied, windowed, YaRN": ("Qwen3", {**UNTIED, **ASKED, "rope_parameters": YARN}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 24}),
    "Qwen3-MoE": ("Qwen3Moe", MOE),
    "Qwen3-MoE, weights summing to 1": ("Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    "Qwen3-MoE, dense layers": ("Qwen3Moe", {**MOE, "mlp_only_layers": [1]}),
}


# ── the reference ───────────────────────────────────────────────────────────────────────────────


def tensor(checkpoint, name):
    return torch.from_numpy(checkpoint.array(name))


def matrix(checkpoint, *names):
    """Weights [outputs, inputs] as the kernels have them: Q8_0 if in no format of theirs."""
    parts = []
    for name in names:
        stored = checkpoint.stored(name)
        if stored is None or stored.kind.name not in FORMATS:
            stored = quantise(checkpoint.array(name), Kind.Q8_0)
        parts.append(torch.from_numpy(dequantize(stored.data, stored.kind)))
    return torch.cat(parts)


def attention(checkpoint, number, x, angles, kv_dtype):
    """[T, D] -> [T, H·E]"""
    shape, prefix = checkpoint.shape, f"model.layers.{number}.self_attn."
    names = ("q_proj", "k_proj", "v_proj")
    qkv = matmul(x, matrix(checkpoint, *(f"{prefix}{name}.weight" for name in names)))
    if shape.qkv_bias:
        qkv += torch.cat([tensor(checkpoint, f"{prefix}{name}.bias") for name in names])
    heads = qkv.view(len(x), -1, shape.head_dim)
    q, k, v = torch.split(heads, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    if shape.qk_norm:
        q = ops.rms_norm(q, tensor(checkpoint, f"{prefix}q_norm.weight"), shape.norm_eps)
        k = ops.rms_norm(k, tensor(checkpoint, f"{prefix}k_norm.weight"), shape.norm_eps)
    q, k = ops.rope(q, *angles), ops.rope(k, *angles)
    k, v = (kv_rounded(x) if kv_dtype == torch.int8 else x.to(kv_dtype).float() for x in (k, v))
    group = shape.heads // shape.kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    ages = torch.arange(len(x))[:, None] - torch.arange(len(x))
    window = shape.window if number in shape.window_layers else len(x)
    hidden = (ages < 0) | (ages >= window)
    scores = torch.einsum("the,she->hts", q, k) / shape.head_dim**0.5
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hts,she->the", weights, v).flatten(1)


def dense(checkpoint, prefix, x):
    """[T, D] -> [T, D]"""
    names = (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")
    inner = ops.silu_mul(matmul(x, matrix(checkpoint, *names)))
    return matmul(inner, matrix(checkpoint, f"{prefix}down_proj.weight"))


def experts(checkpoint, prefix, x):
    """[T, D] -> [T, D]"""
    logits = x @ tensor(checkpoint, f"{prefix}gate.weight").t()
    used, normalised = checkpoint.shape.experts_used, checkpoint.shape.expert_weights_sum_to_one
    weights, chosen = ops.route(logits, used, normalised)
    shares = torch.zeros_like(logits).scatter(1, chosen, weights)  # 0 for who is not chosen
    return sum(
        share[:, None] * dense(checkpoint, f"{prefix}experts.{number}.", x)
        for number, share in enumerate(shares.t())
    )


def reference_logits(checkpoint, ids, kv_dtype=torch.float16):
    """[T, V]"""
    shape, eps = checkpoint.shape, checkpoint.shape.norm_eps
    divisors = torch.tensor(shape.rope_divisors) if shape.rope_divisors else None
    angles = ops.rope_angles(
        torch.arange(len(ids)), shape.head_dim, shape.rope_theta, divisors, shape.rope_magnitude
    )
    table = matrix(checkpoint, "model.embed_tokens.weight")
    x = table[ids]
    for number in range(shape.layers):
        layer = f"model.layers.{number}."
        normed = ops.rms_norm(x, tensor(checkpoint, f"{layer}input_layernorm.weight"), eps)
        mixed = attention(checkpoint, number, normed, angles, kv_dtype)
        x = x + matmul(mixed, matrix(checkpoint, f"{layer}self_attn.o_proj.weight"))
        weight = tensor(checkpoint, f"{layer}post_attention_layernorm.weight")
        feed_forward = experts if number in shape.expert_layers else dense
        x = x + feed_forward(checkpoint, f"{layer}mlp.", ops.rms_norm(x, weight, eps))
    head = table if shape.tied_embeddings else matrix(checkpoint, "lm_head.weight")
    return matmul(ops.rms_norm(x, tensor(checkpoint, "model.norm.weight"), eps), head)


# ── the kernels ─────────────────────────────────────────────────────────────────────────────────


def fast_model(checkpoint, kv_dtype="float16", threads=1, rows=LENGTH):
    return FastModel(checkpoint, KvCache(checkpoint.shape, 12, kv_dtype), Pool(threads), rows)


def fast_logits(checkpoint, ids, **options):
    """[T, V], the prompt in one piece."""
    model = fast_model(checkpoint, **options)
    model.program.run(ids, [Span(0, len(ids), 0, BLOCKS)], range(len(ids)))
    return torch.from_numpy(model.drawn_logits.data)


def assert_close(ours, theirs, *, experts=False):
    """With experts but for the worst 20th: by a step that was missed a row may choose others."""
    error = (ours - theirs) / theirs.std()
    rows = error.square().mean(-1).sort().values
    assert rows[: len(rows) - (len(rows) // 20 if experts else 0)].mean().sqrt() < 0.025
    assert error.abs().amax(-1).min() < 1e-5, "where no step was missed, fp32 sums are equal"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_family_computes_what_its_formulas_say(tiny_model, family):
    checkpoint = open_checkpoint(tiny_model(family[0], **family[1])[1])
    assert objection(checkpoint.shape) is None
    logits = fast_logits(checkpoint, IDS)
    assert_close(logits, reference_logits(checkpoint, IDS), experts=checkpoint.shape.experts > 0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_cache_rounds_keys_and_values_and_nothing_else_does(tiny_llama, dtype):
    _, checkpoint = tiny_llama()
    logits = fast_logits(checkpoint, IDS, kv_dtype=dtype)
    assert_close(logits, reference_logits(checkpoint, IDS, getattr(torch, dtype)))


@pytest.mark.parametrize("name", ["Llama 2", "Mixtral", "Qwen3-MoE, dense layers"])
@pytest.mark.parametrize(("quantize", "kind"), [("int4", "Q4_1"), ("int8", "Q8_0")])
def test_safetensors_are_quantised_as_asked(tiny_model, name, quantize, kind):
    family, config = FAMILIES[name]
    checkpoint = open_checkpoint(tiny_model(family, **config)[1], quantize)
    logits, expected = fast_logits(checkpoint, IDS), reference_logits(checkpoint, IDS)
    assert_close(logits, expected, experts=checkpoint.shape.experts > 0)
    kinds = {checkpoint.stored(n).kind.name for n in checkpoint.names if "up_proj" in n}
    assert kinds == {kind}


@pytest.fixture(scope="module")
def gguf_files():
    """tests/workers/test_families_gguf.py: what a converter does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield importlib.import_module("test_families_gguf")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Llama 3.1", "Q4_0"),
        ("Llama 3.1", "Q5_0"),
        ("Qwen2.5, YaRN", "Q4_1"),
        ("Qwen2.5, YaRN", "Q8_0"),
        ("Qwen2.5, YaRN", "F16"),
        ("Mixtral", "Q4_1"),
        ("Mixtral", "F16"),
        ("Qwen3-MoE", "Q4_0"),
        ("Qwen3-MoE", "Q8_0"),
    ],
)
def test_gguf_blocks_are_used_as_they_are_or_become_q8_0(
    tiny_model, tmp_path, gguf_files, name, kind
):
    family, config, architecture, metadata = gguf_files.MODELS[name]
    if name == "Qwen3-MoE":
        config = config | {"moe_intermediate_size": 64}
        metadata = metadata | {"expert_feed_forward_length": 64}
    hf, folder = tiny_model(family, **config)
    plain = open_checkpoint(folder)
    tensors = gguf_files.converted(plain, architecture)
    if name == "Llama 3.1":
        rope = hf.config.rope_parameters
        tensors["rope_freqs.weight"] = gguf_files.llama3_divisors(rope, plain.shape.head_dim)
    checkpoint = gguf_files.write(
        tmp_path / "a.gguf", plain, architecture, metadata, tensors, kind=Kind[kind]
    )
    assert checkpoint.stored("model.embed_tokens.weight").kind.name == kind
    logits, expected = fast_logits(checkpoint, IDS), reference_logits(checkpoint, IDS)
    assert_close(logits, expected, experts=checkpoint.shape.experts > 0)


def test_logits_of_rows_that_are_read_are_those_that_are_drawn_from(tiny_llama):
    _, checkpoint = tiny_llama()
    model = fast_model(checkpoint)
    model.program.run(IDS, [Span(0, LENGTH, 0, BLOCKS)], range(LENGTH))
    drawn = model.drawn_logits.data.copy()
    for first in range(0, LENGTH, HEAD_ROWS):
        rows = model.x.data[first : first + HEAD_ROWS]
        assert np.array_equal(model.logits(rows), drawn[first : first + HEAD_ROWS])
    assert ROWS <= HEAD_ROWS, "as many as are read at a time"


@pytest.mark.model
def test_smollm2_computes_what_its_formulas_say(bench, smollm2):
    _, oracle = bench
    ids = next(case.prompt for case in oracle.load_cases() if len(case.prompt) == 129)
    logits = fast_logits(smollm2, ids)[: len(ids)]
    theirs = reference_logits(smollm2, ids)
    kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    assert kl.mean() < 1e-3
    assert (logits.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.97
