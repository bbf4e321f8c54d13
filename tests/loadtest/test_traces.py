from __future__ import annotations

import itertools
import random
from array import array

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadtest.api import Endpoint
from loadtest.arrivals import realised
from loadtest.errors import OptionError
from loadtest.slo import Slo, SloClass
from loadtest.spec import Spec
from loadtest.traces import BUILT_IN, Scaling, read, scaled
from loadtest.workload import Workload

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.mark.parametrize(
    ("name", "rows", "rate", "cv"),
    [
        ("azure-conv", 5985, 4.99, 1.06),
        ("azure-code", 3628, 3.03, 14.65),
        ("mooncake-conversation", 1750, 2.93, None),
        ("mooncake-synthetic", 1091, 3.65, None),
    ],
)
def test_the_built_in_slices_are_whole(name, rows, rate, cv):
    trace = read(name)
    found = realised(array("d", [row.at for row in trace]))
    assert (len(trace), trace[0].at) == (rows, 0.0)
    assert found.rate == pytest.approx(rate, rel=0.02)
    if cv is not None:
        assert found.cv == pytest.approx(cv, rel=0.02)


@pytest.mark.parametrize(
    ("name", "sharing"), [("mooncake-conversation", 0.284), ("mooncake-synthetic", 0.170)]
)
def test_mooncakes_prefixes_are_really_shared_text(name, sharing):
    spec = Spec(
        endpoint=Endpoint("http://127.0.0.1:1", "m"),
        classes=[SloClass("all", Slo())],
        trace=name,
        scaling=Scaling(length_scale=1 / 16),
        requests=400,
    )
    whole = Workload(
        Spec(**{f: getattr(spec, f) for f in spec.__struct_fields__} | {"requests": None})
    )
    assert whole.block_sharing == pytest.approx(sharing, abs=0.001)
    workload = Workload(spec)
    rows = read(name)
    prompts = [workload.messages(workload.arrival(n))[0]["content"].split() for n in range(400)]
    seen = {}
    for at, (row, words) in enumerate(zip(rows, prompts, strict=False)):
        assert len(words) == max(1, round(row.input / 16))
        if row.blocks and len(words) >= 32 and row.blocks[0] in seen:
            assert words[:32] == prompts[seen[row.blocks[0]]][:32]
        elif len(words) >= 32:
            assert all(words[:32] != other[:32] for other in prompts[:at])
            seen[row.blocks[0]] = at


def test_azures_own_file_and_the_slices_read_alike(tmp_path):
    original = tmp_path / "original.csv"
    original.write_text(
        AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    rows = read(str(original))
    assert [(round(row.at, 6), row.input, row.output) for row in rows] == [
        (0.0, 374, 44),
        (4.314579, 396, 109),
    ]


def test_scaling_changes_times_sizes_and_caps():
    rows = read("azure-conv")
    fitted = scaled(rows, Scaling(2.0, 1.0, 0.0625, 100, 20), random.Random(0))
    assert fitted[10].at == rows[10].at * 2
    assert max(row.input for row in fitted) == 100
    assert max(row.output for row in fitted) == 20
    assert min(row.output for row in fitted) >= 1


def test_thinning_keeps_the_share_and_the_burst_shape():
    rows = read("azure-code")
    thinned = scaled(rows, Scaling(rate_scale=0.5), random.Random(0))
    assert len(thinned) == pytest.approx(len(rows) / 2, rel=0.05)
    assert {row.at for row in thinned} <= {row.at for row in rows}
    assert realised(array("d", [row.at for row in thinned])).cv > 5


def test_dequantising_spreads_ticks_and_only_when_asked():
    rows = read("mooncake-conversation")
    gaps = [b.at - a.at for a, b in itertools.pairwise(rows)]
    assert sum(gap == 0 for gap in gaps) > 0.8 * len(gaps)
    spread = scaled(rows, Scaling(dequantise=3.0), random.Random(0))
    assert realised(array("d", [row.at for row in spread])).cv == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("suffix", "text", "says"),
    [
        ("csv", "a,b\n1,2\n", "line 1"),
        ("csv", AZURE + "2023-11-16 18:15:46,1\n", "line 2"),
        ("csv", AZURE + "yesterday,1,2\n", "line 2"),
        ("csv", AZURE + "2023-11-16 18:15:46,-1,2\n", "sizes"),
        ("csv", AZURE, "no requests"),
        ("csv", "arrival_s,input_tokens,output_tokens\nnan,1,2\n", "time"),
        ("jsonl", '{"timestamp":0,"input_length":1}\n', "output_length"),
        ("jsonl", '{"timestamp":0,"input_length":1,"output_length":1e400}\n', "line 1"),
        ("jsonl", "[" * 100_000 + "\n", "line 1"),
    ],
)
def test_a_broken_trace_is_named_with_its_line(tmp_path, suffix, text, says):
    path = tmp_path / f"trace.{suffix}"
    path.write_text(text)
    with pytest.raises(OptionError, match=says):
        read(str(path))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(BUILT_IN)), st.integers(0, 4000), st.binary(max_size=6))
def test_a_mutated_trace_reads_or_raises_option_error(tmp_path, name, at, junk):
    slice_ = (
        read.__globals__["resources"].files("loadtest") / "traces" / BUILT_IN[name]
    ).read_bytes()
    path = tmp_path / BUILT_IN[name]
    path.write_bytes(slice_[:at] + junk + slice_[at + len(junk) : 4000])
    try:
        rows = read(str(path))
    except OptionError:
        return
    scaled(rows, Scaling(length_scale=0.1), random.Random(0))


def test_a_rate_is_only_thinned_downwards():
    with pytest.raises(OptionError, match="--rate-scale"):
        scaled(read("azure-conv"), Scaling(rate_scale=2), random.Random(0))


def test_a_missing_trace_names_those_built_in():
    with pytest.raises(OptionError, match="azure-conv"):
        read("nowhere.csv")
