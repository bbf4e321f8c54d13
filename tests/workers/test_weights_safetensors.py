from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from scheduler.errors import SetupError
from scheduler.models import ModelShape
from workers.weights.checkpoint import open_checkpoint

CONFIG = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
}


@pytest.fixture
def make(tmp_path):
    """Save a random Llama as transformers does; returns (folder, the model)."""

    def save(dtype=torch.float32, shard="5GB", **changes):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(CONFIG | changes))).to(dtype)
        model.save_pretrained(tmp_path / "model", max_shard_size=shard)
        Tokenizer(WordLevel({"a": 0}, "a")).save(str(tmp_path / "model" / "tokenizer.json"))
        return tmp_path / "model", model

    return save


def change(path, **fields):
    """Change a JSON file; None takes a field out."""
    content = (json.loads(path.read_bytes()) if path.is_file() else {}) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def refusal(folder):
    with pytest.raises(SetupError) as caught:
        open_checkpoint(folder).tokenizer()
    assert str(folder) in str(caught.value)
    return str(caught.value)


def assert_equal_weights(checkpoint, model):
    oracle = model.state_dict()
    assert {*checkpoint.names, "lm_head.weight"} == set(oracle)
    for name, weight in oracle.items():
        ours = checkpoint.array(name)
        assert ours.dtype == np.float32
        assert ours.flags.c_contiguous
        assert np.array_equal(ours, weight.float())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_weights_equal_those_saved(make, tied, shard):
    folder, model = make(shard=shard, tie_word_embeddings=tied)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "4KB")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.shape.tied_embeddings == tied
    assert_equal_weights(checkpoint, model)
    checkpoint.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(make, dtype):
    folder, model = make(dtype)
    assert_equal_weights(open_checkpoint(folder), model)


def test_numbers_that_need_scales_of_their_own_are_refused(make):
    folder, model = make()
    name, path = "model.norm.weight", folder / "model.safetensors"
    save_file(model.state_dict() | {name: model.model.norm.weight.to(torch.float8_e4m3fn)}, path)
    with pytest.raises(SetupError, match=f"{name} cannot be read: it is stored as F8_E4M3"):
        open_checkpoint(folder).array(name)


def test_the_configuration_gives_the_shape(make):
    folder, model = make(head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.shape == ModelShape(
        layers=2,
        hidden=16,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn=24,
        vocab=32,
        context_length=128,
        rope_theta=5e5,
        norm_eps=1e-6,
        tied_embeddings=False,
    )
    assert checkpoint.shape.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("scaling", "context", "divisors"),
    [
        ({"type": "linear", "factor": 4.0}, 512, (4.0, 4.0)),
        ({"type": "dynamic", "factor": 4.0}, 128, ()),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512, None),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128, None),
        ({"type": "yarn", "original_max_position_embeddings": 32}, 128, None),
        ({"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32}, 128, None),
    ],
)
def test_a_stretched_context_is_as_long_as_its_factor_says(make, scaling, context, divisors):
    folder, _ = make()
    change(folder / "config.json", rope_parameters=None, rope_scaling=scaling)
    shape = open_checkpoint(folder).shape
    assert shape.context_length == context
    if divisors is None:  # the first pair turns often and is kept, the last is stretched
        first, last = shape.rope_divisors
        assert first < last <= 4.0
    else:
        assert shape.rope_divisors == divisors


def test_older_configurations_keep_theta_at_the_top(make):
    folder, _ = make()
    change(folder / "config.json", rope_parameters=None, rope_theta=1e6, rope_scaling=None)
    assert open_checkpoint(folder).shape.rope_theta == 1e6
    change(folder / "config.json", rope_theta=None)
    assert open_checkpoint(folder).shape.rope_theta == 1e4


def test_derived_weights_of_old_exports_are_passed_over(make):
    folder, _ = make(tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    extra = {
        "lm_head.weight": torch.zeros(32, 16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    save_file(weights | extra, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert np.array_equal(checkpoint.array("lm_head.weight"), weights["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [(2, None, {2}), ([2, 3], None, {2, 3}), (2, [5, 6], {5, 6}), (None, None, set())],
)
def test_generation_config_has_the_last_word_on_ends(make, config, generation, ends):
    folder, _ = make()
    change(folder / "config.json", eos_token_id=config)
    change(folder / "generation_config.json", eos_token_id=generation)
    assert open_checkpoint(folder).eos_ids == ends


def test_tokenizer_config_gives_template_and_special_tokens(make):
    folder, _ = make()
    assert open_checkpoint(folder).chat_template is None
    change(
        folder / "tokenizer_config.json",
        bos_token={"content": "<s>", "lstrip": False},
        eos_token="</s>",
        chat_template="one",
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert checkpoint.chat_template == "one"

    named = [{"name": "rag", "template": "two"}, {"name": "default", "template": "three"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert open_checkpoint(folder).chat_template == "three"

    (folder / "chat_template.jinja").write_text("four")
    assert open_checkpoint(folder).chat_template == "four"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "its architecture is GemmaForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "layers.0.self_attn.q_proj.bias is missing"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "head_dim": 4},
            "self_attn.q_norm.weight is missi",
        ),
        ({"architectures": ["MixtralForCausalLM"]}, "each token uses 0 of 0 experts"),
        ({"architectures": []}, "its architecture is unknown"),
        ({"architectures": None}, "missing required field `architectures`"),
        ({"hidden_size": "wide"}, "Expected `int`, got `str` - at `$.hidden_size`"),
        ({"hidden_act": "gelu"}, "its activation is 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "its safetensors are quantised"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 8.0}}, "embeddings (longrope)"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "embeddings (su)"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "rotates only a part of each head"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "its rotary factor is -2.0"),
        ({"rope_scaling": {"type": "llama3", "high_freq_factor": 1.0}}, "cannot be right"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "it holds model.layers.1."),
        ({"intermediate_size": 32}, "[24, 16], its configuration says [32, 16]"),
        ({"num_attention_heads": 0}, "is not positive"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(make, changes, reason):
    folder, _ = make()
    change(folder / "config.json", **changes)
    assert reason in refusal(folder)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", b'{"architectures": ', "config.json is not as it must be"),
        ("config.json", b"\xff\xfe", "config.json is not as it must be"),
        ("generation_config.json", b"[]", "generation_config.json is not as it must be"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", b"{}", "tokenizer.json is damaged"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", b"", "model.safetensors is damaged"),
        ("model.safetensors", b"\x10" * 100, "model.safetensors is damaged"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "b.safetensors"}}',
            "b.safetensors",
        ),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../x"}}', "is missing"),
    ],
)
def test_a_missing_or_damaged_file_is_named(make, name, content, reason):
    folder, _ = make()
    (folder.parent / "x").touch()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert reason in refusal(folder)


def test_weights_cut_short_are_refused(make):
    folder, _ = make()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "model.safetensors is damaged" in refusal(folder)
