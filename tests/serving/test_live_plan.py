"""A plan's file in the live router: workers find their columns, and requests the cheapest."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from motley import main
from scheduler.errors import SetupError
from scheduler.messages import Address, Join, Rates, Role
from scheduler.plan_file import PlanFile, read_deployable
from serving.deploy.planned import commands_elsewhere, located, wanted_here
from serving.live_plan import LivePlan
from serving.placing import RoutingOptions
from serving.run import LocalWorkers, RouterConfig, run_router

COLUMN = {"model": "m", "role": "mixed", "gpu": "CPU-2", "gpus": 1, "price": 0.1}
CHEAP, DEAR, DECODE = "m mixed CPU-2 x1", "m mixed L4 x1", "m decode L4 x1"
PLAN = {
    "status": "optimal",
    "replicas": {CHEAP: 2, DEAR: 1},
    "routing": {"b": {CHEAP: 0.75, DEAR: 0.25}},
    "columns": {CHEAP: COLUMN, DEAR: COLUMN | {"gpu": "L4", "price": 0.7}},
    "buckets": [{"name": "b", "model": "m", "input": 30, "output": 16, "rate": 4}],
    "slo": {"m": {"ttft_ms": 2000, "tpot_ms": 500, "share": 0.9}},
}
ANYWHERE = Address("127.0.0.1", 0)


def plan(**changes) -> PlanFile:
    return msgspec.convert(PLAN | changes, PlanFile)


def join(kind="", role=Role.MIXED, model="m") -> Join:
    return Join("w", model, role, ANYWHERE, "f", 9, 9, Rates(1.0, 1.0), 1, kind=kind)


# ── which column ────────────────────────────────────────────────────────────────────────────────


def test_a_worker_is_in_the_column_that_it_names():
    live = LivePlan(plan())
    assert live.allowance(join(CHEAP)).plan.price == pytest.approx(0.1 / 3600)
    assert live.allowance(join(DEAR)).plan.price == pytest.approx(0.7 / 3600)
    assert live.allowance(join(CHEAP)) is live.allowance(join(CHEAP))


def test_a_worker_that_names_none_is_in_the_only_one_of_its_model_and_role():
    decode = COLUMN | {"role": "decode", "price": 0.3}
    live = LivePlan(plan(columns=PLAN["columns"] | {DECODE: decode}))
    assert live.allowance(join(role=Role.DECODE)).plan.price == pytest.approx(0.3 / 3600)


@pytest.mark.parametrize("stranger", [join(), join("no such"), join(CHEAP, Role.DECODE)])
def test_a_worker_in_no_column_is_for_what_the_others_cannot_do(stranger):
    live = LivePlan(plan())
    other = live.allowance(stranger)
    planned = [live.allowance(join(name)) for name in (CHEAP, DEAR)]
    assert other.price(30, 0.0) > max(each.price(30, 0.0) for each in planned)


def test_a_model_without_a_plan_has_no_prices():
    assert LivePlan(plan()).allowance(join(model="other")) is None


# ── the cluster ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.asyncio
async def test_live_requests_go_to_the_cheaper_column_as_far_as_the_plan_says(cluster, make_ask):
    """The clock stands still: every request comes at the same moment."""
    limits = RoutingOptions(ttft_s={"": 2.0}, tpot_s={"": 0.5})
    sizes = [
        PLAN["buckets"][0] | {"name": name, "input": tokens, "rate": 1.0}
        for name, tokens in (("b", 60), ("c", 200))
    ]  # before and after the router has learned
    shares = PLAN["routing"]["b"]
    live_plan = LivePlan(plan(buckets=sizes, routing={"b": shares, "c": shares}))
    async with cluster(clock=lambda: 100.0, routing=limits, live_plan=live_plan) as it:
        for name, kind in (("m-a", CHEAP), ("m-b", CHEAP), ("m-c", DEAR)):
            await it.join(name, Role.MIXED, model="m", kind=kind)

        async def ask(count: int) -> int:
            """Tokens from the dear worker, after so many requests more of one token each."""
            for _ in range(count):
                await it.text(make_ask(200 * "a", model="m", max_tokens=1))
            return it.workers["m-c"].engine.tokens

        assert await ask(15) == 0
        # A quarter, about: speeds are learned from steps that really run.
        assert await ask(85) == pytest.approx(25, abs=10)


@pytest.mark.asyncio
async def test_a_plans_workers_start_here_and_join_as_its_columns():
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    wanted = wanted_here(plan(), None, {"m": "fake"})
    workers = LocalWorkers((), {}, 1, ("--kv-tokens", "160"), planned=wanted)
    said = RouterConfig(ANYWHERE, ANYWHERE, "of this test", workers, plan=plan())
    task = asyncio.create_task(run_router(said, stop, lambda _, joins: ready.set_result(joins)))
    await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED, timeout=30)
    assert sorted((j.name, j.model, j.kind) for j in ready.result()) == [
        ("m-mixed-CPU-2-x1-0", "m", CHEAP),
        ("m-mixed-CPU-2-x1-1", "m", CHEAP),
        ("m-mixed-L4-x1-0", "m", DEAR),
    ]
    stop.set()
    await asyncio.wait_for(task, 20)


# ── what runs where ─────────────────────────────────────────────────────────────────────────────


def test_only_this_machines_workers_start_here_and_the_others_commands_are_told():
    (here,) = wanted_here(plan(), ("CPU-2",), {"m": "fake"})
    assert (here.name, here.replicas, here.kind) == ("m-mixed-CPU-2-x1", 2, CHEAP)
    assert commands_elsewhere(plan(), ("CPU-2",), Address("192.0.2.7", 8100)) == [
        f"1 × L4: motley worker m --role mixed --kind '{DEAR}' --join 192.0.2.7:8100"
    ]
    assert commands_elsewhere(plan(), None, ANYWHERE) == []


def test_a_tensor_parallel_replica_is_a_group_of_as_many_ranks():
    columns = {CHEAP: COLUMN | {"gpus": 2}, DEAR: COLUMN}
    wanted = wanted_here(plan(columns=columns), None, {"m": "fake"})
    assert [each.ranks for each in wanted] == [2, 1]
    specs = LocalWorkers((), {}, 1, (), planned=wanted[:1]).specs(Address("127.0.0.1", 7))
    assert [spec.name for spec in specs] == [
        *("m-mixed-CPU-2-x1-0", "m-mixed-CPU-2-x1-0-rank-1"),
        *("m-mixed-CPU-2-x1-1", "m-mixed-CPU-2-x1-1-rank-1"),
    ]
    assert specs[0].arguments[specs[0].arguments.index("--kind") + 1] == CHEAP


def test_models_are_found_by_their_names_or_as_told():
    assert located(plan(), []) == {"m": "m"}
    assert located(plan(), ["m=./model.gguf"]) == {"m": "m=./model.gguf"}
    for wrong in ("m", "other=./model.gguf"):
        with pytest.raises(SetupError, match="for a model of the plan: m"):
            located(plan(), [wrong])
    with pytest.raises(SetupError, match="--here T4: the plan has CPU-2, L4"):
        wanted_here(plan(), ("T4",), {"m": "fake"})


# ── the file ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN))
    return path


def test_a_plan_is_read_as_it_was_written(file):
    assert read_deployable("--plan", file) == plan()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"columns": {}}, "not a problem file"),
        ({"columns": {CHEAP: COLUMN}}, DEAR),
        ({"columns": PLAN["columns"] | {CHEAP: COLUMN | {"price": -1}}}, "price"),
        ({"columns": PLAN["columns"] | {CHEAP: COLUMN | {"role": "both"}}}, "role"),
        ({"replicas": {CHEAP: -1}}, "replicas"),
        ({"routing": {"b": {CHEAP: 1.5}}}, "routing"),
        ({"buckets": [{"name": "b"}]}, "buckets"),
        ({"slo": {"m": {"ttft_ms": 0, "tpot_ms": 1}}}, "slo.m.ttft_ms"),
    ],
)
@pytest.mark.parametrize("command", [["deploy"], ["serve", "--plan"]])
def test_what_is_wrong_with_a_plan_is_named(file, capsys, changes, named, command):
    file.write_text(json.dumps(PLAN | changes))
    none = ["--prefill", "0", "--decode", "0"] if command[0] == "serve" else []
    assert main([*command, str(file), *none]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert str(file) in said


def test_workers_elsewhere_need_to_know_where_to_join(file, capsys):
    assert main(["deploy", str(file), "m=fake", "--here", "L4"]) == 2
    assert "--cluster HOST:PORT" in capsys.readouterr().err
