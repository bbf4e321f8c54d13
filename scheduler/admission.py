"""Which workers may serve one model together: a replay or a hand-over between them must be fair.

They must read and write alike (tokenizer, template), be of one shape, and compute in one mode with
weights that are rounded alike. In `fast` mode their KV caches may be of unlike types: a cache is
converted on its way, a replay computes its own, and what differs is of the size that `fast` allows.
In `exact` mode the cache is float32 and nothing else, or tokens would not be equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scheduler.messages import Join

KV_TYPES = ("float16", "float32", "int8")  # that a worker's KV cache may have
CONVERTED = ("float16", "int8")  # of these, the ones of `fast` mode


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints differ in the type of the KV cache at most."""
    return _split(one)[0] == _split(other)[0]


def objection(join: Join, others: Iterable[Join]) -> str | None:
    """Why this worker may not serve its model beside those, or None."""
    for other in others:
        if not _numbers_agree(join, other):
            return (
                f"it computes {join.model!r} in {join.numbers}, which differs from "
                f"{other.name}'s {other.numbers}. Start it with the same file, --mode and "
                "--quantize, or under another model name."
            )
        if not _models_agree(join, other):
            return (
                f"its tokenizer, template or shape of {join.model!r} differs from "
                f"{other.name}'s. Start it from the same model files."
            )
    return None


def remark(join: Join, others: Iterable[Join]) -> str | None:
    """What its operator should know of a worker that may join, or None."""
    kv = _split(join.fingerprint)[1]
    for other in others:
        theirs = _split(other.fingerprint)[1]
        if kv and theirs and kv != theirs:
            return (
                f"it keeps its KV cache in {kv}, {other.name} in {theirs}: the same prompt may be "
                "answered a little differently by the one and by the other"
            )
    return None


def _numbers_agree(join: Join, other: Join) -> bool:
    """Those of a worker that does not say are not compared."""
    if not join.numbers or not other.numbers or join.numbers == other.numbers:
        return True
    (mode, kv), (others, theirs) = _mode(join.numbers), _mode(other.numbers)
    return mode == others and kv in CONVERTED and theirs in CONVERTED


def _models_agree(join: Join, other: Join) -> bool:
    """Unlike KV caches only of workers whose numbers were compared."""
    compared = join.numbers and other.numbers
    return join.fingerprint == other.fingerprint or bool(
        compared and same_model(join.fingerprint, other.fingerprint)
    )


def _mode(numbers: str) -> tuple[str, str]:
    """(mode and weights, type of the KV cache), as a worker puts them: `fast mode, …, int8 KV`."""
    mode, _, kv = numbers.rpartition(", ")
    return mode, kv.removesuffix(" KV")


def _split(fingerprint: str) -> tuple[str, str]:
    """(what the model is, type of the KV cache or nothing)."""
    model, _, kv = fingerprint.rpartition(":")
    return (model, kv) if kv in KV_TYPES else (fingerprint, "")
