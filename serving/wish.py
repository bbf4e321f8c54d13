"""How soon a request wants its tokens, and before or behind whom: from its headers and its body."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import msgspec

from scheduler.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

TTFT_HEADER, TPOT_HEADER = "x-slo-ttft-ms", "x-slo-tpot-ms"
MOST_MS = 3_600_000.0


class Limits(msgspec.Struct, frozen=True):
    """Seconds until the first token, and between two tokens. None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None


class Wish(msgspec.Struct, frozen=True):
    """A lower `priority` goes first. `key` stands for who asks, among whom workers are shared."""

    limits: Limits = Limits()
    priority: int = 0
    key: str = ""


def read_wish(headers: Mapping[str, str], priority: int | None) -> Wish:
    """Raises BadRequest, which names the header."""
    limits = Limits(_seconds(headers, TTFT_HEADER), _seconds(headers, TPOT_HEADER))
    return Wish(limits, priority or 0, _key(headers.get("Authorization", "")))


def _seconds(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MOST_MS:
        message = f"The header {name} must be a number of ms above 0 and at most {MOST_MS:.0f}."
        raise BadRequest(message, param=name, code="invalid_value")
    return value / 1e3


def _key(authorization: str) -> str:
    """A name for an API key that does not give it away."""
    return hashlib.sha256(authorization.encode()).hexdigest()[:16] if authorization else ""
