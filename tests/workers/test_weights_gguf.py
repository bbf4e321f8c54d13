from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from scheduler.errors import SetupError
from scheduler.models import ModelShape
from workers.weights.checkpoint import open_checkpoint
from workers.weights.gguf_header import read_gguf

D, F, V, H, K, E = 16, 24, 8, 4, 2, 4
TENSORS = {
    "token_embd.weight": (V, D),
    "output_norm.weight": (D,),
    "blk.0.attn_norm.weight": (D,),
    "blk.0.attn_q.weight": (H * E, D),
    "blk.0.attn_k.weight": (K * E, D),
    "blk.0.attn_v.weight": (K * E, D),
    "blk.0.attn_output.weight": (D, H * E),
    "blk.0.ffn_norm.weight": (D,),
    "blk.0.ffn_gate.weight": (F, D),
    "blk.0.ffn_up.weight": (F, D),
    "blk.0.ffn_down.weight": (D, F),
}
METADATA = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": D,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": H,
    "llama.attention.head_count_kv": K,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<eos>", "a", "b", "c", "ab", "abc", "Ġ", "1"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.eos_token_id": 0,
}


def write(path, *, architecture="llama", tensors=(), leave_out=(), **metadata):
    """A one-layer llama; dots in `metadata` are written as two underscores, None leaves it out."""
    writer = gguf.GGUFWriter(path, architecture)
    changes = {key.replace("__", "."): value for key, value in metadata.items()}
    for key, value in (METADATA | changes).items():
        match value:
            case None:
                pass
            case str():
                writer.add_string(key, value)
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case _:
                writer.add_array(key, value)
    noise = np.random.default_rng(0)
    for name, dims in (TENSORS | dict(tensors)).items():
        if name not in leave_out:
            writer.add_tensor(name, noise.standard_normal(dims, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_all(path):
    checkpoint = open_checkpoint(path)
    checkpoint.tokenizer()
    for name in checkpoint.names:
        checkpoint.array(name)


def refusal(path):
    """What the operator reads."""
    with pytest.raises(SetupError) as caught:
        read_all(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_file_gives_its_shape_weights_tokenizer_and_ends(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf"))
    assert checkpoint.shape == ModelShape(
        layers=1,
        hidden=D,
        heads=H,
        kv_heads=K,
        head_dim=E,
        ffn=F,
        vocab=V,
        context_length=64,
        rope_theta=10000.0,
        norm_eps=float(np.float32(1e-5)),
        tied_embeddings=True,
    )
    assert checkpoint.eos_ids == {0}
    assert checkpoint.special_tokens == {"eos_token": "<eos>"}
    assert checkpoint.chat_template is None
    assert checkpoint.tokenizer().encode("abc ab1<eos>").ids == [5, 6, 4, 7, 0]
    assert sum(checkpoint.array(name).size for name in checkpoint.names) == (
        checkpoint.shape.parameters
    )
    assert np.array_equal(
        checkpoint.array("lm_head.weight"), checkpoint.array("model.embed_tokens.weight")
    )
    with pytest.raises(KeyError):
        checkpoint.array("model.layers.1.mlp.up_proj.weight")


def test_an_output_table_of_its_own_is_not_tied(tmp_path):
    path = write(tmp_path / "untied.gguf", tensors={"output.weight": (V, D)})
    checkpoint = open_checkpoint(path)
    assert not checkpoint.shape.tied_embeddings
    assert checkpoint.names[-1] == "lm_head.weight"
    assert not np.array_equal(
        checkpoint.array("lm_head.weight"), checkpoint.array("model.embed_tokens.weight")
    )


def test_arrays_and_tokenizer_outlive_the_file(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf"))
    norm, tokenizer = checkpoint.array("model.norm.weight"), checkpoint.tokenizer()
    before = norm.copy()
    checkpoint.close()
    (tmp_path / "tiny.gguf").unlink()
    assert np.array_equal(norm, before)
    assert tokenizer.encode("ab").ids == [4]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "gemma"}, "its architecture is 'gemma'; supported are llama, qwen2"),
        (
            {"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 4.0},
            "scales its rotary embeddings (longrope)",
        ),
        (
            {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__yarn_ext_factor": 0.5},
            "yarn_ext_factor is unusual",
        ),
        (
            {
                "llama__rope__scaling__factor": 4.0,
                "tensors": {"rope_freqs.weight": (E // 2,)},
            },
            "scales its rotary embeddings in two ways",
        ),
        ({"llama__rope__dimension_count": 1}, "rotates only a part of each head"),
        ({"tensors": {"rope_freqs.weight": (E,)}}, "it scales 4 rotary frequencies of 2"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": (4, D)}}, "llama.expert_count is None"),
        (
            {
                "tensors": {"blk.0.ffn_gate_inp.weight": (4, D)},
                "llama__expert_count": 4,
                "llama__expert_used_count": 5,
            },
            "each token uses 5 of 4 experts",
        ),
        (
            {"tensors": {"blk.0.ffn_gate_inp.weight": (4, D)}, "llama__expert_gating_func": 2},
            "not chosen by a softmax",
        ),
        ({"tensors": {"blk.0.attn_q.bias": (D,)}}, "it holds model.layers.0.self_attn.q_proj.bias"),
        ({"leave_out": ["blk.0.ffn_up.weight"]}, "model.layers.0.mlp.up_proj.weight is missing"),
        ({"llama__feed_forward_length": 32}, "[24, 16], its configuration says [32, 16]"),
        ({"llama__block_count": 0}, "a dimension of the model is not positive"),
        ({"llama__block_count": 1 << 31}, "11 weights for 2147483648 layers"),
        ({"llama__attention__head_count_kv": 3}, "do not share 3 kv heads evenly"),
        ({"llama__context_length": None}, "llama.context_length is None, not a number"),
        ({"llama__context_length": "long"}, "llama.context_length is 'long', not a number"),
        ({"general__alignment": 0}, "general.alignment is 0"),
        ({"tokenizer__ggml__model": "llama"}, "'tokenizer.ggml.scores'"),
        ({"tokenizer__ggml__model": "t5"}, "only 'llama' and 'gpt2' with llama-bpe, qwen2, smollm"),
        ({"tokenizer__ggml__pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"tokenizer__ggml__tokens": None}, "'tokenizer.ggml.tokens'"),
        ({"tokenizer__ggml__eos_token_id": 99, "tokenizer__ggml__merges": ["a z"]}, "IndexError"),
        ({"tokenizer__ggml__merges": ["a z"]}, "merges do not fit its tokens"),
        ({"tokenizer__ggml__merges": ["ab"]}, "a merge of the tokenizer is not a pair"),
        ({"tokenizer__ggml__token_type": [3, 1]}, "ValueError"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path, changes, reason):
    assert reason in refusal(write(tmp_path / "other.gguf", **changes))


def test_a_quantisation_without_arithmetic_is_named(tmp_path):
    path = write(tmp_path / "ints.gguf")
    blob = bytearray(path.read_bytes())
    # After the name: dimension count (4 bytes), one dimension (8), then the type.
    place = blob.index(b"output_norm.weight") + len(b"output_norm.weight") + 12
    blob[place] = GGMLQuantizationType.I32
    path.write_bytes(blob)
    assert "model.norm.weight is quantised as I32" in refusal(path)


def test_a_file_that_ends_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(0, len(whole), 37):
        cut.write_bytes(whole[:length])
        assert "fetch it again" in refusal(cut)


def test_a_damaged_byte_is_refused_or_harmless_and_never_a_hang(tmp_path):
    whole = write(tmp_path / "whole.gguf").read_bytes()
    header = whole.index(b"blk.0.ffn_up") + 100
    noise = np.random.default_rng(0)
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(400):
        blob = bytearray(whole)
        blob[noise.integers(header)] = noise.integers(256)
        damaged.write_bytes(blob)
        try:
            read_all(damaged)
        except SetupError as error:
            assert str(damaged) in str(error)  # noqa: PT017 - a harmless byte raises nothing
            refused += 1
    assert refused > 100


def test_no_file_and_not_this_format_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.gguf")
    text = tmp_path / "text.gguf"
    text.write_text("version https://git-lfs.github.com/spec/v1")
    assert "does not begin with GGUF" in refusal(text)


def test_the_real_file_is_smollm2(smollm2):
    assert smollm2.shape == ModelShape(
        layers=30,
        hidden=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        ffn=1536,
        vocab=49152,
        context_length=8192,
        rope_theta=100000.0,
        norm_eps=float(np.float32(1e-5)),
        tied_embeddings=True,
    )
    assert smollm2.eos_ids == {2}
    assert smollm2.special_tokens["bos_token"] == "<|im_start|>"
    assert "<|im_start|>" in smollm2.chat_template


def test_the_header_is_read_as_the_formats_own_library_does(smollm2_path):
    theirs = gguf.GGUFReader(smollm2_path)
    metadata, tensors = read_gguf(smollm2_path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert metadata == {name: field.contents() for name, field in fields.items()}
    assert list(tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        stored = tensors[tensor.name]
        assert stored.kind == tensor.tensor_type
        assert stored.dims == tuple(reversed(tensor.shape))
        assert np.array_equal(stored.data.view(tensor.data.dtype), tensor.data)


def test_every_weight_equals_transformers(tmp_path):
    """The rows of queries and keys in particular, which the format keeps in another order."""
    path = write(tmp_path / "tiny.gguf", tensors={"output.weight": (V, D)})
    oracle = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.names) == set(oracle)
    assert all(np.array_equal(checkpoint.array(name), oracle[name]) for name in oracle)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0])
def test_a_quantised_weight_is_what_its_blocks_say(smollm2, smollm2_path, kind):
    """Block formats by hand, from ggml's ggml-common.h: a scale, for Q4_1 a minimum, 32 numbers."""
    name = {
        GGMLQuantizationType.Q4_1: ("blk.3.ffn_up.weight", "model.layers.3.mlp.up_proj.weight"),
        GGMLQuantizationType.Q8_0: ("token_embd.weight", "model.embed_tokens.weight"),
    }[kind]
    stored = read_gguf(smollm2_path)[1][name[0]]
    assert stored.kind == kind
    block = bytes(stored.data[5])[: 20 if kind == GGMLQuantizationType.Q4_1 else 34]
    scale = np.frombuffer(block[:2], np.float16).astype(np.float32)
    if kind == GGMLQuantizationType.Q8_0:
        expected = scale * np.frombuffer(block[2:], np.int8)
    else:
        minimum = np.frombuffer(block[2:4], np.float16).astype(np.float32)
        packed = np.frombuffer(block[4:], np.uint8)
        expected = scale * np.concatenate([packed & 15, packed >> 4]) + minimum
    assert np.array_equal(smollm2.array(name[1])[5, :32], expected)
