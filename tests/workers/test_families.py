"""Each family against transformers, with small random weights; prompts pass windows and contexts.

Logits are compared at 2e-4 of their size (some 10): both sides sum in fp32 in another order, over
three layers. A wrong frequency, window or expert is off by more than 0.1.
"""

from __future__ import annotations

import pytest
import torch

from workers.kv_cache import KvCache
from workers.model import Batch, Model, Prefill
from workers.native import NativeRunner
from workers.weights.checkpoint import open_checkpoint

CLOSE = {"rtol": 2e-4, "atol": 2e-3}
LENGTH = 150  # of the longest prompt: past every window and every original context below
IDS = torch.randint(300, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


def rope(kind, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **fields}}


def stretched(kind, **fields):
    return rope(kind, factor=8.0, original_max_position_embeddings=64, **fields)


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ASKED = {"use_sliding_window": True, "sliding_window": 24}
QWEN3_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "Llama 2": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "Llama, linear": ("Llama", rope("linear", factor=4.0)),
    "Llama, dynamic": ("Llama", rope("dynamic", factor=4.0)),
    "Llama 3.1": ("Llama", stretched("llama3", **LLAMA3)),
    "Llama, YaRN": ("Llama", stretched("yarn")),
    "Mistral 0.1": ("Mistral", {"sliding_window": 24}),
    "Mistral 0.1, a window of whole blocks": ("Mistral", {"sliding_window": 32}),
    "Mistral 0.2": ("Mistral", {"sliding_window": None}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, untied": ("Qwen2", {"tie_word_embeddings": False}),
    "Qwen2, a window not asked for": ("Qwen2", {"sliding_window": 24}),
    "Qwen2, upper layers windowed": ("Qwen2", {**ASKED, "max_window_layers": 1}),
    "Qwen2, some layers windowed": ("Qwen2", {**ASKED, "layer_types": MIXED}),
    "Qwen2.5, YaRN": ("Qwen2", stretched("yarn", beta_fast=16.0, beta_slow=2.0)),
    "Qwen3": ("Qwen3", {"head_dim": 24}),
    "Qwen3, some layers windowed": ("Qwen3", {**ASKED, "head_dim": 24, "layer_types": MIXED}),
    "Qwen3, YaRN by hand": ("Qwen3", stretched("yarn", attention_factor=1.3, truncate=False)),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "Mixtral, windowed": ("Mixtral", {"num_local_experts": 4, "sliding_window": 24}),
    "Qwen3-MoE": ("Qwen3Moe", {**QWEN3_MOE, "head_dim": 24}),
    "Qwen3-MoE, weights summing to 1": ("Qwen3Moe", {**QWEN3_MOE, "norm_topk_prob": True}),
    "Qwen3-MoE, each second layer": ("Qwen3Moe", {**QWEN3_MOE, "decoder_sparse_step": 2}),
    "Qwen3-MoE, a dense layer": ("Qwen3Moe", {**QWEN3_MOE, "mlp_only_layers": [1]}),
    "Qwen3-MoE, windowed": ("Qwen3Moe", {**QWEN3_MOE, **ASKED}),
}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def models(request, tiny_model):
    family, config = request.param
    model, folder = tiny_model(family, **config)
    return model, open_checkpoint(folder)


def reference(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def test_every_row_has_the_logits_of_transformers(models):
    hf, checkpoint = models
    cache = torch.from_numpy(KvCache(checkpoint.shape, 12).data)
    table, place = torch.tensor([4, 1, 6, 0, 9, 11, 2, 3, 5, 7]), torch.arange(LENGTH)
    batch = Batch(
        tokens=torch.tensor(IDS),
        positions=place,
        slots=table[place // 16] * 16 + place % 16,
        prefills=(Prefill(0, LENGTH, 0, table),),
        decodes=(),
        drawn=place,
    )
    logits = Model(checkpoint).forward(batch, cache)
    torch.testing.assert_close(logits, reference(hf, IDS), **CLOSE)


def test_a_shape_counts_its_weights(models):
    hf, checkpoint = models
    assert checkpoint.shape.parameters == sum(weight.numel() for weight in hf.parameters())
    assert checkpoint.shape.parameters == sum(checkpoint.array(n).size for n in checkpoint.names)


def test_greedy_tokens_are_those_of_transformers_however_they_are_scheduled(bench, models):
    exact, oracle = bench
    hf, checkpoint = models
    prompts = [IDS, IDS[:1], IDS[30:70], IDS[100:117]]
    cases = [oracle.continue_prompt(hf, prompt, 12) for prompt in prompts]
    for max_sequences, max_step_tokens in ((1, 512), (4, 512), (4, 13)):
        runner = NativeRunner(checkpoint, 64, threads=1)
        ours = exact.complete(
            runner,
            prompts,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            new_tokens=12,
        )
        verdicts = [
            exact.compare_tokens(case, "", tokens) for case, tokens in zip(cases, ours, strict=True)
        ]
        assert [verdict for verdict in verdicts if not verdict.holds] == []
