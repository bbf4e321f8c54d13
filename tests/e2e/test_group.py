"""Several processes that together are one worker: one that is lost, and KV for another worker."""

from __future__ import annotations

import os
import re
import signal
import socket

import openai
import pytest
import pytest_asyncio

pytestmark = [pytest.mark.model, pytest.mark.timeout(240), pytest.mark.asyncio]

MODEL = "smollm2-135m-instruct"
EXACT = (MODEL, "--mode", "exact", "--threads", "1")
SECRET = {"MOTLEY_SECRET": "of this test"}
WHOLE = ("--prefill", "0", "--decode", "0", "--mixed", "1")
QUESTION = {
    "model": MODEL,
    "prompt": "Once upon a time there was a",
    "temperature": 0,
    "max_tokens": 16,
    "extra_body": {"ignore_eos": True},
}


def client(cluster):
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0)


async def answer(cluster, at_piece=lambda count: None) -> str:
    """The whole answer; `at_piece` is called with the number of each piece of it."""
    pieces = []
    async with client(cluster) as api:
        async for chunk in await api.completions.create(**QUESTION, stream=True):
            pieces.append(chunk.choices[0].text)
            at_piece(len(pieces))
    return "".join(pieces)


@pytest_asyncio.fixture
async def unbroken(serve):
    """What one worker says by itself."""
    with serve(*EXACT, *WHOLE) as alone:
        return await answer(alone)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


async def test_a_rank_killed_in_the_middle_of_an_answer_changes_no_token_of_it(serve, unbroken):
    with serve(*EXACT, *WHOLE, "--group-ranks", "3") as group:
        victim = re.search(r"\[mixed-0-rank-2\] process (\d+)", group.log)

        def lose(count):
            if count == 6:
                os.kill(int(victim.group(1)), signal.SIGKILL)

        assert await answer(group, lose) == unbroken
        group.wait_for("a group of 2 ranks")


async def test_a_group_of_three_hands_over_to_a_group_of_two_that_may_lose_a_rank(
    serve, launch, unbroken
):
    cluster, listen = (f"127.0.0.1:{free_port()}" for _ in range(2))
    group = ("worker", *EXACT, "--group", "g", "--join")
    first = ("--name", "g", "--rank", "0", "--ranks", "2", "--group-listen", listen)
    split = ("--prefill", "1", "--decode", "0", "--group-ranks", "3", "--cluster", cluster)
    with (
        serve(*EXACT, *split, environment=SECRET) as router,
        launch(*group, cluster, *first, "--role", "decode", "--weight", "1", environment=SECRET),
        launch(*group, listen, "--name", "g-1", "--weight", "2", environment=SECRET) as rank,
    ):
        router.wait_for("g joined")
        assert await answer(router) == unbroken
        size = 7 * 30 * 2 * 3 * 64 * 4  # tokens · layers · keys and values · K · E · bytes
        await router.metric_becomes("motley_worker_kv_bytes_sent_total", "prefill-0", size)
        await router.metric_becomes("motley_worker_kv_bytes_received_total", "g", size)
        rank.process.kill()
        rank.process.wait()
        assert await answer(router) == unbroken
