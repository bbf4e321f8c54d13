"""Answers that repeat their prompt, and the logprobs of its tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from scheduler.batching import Batcher
from scheduler.blocks import BlockPool
from scheduler.messages import Alternative, Echo, FinishReason, TokenLogprob
from workers.engine import Engine
from workers.fake import FakeOptions, FakeText
from workers.native import NativeRunner
from workers.reading import ROWS, score

PROMPT = list(b"once upon a time there was a king")  # two whole blocks and one token


def serve(engine, job, prompt=PROMPT):
    """All outputs of a job."""
    engine.add(job, prompt)
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
        engine.check_integrity()
    assert engine.keys == []
    return outputs


# ── with the fake model ─────────────────────────────────────────────────────────────────────────


def test_the_first_output_alone_brings_the_prompt(make_engine, make_job):
    outputs = serve(make_engine(), make_job(echo=True, choices=(0, 1)))
    assert outputs[0].echo == Echo(bytes(PROMPT).decode(), b"o")
    assert [o.echo for o in outputs[1:]] == [None] * (len(outputs) - 1)


def test_with_logprobs_it_brings_a_score_for_every_token_but_the_first(make_engine, make_job):
    echo = serve(make_engine(), make_job(echo=True, logprobs=1))[0].echo
    assert echo.tokens == tuple(
        TokenLogprob(chr(token), bytes([token]), -before / 100, (Alternative("a", b"a", -1.0),))
        for before, token in pairwise(PROMPT)
    )


def test_an_echo_changes_no_token_of_the_answer(make_engine, make_job):
    plain = serve(make_engine(), make_job(logprobs=0))
    echoed = serve(make_engine(), make_job(logprobs=0, echo=True))
    assert [(o.ids, o.logprobs) for o in echoed] == [(o.ids, o.logprobs) for o in plain]


@pytest.mark.parametrize("hold", [False, True])
def test_an_answer_of_no_tokens_is_one_output_without_ids(make_engine, make_job, hold):
    engine = make_engine()
    job = make_job(echo=True, max_tokens=0, choices=(0, 1))
    engine.add(job, PROMPT, hold=hold)
    result = engine.step()
    assert [(o.choice, o.ids, o.finish) for o in result.outputs] == [
        (0, [], FinishReason.LENGTH),
        (1, [], FinishReason.LENGTH),
    ]
    assert [held.firsts for held in result.held.values()] == [()] * hold


def test_a_prompt_may_fill_the_context_if_no_token_is_asked_for(make_engine, make_job):
    engine = make_engine(options=FakeOptions(context=len(PROMPT)))
    assert serve(engine, make_job(echo=True, max_tokens=0))[0].echo


@pytest.mark.parametrize("budget", [1, 7, 16])
def test_neither_chunks_nor_the_prefix_cache_nor_preemption_change_a_score(
    make_engine, make_job, budget
):
    job = make_job(echo=True, logprobs=2, max_tokens=4)
    expected = serve(make_engine(), job)[0].echo
    engine = make_engine(blocks=5, max_step_tokens=budget)
    serve(engine, make_job(id="before", max_tokens=2))
    assert serve(engine, job)[0].echo == expected
    older = make_job(id="older", ignore_eos=True, max_tokens=30)
    engine.add(older, PROMPT[:20])
    engine.step()
    outputs = serve(engine, job)
    assert next(o.echo for o in outputs if o.id == job.id) == expected


def test_the_first_output_says_what_was_cached_unless_the_prompt_was_read(make_engine, make_job):
    engine = make_engine()
    found = [
        [output.cached for output in serve(engine, job)]
        for job in (
            make_job(max_tokens=2),
            make_job(max_tokens=2, choices=(0, 1)),
            make_job(max_tokens=2, echo=True),
            make_job(max_tokens=2, echo=True, logprobs=0),
        )
    ]
    assert found == [[0, 0], [32, 0, 0, 0], [32, 0], [0, 0]]


# ── with a real one ─────────────────────────────────────────────────────────────────────────────


def test_scores_are_log_softmax_and_never_more_than_some_rows_at_a_time():
    torch.manual_seed(0)
    head = torch.randn(8, 50)
    hidden = torch.randn(3 * ROWS + 5, 8)
    targets = torch.randint(0, 50, (len(hidden),)).tolist()
    seen = []

    def logits(rows):
        seen.append(len(rows))
        return rows @ head.numpy()

    scores = score(hidden.numpy(), logits, targets, top=3)
    expected = (hidden @ head).log_softmax(-1)
    assert seen == [ROWS, ROWS, ROWS, 5]
    assert [s.token for s in scores] == targets
    assert [s.logprob for s in scores] == pytest.approx(
        expected[range(len(targets)), targets].tolist(), abs=1e-5
    )
    assert [[i for i, _ in s.top] for s in scores] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize("budget", [5, 64, 512])
def test_a_prompts_scores_are_those_of_transformers(tiny_llama, make_job, budget):
    model, checkpoint = tiny_llama(vocab_size=257)
    runner = NativeRunner(checkpoint, 16, threads=1)
    engine = Engine(runner, FakeText(512), Batcher(BlockPool(16), max_step_tokens=budget))
    prompt = torch.randint(0, 256, (100,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for name in ("cold", "cached"):
        job = make_job(id=name, echo=True, logprobs=2, max_tokens=0)
        (output,) = serve(engine, job, prompt)
        tokens = output.echo.tokens
        assert [token.logprob for token in tokens] == pytest.approx(
            expected[range(99), prompt[1:]].tolist(), abs=1e-4
        )
        best = [token.top[0].raw[0] if token.top[0].raw else 256 for token in tokens]
        assert best == expected[:99].argmax(-1).tolist()
