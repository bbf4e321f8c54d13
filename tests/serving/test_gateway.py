"""Requests through a whole cluster of fake workers: right answers, and nothing left behind."""

from __future__ import annotations

import asyncio

import pytest

from scheduler.errors import BadRequest, SetupError, Unavailable
from scheduler.messages import Role
from scheduler.policies import POLICIES
from serving.ask import ModelInfo
from workers.fake import FakeOptions

pytestmark = pytest.mark.asyncio

SLOW = FakeOptions(tokens=40, step_ms=1.5)
PROMPT = "once upon a time there was"


def alone(make_engine, make_job, text: str = PROMPT, *, tokens: int = 16, **fields) -> str:
    """What one engine gives that serves nothing else."""
    engine = make_engine(options=FakeOptions(tokens=tokens))
    engine.add(make_job(text, **fields), list(text.encode()))
    pieces = []
    while engine.has_work:
        pieces += [output.text for output in engine.step().outputs]
    return "".join(pieces)


# ── split and whole ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "workers", [("m",), ("p", "d"), ("p1", "p2", "d1", "d2"), ("p", "d", "m"), ("d",), ("p",)]
)
async def test_every_shape_of_cluster_gives_the_same_answer(
    cluster, make_ask, make_engine, make_job, workers
):
    expected = {n: alone(make_engine, make_job, choices=(n,)) for n in (0, 1)}
    async with cluster(*workers) as it:
        assert await it.text(make_ask(n=2)) == expected
        missing = {("d",): "no_prefill", ("p",): "no_decode"}.get(workers)
        assert it.gateway.placing.degraded == ({missing: 1} if missing else {})
        if workers == ("p", "d"):
            assert it.workers["d"].engine.tokens == 2 * 16


@pytest.mark.parametrize("policy", POLICIES)
async def test_every_policy_gives_the_same_answer(cluster, make_ask, make_engine, make_job, policy):
    async with cluster("p", "d", "m", policy=policy) as it:
        answers = await asyncio.gather(*(it.text(make_ask()) for _ in range(4)))
        assert answers == [{0: alone(make_engine, make_job)}] * 4
        assert it.gateway.placing.decisions.total() == 4


async def test_prompts_of_one_request_are_numbered_by_prompt_and_choice(cluster, make_ask):
    async with cluster("p", "d") as it:
        both = await it.text(make_ask("first", "second", n=2))
        first = await it.text(make_ask("first", n=2))
        assert sorted(both) == [0, 1, 2, 3]
        assert {n: both[n] for n in (0, 1)} == first
        async with it.gateway.open(make_ask("first", "second")) as stream:
            assert stream.prompt_tokens == len("first") + len("second")


async def test_sixteen_at_once_are_not_mixed_up(cluster, make_ask, make_engine, make_job):
    texts = [f"this is the story of number {n}, and a long one, " * (n % 4 + 1) for n in range(16)]
    async with cluster("p1", "p2", "d1", "d2", blocks=40, max_step_tokens=64) as it:
        answers = await asyncio.gather(
            *(it.text(make_ask(text, id="same")) for n, text in enumerate(texts))
        )
    assert answers == [{0: alone(make_engine, make_job, text)} for text in texts]


async def test_a_full_decode_pool_makes_requests_wait_and_serves_them_all(
    cluster, make_ask, make_engine, make_job
):
    async with cluster("p") as it:
        await it.join("d", Role.DECODE, blocks=3)
        answers = await asyncio.gather(*(it.text(make_ask()) for _ in range(8)))
    assert answers == [{0: alone(make_engine, make_job)}] * 8


async def test_a_hand_over_tells_how_fast_its_link_is(cluster, make_ask):
    async with cluster("p", "d", blocks=600) as it:
        await it.text(make_ask("tell me " * 1000))
        links = it.members.fleet("fake").get("p").links
        assert links["d"].byte_s > 0
        assert not links["d"].carrying


