"""The whole of `motley serve` in this process, its workers as children of it."""

from __future__ import annotations

import asyncio
import socket
import urllib.request

import pytest

from scheduler.errors import SetupError
from scheduler.messages import Address, Join, Rates, Role
from serving.console import ready_text
from serving.run import LocalWorkers, RouterConfig, run_router

ANYWHERE = Address("127.0.0.1", 0)


def config(http: Address = ANYWHERE, cluster: Address = ANYWHERE, **counts: int) -> RouterConfig:
    workers = LocalWorkers((("m", "fake"),) if counts else (), counts, 1, ("--kv-tokens", "160"))
    return RouterConfig(http, cluster, "of this test", workers)


@pytest.mark.asyncio
async def test_it_is_ready_when_every_worker_has_joined_and_stops_clean():
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    said = config(prefill=1, decode=1)
    task = asyncio.create_task(
        run_router(said, stop, lambda http, joins: ready.set_result((http, joins)))
    )
    await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED, timeout=30)
    (host, port), joins = ready.result()
    assert sorted((j.name, j.model, str(j.role), j.kv_blocks) for j in joins) == [
        ("decode-0", "m", "decode", 10),
        ("prefill-0", "m", "prefill", 10),
    ]
    reply = await asyncio.to_thread(urllib.request.urlopen, f"http://{host}:{port}/metrics")
    with reply:
        assert b'motley_worker_kv_blocks{model="m",role="decode",worker="decode-0"}' in reply.read()
    stop.set()
    await asyncio.wait_for(task, 20)


@pytest.mark.asyncio
async def test_without_workers_of_its_own_it_is_ready_at_once():
    stop, ready = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(run_router(config(), stop, lambda http, joins: ready.set()))
    async with asyncio.timeout(10):
        await ready.wait()
        stop.set()
        await task


@pytest.mark.asyncio
@pytest.mark.parametrize("port", ["http", "cluster"])
async def test_a_port_that_is_taken_is_the_operators_to_mend(port):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wrong = config(**{port: Address(*taken.getsockname())}, mixed=1)
        with pytest.raises(SetupError, match="port"):
            await run_router(wrong, asyncio.Event(), lambda http, joins: None)


@pytest.mark.asyncio
async def test_a_worker_that_cannot_start_ends_everything():
    workers = LocalWorkers((("m", "fake:tokens=x"),), {Role.MIXED: 1}, 1, ())
    with pytest.raises(SetupError, match="worker mixed-0 stopped"):
        await asyncio.wait_for(
            run_router(
                RouterConfig(ANYWHERE, ANYWHERE, "of this test", workers),
                asyncio.Event(),
                lambda http, joins: None,
            ),
            30,
        )


@pytest.mark.parametrize(
    ("cluster", "join", "listen"),
    [
        ("127.0.0.1", "127.0.0.1:7", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1:7", "0.0.0.0"),
        ("::", "::1:7", "::"),
    ],
)
def test_local_workers_reach_the_router_wherever_it_listens(cluster, join, listen):
    workers = LocalWorkers((("m", "fake"), ("n", "x=y")), {Role.PREFILL: 1, Role.DECODE: 2}, 3, ())
    specs = workers.specs(Address(cluster, 7))
    assert [spec.name for spec in specs] == [
        *("m-prefill-0", "m-decode-0", "m-decode-1"),
        *("n-prefill-0", "n-decode-0", "n-decode-1"),
    ]
    assert specs[-1].arguments == (
        *("n=x=y", "--child", "--threads", "3", "--role", "decode"),
        *("--name", "n-decode-1", "--join", join, "--listen", listen),
    )


def worker(model: str, role: Role) -> Join:
    return Join("w", model, role, Address("h", 1), "f", 9, 9, Rates(1.0, 1.0), 1)


@pytest.mark.parametrize(
    ("http", "address"),
    [
        (("127.0.0.1", 8000), "http://127.0.0.1:8000"),
        (("0.0.0.0", 80), "http://127.0.0.1:80"),
        (("::1", 80), "http://[::1]:80"),
    ],
)
def test_the_ready_text_has_an_address_that_works(http, address):
    text = ready_text(http, [worker("m", Role.DECODE), worker("m", Role.PREFILL)])
    lines = text.splitlines()
    assert lines[0] == f"Motley is ready: {address}"
    assert "  m  (1 prefill, 1 decode)" in lines
    assert f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json' \\" in lines


def test_the_ready_text_without_workers_has_no_curl():
    assert "curl" not in ready_text(("127.0.0.1", 1), [])
