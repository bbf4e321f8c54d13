"""Admission: which workers may serve one model together, and what is said of those that do."""

from __future__ import annotations

import msgspec
import pytest

from kernels.kv_rows import KV_TYPES as CONVERTIBLE
from scheduler.admission import KV_TYPES, objection, remark
from scheduler.messages import Address, Join, Rates, Role

FAST = "fast mode, weights 9 Q8_0"
EXACT = "exact mode, weights 9 Q8_0"
JOIN = Join(
    name="a",
    model="m",
    role=Role.MIXED,
    address=Address("h", 1),
    fingerprint="f",
    context_length=100,
    kv_blocks=8,
    rates=Rates(1.0, 1.0),
    pid=1,
)


def worker(name: str, mode: str | None, kv: str, model: str = "text:30x3x64") -> Join:
    """One that says all, or one of an older release, which tells no mode."""
    numbers = f"{mode}, {kv} KV" if mode else ""
    return msgspec.structs.replace(JOIN, name=name, fingerprint=f"{model}:{kv}", numbers=numbers)


# Two workers, what is objected to the second, and what is remarked.
PAIRS = {
    "alike": ((FAST, "float16"), (FAST, "float16"), None, None),
    "exact alike": ((EXACT, "float32"), (EXACT, "float32"), None, None),
    "fast, unlike KV caches": ((FAST, "float16"), (FAST, "int8"), None, "in int8, a in float16"),
    "fast and exact": ((FAST, "float16"), (EXACT, "float32"), "which differs from a's fast", None),
    "exact and fast with an int8 cache": (
        (EXACT, "float32"),
        (FAST, "int8"),
        "which differs from a's exact",
        None,
    ),
    "unlike weights": (
        (FAST, "float16"),
        ("fast mode, weights 9 Q4_1", "float16"),
        "the same file, --mode and --quantize",
        None,
    ),
    "unlike weights and caches": (
        (FAST, "float16"),
        ("fast mode, weights 9 Q4_1", "int8"),
        "which differs",
        None,
    ),
    "a cache that exact mode never has": (
        (EXACT, "float32"),
        (EXACT, "float16"),
        "which differs",
        None,
    ),
    "an older worker alike": ((FAST, "float16"), (None, "float16"), None, None),
    "an older worker whose cache is unlike: its mode is not known": (
        (FAST, "float16"),
        (None, "float32"),
        "tokenizer, template or shape",
        None,
    ),
    "another shape": (
        (FAST, "float16"),
        (FAST, "float16", "text:32x3x64"),
        "tokenizer, template or shape",
        None,
    ),
    "another shape and cache": (
        (FAST, "float16"),
        (FAST, "int8", "text:32x3x64"),
        "tokenizer, template or shape",
        None,
    ),
}


@pytest.mark.parametrize(("one", "two", "objected", "remarked"), PAIRS.values(), ids=PAIRS)
def test_a_second_worker(one, two, objected, remarked):
    first, second = worker("a", *one), worker("b", *two)
    said = objection(second, [first])
    assert (said is None) if objected is None else (objected in said)
    if objected is None:
        said = remark(second, [first])
        assert (said is None) if remarked is None else (remarked in said)
    assert objection(second, []) is remark(second, []) is None


def test_every_cache_that_a_worker_may_have_can_be_converted():
    assert set(KV_TYPES) == set(CONVERTIBLE)
