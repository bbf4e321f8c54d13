"""Embeddings: jobs that end with their prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scheduler.batching import Batcher
from scheduler.blocks import BlockPool
from scheduler.messages import FinishReason
from workers.engine import Engine
from workers.fake import FakeText
from workers.native import NativeRunner

PROMPT = list(b"once upon a time there was a king")


def embed(engine, job, prompt=PROMPT):
    """The one output's vector."""
    engine.add(job, prompt)
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
        engine.check_integrity()
    (output,) = outputs
    assert (output.ids, output.text, output.finish) == ([], "", FinishReason.LENGTH)
    assert engine.keys == []
    return np.frombuffer(output.embedding, "<f4")


@pytest.mark.parametrize("budget", [1, 7, 512])
def test_neither_chunks_nor_the_prefix_cache_change_it(make_engine, make_job, budget):
    expected = embed(make_engine(), make_job(embed=True, max_tokens=0))
    engine = make_engine(max_step_tokens=budget)
    for name in ("cold", "cached"):
        assert np.array_equal(embed(engine, make_job(id=name, embed=True, max_tokens=0)), expected)


def test_beside_it_others_are_served(make_engine, make_job):
    engine = make_engine()
    engine.add(make_job(id="other", max_tokens=3), PROMPT)
    engine.add(make_job(embed=True, max_tokens=0), PROMPT)
    outputs = [output for _ in range(4) if engine.has_work for output in engine.step().outputs]
    assert [o.id for o in outputs if o.embedding] == ["job"]
    assert sum(len(o.ids) for o in outputs if o.id == "other") == 3


@pytest.mark.parametrize("budget", [5, 512])
def test_it_is_the_last_hidden_state_of_transformers(tiny_llama, make_job, budget):
    model, checkpoint = tiny_llama(vocab_size=257)
    runner = NativeRunner(checkpoint, 16, threads=1)
    engine = Engine(runner, FakeText(512), Batcher(BlockPool(16), max_step_tokens=budget))
    prompt = torch.randint(0, 256, (60,)).tolist()
    with torch.inference_mode():
        last = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
    expected = torch.nn.functional.normalize(last, dim=-1).numpy()
    for name in ("cold", "cached"):
        found = embed(engine, make_job(id=name, embed=True, max_tokens=0), prompt)
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.model
def test_fast_mode_gives_nearly_the_same(smollm2, smollm2_text, make_job):
    from workers.fast import FastRunner

    vectors = []
    for runner in (NativeRunner(smollm2, 16, 1), FastRunner(smollm2, 16, 1, 512)):
        engine = Engine(runner, smollm2_text, Batcher(BlockPool(16)))
        prompt = smollm2_text.encode(make_job("The cat sat on the mat.").prompt, 0.0)
        vectors.append(embed(engine, make_job(embed=True, max_tokens=0), prompt))
    exact, fast = vectors
    assert exact @ exact == pytest.approx(1, abs=1e-5)
    assert exact @ fast > 0.99
