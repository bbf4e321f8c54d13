"""Bodies of OpenAI's endpoints → Ask, and what is refused by which field's name."""

from __future__ import annotations

import json

import msgspec
import pytest

from scheduler.errors import BadRequest
from scheduler.request import Limits, Message, Prompt, Sampling
from serving.ask import Ask
from serving.openai import requests
from serving.openai.limits import HttpLimits

LIMITS = HttpLimits(n=4, choices=6)
SAY = [{"role": "user", "content": "Hi"}]


def chat(**fields):
    body = {"model": "m", "messages": SAY, "seed": 7} | fields
    return requests.chat(json.dumps(body).encode(), "id", 12.5, LIMITS)


def completion(**fields):
    body = {"model": "m", "prompt": "Hi", "seed": 7} | fields
    return requests.completion(json.dumps(body).encode(), "id", 12.5, LIMITS)


def test_a_chat_with_nothing_set_has_openais_defaults():
    prompt = Prompt(messages=(Message("user", "Hi"),))
    ask = Ask("id", "m", (prompt,), Sampling(7), Limits(), 1, 12.5, whole=True)
    assert chat() == requests.Call(ask, stream=False, include_usage=False)


def test_null_counts_as_absent():
    optional = set(requests.ChatBody.__struct_fields__) - {"model", "messages", "seed"}
    assert chat(**dict.fromkeys(optional)) == chat()
    optional = set(requests.CompletionBody.__struct_fields__) - {"model", "prompt", "seed"}
    assert completion(**dict.fromkeys(optional)) == completion()


def test_unknown_fields_are_ignored():
    assert chat(store=True, metadata={"a": [1]}, service_tier="auto") == chat()


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"top_p": 1}, {}),
        ({"top_p": 0.1}, {"top_p": 0.1}),
        ({"top_k": -1}, {}),
        ({"top_k": 0}, {}),
        ({"top_k": 40}, {"top_k": 40}),
        ({"min_p": 0.05}, {"min_p": 0.05}),
        ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
        ({"frequency_penalty": 2}, {"frequency_penalty": 2.0}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"logit_bias": {"5": -100, "6": 1.5}}, {"logit_bias": {5: -100.0, 6: 1.5}}),
    ],
)
@pytest.mark.parametrize("parse", [chat, completion])
def test_sampling_fields(parse, fields, sampling):
    assert parse(**fields).ask.sampling == Sampling(7, **sampling)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_the_clients_seed_is_kept(seed):
    assert chat(seed=seed).ask.sampling.seed == seed


def test_without_a_seed_each_request_draws_its_own():
    seeds = {chat(seed=None).ask.sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("call", "logprobs"),
    [
        (chat(logprobs=False), None),
        (chat(logprobs=True), 0),
        (chat(logprobs=True, top_logprobs=20), 20),
        (completion(logprobs=0), 0),
        (completion(logprobs=5), 5),
    ],
)
def test_logprobs_say_how_many_alternatives(call, logprobs):
    assert call.ask.sampling.logprobs == logprobs


@pytest.mark.parametrize(
    ("fields", "limits"),
    [
        ({"max_tokens": 1}, Limits(max_tokens=1)),
        ({"max_tokens": 5}, Limits(max_tokens=5)),
        ({"max_completion_tokens": 6}, Limits(max_tokens=6)),
        ({"max_tokens": 5, "max_completion_tokens": 6}, Limits(max_tokens=6)),
        ({"stop": "a"}, Limits(stop=("a",))),
        ({"stop": []}, Limits()),
        ({"stop": ["a", "b"]}, Limits(stop=("a", "b"))),
        ({"ignore_eos": True}, Limits(ignore_eos=True)),
    ],
)
def test_limits(fields, limits):
    assert chat(**fields).ask.limits == limits


@pytest.mark.parametrize("role", requests.ROLES)
def test_content_is_flattened_to_text(role):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = chat(messages=[{"role": role, "content": parts, "name": "N"}, *SAY])
    assert call.ask.prompts == (
        Prompt(messages=(Message(role, "a\nb", "N"), Message("user", "Hi"))),
    )


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", (Prompt(text=""),)),
        (["a", "b"], (Prompt(text="a"), Prompt(text="b"))),
        ([1, 2], (Prompt(ids=[1, 2]),)),
        ([[1], [2, 3]], (Prompt(ids=[1]), Prompt(ids=[2, 3]))),
    ],
)
def test_the_four_shapes_of_a_prompt(prompt, prompts):
    assert completion(prompt=prompt).ask.prompts == prompts


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_needs_no_answer(max_tokens):
    ask = completion(echo=True, max_tokens=max_tokens, logprobs=1).ask
    assert ask == msgspec.structs.replace(
        completion(max_tokens=1, logprobs=1).ask, echo=True, limits=Limits(max_tokens=max_tokens)
    )


