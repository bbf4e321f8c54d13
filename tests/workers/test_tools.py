"""Tool calls in the ways of several families, from text to deltas and back."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.messages import FinishReason
from scheduler.request import Grammar, Message, Prompt, ToolCall, ToolUse
from workers.fake import FakeOptions
from workers.tools import HERMES, LLAMA, MISTRAL, CallParser, style_of
from workers.tools_prompt import explain

AUTO = ToolUse()
ANY = ToolUse("any")
A = '{"name": "a", "arguments": {"x": "{\\"}", "y": [1, {}]}}'
A_ARGUMENTS = '{"x": "{\\"}", "y": [1, {}]}'
B = '{"name":"b","arguments":{}}'
BACKWARDS = '{"arguments": {"x": 1}, "name": "c"}'

ANSWERS = [
    (HERMES, AUTO, "just text", "just text", []),
    (HERMES, AUTO, "a < b <tool", "a < b <tool", []),
    (HERMES, AUTO, f"<tool_call>\n{A}\n</tool_call>", "", [("a", A_ARGUMENTS)]),
    (
        HERMES,
        AUTO,
        f"Well. <tool_call>{A}</tool_call>\n<tool_call>\n{B}\n</tool_call>",
        "Well. ",
        [("a", A_ARGUMENTS), ("b", "{}")],
    ),
    (HERMES, AUTO, f"<tool_call>{A}</tool_call>after", "after", [("a", A_ARGUMENTS)]),
    (HERMES, AUTO, f"<tool_call>{BACKWARDS}</tool_call>", "", [("c", '{"x": 1}')]),
    (HERMES, AUTO, "<tool_call>nonsense", "nonsense", []),
    (HERMES, AUTO, '<tool_call>{"x": 1}</tool_call>', '{"x": 1}</tool_call>', []),
    (HERMES, AUTO, A, A, []),
    (HERMES, AUTO, '<tool_call>{"name": "a", "arguments": {"x": 1', "", [("a", '{"x": 1')]),
    (HERMES, AUTO, '<tool_call>{"na', '{"na', []),
    (
        HERMES,
        ToolUse(parallel=False),
        f"<tool_call>{A}</tool_call><tool_call>{B}</tool_call>",
        "",
        [("a", A_ARGUMENTS)],
    ),
    (MISTRAL, AUTO, f"Hm [TOOL_CALLS][{A}, {B}]", "Hm ", [("a", A_ARGUMENTS), ("b", "{}")]),
    (MISTRAL, AUTO, f"[TOOL_CALLS] {A}", "", [("a", A_ARGUMENTS)]),
    (MISTRAL, AUTO, f"[TOOL_CALLS]{A}[TOOL_CALLS]{B}", "", [("a", A_ARGUMENTS), ("b", "{}")]),
    (MISTRAL, AUTO, f"Hm [TOOL_CALLS]a[ARGS]{A_ARGUMENTS}", "Hm ", [("a", A_ARGUMENTS)]),
    (
        MISTRAL,
        AUTO,
        f"[TOOL_CALLS]get-a.b[CALL_ID]x0Y[ARGS] {A_ARGUMENTS}[TOOL_CALLS]b[ARGS]{{}}",
        "",
        [("get-a.b", A_ARGUMENTS), ("b", "{}")],
    ),
    (MISTRAL, AUTO, "[TOOL_CALLS]a[ARGS]", "a[ARGS]", []),
    (MISTRAL, AUTO, "[TOOL_CALLS]no call", "no call", []),
    (
        MISTRAL,
        ToolUse(parallel=False),
        f"[TOOL_CALLS]a[ARGS]{B}[TOOL_CALLS]b[ARGS]{B}",
        "",
        [("a", B)],
    ),
    (LLAMA, AUTO, '{"name": "a", "parameters": {"x": 1}}', "", [("a", '{"x": 1}')]),
    (LLAMA, AUTO, f"<|python_tag|>{A}; {B}", "", [("a", A_ARGUMENTS), ("b", "{}")]),
    (LLAMA, AUTO, '{"type": "function", "name": "a", "parameters": {}}', "", [("a", "{}")]),
    (LLAMA, AUTO, '{"plain": "JSON"} it is', '{"plain": "JSON"} it is', []),
    (LLAMA, AUTO, f"text {A}", f"text {A}", []),
    *[
        (style, ANY, f"[{A},\n{B}]", "", [("a", A_ARGUMENTS), ("b", "{}")])
        for style in (HERMES, LLAMA)
    ],
    (HERMES, ToolUse("named", "f"), '{"x": 1}', "", [("f", '{"x": 1}')]),
]


def parse(style, use, pieces):
    """The text and the calls that an answer in pieces comes to."""
    parser = CallParser(style, use)
    said = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    calls = {}
    for delta in (delta for part in said for delta in part.calls):
        if delta.index not in calls:
            assert delta.index == len(calls)
            assert delta.name is not None
            calls[delta.index] = [delta.name, ""]
        else:
            assert delta.name is None
        calls[delta.index][1] += delta.arguments
    assert parser.count == len(calls)
    return "".join(part.text for part in said), [tuple(call) for call in calls.values()]


@pytest.mark.parametrize(("style", "use", "answer", "text", "calls"), ANSWERS)
def test_an_answer_is_what_it_says_and_what_it_calls(style, use, answer, text, calls):
    assert parse(style, use, [answer]) == (text, calls)
    assert parse(style, use, list(answer)) == (text, calls)


@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 80)))
def test_how_tokens_cut_it_does_not_matter(example, cuts):
    style, use, answer, text, calls = example
    edges = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    pieces = [answer[a:b] for a, b in pairwise(edges)]
    assert parse(style, use, pieces) == (text, calls)


def test_arguments_leave_as_they_come():
    parser = CallParser(HERMES, AUTO)
    parser.feed('<tool_call>{"name": "a", "arguments": {"te')
    assert [delta.arguments for delta in parser.feed('xt": "some').calls] == ['xt": "some']


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{{ messages }}", None),
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", MISTRAL),
        ("{% if tools %}Environment: ipython{% endif %}", LLAMA),
    ],
)
def test_a_template_says_in_which_style_its_model_calls(template, style):
    assert style_of(template) == style


def test_a_model_that_knows_no_tools_is_told_of_them():
    tools = json.dumps([{"type": "function", "function": {"name": "f"}}])
    call = ToolCall("1", "f", '{"x": 1}')
    chat = (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "42", tool_call_id="1"),
    )
    told = explain(chat, tools)
    assert told[0].content.startswith("Be brief.\n\n")
    assert '"name": "f"' in told[0].content
    assert [(m.role, m.content) for m in told[1:]] == [
        ("user", "Hi"),
        ("assistant", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'),
        ("user", "<tool_response>\n42\n</tool_response>"),
    ]
    assert explain(chat[1:2], tools)[0].role == "system"


# ── the engine ──────────────────────────────────────────────────────────────────────────────────

PROMPT = list(b"call something")
CALLS = Grammar(
    "json_schema",
    json.dumps(
        {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"enum": ["f", "g"]},
                    "arguments": {
                        "type": "object",
                        "properties": {"q": {"type": "string", "maxLength": 8}},
                        "required": ["q"],
                        "additionalProperties": False,
                    },
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            },
        }
    ),
    "tools",
)


def drain(engine):
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
    return outputs


def called(outputs):
    """The calls of an answer, joined."""
    found = {}
    for delta in (delta for output in outputs for delta in output.calls):
        name, arguments = found.get(delta.index, (delta.name, ""))
        found[delta.index] = (name, arguments + delta.arguments)
    return list(found.values())


def test_a_forced_call_has_no_text_and_says_so_at_its_end(make_engine, make_job):
    engine = make_engine(options=FakeOptions(tokens=40))
    engine.add(make_job(grammar=CALLS, tools=ANY), PROMPT)
    outputs = drain(engine)
    assert "".join(output.text for output in outputs) == ""
    assert outputs[-1].finish is FinishReason.TOOL_CALLS
    ((name, arguments), *_) = called(outputs)
    assert name in ("f", "g")
    assert list(json.loads(arguments)) == ["q"]


def test_a_call_taken_over_anywhere_loses_and_repeats_nothing(make_engine, make_job):
    options = {"grammar": CALLS, "tools": ANY}
    engine = make_engine()
    engine.add(make_job(**options), PROMPT)
    unbroken = drain(engine)
    ids = [token for output in unbroken for token in output.ids]
    for lost in range(1, len(ids)):
        replay = make_engine()
        replay.add(make_job(**options, emitted=ids[:lost]), PROMPT)
        assert called([*unbroken[:lost], *drain(replay)]) == called(unbroken)


def test_a_cut_call_ended_for_its_length(make_engine, make_job):
    engine = make_engine()
    engine.add(make_job(grammar=CALLS, tools=ANY, max_tokens=34), PROMPT)
    outputs = drain(engine)
    assert outputs[-1].finish is FinishReason.LENGTH
    assert len(called(outputs)) == 1


# ── templates ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.model
def test_a_template_without_tools_gets_them_in_its_system_message(smollm2_text):
    prompt = Prompt(messages=(Message("user", "Hi"),), tools='[{"type": "function"}]')
    ids = smollm2_text.encode(prompt, 0.0)
    rendered = "".join(smollm2_text.token_text(token) for token in ids)
    assert '<tools>\n{"type": "function"}\n</tools>' in rendered
