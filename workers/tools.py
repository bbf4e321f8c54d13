"""Tool calls, found in an answer's text as it grows.

Families write calls in ways of their own, most as JSON objects with a name and arguments:

    Hermes, Qwen   text <tool_call>{"name": …, "arguments": {…}}</tool_call> <tool_call>…
    Mistral        text [TOOL_CALLS][{"name": …, "arguments": {…}}, …]
    since 2025     text [TOOL_CALLS]name[ARGS]{…}[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}
    Llama 3        {"name": …, "parameters": {…}}; …          instead of text, not within it
    forced         [{"name": …, "arguments": {…}}, …]         by the grammar, in every family
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from scheduler.messages import CallDelta
from workers.detokenize import overlap

if TYPE_CHECKING:
    from scheduler.request import ToolUse


_SEPARATORS = " \n\r\t,;]"  # around the objects of calls; and [, where no mark begins


class Style(NamedTuple):
    """How a family writes its calls."""

    start: str  # what calls follow; empty: an answer that begins with { is made of calls
    end: str = ""  # what text follows again
    within: tuple[str, ...] = ()  # marks of a call whose name stands before its arguments

    @property
    def marks(self) -> tuple[str, ...]:
        """All that must reach the parser, though a reader never sees it."""
        return (self.start, self.end, *self.within)


HERMES = Style("<tool_call>", "</tool_call>")
MISTRAL = Style("[TOOL_CALLS]", within=("[ARGS]", "[CALL_ID]"))
LLAMA = Style("<|python_tag|>")
BARE = Style("")


def style_of(template: str) -> Style | None:
    """The style of a chat template (Jinja source), or None if it knows no tools."""
    if not re.search(r"\btools\b", template):
        return None
    for style in (HERMES, MISTRAL):
        if style.start in template:
            return style
    return LLAMA


@dataclass(slots=True)
class Said:
    """What some text turned out to be."""

    text: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class CallParser:
    """One answer's text, split into what is said and what is called."""

    def __init__(self, style: Style, use: ToolUse) -> None:
        self.count = 0  # calls that have begun
        self._style = BARE if use.forced else style
        self._use = use
        self._open: _Object | None = None
        # Llama's calls stand where text would; others' stand behind a marker in it.
        self._calling = bool(use.forced)
        self._fresh = style is LLAMA and not use.forced
        self._after = False  # a call: whitespace there is no text
        self._held = ""

    @property
    def complete(self) -> bool:
        """As many calls as are allowed have been made."""
        return not self._use.parallel and self.count == 1 and self._open is None

    def feed(self, text: str) -> Said:
        """More of the answer. Held back is what may yet become a call."""
        if self._use.forced == "named":
            return self._named(text)
        said = Said()
        self._held += text
        while self._advance(said):
            pass
        return said

    def finish(self) -> Said:
        """The answer has ended: what looked like a call and never became one is text."""
        said = Said()
        if self._open is None:
            said.text = "" if self._calling and self.count else self._held
        elif not self._open.begun:
            said.text = self._open.raw
        self._held = ""
        return said

    def _named(self, text: str) -> Said:
        if not text:
            return Said()
        name = None if self.count else self._use.name
        self.count = 1
        return Said(calls=[CallDelta(0, name, text)])

    def _advance(self, said: Said) -> bool:
        """Take one part of what is held; False when more text is needed."""
        if self.complete or not self._held:
            self._held = ""
            return False
        if self._open is not None:
            return self._in_object(self._open, said)
        return self._between(said) if self._calling else self._in_text(said)

    def _in_text(self, said: Said) -> bool:
        if self._after:
            self._held = self._held.lstrip()
            self._after = not self._held
        style, held = self._style, self._held
        if self._fresh:
            begun = held.lstrip()
            if not begun:
                return False
            self._fresh = False
            if begun.startswith("{"):
                self._calling = True
                return True
        at = held.find(style.start)
        if at >= 0:
            said.text += held[:at]
            self._held = held[at + len(style.start) :]
            self._calling = True
            return True
        certain = len(held) - overlap(held, style.start)
        said.text += held[:certain]
        self._held = held[certain:]
        return False

    def _between(self, said: Said) -> bool:
        """Before, between or after calls."""
        style = self._style
        held = self._held.lstrip(_SEPARATORS)
        if style.end and held.startswith(style.end):
            self._held = held[len(style.end) :]
            self._calling, self._after = False, True
            return True
        if style.start and held.startswith(style.start):
            self._held = held[len(style.start) :]
            return True
        if any(mark.startswith(held) for mark in (style.start, style.end)):
            self._held = held
            return False
        self._held = held = held.lstrip(_SEPARATORS + "[")
        if held.startswith("{"):
            self._open = _Object(self.count)
            return True
        if style.within and (named := _NAMED.match(held)):
            self._open = _Object(self.count, named["name"])
            self._held = held[named.end() :]
            return True
        if not held or (style.within and _NAME_SO_FAR.fullmatch(held)):
            return False
        self._calling = False  # no call after all
        said.text += self._held
        self._held = ""
        return False

    def _in_object(self, opened: _Object, said: Said) -> bool:
        deltas, self._held = opened.feed(self._held)
        said.calls += deltas
        self.count = max(self.count, opened.index + opened.begun)
        if not opened.closed:
            return False
        if not opened.begun:
            said.text += opened.raw
            self._calling = bool(self._use.forced)
        self._open = None
        return True


