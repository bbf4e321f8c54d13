"""SmolLM2-135M-Instruct through the whole system: what a new user does first."""

from __future__ import annotations

import asyncio
import socket

import openai
import pytest

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]

MODEL = "smollm2-135m-instruct"
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, " * 40,
    "1, 2, 3, 4, 5,",
]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


def client(cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0)


async def complete_all(cluster, prompts: list[str]) -> list[str]:
    async with client(cluster) as api:
        replies = [api.completions.create(prompt=prompt, **GREEDY) for prompt in prompts]
        return [reply.choices[0].text for reply in await asyncio.gather(*replies)]


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["fast", "exact"])
async def test_the_openai_client_chats_and_a_split_answer_is_the_whole_one(serve, mode):
    with serve(MODEL, "--mode", mode, "--prefill", "1", "--decode", "1") as split:
        async with client(split) as api:
            stream = await api.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
        text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
        assert "Paris" in text
        assert chunks[-1].usage.completion_tokens == 8
        apart = await complete_all(split, PROMPTS)
        assert split.metric("motley_worker_tokens_total", "decode-0") > 0
        assert split.metric("motley_worker_kv_bytes_sent_total", "prefill-0") > 0
    shape = ("--prefill", "0", "--decode", "0", "--mixed", "1")
    with serve(MODEL, "--mode", mode, *shape) as mixed:
        assert await complete_all(mixed, PROMPTS) == apart
        assert [(await complete_all(mixed, [prompt]))[0] for prompt in PROMPTS] == apart


@pytest.mark.asyncio
async def test_workers_whose_kv_caches_are_of_unlike_types_serve_one_model(serve, launch, until):
    """The hand-over converts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cluster = f"127.0.0.1:{taken.getsockname()[1]}"
    secret = {"MOTLEY_SECRET": "of this test"}
    shape = ("--prefill", "1", "--decode", "0", "--cluster", cluster)
    worker = ("worker", MODEL, "--role", "decode", "--name", "small", "--join", cluster)
    with (
        serve(MODEL, *shape, environment=secret) as router,
        launch(*worker, "--kv-dtype", "int8", environment=secret) as other,
    ):
        other.wait_for("joined the router")
        router.wait_for("keeps its KV cache in int8, prefill-0 in float16")
        async with client(router) as api:
            reply = await api.completions.create(
                model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8
            )
        assert "Paris" in reply.choices[0].text
        received = "motley_worker_kv_bytes_received_total", "small"
        assert until(lambda: router.metric(*received) > 0, 10)
