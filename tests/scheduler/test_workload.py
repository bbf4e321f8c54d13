"""Traces become histograms: nothing is lost, and what cannot be read is named."""

from __future__ import annotations

import datetime

import pytest

pytest.importorskip("numpy", reason="the planner is the extra `plan`")

import numpy as np

from scheduler.errors import SetupError
from scheduler.workload import Arrival, dispersion, from_arrivals, read_trace

HEADER = "arrival_s,input_tokens,output_tokens\n"


def trace(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_three_forms_say_the_same(tmp_path):
    expected = [Arrival(0.5, 10, 20), Arrival(2.0, 30, 40)]
    ours = HEADER + "0.5,10,20\n2,30,40\n"
    bench = "index,scheduled,asked_input,asked_output\n0,0.5,10,20\n1,2,30,40\n"
    mooncake = (
        '{"timestamp":500,"input_length":10,"output_length":20,"hash_ids":[0]}\n'
        '{"timestamp":2000,"input_length":30,"output_length":40,"hash_ids":[0]}\n'
    )
    assert read_trace(trace(tmp_path, ours)) == expected
    assert read_trace(trace(tmp_path, bench)) == expected
    shared = [arrival._replace(prefix=(0,)) for arrival in expected]
    assert read_trace(trace(tmp_path, mooncake, "t.jsonl")) == shared


def test_azures_own_clock_is_read(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,5,6\n"
    (arrival,) = read_trace(trace(tmp_path, text))
    moment = datetime.datetime(2023, 11, 16, 18, 17, 3, tzinfo=datetime.UTC).timestamp()
    assert arrival == Arrival(pytest.approx(moment + 0.97996, abs=1e-6), 5, 6)


def test_every_request_is_in_one_bucket_at_its_mean_size():
    arrivals = [Arrival(float(at), 20 + at % 3, 30_000 if at == 5 else 10) for at in range(11)]
    workload = from_arrivals(arrivals)
    assert workload.rate == pytest.approx(1.0)  # 11 arrivals span 10 gaps of 1 s
    assert [bucket.name for bucket in workload.buckets] == ["≤25/≤25", "≤25/>2000"]
    assert workload.buckets[1].size == (22, 30_000)


def test_dispersion_of_chance_is_one_and_of_bursts_is_more():
    rng = np.random.default_rng(0)
    calm = np.cumsum(rng.exponential(0.1, 20_000)).tolist()
    bursts = np.cumsum(rng.gamma(0.1, 1.0, 20_000)).tolist()
    assert dispersion(calm) == pytest.approx(1, abs=0.3)
    assert dispersion(bursts) > 4
    assert dispersion([float(at) for at in range(100)]) == 1


@pytest.mark.parametrize(
    ("text", "name", "named"),
    [
        (HEADER, "t.csv", "no requests"),
        ("", "t.csv", "line 1"),
        ("a,b,c\n", "t.csv", "line 1"),
        (HEADER + "1,2,3\n2,-5,1\n", "t.csv", "line 3"),
        (HEADER + "nan,2,3\n", "t.csv", "line 2"),
        (HEADER + "1,2\n", "t.csv", "line 2"),
        ("{}\n", "t.jsonl", "line 1: 'timestamp'"),
        ("\n", "t.jsonl", "no requests"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, text, name, named):
    with pytest.raises(SetupError, match=named):
        read_trace(trace(tmp_path, text, name))


def test_a_trace_of_one_moment_has_no_rate():
    with pytest.raises(SetupError, match="one moment"):
        from_arrivals([Arrival(1.0, 5, 5), Arrival(1.0, 6, 6)])
