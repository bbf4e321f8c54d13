"""Clients that leave at random moments, against `motley serve` as it is: what is left of them?

The file descriptors and threads of a router and its workers are counted in /proc, their tasks and
blocks of KV cache in /metrics: before, and once the last client has gone.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = ("--prefill", "1", "--decode", "2")
MODEL = "fake:step_ms=1,tokens=200"
MOST_CLIENTS = 48
STAY_S = 1.0  # a client leaves after at most so long
REST_S = 3.0  # idle links between workers are closed by then
SETTLE_S, LOOK_S = 10.0, 0.5
WARM_S = 30.0  # nobody leaves
READY_S = 60.0


@dataclass(frozen=True)
class Holdings:
    """What the cluster's processes hold."""

    blocks: dict[str, float]  # of KV cache, free, by worker
    tasks: dict[str, float]  # by process: the router's name is empty
    descriptors: dict[int, int]  # by process id
    threads: dict[int, int]
    in_flight: float


class Served:
    """A running `motley serve`."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process, self.url = process, url

    @property
    def pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [self.process.pid, *map(int, children.split())]

    async def holdings(self) -> Holdings:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/metrics", headers={"Connection": "close"}) as reply,
        ):
            text = await reply.text()
        tasks = _by_worker(text, "motley_worker_tasks")
        tasks[""] = _plain(text, "motley_router_tasks")
        return Holdings(
            blocks=_by_worker(text, "motley_worker_free_blocks"),
            tasks=tasks,
            descriptors={pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids},
            threads={pid: len(os.listdir(f"/proc/{pid}/task")) for pid in self.pids},
            in_flight=_plain(text, "motley_requests_in_flight"),
        )


def _by_worker(text: str, name: str) -> dict[str, float]:
    pattern = rf'^{name}{{[^}}]*worker="([^"]*)"[^}}]*}} (\S+)$'
    return {worker: float(value) for worker, value in re.findall(pattern, text, re.MULTILINE)}


def _plain(text: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found, f"no {name} in /metrics"
    return float(found.group(1))


async def disconnects(count: int, seed: int) -> dict[str, object]:
    """So many requests whose clients leave at random; what was held before and after."""
    command = [sys.executable, "-m", "motley", "serve", MODEL, "--port", "0", *SHAPE]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout
        async with asyncio.timeout(READY_S):
            while not (ready := re.search(rb"ready: (\S+)", await process.stdout.readline())):
                pass
        served = Served(process, ready.group(1).decode())
        return await _leave(served, count, random.Random(seed))
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def _leave(served: Served, count: int, chance: random.Random) -> dict[str, object]:
    clients = min(MOST_CLIENTS, count // 8)
    await _visits(served.url, clients, [WARM_S] * 2 * clients)
    before = await _settled(served, lambda held: not held.in_flight)
    finished = await _visits(served.url, clients, [chance.uniform(0, STAY_S) for _ in range(count)])
    after = await _settled(served, lambda held: not _leaks(before, held))
    leaked = _leaks(before, after)
    return {
        "requests": count,
        "left before the end": count - finished,
        "leaked": leaked,
        "free blocks": sum(after.blocks.values()),
        "file descriptors": sum(after.descriptors.values()),
        "tasks": sum(after.tasks.values()),
        "threads": sum(after.threads.values()),
        "holds": not leaked,
    }


async def _visits(url: str, clients: int, stays: list[float]) -> int:
    """One request for each stay, so many at once; how many were complete in time."""
    numbers = iter(range(len(stays)))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> int:
            return sum([await _visit(session, url, number, stays[number]) for number in numbers])

        return sum(await asyncio.gather(*(client() for _ in range(clients))))


async def _visit(session: aiohttp.ClientSession, url: str, number: int, stay: float) -> bool:
    """Ask and leave after `stay` seconds; True if the answer was complete before that."""
    body = {
        "model": "fake",
        "prompt": f"{number} asks " * (1 + number % 50),
        "max_tokens": 60,
        "stream": True,
    }
    data = json.dumps(body)
    headers = {"Content-Type": "application/json"}
    try:
        async with asyncio.timeout(stay):
            async with session.post(f"{url}/v1/completions", data=data, headers=headers) as reply:
                return (await reply.content.read()).endswith(b"[DONE]\n\n")
    except TimeoutError:
        return False


async def _settled(served: Served, done: Callable[[Holdings], bool]) -> Holdings:
    """What is held once everything has had time to end."""
    await asyncio.sleep(REST_S)
    for _ in range(round(SETTLE_S / LOOK_S)):
        await asyncio.sleep(LOOK_S)
        held = await served.holdings()
        if done(held):
            break
    return held


def _leaks(before: Holdings, after: Holdings) -> dict[str, float]:
    """What is held now and was not before, by kind; fewer blocks are free, more of the rest.

    Threads are no leak: a process makes those of its pool, 4 more than its cores, one by one.
    """
    differences = {
        "blocks": sum(before.blocks.values()) - sum(after.blocks.values()),
        "tasks": sum(after.tasks.values()) - sum(before.tasks.values()),
        "file descriptors": sum(after.descriptors.values()) - sum(before.descriptors.values()),
        "in flight": after.in_flight,
    }
    return {kind: number for kind, number in differences.items() if number > 0}