_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
    r'"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


_NAMED = re.compile(r"(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*(?=\{)")
_NAME_SO_FAR = re.compile(r"[\w.-]+(?:\[[A-Z_]*(?:\]\w*(?:\[[A-Z]*\]?)?)?)?\s*")


class _Object:
    """One JSON object that may be a call. Arguments leave as they come once the name is known.

    With a `name` that stood before it, all of it are arguments.
    """

    def __init__(self, index: int, name: str | None = None) -> None:
        self.index = index
        self.raw = ""
        self.begun = False
        self._name = name
        self.closed = False
        self._depth = 0
        self._string = False
        self._escaped = False
        self._given = 0  # of raw, up to here

    def feed(self, text: str) -> tuple[list[CallDelta], str]:
        """The pieces of the call that `text` brings, and what follows the object."""
        for at, character in enumerate(text):
            self.raw += character
            self._count(character)
            if self._depth == 0:
                self.closed = True
                return self._deltas(), text[at + 1 :]
        return self._deltas(), ""

    def _count(self, character: str) -> None:
        if self._string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._string = False
        elif character == '"':
            self._string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1

    def _deltas(self) -> list[CallDelta]:
        name = None
        if not self.begun and self._name is not None:
            self.begun, name = True, self._name
        elif not self.begun:
            head = _HEAD.match(self.raw)
            if head is None:
                return self._whole() if self.closed else []
            self.begun, self._given = True, head.end()
            name = json.loads(head["name"])
        end = self._arguments_end()
        piece, self._given = self.raw[self._given : end], max(self._given, end)
        return [CallDelta(self.index, name, piece)] if piece or name is not None else []

    def _arguments_end(self) -> int:
        """How much of `raw` certainly belongs to the arguments: their object has depth 2."""
        if self._name is not None:
            return len(self.raw)
        if self.closed:
            return len(self.raw[:-1].rstrip())
        if self._depth >= 2 or self._string:
            return len(self.raw)
        return len(self.raw.rstrip())

    def _whole(self) -> list[CallDelta]:
        """A call whose parts stand in another order than usual."""
        try:
            value = json.loads(self.raw)
        except ValueError:
            return []
        arguments = value.get("arguments", value.get("parameters"))
        if not isinstance(value.get("name"), str) or arguments is None:
            return []
        self.begun = True
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return [CallDelta(self.index, value["name"], written)]
