"""Processes that stop, wake, end and start again, while clients read."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from contextlib import ExitStack

import openai
import pytest

SLOW = "fake:step_ms=10,tokens=400"
SECRET = {"MOTLEY_SECRET": "of this test"}


def client(cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0)


async def texts(api: openai.AsyncOpenAI, tokens: int, prompt: str = "count on me"):
    """The pieces of one streamed answer."""
    stream = await api.completions.create(
        model="fake", prompt=prompt, seed=1, max_tokens=tokens, stream=True
    )
    async for chunk in stream:
        yield chunk.choices[0].text


async def whole(api: openai.AsyncOpenAI, tokens: int) -> str:
    return "".join([text async for text in texts(api, tokens)])


def pids(cluster) -> dict[str, int]:
    return {name: int(pid) for name, pid in re.findall(r"\[(\S+)\] process (\d+)", cluster.log)}


# ── a worker stops and wakes ────────────────────────────────────────────────────────────────────


@pytest.mark.asyncio
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_stopped_worker_costs_nobody_a_token_and_disturbs_nobody_when_it_wakes(
    serve, until, victim
):
    with serve(SLOW, "--prefill", "1", "--decode", "2") as cluster:
        stopped = pids(cluster)[victim]
        async with client(cluster) as api:
            unbroken = await whole(api, 60)
            running = [asyncio.create_task(whole(api, 60)) for _ in range(6)]
            await asyncio.to_thread(
                until, lambda: cluster.metric("motley_worker_running", "decode-0") > 0, 10
            )
            os.kill(stopped, signal.SIGSTOP)
            try:
                more = [asyncio.create_task(whole(api, 60)) for _ in range(2)]
                assert await asyncio.gather(*running, *more) == [unbroken] * 8
            finally:
                os.kill(stopped, signal.SIGCONT)
            cluster.wait_for(rf"worker {victim} joined[^$]*worker {victim} joined")
            assert await whole(api, 60) == unbroken
            blocks = cluster.metric("motley_worker_kv_blocks", victim)
            await cluster.metric_becomes("motley_worker_free_blocks", victim, blocks)


# ── the router ends ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.asyncio
async def test_on_sigterm_streams_are_finished_and_nobody_new_is_let_in(serve, until):
    with serve(SLOW) as cluster:
        below = cluster.workers()
        async with client(cluster) as api:
            unbroken = await whole(api, 60)
            stream = texts(api, 60)
            begun = await anext(stream)
            cluster.process.send_signal(signal.SIGTERM)
            cluster.wait_for("stopping: requests in flight")
            assert begun + "".join([text async for text in stream]) == unbroken
            async with client(cluster) as another:
                with pytest.raises(openai.APIConnectionError):
                    await whole(another, 1)
        assert await asyncio.to_thread(cluster.process.wait, 20) == 0
        assert cluster.alive(below) == []


@pytest.mark.asyncio
async def test_a_stream_that_outlasts_the_drain_is_cut_and_everything_ends(serve):
    with serve("fake:step_ms=10,tokens=10000", "--drain-s", "1") as cluster:
        async with client(cluster) as api:
            stream = texts(api, 10_000)
            await anext(stream)
            cluster.process.send_signal(signal.SIGTERM)
            with pytest.raises((openai.APIError, OSError)):
                async for _ in stream:
                    pass
        assert await asyncio.to_thread(cluster.process.wait, 20) == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_second_signal_ends_everything_at_once(serve, until, number):
    with serve("fake:step_ms=10,tokens=10000") as cluster:
        below = cluster.workers()
        async with client(cluster) as api:
            stream = texts(api, 10_000)
            await anext(stream)
            cluster.process.send_signal(number)
            cluster.wait_for("stopping: requests in flight")
            cluster.process.send_signal(number)
            assert await asyncio.to_thread(cluster.process.wait, 5) == -number
            with pytest.raises((openai.APIError, OSError)):
                async for _ in stream:
                    pass
        await asyncio.to_thread(until, lambda: not cluster.alive(below), 10)
        assert cluster.alive(below) == []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def router(port: int) -> tuple[str, ...]:
    """Arguments of `motley serve` without workers of its own."""
    return (SLOW, "--prefill", "0", "--decode", "0", "--cluster", f"127.0.0.1:{port}")


def worker(name: str, *ports: int) -> tuple[str, ...]:
    """Arguments of `motley` for a worker of the routers at these ports."""
    routers = ",".join(f"127.0.0.1:{port}" for port in ports)
    return ("worker", SLOW, "--listen", "127.0.0.1", "--join", routers, "--name", name)


@pytest.mark.asyncio
async def test_a_router_that_was_killed_and_starts_again_finds_its_workers(serve, launch):
    port, answers = free_port(), []
    with ExitStack() as stack:
        for name in ("a", "b"):
            stack.enter_context(launch(*worker(name, port), environment=SECRET))
        for _ in range(2):
            with serve(*router(port), environment=SECRET) as cluster:
                cluster.wait_for("worker a joined")
                cluster.wait_for("worker b joined")
                async with client(cluster) as api:
                    answers.append(await whole(api, 20))
                cluster.stop(signal.SIGKILL)
    assert answers[0] == answers[1]


@pytest.mark.asyncio
async def test_one_of_two_routers_dies_and_the_others_streams_go_on(serve, launch):
    ports = free_port(), free_port()
    with ExitStack() as stack:
        one, two = (stack.enter_context(serve(*router(p), environment=SECRET)) for p in ports)
        for name in ("a", "b"):
            stack.enter_context(launch(*worker(name, *ports), environment=SECRET))
            one.wait_for(f"worker {name} joined")
            two.wait_for(f"worker {name} joined")
        async with client(one) as first, client(two) as second:
            unbroken = await whole(first, 60)
            streams = [texts(second, 60) for _ in range(2)]
            begun = [await anext(stream) for stream in streams]
            lost = texts(first, 60)
            await anext(lost)
            one.stop(signal.SIGKILL)
            with pytest.raises((openai.APIError, OSError)):
                async for _ in lost:
                    pass
            for beginning, stream in zip(begun, streams, strict=True):
                assert beginning + "".join([text async for text in stream]) == unbroken
            assert await whole(second, 60) == unbroken
