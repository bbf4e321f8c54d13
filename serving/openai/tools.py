"""tools, tool_choice and parallel_tool_calls: what the model may call, and what it must."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from scheduler.errors import BadRequest
from scheduler.request import Grammar, ToolUse

if TYPE_CHECKING:
    from serving.openai.requests import ChatBody

CHOICES = ("none", "auto", "required")
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


class Function(msgspec.Struct, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # forced calls follow the parameters exactly either way


class Tool(msgspec.Struct):
    type: str
    function: Function


class NamedFunction(msgspec.Struct):
    name: str


class Named(msgspec.Struct):
    type: str
    function: NamedFunction


class PastFunction(msgspec.Struct):
    name: str
    arguments: str


class PastCall(msgspec.Struct):
    """A call of an assistant's message in the history."""

    id: str
    function: PastFunction
    type: str = "function"


def read_tools(body: ChatBody) -> tuple[ToolUse | None, str | None, Grammar | None]:
    """How tools may be used, their definitions for the template, and the grammar of a forced call.

    Raises BadRequest, which names the field.
    """
    tools, choice = body.tools or [], body.tool_choice or "auto"
    definitions = define(tools)
    if not tools and choice not in ("none", "auto"):
        raise _refuse("tool_choice", "needs tools to choose from")
    if not tools or choice == "none":
        return None, None, None
    parallel = body.parallel_tool_calls is not False
    if isinstance(choice, Named):
        named = _find(choice.function.name, tools)
        grammar = Grammar("json_schema", _json(_parameters(named)), "tools")
        return ToolUse("named", named.name), definitions, grammar
    if choice not in CHOICES:
        raise _refuse("tool_choice", f"must be {', '.join(CHOICES)} or a function of tools")
    if choice == "auto":
        return ToolUse(parallel=parallel), definitions, None
    return ToolUse("any", parallel=parallel), definitions, _any_of(tools, parallel)


def define(tools: list[Tool]) -> str:
    """The definitions as templates get them. Raises BadRequest, which names the field."""
    for at, tool in enumerate(tools):
        if tool.type != "function":
            raise _refuse(f"tools[{at}].type", "must be function")
        if not _NAME.fullmatch(tool.function.name):
            raise _refuse(
                f"tools[{at}].function.name", "must be 1 to 64 of letters, digits and _.-"
            )
    return msgspec.json.encode(tools).decode()


def _find(name: str, tools: list[Tool]) -> Function:
    for tool in tools:
        if tool.function.name == name:
            return tool.function
    raise _refuse("tool_choice", f"names {name!r}, which is not among tools")


def _any_of(tools: list[Tool], parallel: bool) -> Grammar:
    """An array of calls, at least one."""
    shared: dict[str, Any] = {}
    calls = [_call(tool.function, shared) for tool in tools]
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "$defs": shared}
    if not parallel:
        schema["maxItems"] = 1
    return Grammar("json_schema", _json(schema), "tools")


def _call(function: Function, shared: dict[str, Any]) -> dict[str, Any]:
    """One call's schema; definitions that its parameters refer to go to the root, into `shared`."""
    parameters = dict(_parameters(function))
    for name, definition in parameters.pop("$defs", {}).items():
        if shared.setdefault(name, definition) != definition:
            raise _refuse("tools", f"define $defs.{name} in two ways")
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _parameters(function: Function) -> dict[str, Any]:
    return function.parameters or {"type": "object"}


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _refuse(param: str, rule: str) -> BadRequest:
    return BadRequest(f"{param} {rule}.", param=param, code="invalid_value")
