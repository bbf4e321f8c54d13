"""What the workers' tests share: the real model, read once, and tiny ones with random weights."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import transformers

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
}
BENCH = Path(__file__).parents[2] / "bench"


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
def bench():
    """The commands bench/exact.py and bench/oracle.py as modules: what they check, tests check."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("exact"), importlib.import_module("oracle")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Makes random models: a family and its configuration → (transformers' model, its folder)."""

    def make(family, **config):
        torch.manual_seed(0)
        configuration = getattr(transformers, f"{family}Config")(**(TINY | config))
        model = getattr(transformers, f"{family}ForCausalLM")(configuration).eval()
        for name, weight in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0  # biases and norms too, which begin as 0 and 1
            torch.nn.init.normal_(weight, mean, 0.2)
        folder = tmp_path_factory.mktemp("tiny")
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_model):
    """Makes random Llamas: keywords of LlamaConfig → (transformers' model, our checkpoint)."""

    def make(**config):
        model, folder = tiny_model("Llama", **config)
        return model, open_checkpoint(folder)

    return make


@pytest.fixture(scope="session")
def smollm2_text(smollm2):
    """Its text, in and out."""
    return Text.from_checkpoint(smollm2)
