"""Tools in a body → how the answer may use them; calls in deltas → OpenAI's shapes."""

from __future__ import annotations

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from scheduler.errors import BadRequest
from scheduler.messages import CallDelta, FinishReason
from scheduler.request import Message, ToolCall, ToolUse
from serving.ask import Delta
from serving.openai import requests
from serving.openai.limits import HttpLimits
from serving.openai.replies import ChatReply, Collected, Usage

PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
F = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
G = {"type": "function", "function": {"name": "g", "description": "Goes."}}
SAY = [{"role": "user", "content": "Hi"}]
NAMED = {"type": "function", "function": {"name": "f"}}


def chat(**fields):
    body = {"model": "m", "messages": SAY, "seed": 7} | fields
    return requests.chat(json.dumps(body).encode(), "id", 12.5, HttpLimits())


@pytest.mark.parametrize(
    "fields", [{"tools": []}, {"tools": [F], "tool_choice": "none"}, {"tool_choice": "auto"}]
)
def test_without_tools_that_may_be_called_nothing_changes(fields):
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    ("fields", "use"),
    [
        ({}, ToolUse()),
        ({"tool_choice": "auto"}, ToolUse()),
        ({"parallel_tool_calls": False}, ToolUse(parallel=False)),
        ({"tool_choice": "required"}, ToolUse("any")),
        ({"tool_choice": NAMED}, ToolUse("named", "f")),
    ],
)
def test_tools_are_used_as_chosen_and_the_template_gets_them(fields, use):
    ask = chat(tools=[F, G], **fields).ask
    assert ask.tools == use
    assert json.loads(ask.prompts[0].tools) == [F, G]
    assert bool(ask.grammar) == bool(use.forced)


def test_a_named_function_is_called_with_its_parameters():
    assert json.loads(chat(tools=[F], tool_choice=NAMED).ask.grammar.text) == PARAMETERS


def test_a_required_call_is_one_of_the_tools_and_shared_definitions_go_to_the_root():
    shared = {"$ref": "#/$defs/s", "$defs": {"s": {"type": "object"}}}
    tools = [F, {"type": "function", "function": {"name": "h", "parameters": shared}}]
    fields = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    schema = json.loads(chat(**fields).ask.grammar.text)
    assert [call["properties"] for call in schema["items"]["anyOf"]] == [
        {"name": {"const": "f"}, "arguments": PARAMETERS},
        {"name": {"const": "h"}, "arguments": {"$ref": "#/$defs/s"}},
    ]
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    assert schema["$defs"] == shared["$defs"]


def test_a_history_with_calls_and_their_results():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = [
        *SAY,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    assert chat(messages=history).ask.prompts[0].messages[1:] == (
        Message("assistant", "", tool_calls=(ToolCall("1", "f", "{}"),)),
        Message("tool", "42", tool_call_id="1"),
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web"}]}, "tools[0].function"),
        ({"tools": [F | {"type": "web"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [F], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [G], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [F], "response_format": {"type": "json_object"}}, "response_format"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                    }
                ]
            },
            "messages[0].tool_calls",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
    ],
)
def test_a_bad_use_of_tools_is_refused_by_its_fields_name(fields, param):
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    assert caught.value.param == param


DELTAS = (
    Delta(0, "Well. ", 1),
    Delta(0, "", 1, calls=(CallDelta(0, "f", '{"x"'),)),
    Delta(0, "", 1, calls=(CallDelta(0, None, ": 1}"), CallDelta(1, "g", "{}"))),
    Delta(0, "", 1, finish=FinishReason.TOOL_CALLS),
)


def test_a_streamed_call_has_its_id_and_name_once():
    reply = ChatReply(chat(stream=True))
    chunks = [json.loads(reply.chunk(d).removeprefix(b"data: ")) for d in DELTAS]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    pieces = [call for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", ())]
    assert [(p["index"], p.get("type"), p["function"]) for p in pieces] == [
        (0, "function", {"name": "f", "arguments": '{"x"'}),
        (0, None, {"arguments": ": 1}"}),
        (1, "function", {"name": "g", "arguments": "{}"}),
    ]
    assert [len(p.get("id", "")) for p in pieces] == [9, 0, 9]
    assert "content" not in chunks[1]["choices"][0]["delta"]


@pytest.mark.parametrize(("first", "content"), [(0, "Well. "), (1, None)])
def test_a_whole_answer_has_each_call_in_one_piece(first, content):
    collected = Collected()
    for delta in DELTAS[first:]:
        collected.add(delta)
    body = json.loads(ChatReply(chat()).body(collected.choices(), Usage(1, 4, 5)))
    ChatCompletion.model_validate(body, strict=True)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == content
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [
        {"name": "f", "arguments": '{"x": 1}'},
        {"name": "g", "arguments": "{}"},
    ]


def test_an_answer_without_calls_has_no_such_field():
    collected = Collected()
    collected.add(Delta(0, "Hi", 1, finish=FinishReason.STOP))
    body = json.loads(ChatReply(chat()).body(collected.choices(), Usage(1, 1, 2)))
    assert "tool_calls" not in body["choices"][0]["message"]
