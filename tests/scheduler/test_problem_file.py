"""A problem file is read strictly: what is wrong is named by its path."""

from __future__ import annotations

import json
import math

import pytest

from scheduler.errors import SetupError
from scheduler.problem import parse_problem

GOOD = {
    "buckets": [{"name": "b", "model": "m", "rate": 1.5}, {"name": "b", "model": "n", "rate": 0}],
    "columns": [
        {
            "name": "m on L4",
            "model": "m",
            "gpu": "L4",
            "gpus": 2,
            "role": "mixed",
            "price": 1.4,
            "capacity": {"b": 3},
        }
    ],
    "limits": {"L4": 8},
}


def test_a_good_file_is_read():
    problem = parse_problem(json.dumps(GOOD))
    assert [bucket.rate for bucket in problem.buckets] == [1.5, 0]
    assert problem.columns[0].capacity == {"b": 3}
    assert (problem.limits[0].gpu, problem.limits[0].gpus) == ("L4", 8)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("buckets", 0, "rate"), -1, "buckets[0].rate"),
        (("buckets", 0, "rate"), math.nan, "buckets[0].rate"),
        (("buckets", 0, "rate"), math.inf, "buckets[0].rate"),
        (("buckets", 0, "rate"), "fast", "buckets[0].rate"),
        (("buckets", 0, "rate"), None, "rate"),
        (("buckets", 1, "model"), "m", "buckets[1].name"),
        (("buckets",), [], "buckets"),
        (("buckets", 0, "weight"), 1, "weight"),
        (("columns", 0, "capacity"), {"b": 0}, "columns[0].capacity.b"),
        (("columns", 0, "capacity"), {"b": math.nan}, "columns[0].capacity.b"),
        (("columns", 0, "capacity"), {"c": 1}, "columns[0].capacity.c"),
        (("columns", 0, "price"), -0.1, "columns[0].price"),
        (("columns", 0, "price"), math.nan, "columns[0].price"),
        (("columns", 0, "gpus"), 0, "columns[0].gpus"),
        (("columns", 0, "gpus"), 1.5, "columns[0].gpus"),
        (("columns", 0, "role"), "both", "columns[0].role"),
        (("columns", 0, "model"), "o", "columns[0].capacity.b"),
        (("columns",), GOOD["columns"] * 2, "columns[1].name"),
        (("limits",), {"H100": 8}, "limits.H100"),
        (("limits",), {"L4": -1}, "limits.L4"),
        (("limits",), {"L4": math.nan}, "limits.L4"),
        (("limits",), {"L4": 1.5}, "limits.L4"),
        (("limits",), {"L4": 10**400}, "limits.L4"),
        (("columns", 0, "capacity"), {"b": "fast"}, "columns[0].capacity.b"),
        (("columns", 0, "capacity"), {"b": 1e-300}, "columns[0].capacity.b"),
        (("columns", 0, "price"), 1e300, "columns[0].price"),
        (("buckets", 0, "rate"), 1e300, "buckets[0].rate"),
        (("extra",), 1, "extra"),
    ],
)
def test_what_is_wrong_is_named(changed, path, value, named):
    with pytest.raises(SetupError) as caught:
        parse_problem(changed(GOOD, path, value))
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"buckets": 1}', "[" * 100_000])
def test_what_is_no_problem_at_all_is_refused(text):
    with pytest.raises(SetupError):
        parse_problem(text)
