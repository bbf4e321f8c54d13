"""Steps of a worker, timed: each is what its cell says, and the engine is left idle."""

from __future__ import annotations

import json

import pytest

from motley import main
from scheduler.batching import Batcher
from scheduler.blocks import BlockPool
from scheduler.cost import CostModel
from workers.engine import Engine
from workers.fake import FakeOptions, FakeRunner, FakeText
from workers.profile_command import points
from workers.recording import RecordingEngine
from workers.stepping import DECODES, ROUNDS, Cell, grid, time_steps

TRUE = CostModel(5e-3, 1e-3, 0.0, 0.0, 0.0, "assumed")


class Bench:
    """A worker whose time is its own: 5 ms a step, and 1 ms for each prompt token."""

    def __init__(self, blocks=1024, context=8192, **batching):
        self.now = 0.0
        options = FakeOptions(step_ms=5, prefill_tps=1000, context=context)
        made = Engine(
            FakeRunner(blocks, options, self.sleep),
            FakeText(context),
            Batcher(BlockPool(blocks), **batching),
            lambda: self.now,
        )
        self.engine = RecordingEngine(made)

    def sleep(self, seconds):
        self.now += seconds

    def time(self, *cells, seconds=1e9, **other):
        return time_steps(self.engine, list(cells), seconds, **other)


def shapes(steps):
    return [tuple(step.shape) for step in steps]


def test_a_prompt_is_timed_piece_by_piece():
    (steps,) = Bench().time(Cell(1100, 0, 0))
    assert len(steps) == 3 * ROUNDS
    assert [shape[0] for shape in shapes(steps[:3])] == [512, 512, 76]
    assert [step.seconds for step in steps[:3]] == pytest.approx([0.517, 0.517, 0.081])
    assert [(p.prompt_tokens, p.context, p.runs) for p in points([Cell(1100, 0, 0)], [steps])] == [
        (512, 0, ROUNDS),
        (512, 512, ROUNDS),
        (76, 1024, ROUNDS),
    ]


def test_a_batch_decodes_at_its_context_without_its_prompts_being_computed():
    bench = Bench()
    (steps,) = bench.time(Cell(0, 4, 100))
    assert shapes(steps[:DECODES]) == [(0, 0, 4, 4 * (101 + at)) for at in range(DECODES)]
    assert [step.seconds for step in steps] == pytest.approx([0.005] * DECODES * ROUNDS)
    (point,) = points([Cell(0, 4, 100)], [steps])
    assert (point.phase, point.context, point.runs) == ("decode", 102, DECODES * ROUNDS)


def test_a_prompt_is_timed_beside_a_batch():
    (steps,) = Bench().time(Cell(64, 2, 100))
    assert shapes(steps[:1]) == [(64, 64 * 65 // 2, 2, 202)]
    assert len(steps) == ROUNDS


def test_no_prompt_is_found_in_the_cache_of_an_earlier_one():
    (steps,) = Bench().time(Cell(256, 0, 0))
    assert {shape[0] for shape in shapes(steps)} == {256}


def test_the_engine_is_idle_afterwards_and_when_a_step_fails():
    bench = Bench()
    bench.time(Cell(64, 2, 100), Cell(0, 3, 50), Cell(300, 0, 0))
    run = bench.engine.runner.run
    bench.engine.runner.run = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        bench.time(Cell(64, 2, 100))
    bench.engine.runner.run = run
    bench.engine.check_integrity()
    assert not bench.engine.keys
    assert bench.engine.batcher.pool.free == 1024


def test_when_the_time_is_up_the_first_round_is_still_whole():
    bench, told = Bench(), []
    cells = [Cell(500, 0, 0), Cell(0, 1, 10)]
    found = bench.time(*cells, seconds=0.1, on_cell=lambda: told.append(1))
    assert [len(steps) for steps in found] == [1, DECODES]
    assert len(told) == ROUNDS * len(cells)


def test_the_grid_holds_what_fits_and_is_quick_enough_smallest_first():
    cells = grid(Bench().engine, TRUE, 40)
    assert cells[0] == Cell(0, 1, 64)
    assert cells[-1] == Cell(2048, 0, 0)
    assert Cell(256, 16, 256) in cells
    assert Cell(0, 64, 512) not in cells  # 32,768 tokens of KV cache in 16,384
    assert {cell.prompt for cell in grid(Bench().engine, TRUE, 2) if not cell.batch} == {
        *(16, 64, 128)
    }
    short = grid(Bench(blocks=20, context=300, max_sequences=2).engine, TRUE, 40)
    assert short
    assert all(cell.prompt < 300 and cell.context < 300 and cell.batch <= 2 for cell in short)


def test_a_profile_is_a_table_a_file_and_what_planning_rests_on(tmp_path, capsys, monkeypatch):
    pytest.importorskip("scipy", reason="the planner is the extra `plan`")
    monkeypatch.chdir(tmp_path)
    fake = "little=fake:step_ms=0.2,prefill_tps=100000,context=4096"
    arguments = ["profile", fake, "--threads", "1", "--seconds", "0.3"]
    assert main([*arguments, "--output", "p.json"]) == 0
    shown = capsys.readouterr().out
    assert "decode: fitted within" in shown
    profile = json.loads((tmp_path / "p.json").read_text())
    assert profile["worker"]["threads"] == 1
    assert {step["provenance"] for step in profile["steps"]} == {"measured"}
    assert profile["cost"]["provenance"] == "fitted"
    assert 0.2e-3 < profile["cost"]["step"] < 5e-3

    (tmp_path / "service.toml").write_text(
        "slo = {ttft_ms = 3000, tpot_ms = 60}\n"
        '[[model]]\nname = "little"\nrate = 2\n'
        "sizes = [{input = 400, output = 50, weight = 1}]\n"
        '[[profile]]\nfile = "p.json"\ngpu = "CPU-2"\n[plan]\ngpus = ["CPU-2"]\n'
    )
    assert main(["plan", "service.toml", "--no-certify", "--json"]) == 0
    (column,) = json.loads(capsys.readouterr().out)["columns"].values()
    assert column["provenance"] == "fitted"
    assert "kinds of step measured on 1 of" in column["source"]

    (tmp_path / "workers.toml").write_text(
        'slo = {ttft_ms = 3000, tpot_ms = 60}\n[[worker]]\nrole = "mixed"\nprofile = "p.json"\n'
    )
    (tmp_path / "trace.csv").write_text("arrival_s,input_tokens,output_tokens\n0,100,9\n1,99,9\n")
    simulate = ["simulate", "--workers", "workers.toml", "--trace", "trace.csv", "--json"]
    assert main([*simulate, "--requests", "20"]) == 0
    assert json.loads(capsys.readouterr().out)["workers"]["attainment"]["mean"] == 1


def test_an_output_that_cannot_be_written_is_named(capsys):
    arguments = ["profile", "fake", "--seconds", "0.1", "--output", "/nowhere/p.json"]
    assert main(arguments) == 2
    assert "--output /nowhere/p.json" in capsys.readouterr().err
