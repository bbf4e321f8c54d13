"""A cluster to be hurt: the router in this process, so that its state is seen; workers outside.

Requests still come over HTTP and workers are processes on sockets; what is special is only that the
moment of a blow can be chosen by the phase that a request is in.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from chaos_history import History, WatchedMembers, request_of

from scheduler.lifecycle import Phase
from scheduler.messages import Outputs, Role
from scheduler.transport import listen
from serving.app import App, serve
from serving.gateway import Gateway
from serving.metrics import Metrics
from serving.openai.limits import HttpLimits
from serving.placing import RoutingOptions

if TYPE_CHECKING:
    import random
    import signal
    from collections.abc import AsyncIterator, Callable

    from scheduler.lifecycle import Attempt
    from scheduler.messages import Wire
    from serving.members import Member

Found = TypeVar("Found")
SECRET = "of the chaos bench"
JOIN_S = 120.0
PHASES = {
    "prefill": Phase.PREFILLING,
    "transfer": Phase.STAGED,
    "decode": Phase.DECODING,
}


@dataclass(frozen=True)
class Blow:
    """What was done to a worker, and to whose requests."""

    kind: str
    worker: str
    time: float
    requests: frozenset[str]  # names of those that had something there
    patience: float  # how long the worker might be silent


class Nursery:
    """Starts workers; see chaos_nursery."""

    def __init__(self, log: Path) -> None:
        self._one_by_one = asyncio.Lock()
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("chaos_nursery.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "MOTLEY_SECRET": SECRET},
        )

    async def bear(self, arguments: list[str]) -> int:
        """A new worker's process id."""
        async with self._one_by_one:
            return await asyncio.to_thread(self._bear, json.dumps(arguments).encode())

    def _bear(self, line: bytes) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it, and with it every worker."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe:
                pipe.close()


class Cluster:
    """Router and workers. `shape` gives each worker its role."""

    def __init__(self, model: str, arguments: tuple[str, ...], nursery: Nursery) -> None:
        self.history = History(asyncio.get_running_loop().time)
        self.members = WatchedMembers(self.history)
        # A policy that splits every request: each kind of blow finds its moment.
        self.gateway = Gateway(self.members, routing=RoutingOptions("least-load"))
        self.url = ""
        self._model = model
        self._arguments = arguments
        self._nursery = nursery
        self._port = 0
        self._roles: dict[str, Role] = {}
        self._staged: asyncio.Future[Attempt] | None = None
        self._hear = self.members.on_message
        self.members.on_message = self._on_message

    async def start(self, stack: AsyncExitStack, shape: dict[Role, int]) -> None:
        inside = listen("127.0.0.1", 0, SECRET.encode(), self.members.serve)
        _, self._port = await stack.enter_async_context(inside)
        app = App(self.gateway, Metrics(), HttpLimits())
        host, port = await stack.enter_async_context(serve(app, "127.0.0.1", 0))
        self.url = f"http://{host}:{port}"
        for role, count in shape.items():
            for number in range(count):
                self._roles[f"{role}-{number}"] = role
        await asyncio.gather(*map(self.revive, self._roles))

    async def revive(self, name: str) -> None:
        """Start this worker, once its former self is gone, and wait until it has joined."""
        await until(lambda: self.members.get(name) is None)
        common = ["--listen", "127.0.0.1", "--join", f"127.0.0.1:{self._port}"]
        role = ["--role", str(self._roles[name]), "--name", name]
        await self._nursery.bear([self._model, *common, *role, *self._arguments])
        async with asyncio.timeout(JOIN_S):
            await self.members.joined(name)

    def lenders(self) -> list[Member]:
        """Decode workers that keep blocks for a prompt which is computed elsewhere."""
        members = self.members.of()
        return [m for m in members if held(m) and m.load and not m.load.running + m.load.waiting]

    async def strike(self, kind: str, number: signal.Signals, chance: random.Random) -> Blow:
        """Send a signal to a worker of a request that is in the phase named `kind`."""
        if kind == "transfer":
            self._staged = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(JOIN_S):
                return await self._on_staged(number, chance)
        await asyncio.sleep(chance.uniform(0, 0.1))
        candidates = await until(lambda: self._attempts(PHASES[kind]))
        attempt = chance.choice(candidates)
        victim = attempt.prefill if kind == "prefill" else attempt.decode
        return self._hit(kind, victim, number)

    async def _on_staged(self, number: signal.Signals, chance: random.Random) -> Blow:
        assert self._staged
        attempt = await self._staged
        return self._hit("transfer", chance.choice([attempt.prefill, attempt.decode]), number)

    def _hit(self, kind: str, name: str, number: signal.Signals) -> Blow:
        member = self.members.get(name)
        assert member, "whoever holds something is here"
        os.kill(member.join.pid, number)
        held = {
            request_of(live.generation.job.id)
            for live in self.gateway._live.values()
            if any(name in attempt.workers for attempt in live.generation.attempts.values())
        }
        now = asyncio.get_running_loop().time()
        self.history.struck(frozenset(held), f"{name} gets {number.name}")
        return Blow(kind, name, now, frozenset(held), member.record.suspicion.patience)

    def _attempts(self, phase: Phase) -> list[Attempt]:
        return [
            attempt
            for live in self.gateway._live.values()
            for attempt in live.generation.attempts.values()
            if attempt.phase is phase and self.members.get(attempt.owner or "")
        ]

    def _on_message(self, worker: str, message: Wire) -> None:
        self.history.heard(worker, message)
        self._hear(worker, message)
        if isinstance(message, Outputs) and self._staged and not self._staged.done():
            for attempt in self._attempts(Phase.STAGED)[:1]:
                self._staged.set_result(attempt)


def held(member: Member) -> int:
    """Blocks of KV cache, by its last heartbeat."""
    return member.join.kv_blocks - member.load.free_blocks if member.load else 0


async def until(condition: Callable[[], Found]) -> Found:
    """What the condition gives once it gives something: for what no event tells of."""
    while True:
        if found := condition():
            return found
        await asyncio.sleep(0.001)


@asynccontextmanager
async def cluster(
    model: str, shape: dict[Role, int], log: Path, *arguments: str
) -> AsyncIterator[Cluster]:
    """A running cluster; at the end nothing of it is left."""
    nursery = Nursery(log)
    try:
        async with AsyncExitStack() as stack:
            it = Cluster(model, arguments, nursery)
            await it.start(stack, shape)
            yield it
    finally:
        nursery.close()
