"""A request's record → the registry, once, however the request ends."""

from __future__ import annotations

from contextlib import suppress

import pytest
from prometheus_client import REGISTRY

from serving.ask import Delta
from serving.metrics import CLIENT_LEFT, UNKNOWN_MODEL, Metrics


class Clock:
    """Stands still until told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_request_is_in_flight_until_it_ends_and_counts_as_left_if_nothing_was_said():
    metrics = Metrics()
    sample = metrics.registry.get_sample_value
    with suppress(KeyError), metrics.request():
        assert sample("motley_requests_in_flight") == 1
        raise KeyError

    assert sample("motley_requests_in_flight") == 0
    labels = {"model": UNKNOWN_MODEL, "code": str(CLIENT_LEFT)}
    assert sample("motley_requests_total", labels) == 1


def test_tokens_count_even_if_the_client_left_but_duration_only_if_served():
    metrics = Metrics()
    sample = metrics.registry.get_sample_value
    for code in (200, CLIENT_LEFT):
        with metrics.request() as record:
            record.model, record.code, record.prompt_tokens = "m", code, 10
            record.saw(Delta(0, "ab", 2))
            record.saw(Delta(0, "c", 1))

    labels = {"model": "m"}
    assert sample("motley_prompt_tokens_total", labels) == 20
    assert sample("motley_generation_tokens_total", labels) == 6
    assert sample("motley_request_ttft_seconds_count", labels) == 2
    assert sample("motley_request_tpot_seconds_count", labels) == 2
    assert sample("motley_request_duration_seconds_count", labels) == 1


def test_histograms_hold_seconds(clock):
    metrics = Metrics(clock)
    with metrics.request() as record:
        record.model, record.code = "m", 200
        for after, tokens in ((2.0, 1), (1.0, 1), (1.0, 1)):
            clock.now += after
            record.saw(Delta(0, "a", tokens))
        clock.now += 5.0

    names = ("ttft", "tpot", "duration")
    sums = [f"motley_request_{name}_seconds_sum" for name in names]
    assert [metrics.registry.get_sample_value(s, {"model": "m"}) for s in sums] == [2.0, 1.0, 9.0]


def test_the_first_token_is_the_first_delta_that_holds_one(clock):
    record = Metrics(clock).request()
    ttfts = []
    for tokens in (0, 1, 1):
        clock.now += 1.5
        record.saw(Delta(0, "", tokens))
        ttfts.append(record.ttft)
    assert ttfts == [None, 3.0, 3.0]


@pytest.mark.parametrize(
    ("choices", "tokens", "tpot"),
    [(1, 5, 3.0), (2, 10, 3.0), (3, 9, 6.0), (1, 1, None), (2, 2, None)],
)
def test_time_per_token_is_of_one_choice(clock, choices, tokens, tpot):
    record = Metrics(clock).request()
    record.choices = choices
    record.saw(Delta(0, "", 1))
    clock.now += 12.0
    record.saw(Delta(0, "", tokens - 1))
    assert record.tpot == tpot


def test_two_routers_in_one_process_share_nothing():
    one, two = Metrics(), Metrics()
    with one.request() as record:
        record.model = "m"
    labels = {"model": "m", "code": "499"}
    assert one.registry.get_sample_value("motley_requests_total", labels) == 1
    assert two.registry.get_sample_value("motley_requests_total", labels) is None
    assert REGISTRY.get_sample_value("motley_requests_in_flight") is None
