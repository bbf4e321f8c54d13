"""Tools explained to models whose chat template knows none."""

from __future__ import annotations

import json

from scheduler.request import Message


def explain(messages: tuple[Message, ...], tools: str) -> tuple[Message, ...]:
    """The chat for a template that knows no tools: they are described in the system message, and
    calls and their results are told as text, all in Hermes' words."""
    told = [_tell(message) for message in messages]
    words = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool) for tool in json.loads(tools)))
    if told and told[0].role in ("system", "developer"):
        told[0] = Message(told[0].role, f"{told[0].content}\n\n{words}")
    else:
        told.insert(0, Message("system", words))
    return tuple(told)


_INSTRUCTIONS = """You may call functions to help with the user's request. These are available, as \
JSON Schema:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON within tags:
<tool_call>
{{"name": "function name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def _tell(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    calls = [
        f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n'
        "</tool_call>"
        for call in message.tool_calls
    ]
    content = "\n".join(([message.content] if message.content else []) + calls)
    return Message(message.role, content, message.name)
