"""The fake worker: deterministic, and its answer shows whether its KV cache was right."""

from __future__ import annotations

import pytest

from scheduler.errors import BadRequest, SetupError
from scheduler.messages import Rates
from scheduler.request import Message, Prompt
from workers.build import EngineOptions, Model, build, find
from workers.fake import EOS, FakeOptions, FakeRunner, FakeText, parse_options


def drain(engine) -> list[int]:
    ids = []
    while engine.has_work:
        ids += [token for output in engine.step().outputs for token in output.ids]
    return ids


# ── options ─────────────────────────────────────────────────────────────────────────────────────


def test_options_are_read():
    assert parse_options("") == FakeOptions()
    assert parse_options("step_ms=2.5,tokens=3") == FakeOptions(tokens=3, step_ms=2.5)


@pytest.mark.parametrize("text", ["tokens=many", "speed=1", "tokens", "step_ms=-1", "context=0"])
def test_wrong_options_are_named(text):
    with pytest.raises(SetupError, match=f"fake:{text}.*known: "):
        parse_options(text)


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("fake", Model("fake", "fake")),
        ("fake:tokens=3", Model("fake", "fake:tokens=3")),
        ("chat=fake", Model("chat", "fake")),
        ("chat=fake:tokens=3,step_ms=1", Model("chat", "fake:tokens=3,step_ms=1")),
    ],
)
def test_a_model_is_found_as_the_operator_writes_it_and_as_a_child_gets_it(text, model):
    assert find(text) == model
    assert find(str(model)) == model


def test_sequences_that_run_at_once():
    engine, _ = build(Model("m", "fake:sequences=700"), EngineOptions(kv_tokens=16, threads=1))
    assert (engine.batcher.max_sequences, engine.batcher.max_step_tokens) == (700, 1400)


def test_build():
    engine, rates = build(
        Model("m", "fake:step_ms=4,prefill_tps=1000,context=99"), EngineOptions(33, threads=1)
    )
    assert (engine.batcher.pool.size, engine.text.context_length) == (3, 99)
    assert rates == Rates(1000.0, 0.004)


# ── text ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        (Prompt(text="aé"), [97, 195, 169]),
        (Prompt(ids=[1, 255]), [1, 255]),
        (Prompt(messages=(Message("user", "x"),)), list(b"user: x\n")),
    ],
)
def test_bytes_are_tokens(prompt, tokens):
    assert FakeText(100).encode(prompt, 0.0) == tokens


@pytest.mark.parametrize(
    "prompt", [Prompt(text=""), Prompt(ids=[]), Prompt(ids=[256]), Prompt(messages=())]
)
def test_a_prompt_without_tokens_of_ours_is_a_bad_request(prompt):
    with pytest.raises(BadRequest) as wrong:
        FakeText(100).encode(prompt, 0.0)
    assert wrong.value.param == "prompt"


def test_spelling():
    text = FakeText(100)
    assert [text.token_text(t) for t in (97, 200, EOS)] == ["a", "\ufffd", ""]
    assert [text.token_bytes(t) for t in (97, 200, EOS)] == [b"a", b"\xc8", b""]


@pytest.mark.parametrize(
    ("stop", "pieces", "stopped"),
    [
        ((), ["a", "b", "c", "d", ""], False),
        (("bc",), ["a", "", ""], True),
        (("bx",), ["a", "", "bc", "d", ""], False),
        (("cdx",), ["a", "b", "", "", "cd"], False),
        (("ab", "zz"), ["", ""], True),
    ],
)
def test_text_that_may_begin_a_stop_string_is_held_back(stop, pieces, stopped):
    stream, given = FakeText(100).stream(stop), []
    for token in b"abcd":
        given.append(stream.push(token))
        if stream.stopped:
            break
    else:
        given.append(stream.finish())
    assert (given, stream.stopped) == (pieces, stopped)
    assert stream.sent == len("".join(given))


@pytest.mark.parametrize(("emitted", "sent", "next_text"), [(b"ab", 2, "c"), (b"ab", 1, "bc")])
def test_a_stream_goes_on_after_what_the_client_has(emitted, sent, next_text):
    stream = FakeText(100).stream(("x",), list(emitted), sent)
    assert stream.push(ord("c")) == next_text


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def test_the_same_job_gives_the_same_answer_in_any_company(make_engine, make_job):
    alone = make_engine()
    alone.add(make_job(), list(b"abc" * 9))
    answer = drain(alone)
    company = make_engine(max_step_tokens=10)
    company.add(make_job(id="other"), list(b"xyz" * 30))
    company.add(make_job(), list(b"abc" * 9))
    ids = []
    while company.has_work:
        ids += [o.ids[0] for o in company.step().outputs if o.id == "job"]
    assert ids == answer


@pytest.mark.parametrize(
    "other",
    [{"seed": 8}, {"choices": (1,)}, {"ids": list(b"abd")}],
    ids=["seed", "choice", "prompt"],
)
def test_another_job_gives_another_answer(make_engine, make_job, other):
    answers = []
    for job in (make_job(ids=list(b"abc")), make_job(**{"ids": list(b"abc"), **other})):
        engine = make_engine()
        engine.add(job, job.prompt.ids)
        answers.append(drain(engine))
    assert answers[0] != answers[1]


@pytest.mark.parametrize("position", [0, 17, 26, 29])
def test_a_damaged_cache_changes_the_answer(make_engine, make_job, position):
    """Prompt tokens 0 to 26, and those that were generated: each is seen."""
    answers = []
    for damage in (False, True):
        engine = make_engine()
        engine.add(make_job(), list(b"abc" * 9))
        for _ in range(4):
            engine.step()
        (sequence,) = engine.batcher.running
        if damage:
            block = sequence.blocks[position // 16]
            engine.runner.cache.data[1, 0, block, position % 16] += 1
        answers.append(drain(engine))
    assert answers[0] != answers[1]


def test_it_takes_the_time_that_it_was_told(make_engine, make_job):
    slept: list[float] = []
    options = FakeOptions(tokens=2, step_ms=10, prefill_tps=1000)
    engine = make_engine(runner=FakeRunner(8, options, slept.append), blocks=8)
    engine.add(make_job(), list(b"abcde"))
    drain(engine)
    assert slept == [pytest.approx(0.015), 0.01, 0.01]
