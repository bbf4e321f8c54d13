"""What a body may say, as tables: bounds of numbers, and fields that are not served yet."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from scheduler.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")

INT32_MAX = 2**31 - 1


class Bounds(NamedTuple):
    low: float
    high: float
    above_low: bool = False  # `low` itself is refused

    def holds(self, value: float) -> bool:
        return (self.low < value if self.above_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low = f"greater than {self.low}" if self.above_low else f"at least {self.low}"
        return f"{low} and at most {self.high}"


BOUNDS: Mapping[str, Bounds] = {
    "temperature": Bounds(0, 2),
    "top_p": Bounds(0, 1, above_low=True),
    "top_k": Bounds(-1, INT32_MAX),
    "min_p": Bounds(0, 1),
    "presence_penalty": Bounds(-2, 2),
    "frequency_penalty": Bounds(-2, 2),
    # Logits are divided by it in float32: nearer to the ends they would overflow.
    "repetition_penalty": Bounds(0.01, 100),
    "max_tokens": Bounds(0, INT32_MAX),  # 0 only with echo
    "max_completion_tokens": Bounds(1, INT32_MAX),
    "top_logprobs": Bounds(0, 20),
    "seed": Bounds(-(2**63), 2**63 - 1),
    "priority": Bounds(-1000, 1000),
}
COMPLETION_LOGPROBS = Bounds(0, 20)
BIAS = Bounds(-100, 100)

# Fields that would change the answer and are not served yet, with the values that change nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "prompt_logprobs": (False,),
    "suffix": ("",),
}


def check_bounds(body: object, bounds: Mapping[str, Bounds] = BOUNDS) -> None:
    """Raises BadRequest for the first field of `body` that is set and outside its bounds."""
    for name, bound in bounds.items():
        value = getattr(body, name, None)
        if value is not None and not bound.holds(value):
            raise BadRequest(f"{name} must be {bound}.", param=name, code="invalid_value")


def check_supported(body: object) -> None:
    """Raises BadRequest for the first field of `body` that asks for what is not served yet."""
    for name, harmless in UNSUPPORTED.items():
        value = getattr(body, name, None)
        if value is None or value in harmless:
            continue
        remedy = "leave it out"
        if harmless:
            remedy += f" or set it to {msgspec.json.encode(harmless[0]).decode()}"
        message = f"{name} is not supported here with this value: {remedy}."
        raise BadRequest(message, param=name, code="unsupported_parameter")


# How msgspec words a refusal: "Expected `int`, got `str` - at `$.messages[0].content`".
_REFUSAL = re.compile(r"(?P<what>.*?)( - at (`key` in )?`\$\.?(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"missing required field `(\w+)`")


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """`body` as the decoder's type; raises BadRequest, naming the field where there is one."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f"The body is not valid JSON in UTF-8: {error}."
    except RecursionError:
        message = "The body nests arrays or objects too deeply."
    raise BadRequest(message, code="invalid_json")


def _wrong_type(said: str) -> BadRequest:
    match = _REFUSAL.fullmatch(said)
    assert match is not None, "every part of the pattern is optional"
    what, path = match["what"], (match["path"] or "").replace("[...]", "")
    if missing := _MISSING.search(what):
        path = f"{path}.{missing[1]}" if path else missing[1]
        return BadRequest(f"{path} is required.", param=path, code="missing_required_parameter")
    message = f"{path or 'the body'}: {what[:1].lower()}{what[1:]}."
    return BadRequest(message, param=path or None, code="invalid_type")
