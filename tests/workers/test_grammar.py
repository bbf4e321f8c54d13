"""Answers that must match a grammar, whoever computes them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.batching import Batcher
from scheduler.blocks import BlockPool
from scheduler.errors import BadRequest
from scheduler.messages import FinishReason
from scheduler.request import Grammar, Sampling
from workers.engine import Engine
from workers.fake import EOS, SHAPE, FakeOptions, FakeText
from workers.native import NativeRunner
from workers.sampling import Draw, Sampler

PROMPT = list(b"say it in JSON")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def schema(value) -> Grammar:
    return Grammar("json_schema", json.dumps(value), "response_format")


def regex(text) -> Grammar:
    return Grammar("regex", text, "guided_regex")


def is_person(value) -> bool:
    return (
        list(value) == ["name", "age", "tags"]
        and len(value["name"]) <= 12
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and len(value["tags"]) <= 2
        and set(value["tags"]) <= {"a", "b"}
    )


@pytest.fixture(scope="module")
def text():
    return FakeText(1000)


def allowed(text, grammar, emitted=b"") -> set[int]:
    mask = text.grammars.start(grammar, list(emitted)).allowed()
    return set(np.flatnonzero(mask).tolist())


def drain(engine):
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
        engine.check_integrity()
    return outputs


def said(outputs, choice=0) -> str:
    return "".join(output.text for output in outputs if output.choice == choice)


# ── what may follow ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("grammar", "emitted", "expected"),
    [
        (regex("ab|ac"), b"", b"a"),
        (regex("ab|ac"), b"a", b"bc"),
        (regex("ab*"), b"a", [ord("b"), EOS]),
        (regex("ab"), b"ab", [EOS]),
        (Grammar("lark", 'start: "x" | "yz"', "guided_grammar"), b"", b"xy"),
        (schema({"type": "object", "properties": {}, "additionalProperties": False}), b"", b"{"),
        (schema({"enum": [1, True]}), b"", b"1t"),
        (schema({"enum": [True]}), b"tru", b"e"),
    ],
)
def test_only_what_the_grammar_has_may_follow_and_eos_only_at_its_end(
    text, grammar, emitted, expected
):
    assert allowed(text, grammar, emitted) == set(expected)


@pytest.mark.parametrize(("emitted", "finished"), [(b"", False), (b"{", False), (b"{}", True)])
def test_a_grammar_that_nothing_can_follow_is_finished(text, emitted, finished):
    empty = schema({"type": "object", "properties": {}, "additionalProperties": False})
    assert text.grammars.start(empty, list(emitted)).finished is finished


def test_whitespace_in_json_is_bounded(text):
    start = b"{" + b"\n" + b" " * 32
    assert ord(" ") in allowed(text, schema({"type": "object"}), start[:-1])
    assert ord(" ") not in allowed(text, schema({"type": "object"}), start)


@pytest.mark.parametrize(
    "grammar",
    [
        schema({"type": "nothing"}),
        schema({"not": {"type": "string"}}),
        schema({"$ref": "#/missing"}),
        Grammar("json_schema", "[", "response_format"),
        Grammar("json_schema", '"' + "x" * (300 << 10) + '"', "response_format"),
        regex("(a"),
        Grammar("lark", "start: missing", "guided_grammar"),
    ],
)
def test_a_grammar_that_is_not_understood_is_the_clients_to_change(text, grammar):
    with pytest.raises(BadRequest) as caught:
        text.grammars.compile(grammar)
    assert caught.value.param == grammar.param
    assert caught.value.message.startswith(grammar.param)


def test_state_is_each_answers_own(text):
    grammar = regex("ab|cd")
    first, second = (text.grammars.start(grammar, []) for _ in range(2))
    first.take(ord("a"))
    assert set(np.flatnonzero(second.allowed())) == set(b"ac")


# ── the draw ────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(0, 9), min_size=1, max_size=10),
    st.sampled_from(
        [{"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.2}, {"min_p": 0.9}, {"logprobs": 2}]
    ),
)
def test_only_allowed_tokens_are_drawn(seed, tokens, options):
    mask = np.zeros(10, bool)
    mask[tokens] = True
    logits = np.random.default_rng(seed).normal(0, 5, (1, 12)).astype(np.float32)
    draw = Draw(0, Sampling(seed, **options), 0, 0, [1], 1, mask)
    (drawn,) = Sampler().sample(logits, [draw])
    assert drawn.token in tokens
    if "temperature" in options:
        assert drawn.token == max(set(tokens), key=lambda token: (logits[0, token], -token))


# ── the engine ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"ignore_eos": True}, {"max_tokens": 200}])
def test_every_choice_is_json_of_its_schema_and_ends_by_itself(make_engine, make_job, options):
    engine = make_engine(options=FakeOptions(tokens=30))
    engine.add(make_job(grammar=schema(PERSON), choices=(0, 1, 2), **options), PROMPT)
    outputs = drain(engine)
    for choice in range(3):
        assert is_person(json.loads(said(outputs, choice)))
    assert [o.finish for o in outputs if o.finish] == [FinishReason.STOP] * 3
    assert len({said(outputs, choice) for choice in range(3)}) > 1


def test_max_tokens_may_cut_it(make_engine, make_job):
    engine = make_engine()
    engine.add(make_job(grammar=schema(PERSON), max_tokens=5), PROMPT)
    outputs = drain(engine)
    assert said(outputs).startswith('{"na')
    assert outputs[-1].finish is FinishReason.LENGTH


def test_an_answer_taken_over_anywhere_goes_on_in_its_grammar(make_engine, make_job):
    job = make_job(grammar=schema(PERSON))
    engine = make_engine()
    engine.add(job, PROMPT)
    unbroken = drain(engine)
    ids = [token for output in unbroken for token in output.ids]
    for lost in range(1, len(ids)):
        sent = said(unbroken[:lost])
        replay = make_engine()
        replay.add(make_job(grammar=schema(PERSON), emitted=ids[:lost], sent=len(sent)), PROMPT)
        assert sent + said(drain(replay)) == said(unbroken)


def test_an_answer_handed_over_goes_on_in_its_grammar(make_engine, make_job, move_kv):
    job = make_job(grammar=schema(PERSON), choices=(0, 1))
    whole = make_engine()
    whole.add(job, PROMPT)
    expected = drain(whole)
    source, target = make_engine(), make_engine()
    source.add(job, PROMPT, hold=True)
    target.reserve(job, PROMPT)
    first = source.step()
    (held,), (sequence,) = first.held.values(), target.step().granted.values()
    move_kv(held, source, sequence, target)
    assert target.resume((job.id, job.epoch), held.firsts)
    outputs = [*first.outputs, *drain(target)]
    assert [said(outputs, c) for c in (0, 1)] == [said(expected, c) for c in (0, 1)]


def test_a_grammar_that_becomes_too_hard_ends_its_job_and_no_other(make_engine, make_job):
    # A derivative of this one grows with every letter, until the lexer gives up.
    hard = regex("([a-z ]*[a-m][a-z ]{400}[n-z]?){40}")
    engine = make_engine(options=FakeOptions(tokens=10**6))
    engine.add(make_job(id="hard", grammar=hard, ignore_eos=True, max_tokens=900), PROMPT)
    engine.add(make_job(id="easy", ignore_eos=True, max_tokens=20), PROMPT)
    refused, outputs = {}, []
    while engine.has_work and not refused:
        result = engine.step()
        refused, outputs = result.refused, outputs + result.outputs
    assert engine.cancel(("hard", 1))
    outputs += drain(engine)
    assert [error.param for error in refused.values()] == ["guided_regex"]
    assert sum(o.id == "easy" for o in outputs) == 20
    assert engine.keys == []


def test_a_random_llama_says_nothing_but_its_grammar(tiny_llama, make_job):
    _, checkpoint = tiny_llama(vocab_size=SHAPE.vocab + 3)  # more rows than tokens
    runner = NativeRunner(checkpoint, 64, threads=1)
    engine = Engine(runner, FakeText(512), Batcher(BlockPool(64)))
    job = make_job(grammar=regex("(ab|cd)+e|[0-9]{3,5}"), choices=tuple(range(8)), max_tokens=60)
    engine.add(job, PROMPT)
    outputs = drain(engine)
    for choice in range(8):
        text = said(outputs, choice)
        cut = any(o.finish is FinishReason.LENGTH for o in outputs if o.choice == choice)
        assert re.fullmatch("(ab|cd)+e|[0-9]{3,5}", text) or (cut and text.startswith(("a", "c")))


@pytest.mark.model
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_smollm2_always_answers_by_the_schema(smollm2, smollm2_text, make_job, temperature):
    runner = NativeRunner(smollm2, 64, threads=1)
    engine = Engine(runner, smollm2_text, Batcher(BlockPool(64)))
    prompt = smollm2_text.encode(make_job("Describe a person as JSON:").prompt, 0.0)
    job = make_job(
        grammar=schema(PERSON), choices=(0, 1, 2, 3), temperature=temperature, max_tokens=150
    )
    engine.add(job, prompt)
    outputs = drain(engine)
    for choice in range(4):
        assert is_person(json.loads(said(outputs, choice)))
