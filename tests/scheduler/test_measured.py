"""A measured worker is planned and simulated with as it is."""

from __future__ import annotations

import datetime
import json

import msgspec
import pytest

pytest.importorskip("scipy", reason="the planner is the extra `plan`")

from scheduler.capacity import Slo, capacity
from scheduler.cost import CostModel, StepShape, context_sum
from scheduler.errors import SetupError
from scheduler.hardware import Model
from scheduler.measured import Point, Worker, read_worker_profile, summarise
from scheduler.messages import Role
from scheduler.plan_file import PlanFile
from scheduler.planner_columns import build
from scheduler.service_file import parse_service
from scheduler.simulate_plan import plan_workers, read_workers

TRUE = CostModel(4e-3, 1e-3, 1e-6, 1.5e-3, 3e-6, "assumed")
SHAPES = [
    *(StepShape(tokens, context_sum(0, tokens)) for tokens in (16, 128, 512)),
    StepShape(512, context_sum(512, 1024)),
    *(StepShape(0, 0, batch, batch * each) for batch in (1, 8, 32) for each in (64, 1024)),
    StepShape(128, context_sum(0, 128), 4, 2048),
]
MODEL = Model("little", 135e6, 30, 576, 9, 3, 64, 8192)
WORKER = Worker("a CPU", 2, 8.0, 1, "fast mode", 4000, 512, 16, 0.5)
TODAY = datetime.date(2026, 11, 21)
SERVICE = """
slo = {ttft_ms = 3000, tpot_ms = 60}
[[model]]
name = "little"
rate = 0.5
sizes = [{input = 400, output = 50, weight = 1}]
[[profile]]
file = "p.json"
gpu = "CPU-2"
[plan]
gpus = ["CPU-2"]
"""


def profile(*, slower=1.0, shapes=SHAPES):
    """Of a worker that keeps to TRUE, but for one step that took `slower` times as long."""
    points = [Point(*shape, ms=1e3 * TRUE.predict(shape), runs=5) for shape in shapes]
    points[-1] = msgspec.structs.replace(points[-1], ms=slower * points[-1].ms)
    return summarise(MODEL, WORKER, TODAY, points, kv_token_bytes=23040)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "p.json"
    path.write_bytes(msgspec.json.encode(profile()))
    return path


def test_a_line_is_fitted_and_its_error_is_told_by_phase():
    found = profile()
    assert found.cost.coefficients == pytest.approx(TRUE.coefficients, rel=1e-6)
    assert (found.cost.provenance, found.steps[0].provenance) == ("fitted", "measured")
    assert {phase: error.steps for phase, error in found.errors.items()} == {
        "prefill": 4,
        "decode": 6,
        "mixed": 1,
    }
    assert max(error.worst for error in found.errors.values()) < 1e-6
    assert profile(slower=1.5).errors["mixed"].worst > 0.2
    assert "mixed" not in profile(shapes=SHAPES[:-1]).errors


def test_a_point_says_what_was_in_its_step():
    found = [(point.phase, point.context) for point in profile().steps]
    assert found[:4] == [("prefill", 0), ("prefill", 0), ("prefill", 0), ("prefill", 512)]
    assert found[5] == ("decode", 1024)
    assert found[-1] == ("mixed", 512)


def test_a_file_is_read_back_as_it_was_written(file):
    assert read_worker_profile(file) == profile()


def test_its_times_are_those_of_the_engine_that_was_measured():
    found = profile()
    # 1,200 tokens are three pieces of at most 512.
    assert found.prefill_ms(1200, 1200**2) == pytest.approx(1e3 * TRUE.prefill_s(1200))
    assert found.decode_ms(8, 4096) == pytest.approx(1e3 * TRUE.decode_step_s(8, 4096))
    slo = Slo(1e4, 1e4)
    most = capacity(found, Role.DECODE, found.bounds.kv(10**9), (10, 10), slo)
    assert most.places == WORKER.sequences
    most = capacity(found, Role.DECODE, found.bounds.kv(10**9), (900, 100), slo)
    assert most.places == WORKER.kv_tokens // 1000


def test_a_service_is_planned_from_it(file):
    service = parse_service(SERVICE, file.parent)
    built = build(service)
    facts = built.facts["little mixed CPU-2 x1"]
    assert facts.provenance == "fitted"
    assert "11 kinds of step measured on 1 of 2 cores of a CPU, fast mode, 2026-11-21" in (
        facts.source
    )
    plan = PlanFile(replicas={"little mixed CPU-2 x1": 1})
    (worker,) = plan_workers(service, built, plan)["little"]
    assert worker.cost.coefficients == pytest.approx(TRUE.coefficients, rel=1e-6)
    assert (worker.kv_tokens, worker.max_step_tokens, worker.max_sequences) == (4000, 512, 16)


def test_a_profile_stands_for_the_model_that_names_its_shape(file):
    text = SERVICE.replace('name = "little"', 'name = "chat"\nshape = "little"')
    assert set(parse_service(text, file.parent).measured) == {("chat", "CPU-2", 1)}


def test_workers_of_a_file_are_simulated_with_it(file):
    path = file.parent / "workers.toml"
    own = 'profile = "p.json"\n'
    path.write_text(
        "slo = {ttft_ms = 1000, tpot_ms = 60}\n"
        f'[[worker]]\nrole = "prefill"\n{own}[[worker]]\nrole = "decode"\n{own}kv_tokens = 320\n'
    )
    (prefill, decode), _ = read_workers(path)
    assert prefill.cost == decode.cost == profile().cost
    assert (prefill.kv_tokens, prefill.max_sequences) == (4000, 16)
    assert (decode.kv_tokens, decode.max_step_tokens) == (320, 512)
    path.write_text(path.read_text() + "prefill_tokens_per_s = 9\ndecode_s_per_token = 1\n")
    with pytest.raises(SetupError, match=r"worker\[1\]: give just one of profile"):
        read_workers(path)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("format",), "motley-profile-9", "format"),
        (("model", "layers"), "many", "model.layers"),
        (("worker", "kv_tokens"), 3, "worker.kv_tokens"),
        (("worker", "sequences"), 0, "worker.sequences"),
        (("worker",), None, "worker"),
        (("date",), "yesterday", "date"),
        (("cost", "step"), -1, "cost.step"),
        (("cost", "link_bytes_s"), 0, "cost.link_bytes_s"),
        (("steps",), [], "steps"),
        (("steps", 2, "ms"), 0, "steps[2].ms"),
        (("steps", 2, "decodes"), "x", "steps[2].decodes"),
        (("extra",), 1, "extra"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(changed, file, path, value, named):
    file.write_text(changed(json.loads(file.read_text()), path, value))
    with pytest.raises(SetupError) as caught:
        read_worker_profile(file)
    assert named in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"CPU-2"\n[plan]', '"Z80"\n[plan]', "profile[0].gpu"),
        ('"p.json"', '"nowhere.json"', "nowhere.json"),
        ('file = "p.json"', 'file = "p.json"\nmodel = "large"', "profile[0].model"),
        ("[plan]", '[[profile]]\nfile = "p.json"\ngpu = "CPU-2"\n[plan]', "profile[1]"),
    ],
)
def test_what_is_wrong_with_its_place_in_a_service_is_named(file, old, new, named):
    with pytest.raises(SetupError) as caught:
        parse_service(SERVICE.replace(old, new), file.parent)
    assert named in str(caught.value)
