"""response_format and guided_* → the grammar that every answer must match."""

from __future__ import annotations

import json

import pytest

from scheduler.errors import BadRequest
from scheduler.request import Grammar
from serving.openai import requests
from serving.openai.limits import HttpLimits

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def grammar(parse=requests.chat, **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}
    return parse(json.dumps(body | fields).encode(), "id", 12.5, HttpLimits()).ask.grammar


def schema_of(found):
    assert found.kind == "json_schema"
    return json.loads(found.text)


@pytest.mark.parametrize("parse", [requests.chat, requests.completion])
@pytest.mark.parametrize("strict", [True, False, None])
def test_a_schema_is_followed_strict_or_not(parse, strict):
    wrapped = {"name": "n", "schema": SCHEMA, "strict": strict}
    found = grammar(parse, response_format={"type": "json_schema", "json_schema": wrapped})
    assert schema_of(found) == SCHEMA
    assert found.param == "response_format"


def test_a_json_object_is_any_object():
    assert schema_of(grammar(response_format={"type": "json_object"})) == {"type": "object"}


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}])
def test_plain_text_has_none(fields):
    assert grammar(**fields) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_regex": "a+"}, Grammar("regex", "a+", "guided_regex")),
        ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"', "guided_grammar")),
        ({"guided_choice": ["a b", '"é"']}, 'start: "a b" | "\\"é\\""'),
        ({"guided_json": '{"type":"null"}'}, '{"type":"null"}'),
        ({"guided_json": {"type": "null"}}, '{"type":"null"}'),
    ],
)
def test_what_vllm_made_common(fields, expected):
    found = grammar(**fields)
    assert expected in (found, found.text)
    assert found.param == next(iter(fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "response_format.json_schema.name",
        ),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_bad_form_is_refused_by_its_fields_name(fields, param):
    with pytest.raises(BadRequest) as caught:
        grammar(**fields)
    assert caught.value.param == param
