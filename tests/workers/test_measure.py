from __future__ import annotations

import numpy as np
import pytest

from scheduler.messages import Rates
from scheduler.models import ModelShape
from workers.kv_cache import KvCache
from workers.measure import measure
from workers.native import NativeRunner
from workers.runner import Sampled


class SlowRunner:
    """A Runner whose time is its own: each run takes what the next of `seconds` says."""

    def __init__(self, blocks, prefill_s, decode_s):
        shape = ModelShape(1, 2, 1, 1, 2, 2, 8, 4096, 1e4, 1e-5, True)
        self.cache = KvCache(shape, blocks)
        self.cache.data[:] = 7
        self.vocab = 100
        self.now = 0.0
        self.lengths = []
        self._seconds = {True: iter(prefill_s), False: iter(decode_s)}

    def run(self, slices):
        (piece,) = slices
        assert 0 <= min(piece.tokens) <= max(piece.tokens) < self.vocab
        self.now += next(self._seconds[piece.end - piece.start > 1])
        self.lengths.append(piece.end - piece.start)
        assert len(piece.sequence.blocks) * 16 >= piece.end
        self.cache.data[:, :, piece.sequence.blocks] = 1
        return [Sampled(0) for _ in piece.choices]


def rates(runner):
    return measure(runner, lambda: runner.now)


@pytest.mark.parametrize(
    ("prefill_s", "decode_s", "expected", "runs"),
    [
        # the first one warms up; five, or as many as take 0.3 s
        ([9, *[1 / 8] * 5], [9, *[1 / 16] * 5], (1024, 1 / 16), (6, 6)),
        ([9, *[1 / 64] * 20], [9, *[1 / 128] * 39], (8192, 1 / 128), (21, 40)),
        # under a quota most are quick, and the others pay for it
        ([9, 0, 0, 1 / 4, 0, 1 / 4], [9, 0, 1 / 8, 0, 1 / 8, 1 / 8], (1280, 3 / 40), (6, 6)),
        # a slow machine: no further run begins once the budget is spent
        ([9, 4.0], [9, 2.0], (32, 2.0), (2, 2)),
        ([9, 0.5, 0.6], [9, 0.3, 0.5], (128 / 0.55, 0.4), (3, 3)),
    ],
)
def test_rates_are_means_over_runs_in_a_row(prefill_s, decode_s, expected, runs):
    runner = SlowRunner(64, prefill_s, decode_s)
    got = rates(runner)
    assert got.prefill_tokens_per_s == pytest.approx(expected[0])
    assert got.decode_s_per_token == pytest.approx(expected[1])
    assert runner.lengths == [128] * runs[0] + [1] * runs[1]


def test_a_small_cache_gets_a_prompt_that_fits_with_one_more_token():
    runner = SlowRunner(2, [1, 0.5, 0.5], [1, 1])
    assert rates(runner) == Rates(prefill_tokens_per_s=62.0, decode_s_per_token=1)
    assert set(runner.lengths) == {31, 1}


def test_the_cache_is_left_as_it_was_found():
    runner = SlowRunner(64, [1] * 9, [1] * 9)
    rates(runner)
    assert (runner.cache.data == 7).all()


class Broken(SlowRunner):
    def run(self, slices):
        super().run(slices)
        raise ZeroDivisionError


def test_the_cache_is_left_as_it_was_found_when_the_runner_fails():
    runner = Broken(64, [1], [])
    with pytest.raises(ZeroDivisionError):
        rates(runner)
    assert (runner.cache.data == 7).all()


def test_the_native_runner_can_be_measured(tiny_llama):
    _, checkpoint = tiny_llama()
    runner = NativeRunner(checkpoint, 16, 1)
    got = measure(runner)
    assert 100 < got.prefill_tokens_per_s < 1e8
    assert 1e-6 < got.decode_s_per_token < 1
    assert not np.any(runner.cache.data)