@pytest.mark.parametrize("parse", [chat, completion])
def test_an_answer_of_no_tokens_is_refused_without_echo(parse):
    with pytest.raises(BadRequest) as caught:
        parse(max_tokens=0)
    assert caught.value.message == "max_tokens must be at least 1, or 0 with echo."


def test_streaming_and_usage():
    call = chat(stream=True, stream_options={"include_usage": True})
    assert (call.stream, call.include_usage) == (True, True)
    assert not chat(stream=True, stream_options={}).include_usage


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *[({"temperature": bad}, "temperature") for bad in (-0.1, 2.1, "1", True, [])],
        *[({"top_p": bad}, "top_p") for bad in (0, -1, 1.1)],
        *[({"top_k": bad}, "top_k") for bad in (-2, 1.5, 2**40)],
        *[({"min_p": bad}, "min_p") for bad in (-0.1, 1.1)],
        *[({"presence_penalty": bad}, "presence_penalty") for bad in (-2.1, 2.1)],
        *[({"frequency_penalty": bad}, "frequency_penalty") for bad in (-2.1, 2.1)],
        *[({"repetition_penalty": bad}, "repetition_penalty") for bad in (0, -1, 1e-40, 1e40)],
        *[({"max_tokens": bad}, "max_tokens") for bad in (0, -1, 2**31, 10**400, 1.5)],
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        *[({"n": bad}, "n") for bad in (0, -1, 5)],
        *[({"seed": bad}, "seed") for bad in (2**63, -(2**63) - 1, "x", 1.5)],
        *[({"stop": bad}, "stop") for bad in ("", [""], ["a"] * 17, 5)],
        ({"stop": ["a", 5]}, "stop[1]"),
        *[({"logit_bias": bad}, "logit_bias") for bad in ([], {"x": 1}, {"-1": 1}, {"1": 101})],
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"user": 5}, "user"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [*SAY, {"content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ],
)
def test_a_bad_value_is_refused_by_its_fields_name(fields, param):
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    assert (caught.value.param, caught.value.status) == (param, 400)
    assert param.split("[")[0].split(".")[0] in caught.value.message


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "input_audio", "input_audio": {}},
        {"type": "refusal", "refusal": "no"},
        {"type": "text"},
    ],
)
def test_a_part_that_is_no_text_is_refused_by_its_place(part):
    with pytest.raises(BadRequest) as caught:
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
    assert caught.value.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *[({"prompt": bad}, "prompt") for bad in ([], [[]], [[1], []], ["a", 1], [1, [1]], {}, 5)],
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [[1, 2**31]]}, "prompt[0][1]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"n": 3, "prompt": ["a", "b", "c"]}, "n"),
    ],
)
def test_a_bad_completion_is_refused_by_its_fields_name(fields, param):
    with pytest.raises(BadRequest) as caught:
        completion(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("parse", "field", "harmless", "asked"),
    [
        (chat, "functions", [], [{"name": "f"}]),
        (chat, "modalities", ["text"], ["text", "audio"]),
        (chat, "prediction", None, {"type": "content", "content": "x"}),
        (chat, "prompt_logprobs", None, 1),
        (completion, "suffix", "", "end"),
        (completion, "best_of", 1, 2),
        (completion, "prompt_logprobs", None, 1),
    ],
)
def test_what_is_not_served_yet_is_refused_only_where_it_would_matter(
    parse, field, harmless, asked
):
    assert parse(**{field: harmless}) == parse()
    with pytest.raises(BadRequest) as caught:
        parse(**{field: asked})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 3}, "temperature must be at least 0 and at most 2."),
        ({"top_p": 0}, "top_p must be greater than 0 and at most 1."),
        ({"max_tokens": "x"}, "max_tokens: expected `int | null`, got `str`."),
        (
            {"functions": [{"name": "f"}]},
            "functions is not supported here with this value: leave it out or set it to [].",
        ),
    ],
)
def test_a_refusal_says_what_is_allowed(fields, message):
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    assert caught.value.message == message
