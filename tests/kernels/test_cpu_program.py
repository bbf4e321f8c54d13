"""Programs and pools: what is refused, what threads change (nothing), what comes back."""

from __future__ import annotations

import gc
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kernels import dispatch, library
from kernels.mark import Mark
from kernels.program import HeadCounts, Pool, Program, QkvExtras, Span

pytestmark = pytest.mark.skipif(
    not dispatch.instruction_sets(),
    reason="the kernels' library is not built: there was no C++ compiler",
)


def long_program(pool, matrix):
    """400 dependent steps, each of several parts: threads that overtake would change the end."""
    program = Program(pool, 3)
    x, acts = program.floats(512), program.acts(512)
    x.data[:] = np.random.default_rng(0).normal(size=x.data.shape)
    for _ in range(400):
        program.norm(x, np.ones(512), 1e-5, acts)
        program.matmul(matrix, acts, x, add=True)
    return program, x


def test_a_long_program_ends_alike_on_one_thread_and_on_many(random_matrix, instruction_set):
    matrix, _ = random_matrix("Q4_1", 512, 512)
    results = []
    for threads in (1, 2, 5):
        program, x = long_program(Pool(threads, instruction_set), matrix)
        program.run([0] * 3, [Span(0, 3, 0, [0])], [])
        results.append(x.data)
    assert np.isfinite(results[0]).all()
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_pools_run_side_by_side(random_matrix):
    matrix, _ = random_matrix("Q8_0", 512, 512)

    def result(_):
        program, x = long_program(Pool(2), matrix)
        program.run([0] * 3, [Span(0, 3, 0, [0])], [])
        return x.data.copy()

    with ThreadPoolExecutor(3) as threads:
        first, *others = threads.map(result, range(3))
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_mark_is_reached_in_order_and_rings_once_each(random_matrix, instruction_set, threads):
    matrix, _ = random_matrix("Q4_1", 512, 512)
    program, mark = Program(Pool(threads, instruction_set), 1), Mark()
    x, acts = program.floats(512), program.acts(512)
    for value in (1, 2, 3):
        program.norm(x, np.ones(512), 1e-5, acts)
        program.matmul(matrix, acts, x, add=True)
        program.mark(mark, value)
    read, write = os.pipe()
    mark.wake(write)
    for _ in range(2):
        mark.reset()
        assert mark.value == 0
        program.run([0], [Span(0, 1, 0, [0])], [])
        assert (mark.value, len(os.read(read, 100))) == (3, 3)
    mark.wake(None)
    mark.reach(4)  # rings no more: the pipe stays empty
    os.set_blocking(read, False)
    with pytest.raises(BlockingIOError):
        os.read(read, 1)
    assert mark.value == 4
    os.close(read)
    os.close(write)


def test_a_pool_that_nobody_holds_ends_its_threads(random_matrix):
    def tasks():
        return len(list(Path("/proc/self/task").iterdir()))

    gc.collect()  # of earlier tests
    before = tasks()
    pool = Pool(4)
    assert tasks() == before + 3
    program, _ = long_program(pool, random_matrix("Q4_0", 512, 512)[0])
    del pool
    program.run([0], [Span(0, 1, 0, [0])], [])
    del program
    assert tasks() == before


def test_python_runs_while_a_program_does(random_matrix):
    program, _ = long_program(Pool(1), random_matrix("Q4_1", 512, 512)[0])
    entered = threading.Event()
    worker = threading.Thread(target=lambda: (entered.set(), run_often(program)))
    worker.start()
    assert entered.wait(10)
    steps = 0
    while worker.is_alive():
        steps += 1
    worker.join(10)
    assert steps > 100


def run_often(program):
    for _ in range(20):
        program.run([0] * 3, [Span(0, 3, 0, [0])], [])


@pytest.mark.parametrize("rows", [0, 4])
def test_a_step_must_fit_its_program(random_matrix, rows):
    program, _ = long_program(Pool(1), random_matrix("Q4_1", 512, 512)[0])
    with pytest.raises(ValueError, match="1 to 3"):
        program.run([0] * rows, [Span(0, rows, 0, [0])], [])


def test_widths_that_do_not_meet_are_refused(random_matrix):
    matrix, _ = random_matrix("Q4_1", 40, 64)
    program = Program(Pool(1), 1)
    with pytest.raises(ValueError, match="columns"):
        program.matmul(matrix, program.acts(32), program.floats(40))
    with pytest.raises(ValueError, match="groups"):
        program.acts(33)


def test_a_cache_of_another_type_is_refused():
    program = Program(Pool(1), 1)
    cache = np.zeros((2, 1, 16, 1, 32), np.float64)
    with pytest.raises(ValueError, match="float64"):
        program.rope(
            program.floats(96), program.floats(32), HeadCounts(1, 1, 32), cache, QkvExtras()
        )


def test_an_int8_cache_without_room_for_its_steps_is_refused():
    program, cache = Program(Pool(1), 1), np.zeros((2, 1, 16, 1, 32), np.int8)
    with pytest.raises(ValueError, match="rows of 32 int8"):
        program.attention(program.floats(96), HeadCounts(1, 1, 32), cache, program.floats(32))


@pytest.mark.parametrize("arguments", [(0,), (1, "sse9")])
def test_a_pool_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match="one thread is the least"):
        Pool(*arguments)


def test_without_a_library_torch_computes_and_that_is_said_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(library, "path", lambda: tmp_path / "library.so")
    library.load.cache_clear()
    dispatch.instruction_sets.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert dispatch.instruction_sets() == dispatch.instruction_sets() == ()
            with pytest.raises(ValueError, match="no library of kernels"):
                Pool(1)
        assert len(caplog.records) == 1
        assert "pip install" in caplog.text
    finally:
        library.load.cache_clear()
        dispatch.instruction_sets.cache_clear()
