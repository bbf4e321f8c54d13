"""Deltas → the parts of OpenAI's answers that a client's model cannot check."""

from __future__ import annotations

import json
import math

import pytest

from scheduler.messages import Alternative, Echo, FinishReason, TokenLogprob
from scheduler.request import Limits, Prompt, Sampling
from serving.ask import Ask, Delta
from serving.openai.replies import ChatReply, Collected, CompletionReply, PromptDetails, Usage
from serving.openai.requests import Call


def call(logprobs=None, stream=True, include_usage=False, request_id="i", prompt=None):
    sampling = Sampling(1, logprobs=logprobs)
    prompts = (prompt or Prompt(text="x"),)
    ask = Ask(request_id, 'mo"del', prompts, sampling, Limits(), 1, 9.75)
    return Call(ask, stream, include_usage)


def token(text, raw=None, logprob=-1.0, top=()):
    return TokenLogprob(text, text.encode() if raw is None else raw, logprob, top)


def event(raw):
    assert raw.startswith(b"data: ")
    assert raw.endswith(b"\n\n")
    assert b"\n" not in raw[:-2]
    return json.loads(raw.removeprefix(b"data: "))


def test_text_with_newlines_quotes_and_ids_with_quotes_stay_one_event():
    text = 'a\n\n"b"\r\u2028é'
    sent = event(ChatReply(call(request_id='q"')).chunk(Delta(0, text, 1)))
    assert sent["choices"][0]["delta"]["content"] == text
    assert (sent["id"], sent["model"], sent["created"]) == ('q"', 'mo"del', 9)


@pytest.mark.parametrize(("include_usage", "expected"), [(True, {"usage": None}), (False, {})])
def test_usage_is_null_in_every_chunk_only_if_it_will_come(include_usage, expected):
    sent = event(CompletionReply(call(include_usage=include_usage)).chunk(Delta(0, "a", 1)))
    assert {key: sent[key] for key in sent if key == "usage"} == expected


def test_the_usage_chunk_has_no_choices():
    usage = Usage(20, 2, 22, PromptDetails(cached_tokens=16))
    sent = event(ChatReply(call()).usage_chunk(usage))
    assert sent["choices"] == []
    assert sent["usage"] == {
        "prompt_tokens": 20,
        "completion_tokens": 2,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


def test_logprobs_are_null_unless_asked_for_and_empty_where_text_was_held_back():
    held = Delta(0, "", 0)
    assert event(ChatReply(call()).chunk(held))["choices"][0]["logprobs"] is None
    sent = event(ChatReply(call(logprobs=0)).chunk(held))["choices"][0]["logprobs"]
    assert sent == {"content": [], "refusal": None}


def test_a_chat_token_carries_its_bytes_and_alternatives():
    drawn = token(
        "é", top=(Alternative("é", "é".encode(), -0.5), Alternative("\ufffd", b"\xc3", -2.0))
    )
    sent = event(ChatReply(call(logprobs=2)).chunk(Delta(0, "é", 1, (drawn,))))
    assert sent["choices"][0]["logprobs"]["content"] == [
        {
            "token": "é",
            "logprob": -1.0,
            "bytes": [195, 169],
            "top_logprobs": [
                {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                {"token": "\ufffd", "logprob": -2.0, "bytes": [195]},
            ],
        }
    ]


def test_offsets_count_characters_across_chunks_and_parts_of_characters_begin_together():
    reply = CompletionReply(call(logprobs=0))
    first = (token("añ"), token("\ufffd", b"\xe2\x82"))
    second = (token("\ufffd", b"\xac"), token("b"))

    offsets = [
        event(reply.chunk(Delta(0, "", 2, tokens)))["choices"][0]["logprobs"]["text_offset"]
        for tokens in (first, second)
    ]
    assert offsets == [[0, 2], [2, 3]]  # "añ€b"


@pytest.mark.parametrize(
    ("prompt", "first", "offsets"),
    [
        (Prompt(text="Hi you"), b"Hi", [0, 2, 6]),
        (Prompt(text="Hi you"), b" Hi", [0, 2, 6]),  # a SentencePiece word's space
        (Prompt(text=" you"), b"<s>", [0, 0, 4]),  # a beginning that the client did not write
        (Prompt(ids=[1, 2]), b"<s>", [0, 3, 7]),
    ],
)
def test_an_echo_is_the_prompt_as_sent_and_its_first_token_has_no_logprob(prompt, first, offsets):
    reply = CompletionReply(call(logprobs=1, prompt=prompt))
    echo = Echo((first + b" you").decode(), first, (token(" you"),))
    sent = event(reply.chunk(Delta(0, "!", 1, (token("!"),), echo=echo)))["choices"][0]
    assert sent["text"] == ((first.decode() + " you") if prompt.ids else prompt.text) + "!"
    assert sent["logprobs"] == {
        "tokens": [first.decode(), " you", "!"],
        "token_logprobs": [None, -1.0, -1.0],
        "top_logprobs": [None, {" you": -1.0}, {"!": -1.0}],
        "text_offset": offsets,
    }


def test_offsets_are_counted_for_each_choice_apart():
    reply = CompletionReply(call(logprobs=0))
    for index in (0, 1):
        sent = event(reply.chunk(Delta(index, "ab", 1, (token("ab"),))))
        assert sent["choices"][0]["logprobs"]["text_offset"] == [0]


def test_the_drawn_token_is_among_the_top_and_of_equal_texts_the_likeliest_counts():
    top = (
        Alternative("x", b"x", -0.1),
        Alternative("x", b"\xff", -3.0),
        Alternative("d", b"d", -math.inf),
    )
    sent = event(CompletionReply(call(logprobs=3)).chunk(Delta(0, "d", 1, (token("d", top=top),))))
    assert sent["choices"][0]["logprobs"]["top_logprobs"] == [{"d": -1.0, "x": -0.1}]


def test_no_logprob_leaves_json():
    drawn = token("a", logprob=-math.inf)
    for reply in (ChatReply(call(logprobs=0)), CompletionReply(call(logprobs=0))):
        assert b"-9999.0" in reply.chunk(Delta(0, "a", 1, (drawn,)))


def test_collected_choices_join_their_deltas_in_order_of_index():
    collected = Collected()
    for delta in (
        Delta(1, "x", 1, (token("x"),)),
        Delta(0, "a", 1),
        Delta(1, "y", 2, (token("y"),), FinishReason.LENGTH),
        Delta(0, "", 0, (), FinishReason.STOP),
    ):
        collected.add(delta)

    assert collected.choices() == [
        Delta(0, "a", 1, (), FinishReason.STOP),
        Delta(1, "xy", 3, (token("x"), token("y")), FinishReason.LENGTH),
    ]


def test_a_choice_without_an_end_is_a_broken_generator():
    collected = Collected()
    collected.add(Delta(0, "a", 1))
    with pytest.raises(AssertionError, match="choice 0 ended without a reason"):
        collected.choices()
