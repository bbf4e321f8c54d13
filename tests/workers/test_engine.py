"""The engine with the fake model: what comes out of steps, and that nothing stays behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from scheduler.errors import BadRequest
from scheduler.messages import Alternative, FinishReason, FirstToken, Output, TokenLogprob
from scheduler.request import Message, Prompt
from workers.fake import FakeOptions

if TYPE_CHECKING:
    from workers.engine import Engine

PROMPT = list(b"once upon a time there was")  # 26 tokens: one whole block and a part of one


def words(outputs: list[Output]) -> list[SimpleNamespace]:
    """What the client sees of them; not how much work they were."""
    seen = ("id", "choice", "position", "ids", "text", "logprobs", "finish")
    return [SimpleNamespace(**{name: getattr(o, name) for name in seen}) for o in outputs]


def drain(engine: Engine) -> list:
    outputs = []
    while engine.has_work:
        outputs += words(engine.step().outputs)
        engine.check_integrity()
    return outputs


def serve(engine: Engine, job) -> dict[int, list]:
    """A job from start to end, by choice; afterwards the engine is empty."""
    engine.add(job, PROMPT)
    return settle(engine, drain(engine))


def settle(engine: Engine, outputs: list) -> dict[int, list]:
    assert engine.keys == []
    assert engine.batcher.pool.free == engine.batcher.pool.size
    return by_choice(outputs)


def by_choice(outputs: list) -> dict[int, list]:
    found: dict[int, list] = {}
    for output in outputs:
        found.setdefault(output.choice, []).append(output)
    return found


def ids(outputs: list) -> list[int]:
    return [token for output in outputs for token in output.ids]


def text(outputs: list) -> str:
    return "".join(output.text for output in outputs)


@pytest.fixture
def unbroken(make_engine, make_job):
    """What choices 0 to 2 of the job give, undisturbed."""
    return serve(make_engine(), make_job(choices=(0, 1, 2)))


# ── the end of an answer ────────────────────────────────────────────────────────────────────────


def test_an_answer_ends_at_the_models_own_end(make_engine, make_job):
    (answer,) = serve(make_engine(), make_job()).values()
    assert [o.position for o in answer] == list(range(17))
    assert [o.finish for o in answer] == [None] * 16 + [FinishReason.STOP]
    assert text(answer) == bytes(ids(answer)[:-1]).decode()
    assert answer[-1].text == ""


def test_ignore_eos_goes_on_to_max_tokens(make_engine, make_job):
    (answer,) = serve(make_engine(), make_job(ignore_eos=True, max_tokens=40)).values()
    assert len(answer) == 40
    assert answer[-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens(make_engine, make_job, unbroken, max_tokens):
    (answer,) = serve(make_engine(), make_job(max_tokens=max_tokens)).values()
    assert ids(answer) == ids(unbroken[0])[:max_tokens]
    assert answer[-1].finish is FinishReason.LENGTH


def test_without_max_tokens_the_context_is_the_limit(make_engine, make_job):
    engine = make_engine(options=FakeOptions(context=len(PROMPT) + 5))
    (answer,) = serve(engine, make_job()).values()
    assert (len(answer), answer[-1].finish) == (5, FinishReason.LENGTH)


def test_without_max_tokens_the_cache_is_a_limit_too(make_engine, make_job):
    (answer,) = serve(make_engine(blocks=2), make_job(ignore_eos=True)).values()
    assert (len(answer), answer[-1].finish) == (6, FinishReason.LENGTH)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_string_ends_the_text_before_it(make_engine, make_job, unbroken, length):
    whole = text(unbroken[0])
    stop = whole[5 : 5 + length]
    (answer,) = serve(make_engine(), make_job(stop=(stop, "never"))).values()
    assert text(answer) == whole[: whole.find(stop)]
    assert answer[-1].finish is FinishReason.STOP


def test_text_held_back_for_a_stop_string_comes_with_the_end(make_engine, make_job, unbroken):
    whole = text(unbroken[0])
    (answer,) = serve(make_engine(), make_job(stop=(whole[-3:] + "!",))).values()
    assert text(answer) == whole
    (answer,) = serve(make_engine(), make_job(stop=(whole[3:9] + "!",), max_tokens=6)).values()
    assert text(answer) == whole[:6]


# ── what can never run ──────────────────────────────────────────────────────────────────────────

CONTEXT = FakeOptions(context=30)


@pytest.mark.parametrize(
    ("options", "blocks", "limits", "prompt", "param"),
    [
        (CONTEXT, 64, {"max_tokens": 5}, Prompt(text="x"), "max_tokens"),
        (CONTEXT, 64, {"max_tokens": 5}, Prompt(messages=(Message("u", "x"),)), "max_tokens"),
        (FakeOptions(context=26), 64, {"max_tokens": 1}, Prompt(text="x"), "prompt"),
        (FakeOptions(context=26), 64, {}, Prompt(messages=(Message("u", "x"),)), "messages"),
        (FakeOptions(context=9), 64, {}, Prompt(text="x"), "prompt"),
        (FakeOptions(), 2, {"max_tokens": 7}, Prompt(text="x"), "prompt"),
        (FakeOptions(), 1, {}, Prompt(messages=(Message("u", "x"),)), "messages"),
    ],
)
def test_what_can_never_run_names_the_field(
    make_engine, make_job, options, blocks, limits, prompt, param
):
    engine = make_engine(blocks, options)
    job = make_job(**limits)
    job = type(job)(**{f: getattr(job, f) for f in job.__struct_fields__} | {"prompt": prompt})
    for refuse in (engine.check, engine.add, engine.reserve):
        with pytest.raises(BadRequest) as refused:
            refuse(job, PROMPT)
        assert (refused.value.param, refused.value.code) == (param, "context_length_exceeded")
    assert (engine.keys, engine.has_work) == ([], False)


def test_what_just_fits_runs(make_engine, make_job):
    engine = make_engine(2, FakeOptions(context=32))
    (answer,) = serve(engine, make_job(max_tokens=6)).values()
    assert len(answer) == 6


# ── choices ─────────────────────────────────────────────────────────────────────────────────────


def test_each_choice_is_what_it_would_be_alone(make_engine, make_job, unbroken):
    for choice in (0, 1, 2):
        (alone,) = serve(make_engine(), make_job(choices=(choice,))).values()
        assert alone == unbroken[choice]
    assert len({tuple(ids(outputs)) for outputs in unbroken.values()}) == 3


def test_choices_share_the_prompts_whole_blocks(make_engine, make_job):
    engine = make_engine()
    engine.add(make_job(choices=(0, 1, 2)), PROMPT)
    engine.step()
    assert engine.batcher.pool.size - engine.batcher.pool.free == 1 + 3


@pytest.mark.parametrize("blocks", [3, 4, 5])
def test_without_blocks_for_all_choices_nothing_changes_but_time(make_engine, make_job, blocks):
    """Each choice alone takes three blocks: here they wait for each other, or are preempted."""
    job = make_job(choices=(0, 1, 2), ignore_eos=True, max_tokens=20)
    roomy, tight = make_engine(), make_engine(blocks)
    assert serve(tight, job) == serve(roomy, job)
    assert tight.steps > roomy.steps


@pytest.mark.parametrize("budget", [1, 5, 16, 40])
def test_neither_chunks_nor_preemption_change_a_token(make_engine, make_job, budget):
    jobs = [
        make_job(id=name, seed=seed, ignore_eos=True, max_tokens=30)
        for seed, name in enumerate("abcde")
    ]
    alone = {job.id: serve(make_engine(), job)[0] for job in jobs}
    engine = make_engine(blocks=9, max_step_tokens=budget)
    for job in jobs:
        engine.add(job, PROMPT)
    outputs = drain(engine)
    assert {name: [o for o in outputs if o.id == name] for name in alone} == alone
    assert engine.batcher.preempted or budget == 1
    assert engine.tokens == len(outputs) == 150


# ── log-probabilities ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_are_one_per_token_with_their_spelling(make_engine, make_job, top):
    (answer,) = serve(make_engine(), make_job(logprobs=top, max_tokens=3)).values()
    for output in answer:
        letter = chr(output.ids[0])
        (logprob,) = output.logprobs
        assert logprob == TokenLogprob(
            letter,
            letter.encode(),
            -0.5,
            tuple(Alternative(c, c.encode(), -1.0 - i) for i, c in enumerate("abc"[:top])),
        )


def test_without_asking_there_are_none(make_engine, make_job):
    (answer,) = serve(make_engine(), make_job(max_tokens=3)).values()
    assert [output.logprobs for output in answer] == [()] * 3


# ── answers that are read as a whole ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("choices", [(0,), (0, 1)])
def test_a_whole_answer_comes_in_few_pieces_and_says_the_same(make_engine, make_job, choices):
    fields = {"choices": choices, "max_tokens": 40, "ignore_eos": True, "logprobs": 1}
    token_by_token = serve(make_engine(), make_job(**fields))
    whole = serve(make_engine(), make_job(**fields, whole=True))
    assert whole.keys() == token_by_token.keys()
    for number, pieces in whole.items():
        single = token_by_token[number]
        assert [len(piece.ids) for piece in pieces] == [1, 16, 16, 7]
        assert [piece.position for piece in pieces] == [0, 1, 17, 33]
        assert [piece.finish for piece in pieces] == [None, None, None, "length"]
        assert (ids(pieces), text(pieces)) == (ids(single), text(single))
        assert sum((p.logprobs for p in pieces), ()) == sum((o.logprobs for o in single), ())


# ── replay ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stop", [(), ("q x!", "zz")])
@pytest.mark.parametrize("done", [1, 5, 16])
def test_a_replay_goes_on_where_the_client_is(make_engine, make_job, done, stop):
    (whole,) = serve(make_engine(), make_job(stop=stop)).values()
    begun = whole[:done]
    job = make_job(stop=stop, emitted=ids(begun), sent=len(text(begun)))
    (rest,) = serve(make_engine(), job).values()
    assert rest == whole[done:]


def test_a_replay_in_the_middle_of_a_stop_string_still_stops(make_engine, make_job, unbroken):
    whole = text(unbroken[1])
    stop = whole[6:10]
    (answer,) = serve(make_engine(), make_job(choices=(1,), stop=(stop,))).values()
    begun = answer[:8]
    job = make_job(choices=(1,), stop=(stop,), emitted=ids(begun), sent=len(text(begun)))
    (rest,) = serve(make_engine(), job).values()
    assert rest == answer[8:]
    assert text(answer) == whole[: whole.find(stop)]


# ── hand-over ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hand_over(move_kv):
    """Reserve there, compute here, move the KV, resume there; gives what the prefill gave."""

    def run(prefill: Engine, decode: Engine, job) -> list:
        key = (job.id, job.epoch)
        decode.reserve(job, PROMPT)
        sequence = decode.step().granted[key]
        prefill.add(job, PROMPT, hold=True)
        outputs, held = [], {}
        while not held:
            result = prefill.step()
            outputs, held = outputs + words(result.outputs), result.held
        move_kv(held[key], prefill, sequence, decode)
        assert prefill.computing == []
        assert prefill.cancel(key)
        settle(prefill, [])
        if firsts := held[key].firsts:
            assert decode.resume(key, firsts)
        else:
            assert decode.cancel(key)
        return outputs

    return run


@pytest.mark.parametrize("choices", [(0,), (0, 1, 2), (2, 4)])
def test_two_engines_give_what_one_gives(hand_over, make_engine, make_job, choices):
    job = make_job(choices=choices)
    prefill, decode = make_engine(max_step_tokens=7), make_engine()
    other = make_job(id="other")
    decode.reserve(other, PROMPT)  # so that the blocks have other numbers there
    outputs = hand_over(prefill, decode, job) + drain(decode)
    assert decode.keys == [("other", 1)]
    decode.cancel(("other", 1))
    assert settle(decode, outputs) == serve(make_engine(), job)


def test_a_hand_over_of_a_replay(hand_over, make_engine, make_job, unbroken):
    begun = unbroken[0][:9]
    job = make_job(emitted=ids(begun), sent=len(text(begun)))
    prefill, decode = make_engine(), make_engine()
    outputs = hand_over(prefill, decode, job) + drain(decode)
    assert settle(decode, outputs)[0] == unbroken[0][9:]


def test_choices_that_end_with_their_first_token_are_not_handed_over(
    hand_over, make_engine, make_job
):
    job = make_job(choices=(0, 1), max_tokens=1)
    prefill, decode = make_engine(), make_engine()
    outputs = hand_over(prefill, decode, job)
    assert [o.finish for o in outputs] == [FinishReason.LENGTH] * 2
    settle(decode, outputs)


def test_one_of_two_choices_ends_with_its_first_token(hand_over, make_engine, make_job, unbroken):
    stop = text(unbroken[0])[0]
    job = make_job(choices=(0, 1), stop=(stop,))
    prefill, decode = make_engine(), make_engine()
    outputs = hand_over(prefill, decode, job)
    assert [o.finish for o in outputs] == [FinishReason.STOP, None]
    assert by_choice(outputs + drain(decode)) == serve(make_engine(), job)


def test_a_resume_without_blocks_for_all_choices(hand_over, make_engine, make_job):
    job = make_job(choices=(0, 1, 2))
    prefill, decode = make_engine(), make_engine(blocks=3)
    outputs = hand_over(prefill, decode, job) + drain(decode)
    assert settle(decode, outputs) == serve(make_engine(), job)


def test_nothing_is_ready_of_a_prompt_that_is_being_preempted(make_engine, make_job):
    """Seen from another thread in the middle of it: the blocks are gone, the tokens still there."""
    engine = make_engine(max_step_tokens=7)
    engine.add(make_job(), PROMPT, hold=True)
    engine.step()
    ready = engine.ready(("job", 1))
    assert (ready.tokens, ready.end) == (7, 7)
    ready.sequence.blocks = []
    ready = engine.ready(("job", 1))
    assert (ready.tokens, ready.end, ready.blocks) == (0, 0, [])


def test_resume_of_a_job_that_is_gone(make_engine, make_job):
    engine = make_engine()
    engine.reserve(make_job(), PROMPT)
    engine.step()
    assert engine.cancel(("job", 1))
    assert not engine.resume(("job", 1), (FirstToken(0, 97, 1),))
    settle(engine, [])


# ── cancel ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("after", range(9))
def test_a_cancel_at_any_moment_frees_all(make_engine, make_job, after, hold):
    engine = make_engine(max_step_tokens=8)
    engine.add(make_job(choices=(0, 1, 2)), PROMPT, hold=hold)
    for _ in range(after):
        engine.step()
    assert engine.cancel(("job", 1))
    assert not engine.cancel(("job", 1))
    engine.check_integrity()
    settle(engine, [])
    assert engine.step().idle


def test_jobs_know_nothing_of_each_others_cancel(make_engine, make_job):
    engine = make_engine(blocks=6)
    kept, gone = make_job(id="kept"), make_job(id="gone", seed=1)
    engine.add(gone, PROMPT)
    engine.add(kept, PROMPT)
    outputs = [output for _ in range(4) for output in words(engine.step().outputs)]
    engine.cancel(("gone", 1))
    outputs += drain(engine)
    expected = serve(make_engine(), kept)[0]
    assert [o for o in outputs if o.id == "kept"] == expected


def test_an_empty_engine_is_idle(make_engine):
    engine = make_engine()
    result = engine.step()
    assert (result.idle, result.outputs, engine.steps) == (True, [], 0)


def test_a_step_that_only_grants_is_not_idle(make_engine, make_job):
    engine = make_engine()
    engine.reserve(make_job(), PROMPT)
    assert not engine.step().idle
    assert engine.step().idle


def test_kv_of_a_freed_job_is_not_read_by_the_next(make_engine, make_job):
    """Blocks come back with old bytes in them; whoever gets them next writes first."""
    clean, used = make_engine(blocks=4), make_engine(blocks=4)
    used.runner.cache.data[:] = np.float32(77)
    assert serve(used, make_job()) == serve(clean, make_job())
