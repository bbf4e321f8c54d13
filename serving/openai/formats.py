"""What form an answer must have: OpenAI's response_format, and vLLM's guided_* fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from scheduler.errors import BadRequest
from scheduler.request import Grammar

if TYPE_CHECKING:
    from serving.openai.requests import Body

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


class JsonSchema(msgspec.Struct):
    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None  # a schema is followed exactly either way


class ResponseFormat(msgspec.Struct):
    type: str
    json_schema: JsonSchema | None = None


def grammar(body: Body) -> Grammar | None:
    """The grammar that a body asks for. Raises BadRequest, which names the field."""
    asked = [name for name in GUIDED if getattr(body, name) is not None]
    found = [_guided(body, name) for name in asked]
    if formatted := _formatted(body.response_format):
        found.append(formatted)
    if len(found) > 1:
        message = f"{found[1].param} and {found[0].param} cannot be asked for together."
        raise BadRequest(message, param=found[1].param, code="invalid_value")
    return found[0] if found else None


def _formatted(asked: ResponseFormat | None) -> Grammar | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return Grammar("json_schema", '{"type":"object"}', "response_format")
    if asked.type != "json_schema":
        message = "response_format.type must be text, json_object or json_schema."
        raise BadRequest(message, param="response_format.type", code="invalid_value")
    if asked.json_schema is None or asked.json_schema.schema is None:
        missing = "response_format.json_schema" + (".schema" if asked.json_schema else "")
        message = f"{missing} is required with type json_schema."
        raise BadRequest(message, param=missing, code="missing_required_parameter")
    return Grammar("json_schema", _json(asked.json_schema.schema), "response_format")


def _guided(body: Body, name: str) -> Grammar:
    value = getattr(body, name)
    if name == "guided_json":
        return Grammar("json_schema", value if isinstance(value, str) else _json(value), name)
    if name == "guided_choice":
        if not value:
            message = f"{name} must hold at least one string."
            raise BadRequest(message, param=name, code="invalid_value")
        return Grammar("lark", "start: " + " | ".join(map(_json, value)), name)
    return Grammar("regex" if name == "guided_regex" else "lark", value, name)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
