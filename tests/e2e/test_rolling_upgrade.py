"""The release before this one and this one serve together, whichever process is upgraded first."""

from __future__ import annotations

import asyncio
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest

from scheduler.messages import OLDEST, VERSION

pytestmark = pytest.mark.asyncio

SLOW = "fake:step_ms=10,tokens=400"
SECRET = {"MOTLEY_SECRET": "of this test"}
ARCHIVE = Path(__file__).parents[1] / "data" / f"motley-protocol-{OLDEST}.zip"
NEW: dict[str, str] = {}
# PYTHONSAFEPATH: this checkout, the working directory, must not stand in for the archive.
OLD = {"PYTHONPATH": str(ARCHIVE), "PYTHONSAFEPATH": "1"}


@pytest.fixture
def cluster(serve, launch):
    """`cluster(router, name=…)`: of which release each is; `cluster.worker(name, …)` adds one."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    alone = ("--prefill", "0", "--decode", "0", "--cluster", f"127.0.0.1:{port}")
    join = ("worker", SLOW, "--listen", "127.0.0.1", "--join", f"127.0.0.1:{port}")

    stack = ExitStack()

    def worker(name: str, release: dict[str, str]):
        options = ("--role", name[:-1], "--name", name)
        return stack.enter_context(launch(*join, *options, environment=SECRET | release))

    def start(router: dict[str, str], **workers: dict[str, str]):
        policy = "least-load" if router is NEW else None
        front = stack.enter_context(serve(SLOW, *alone, policy=policy, environment=SECRET | router))
        for name, release in workers.items():
            worker(name, release)
        for name in workers:
            front.wait_for(f"worker {name} joined")
        return front

    start.worker = worker
    with stack:
        yield start


async def pieces(front, tokens: int):
    async with openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="x", max_retries=0) as api:
        stream = await api.completions.create(
            model="fake", prompt="count on me", seed=1, max_tokens=tokens, stream=True
        )
        async for chunk in stream:
            yield chunk.choices[0].text


async def ask(front, tokens: int = 40) -> str:
    return "".join([text async for text in pieces(front, tokens)])


@pytest.mark.parametrize(
    ("router", "prefill", "decode"),
    [(NEW, OLD, NEW), (NEW, NEW, OLD), (OLD, NEW, NEW), (OLD, OLD, NEW), (OLD, NEW, OLD)],
    ids=[
        "prefill is old",
        "decode is old",
        "the router is old",
        "only decode is new",
        "only prefill is new",
    ],
)
async def test_a_split_request_over_both_releases(cluster, until, router, prefill, decode):
    front = cluster(router, prefill1=prefill, decode1=decode)
    alone = await ask(front)
    assert await asyncio.gather(*(ask(front) for _ in range(4))) == [alone] * 4
    received = "motley_worker_kv_bytes_received_total"
    assert await asyncio.to_thread(until, lambda: front.metric(received, "decode1") > 0, 10)
    if router is NEW:
        for name, release in (("prefill1", prefill), ("decode1", decode)):
            spoken = VERSION if release is NEW else OLDEST
            assert front.metric("motley_worker_protocol", name) == spoken


async def test_an_old_workers_requests_go_on_at_a_new_one(cluster):
    """The upgrade itself: a worker of the old release dies in the middle of a stream."""
    front = cluster(NEW)
    old = cluster.worker("mixed1", OLD)
    front.wait_for("worker mixed1 joined")
    unbroken = await ask(front, 60)
    stream = pieces(front, 60)
    begun = await anext(stream)
    old.stop(signal.SIGKILL)
    cluster.worker("mixed2", NEW)
    assert begun + "".join([text async for text in stream]) == unbroken
    assert front.metric("motley_worker_protocol", "mixed2") == VERSION
