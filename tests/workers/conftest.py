"""What the workers' tests share: the real model, read once, and tiny ones with random weights."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workers.text import Text
from workers.weights.catalogue import resolve
from workers.weights.checkpoint import open_checkpoint

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # large enough that the top two logits lie well apart
}


@pytest.fixture(scope="session")
def smollm2_path():
    """The GGUF file of SmolLM2-135M-Instruct; the catalogue fetches it if it is not here yet."""
    return resolve("smollm2-135m-instruct").path


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """The same, opened: reading its vocabulary takes seconds."""
    checkpoint = open_checkpoint(smollm2_path)
    yield checkpoint
    checkpoint.close()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Makes random Llamas: keywords of LlamaConfig → (transformers' model, our checkpoint)."""

    def make(**config):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(TINY | config))).eval()
        folder = tmp_path_factory.mktemp("tiny")
        model.save_pretrained(folder)
        return model, open_checkpoint(folder)

    return make


@pytest.fixture(scope="session")
def smollm2_text(smollm2):
    """Its text, in and out."""
    return Text.from_checkpoint(smollm2)
