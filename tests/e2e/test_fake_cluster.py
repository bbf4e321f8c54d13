"""The whole system with real processes and sockets, and the fake worker in place of a model."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket

import openai
import pytest

SLOW = "fake:step_ms=20,tokens=400"


def client(cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0)


async def ask(api: openai.AsyncOpenAI, text: str, **options) -> str:
    reply = await api.completions.create(model="fake", prompt=text, seed=1, **options)
    return "".join(choice.text for choice in reply.choices)


@pytest.mark.asyncio
async def test_sixteen_clients_at_once_get_what_each_gets_alone(serve):
    prompts = [f"client {n} " * (n * 20 + 1) for n in range(16)]
    with serve("fake", "--prefill", "2", "--decode", "2") as split:
        async with client(split) as api:
            together = await asyncio.gather(*(ask(api, p, max_tokens=40) for p in prompts))
            alone = [await ask(api, p, max_tokens=40) for p in prompts]
    with serve("fake", "--prefill", "0", "--decode", "0", "--mixed", "1") as mixed:
        async with client(mixed) as api:
            whole = [await ask(api, p, max_tokens=40) for p in prompts]
    assert together == alone == whole
    assert len(set(whole)) == 16


@pytest.mark.asyncio
async def test_a_short_prompt_beside_nobody_is_not_handed_over(serve):
    """By default each route is priced, and a hand-over costs something."""
    with serve("fake", policy="priced") as cluster:
        async with client(cluster) as api:
            await ask(api, "hello", max_tokens=4)
        assert cluster.metric("motley_disagg_decision_total", "whole", "decision_type") == 1


@pytest.mark.asyncio
async def test_a_client_that_leaves_frees_its_blocks_within_two_steps(serve):
    with serve(SLOW) as cluster:
        async with client(cluster) as api:
            blocks = cluster.metric("motley_worker_kv_blocks", "decode-0")
            stream = await api.completions.create(
                model="fake", prompt="to be left " * 50, stream=True, max_tokens=400
            )
            async for _ in stream:
                break
            await cluster.metric_becomes("motley_worker_running", "decode-0", 1)
            await stream.close()
            await cluster.metric_becomes("motley_worker_free_blocks", "decode-0", blocks)
            await cluster.metric_becomes("motley_worker_free_blocks", "prefill-0", blocks)
            assert cluster.metric("motley_worker_cancelled_total", "decode-0") == 1
            assert cluster.metric("motley_worker_cancel_steps_max", "decode-0") <= 1


@pytest.mark.asyncio
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_killed_worker_costs_nobody_a_token(serve, until, victim):
    with serve(SLOW, "--prefill", "1", "--decode", "2") as cluster:
        pids = dict(re.findall(r"\[(\S+)\] process (\d+)", cluster.log))
        async with client(cluster) as api:
            options = {"max_tokens": 60, "n": 2}
            unbroken = await ask(api, "count on me", **options)
            running = [asyncio.create_task(ask(api, "count on me", **options)) for _ in range(6)]
            await asyncio.to_thread(
                until, lambda: cluster.metric("motley_worker_running", "decode-0") > 0, 10
            )
            os.kill(int(pids[victim]), signal.SIGKILL)
            assert await asyncio.gather(*running) == [unbroken] * 6
            cluster.wait_for(rf"worker {victim} ended")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(serve, number):
    with serve("fake") as cluster:
        below = cluster.workers()
        assert len(below) == 2
        assert cluster.stop(number) == 0
        assert cluster.alive(below) == []


def test_a_killed_front_process_takes_its_workers_along(serve, until):
    with serve("fake") as cluster:
        below = cluster.workers()
        cluster.stop(signal.SIGKILL)
        until(lambda: not cluster.alive(below), 20)
        assert cluster.alive(below) == []


def test_a_taken_port_is_said_with_what_to_do(launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with launch("serve", "fake", "--port", port) as cluster:
            assert cluster.process.wait(30) == 2
            assert re.search(rf"motley: .*{port}.*(free|other|another) ", cluster.log), cluster.log
            assert "Traceback" not in cluster.log


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("no-such-file.gguf", r"no-such-file\.gguf"),
        ("broken.gguf", r"broken\.gguf"),
        ("fake:steps=1", r"steps"),
    ],
)
def test_a_model_that_cannot_be_served_is_said_and_nothing_is_left(launch, tmp_path, model, said):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    location = str(tmp_path / model) if model.endswith(".gguf") else model
    with launch("serve", location) as cluster:
        assert cluster.process.wait(60) == 2
        assert re.search(f"motley: .*{said}", cluster.log), cluster.log
        assert "Traceback" not in cluster.log


@pytest.mark.asyncio
async def test_errors_have_openais_shape(serve):
    with serve("fake:context=64") as cluster:
        async with client(cluster) as api:
            with pytest.raises(openai.NotFoundError) as unknown:
                await api.completions.create(model="other", prompt="x")
            assert unknown.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as too_long:
                await api.completions.create(model="fake", prompt="x" * 60, max_tokens=10)
            assert (too_long.value.code, too_long.value.param) == (
                "context_length_exceeded",
                "max_tokens",
            )
            with pytest.raises(openai.BadRequestError) as malformed:
                await api.post("/completions", cast_to=object, content=b"{")
            assert malformed.value.body["type"] == "invalid_request_error"


@pytest.mark.asyncio
async def test_a_prompt_that_begins_like_an_earlier_one_says_what_was_cached(serve):
    with serve("fake") as cluster:
        async with client(cluster) as api:
            cached = []
            for question in ("first", "second"):
                prompt = f"a long preamble that all share {'. ' * 20}{question}"
                reply = await api.completions.create(model="fake", prompt=prompt)
                cached.append(reply.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 64]


@pytest.mark.asyncio
async def test_workers_of_two_models_share_a_router(serve):
    with serve("one=fake:tokens=3", "two=fake:tokens=5") as cluster:
        async with client(cluster) as api:
            assert {m.id for m in (await api.models.list()).data} == {"one", "two"}
            for model, tokens in (("one", 4), ("two", 6)):  # the last token says that it ends
                reply = await api.completions.create(model=model, prompt="hello")
                assert reply.usage.completion_tokens == tokens


@pytest.mark.asyncio
async def test_two_routers_share_the_port_and_the_workers(serve, until):
    """Each connection is one router's; both count only what came to them."""
    shape = ("--prefill", "1", "--decode", "1", "--routers", "2")
    with serve("fake", *shape, policy="least-load") as cluster:
        cluster.wait_for(r"(?s)decode-0\] joined the router.*decode-0\] joined the router")
        answers, shares = set(), set()

        async def ask_anew() -> None:
            async with client(cluster) as api:
                answers.add(await ask(api, "hello", max_tokens=8))

        def both_have_answered() -> bool:
            shares.add(cluster.metric("motley_disagg_decision_total", "split", "decision_type"))
            return len(shares) > 1 and min(shares) > 0

        for _ in range(41):  # odd, so that no two counts are equal
            await ask_anew()
        assert until(both_have_answered, 10)
        assert len(answers) == 1
        children = cluster.workers()
        assert cluster.stop() == 0
        assert until(lambda: not cluster.alive(children), 10)