async def test_limits_and_logprobs_travel(cluster, make_ask):
    async with cluster("p", "d") as it:
        async with it.gateway.open(make_ask(max_tokens=5, logprobs=2)) as stream:
            deltas = [delta async for delta in it.each(stream)]
        assert [(d.tokens, len(d.logprobs), len(d.logprobs[0].top)) for d in deltas] == [
            (1, 1, 2)
        ] * 5
        assert [d.finish for d in deltas] == [None] * 4 + ["length"]


# ── requests that are refused ───────────────────────────────────────────────────────────────────


async def test_an_unknown_model(cluster, make_ask):
    async with cluster("m") as it:
        with pytest.raises(BadRequest, match="'gpt' does not exist here") as wrong:
            await it.text(make_ask(model="gpt"))
        assert (wrong.value.status, wrong.value.param, wrong.value.code) == (
            404,
            "model",
            "model_not_found",
        )


@pytest.mark.parametrize(
    ("text", "limits", "param"),
    [("x" * 101, {}, "prompt"), ("x" * 90, {"max_tokens": 11}, "max_tokens"), ("", {}, "prompt")],
)
@pytest.mark.parametrize("workers", [("m",), ("p", "d")])
async def test_a_prompt_that_can_never_run(cluster, make_ask, workers, text, limits, param):
    async with cluster(*workers, options=FakeOptions(context=100)) as it:
        with pytest.raises(BadRequest) as wrong:
            await it.text(make_ask(text, **limits))
        assert (wrong.value.status, wrong.value.param) == (400, param)
        with pytest.raises(BadRequest):
            await it.text(make_ask("good", text, **limits))


async def test_workers_that_are_expected_but_not_here(cluster, make_ask):
    async with cluster() as it:
        with pytest.raises(Unavailable, match="the workers of 'fake' are not ready"):
            await it.text(make_ask())


async def test_all_workers_drain(cluster, make_ask):
    async with cluster("m") as it:
        it.members.get("m").worker.draining = True
        with pytest.raises(Unavailable, match="no worker for this model is ready"):
            await it.text(make_ask())


# ── who is ready ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("workers", "ready"),
    [((), False), (("p",), False), (("d",), False), (("p", "d"), True), (("m",), True)],
)
async def test_ready_is_a_worker_for_each_phase(cluster, workers, ready):
    async with cluster(*workers) as it:
        assert it.gateway.ready is ready


async def test_models_are_those_that_workers_serve(cluster):
    async with cluster("p", "d") as it:
        await it.join("other", Role.MIXED, model="other", options=FakeOptions(context=9))
        since = {m.join.name: m.since for m in it.members.of()}
        assert it.gateway.models() == [
            ModelInfo("fake", FakeOptions().context, since["p"]),
            ModelInfo("other", 9, since["other"]),
        ]


# ── the client leaves ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [("m",), ("p", "d")])
@pytest.mark.parametrize("after", [0, 1, 5])
async def test_when_the_client_leaves_the_workers_are_empty_and_count_it(
    cluster, make_ask, until, workers, after
):
    async with cluster(*workers, options=SLOW) as it:
        async with it.gateway.open(make_ask(n=2)) as stream:
            deltas = it.each(stream)
            for _ in range(after):
                await anext(deltas)
        await it.idle()
        loads = [it.members.get(name).load for name in workers]
        if after > 2:  # the last worker has it, however fast it is
            await until(lambda: it.members.get(workers[-1]).load.cancelled == 1)
        assert max(load.cancel_steps_max for load in loads) <= 1


async def test_when_the_client_leaves_before_acceptance(cluster, make_ask):
    async with cluster("m", options=SLOW) as it:
        task = asyncio.create_task(it.text(make_ask()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# ── joining ─────────────────────────────────────────────────────────────────────────────────────


async def test_another_tokenizer_may_not_join(cluster):
    async with cluster("m") as it:
        worker = it.start("n", Role.MIXED, fingerprint="another")
        with pytest.raises(SetupError, match="Start it from the same model files"):
            await worker.task
        it.workers.pop("n")


async def test_a_wrong_secret(cluster):
    async with cluster("m") as it:
        worker = it.start("n", Role.MIXED, secret=b"wrong")
        with pytest.raises(SetupError, match="wrong cluster secret"):
            await worker.task
        it.workers.pop("n")
