"""Histogram, statistics, SLOs, tally: figures from stamps."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.api import Usage
from loadtest.client import Exchange
from loadtest.errors import OptionError
from loadtest.histogram import Histogram
from loadtest.outcome import Outcome
from loadtest.slo import PRESETS, Slo, parse, read_classes
from loadtest.stats import design_effect, quantile, quantiles, warmup_length, wilson
from loadtest.tally import Gaps, outcome
from loadtest.units import number, seconds, seconds_text
from loadtest.workload import Ask

times = st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=200)


@given(times, st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_histograms_quantiles_are_within_half_a_percent(values, share):
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = quantile(sorted(values), share)
    assert histogram.quantile(share) == pytest.approx(exact, rel=0.0051)


@given(times, times)
def test_merged_histograms_equal_one_of_all_values(left, right):
    a, b, whole = Histogram({}), Histogram({}), Histogram({})
    for values, histogram in ((left, a), (right, b), (left + right, whole)):
        for value in values:
            histogram.add(value)
    a.merge(b)
    assert (a.buckets, a.count, a.largest) == (whole.buckets, whole.count, whole.largest)
    assert a.mean == pytest.approx(whole.mean)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(a), type=Histogram) == a


def test_wilsons_interval_is_the_textbooks():
    assert wilson(81, 263, 1.96) == pytest.approx((0.2553, 0.3662), abs=2e-4)
    assert wilson(0, 0, 1.96) == (0.0, 1.0)
    low, high = wilson(10, 10, 1.96)
    assert (round(low, 3), high) == (0.722, 1.0)


def test_requests_that_share_their_luck_are_worth_fewer():
    rng = random.Random(1)
    alone = [rng.random() < 0.9 for _ in range(6000)]
    grouped = [flag for flag in alone[:200] for _ in range(30)]
    assert design_effect(alone) == pytest.approx(1, abs=0.8)
    assert 10 < design_effect(grouped) < 100
    assert design_effect([True] * 500) == 1.0


def test_warm_up_is_found_where_there_is_one_and_only_there():
    rng = random.Random(1)
    steady = [rng.gauss(1, 0.1) for _ in range(500)]
    assert warmup_length(steady) == 0
    assert 40 <= warmup_length([5.0] * 50 + steady) <= 60


def test_quantiles_of_nothing_are_zero():
    assert quantiles([]).count == 0


def answered(**changes) -> Outcome:
    return msgspec.structs.replace(
        Outcome(0, 0, scheduled=1.0, sent=1.1, end=3.2, first=1.5, last=3.0, tokens=16), **changes
    )


def test_latencies_start_at_the_scheduled_time():
    found = answered()
    assert found.ttft == pytest.approx(0.5)
    assert found.ttft_from_send == pytest.approx(0.4)
    assert found.lag == pytest.approx(0.1)
    assert found.tpot == pytest.approx(0.1)
    assert found.e2e == pytest.approx(2.2)
    assert answered(tokens=1).tpot == 0


@pytest.mark.parametrize(
    ("slo", "changes", "met"),
    [
        (Slo(0.6, 0.11), {}, True),
        (Slo(0.4, 0.11), {}, False),
        (Slo(0.6, 0.09), {}, False),
        (Slo(0.6, 0.11, e2e=2.0), {}, False),
        (Slo(), {"error": "timeout"}, False),
        (Slo(0.6, 0.11), {"error": "http_429"}, False),
    ],
)
def test_a_request_meets_all_its_limits_or_misses(slo, changes, met):
    assert slo.met(answered(**changes)) is met


def test_limits_scale():
    slo = Slo(0.25, 0.05)
    assert [slo.met(answered(), scale) for scale in (1.0, 1.9, 2.1)] == [False, False, True]


def test_each_limit_is_counted_by_itself_when_the_rule_says_so():
    assert Slo(0.4, 0.11, rule="each").criteria(answered()) == (False, True)
    assert Slo(0.4, 0.11).criteria(answered()) == (False,)


def test_slos_are_read_from_presets_and_words():
    assert parse("distserve-chat-13b") == Slo(0.25, 0.1, share=0.9)
    assert parse("ttft=450ms,tpot=40ms,share=0.99,rule=each") == Slo(
        0.45, 0.04, share=0.99, rule="each"
    )
    assert all(str(slo) for slo in PRESETS.values())


@pytest.mark.parametrize(
    "text", ["fast", "ttft=soon", "ttft=1s,share=1", "ttft=1s,rule=any", "ttft=-1s", "share=0"]
)
def test_an_slo_that_is_none_names_the_option(text):
    with pytest.raises(OptionError, match="--slo"):
        parse(text)


def test_classes_are_read_from_toml(tmp_path):
    path = tmp_path / "classes.toml"
    path.write_text(
        '[[class]]\nname = "chat"\npreset = "distserve-chat-13b"\nweight = 3\n'
        '[[class]]\nname = "code"\nttft = "125ms"\ntpot = "200ms"\ninput = "200"\n'
    )
    chat, code = read_classes(path)
    assert (chat.name, chat.weight, chat.slo) == ("chat", 3.0, Slo(0.25, 0.1))
    assert (code.slo, code.input, code.output) == (Slo(0.125, 0.2), "200", None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"no \[\[class\]\]"),
        ("[[class]]\nttft = '1s'", "class 1: name"),
        ("[[class]]\nname = 'a'\npreset = 'x'", "preset"),
        ("[[class]]\nname = 'a'\nspeed = '1s'", "speed"),
        ("[[class", "--classes"),
    ],
)
def test_broken_classes_name_the_field(tmp_path, text, says):
    path = tmp_path / "classes.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=says):
        read_classes(path)


def exchange(stamps: list[float], tokens: int | None = None) -> Exchange:
    found = Exchange(b"", lambda _: None)
    found.sent, found.end, found.stamps = 100.1, stamps[-1] if stamps else 101, stamps
    found.usage = None if tokens is None else Usage(7, tokens)
    return found


def test_a_gap_is_one_per_chunk_and_spread_over_its_tokens():
    gaps = Gaps()
    found = outcome(exchange([100.5, 100.6, 100.8], 6), Ask(3, 0, 0, 9, 9), 100.0, Slo(), gaps)
    assert (found.tokens, found.chunks, found.largest_gap) == (6, 3, pytest.approx(0.2))
    assert (gaps.chunk.count, gaps.token.count) == (2, 4)
    assert gaps.chunk.mean == pytest.approx(0.15)
    assert gaps.token.mean == pytest.approx(0.075)
    assert found.tpot == pytest.approx(0.3 / 5)


def test_without_usage_chunks_are_tokens():
    found = outcome(exchange([100.5, 100.6]), Ask(3, 0, 0, 9, 9), 100.0, Slo(), Gaps())
    assert (found.tokens, found.prompt_tokens) == (2, 0)


def test_tokens_behind_the_deadline_line_are_late():
    slo = Slo(ttft=0.5, tpot=0.1)  # lines: 0.5, 0.6, 0.7, 0.8
    found = outcome(
        exchange([100.4, 100.65, 100.69, 100.9]), Ask(0, 0, 0, 1, 4), 100.0, slo, Gaps()
    )
    assert found.late_tokens == 2


@pytest.mark.parametrize(
    ("text", "value"), [("250ms", 0.25), ("5s", 5), ("2m", 120), ("1.5", 1.5), ("10us", 1e-5)]
)
def test_durations_are_read(text, value):
    assert seconds(text, "--x") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "fast", "5 parsecs", "1.2.3s", "-5s", "0"])
def test_durations_that_are_none_name_the_option(text):
    with pytest.raises(OptionError, match="--x"):
        seconds(text, "--x")


@pytest.mark.parametrize("text", ["1/0", "nan", "inf", "-1", "x"])
def test_numbers_that_are_none_name_the_option(text):
    with pytest.raises(OptionError, match="--x"):
        number(text, "--x")


def test_numbers_may_be_fractions():
    assert number("1/16", "--x") == 0.0625


@pytest.mark.parametrize(
    ("value", "text"),
    [(5e-5, "50 µs"), (0.0123, "12.3 ms"), (3.214, "3.21 s"), (0, "0"), (321, "321 s")],
)
def test_times_are_written_in_the_unit_that_suits(value, text):
    assert seconds_text(value) == text
