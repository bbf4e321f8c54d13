"""A whole cluster in one process: members, gateway and fake workers over loopback sockets."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest

from scheduler.messages import Address, Rates, Role
from scheduler.request import Limits, Prompt, Sampling
from scheduler.transport import listen
from serving.ask import Ask
from serving.gateway import Gateway
from serving.members import Members
from serving.placing import RoutingOptions
from workers.service import WorkerConfig, WorkerService

SECRET = b"of this test"


def make_ask(
    *prompts: str,
    id: str = "ask",  # noqa: A002  # the field's name
    model: str = "fake",
    n: int = 1,
    grammar=None,
    **fields,
) -> Ask:
    return Ask(
        id=id,
        model=model,
        prompts=tuple(Prompt(text=text) for text in prompts or ("once upon a time there was",)),
        sampling=Sampling(seed=fields.pop("seed", 7), logprobs=fields.pop("logprobs", None)),
        limits=Limits(**fields),
        n=n,
        created=0.0,
        grammar=grammar,
    )


@dataclass
class Worker:
    service: WorkerService
    engine: object
    task: asyncio.Task


class Cluster:
    """The router's side, and workers that come and go."""

    def __init__(self, make_engine, until, clock, routing, plan) -> None:
        self.members = Members(clock, plan)
        self.gateway = Gateway(self.members, frozenset({"fake"}), routing)
        self.workers: dict[str, Worker] = {}
        self.port = 0
        self.also: tuple[Address, ...] = ()  # routers that new workers join besides this one
        self._make_engine = make_engine
        self._until = until

    def start(
        self,
        name: str,
        role: Role,
        *,
        model="fake",
        secret=SECRET,
        fingerprint=None,
        kind="",
        **engine,
    ) -> Worker:
        """A worker that joins by itself; `joined` waits for it."""
        made = self._make_engine(**engine)
        made.text.fingerprint = fingerprint or made.text.fingerprint
        routers = (Address("127.0.0.1", self.port), *self.also)
        config = WorkerConfig(name, model, role, routers, secret, "127.0.0.1", kind=kind)
        service = WorkerService(config, made, Rates(1e6, 1e-4))
        self.workers[name] = Worker(service, made, asyncio.create_task(service.run()))
        return self.workers[name]

    async def join(self, name: str, role: Role, **engine) -> Worker:
        worker = self.start(name, role, **engine)
        await self.joined(name)
        return worker

    async def joined(self, name: str) -> None:
        await self._until(lambda: self.members.get(name) or self.workers[name].task.done())
        assert self.members.get(name), self.workers[name].task.exception()

    async def kill(self, name: str) -> None:
        """All its sockets close at once, as when its process dies."""
        worker = self.workers.pop(name)
        worker.task.cancel()
        with suppress(asyncio.CancelledError):
            await worker.task
        await self._until(lambda: self.members.get(name) is None)

    def cut(self, name: str) -> None:
        """Only its connection to the router breaks; it will be back."""
        self.members.get(name).connection.close()

    async def text(self, ask: Ask) -> dict[int, str]:
        """The whole answer, by choice."""
        found: dict[int, str] = {}
        async with self.gateway.open(ask) as stream:
            async for delta in self.each(stream):
                found[delta.index] = found.get(delta.index, "") + delta.text
        return found

    @staticmethod
    async def each(stream):
        """Its deltas, one by one: it waits while each is used."""
        taken = []

        def take(delta):
            taken.append(delta)
            return False

        while not await stream.pour(take):
            yield taken.pop()

    async def idle(self) -> None:
        """Nobody holds anything."""
        for worker in self.workers.values():
            batcher = worker.engine.batcher
            await self._until(lambda e=worker.engine: not e.keys)
            worker.engine.check_integrity()
            assert batcher.pool.free == batcher.pool.size
        for member in self.members.of():
            assert member.worker.idle, member.worker


@pytest.fixture
def cluster(make_engine, until):
    """`async with cluster("p", "d") as it`: roles by first letter. Leaks fail at the end.

    Least load, unless told otherwise: it hands over whenever there is a prefill worker.
    """
    roles = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}

    @asynccontextmanager
    async def start(
        *names: str,
        clock=time.monotonic,
        policy="least-load",
        routing=None,
        live_plan=None,
        **engine,
    ):
        tasks, descriptors = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
        it = Cluster(make_engine, until, clock, routing or RoutingOptions(policy), live_plan)
        async with listen("127.0.0.1", 0, SECRET, it.members.serve) as (_, it.port):
            try:
                for name in names:
                    await it.join(name, roles[name[0]], **engine)
                yield it
                await it.idle()
            finally:
                for name in list(it.workers):
                    worker = it.workers.pop(name)
                    worker.task.cancel()
                    await asyncio.gather(worker.task, return_exceptions=True)
        await until(lambda: len(asyncio.all_tasks()) == tasks)
        await until(lambda: len(os.listdir("/proc/self/fd")) == descriptors)

    return start


@pytest.fixture(scope="session", name="make_ask")
def make_ask_fixture():
    """`make_ask("prompt", …, n=2, max_tokens=5)` -> Ask."""
    return make_ask
