"""The router process: HTTP in front, the cluster port behind, local workers if asked for."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from scheduler.messages import Address
from scheduler.transport import listen
from serving.app import App, serve
from serving.cluster_metrics import ClusterCollector
from serving.deploy.local import LocalDeployment, WorkerSpec
from serving.deploy.planned import Wanted
from serving.gateway import Gateway
from serving.live_plan import LivePlan
from serving.members import Members
from serving.metrics import Metrics
from serving.openai.limits import HttpLimits
from serving.placing import RoutingOptions
from serving.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from typing import Any

    from scheduler.messages import Join, Role
    from scheduler.plan_file import PlanFile

logger = logging.getLogger(__name__)

GC_AFTER = 20_000  # more objects made than dropped: the router's garbage is seldom a cycle


@dataclass(frozen=True, slots=True)
class LocalWorkers:
    """The workers to start beside the router: so many of each role for each (name, location).

    And those of a plan, `planned`.
    """

    models: tuple[tuple[str, str], ...]
    counts: dict[Role, int]
    threads: int  # compute threads of each worker, or of each rank of one
    arguments: tuple[str, ...]  # further ones of `motley worker`
    ranks: int = 1  # processes that together are one worker
    caps: tuple[int, ...] = ()  # bytes of memory of each rank; empty: no cap
    planned: tuple[Wanted, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """Of the models."""
        return frozenset(wanted.model[0] for wanted in self._wanted())

    def _wanted(self) -> Iterator[Wanted]:
        yield from self.planned
        for model in self.models:
            prefix = f"{model[0]}-" if len(self.models) > 1 else ""
            for role, count in self.counts.items():
                yield Wanted(f"{prefix}{role}", model, role, count, ranks=self.ranks)

    def specs(self, cluster: Address, others: Sequence[Address] = ()) -> list[WorkerSpec]:
        """One spec a process; `cluster` and `others` are where the routers listen for workers."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(cluster.host, cluster.host)
        routers = ",".join(f"{host}:{each.port}" for each in (cluster, *others))
        common = ("--child", "--threads", str(self.threads), *self.arguments)
        join = ("--join", routers, "--listen", cluster.host)
        specs: list[WorkerSpec] = []
        for wanted in self._wanted():
            own = ("=".join(wanted.model), *common)
            kind = ("--kind", wanted.kind) if wanted.kind else ()
            for number in range(wanted.replicas):
                name = f"{wanted.name}-{number}"
                first, ranks = self._ranks(name, own, wanted.ranks)
                arguments = ("--role", wanted.role, "--name", name, *kind, *join, *first)
                specs += [WorkerSpec(name, (*own, *arguments)), *ranks]
        return specs

    def _ranks(
        self, name: str, own: tuple[str, ...], count: int
    ) -> tuple[tuple[str, ...], list[WorkerSpec]]:
        """What a group's first rank is told beside what every worker is, and its other ranks."""
        if count == 1 and not self.caps:
            return (), []
        address = f"127.0.0.1:{_free_port()}"
        # Processes of one machine that may hold as much are alike: there is nothing to measure.
        weight = () if len(set(self.caps)) > 1 else ("--weight", "1")
        caps = [("--memory-cap", f"{cap / 1e6}MB") for cap in self.caps]
        first = ("--rank", "0", "--ranks", str(count), "--group-listen", address)
        join = ("--listen", "127.0.0.1", "--join", address, "--group", name)
        others: list[WorkerSpec] = []
        for number in range(1, count):
            rank, cap = f"{name}-rank-{number}", caps[number] if caps else ()
            others.append(
                WorkerSpec(rank, (*own, "--name", rank, *join, *weight, *cap), joins=False)
            )
        return ("--group", name, *first, *weight, *(caps[0] if caps else ())), others


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What one router process needs to know."""

    http: Address
    cluster: Address  # where workers join
    secret: str
    workers: LocalWorkers
    routing: RoutingOptions = field(default_factory=RoutingOptions)
    plan: PlanFile | None = None  # whose prices and shares routing carries out
    drain_s: float = 30.0  # what requests in flight have at the end
    others: tuple[Address, ...] = ()  # where workers join the other routers of this port
    siblings: tuple[WorkerSpec, ...] = ()  # these routers, if this process starts them
    endpoints: tuple[str, ...] = ()  # URLs of plain OpenAI servers behind this router
    sibling: bool = False  # started by another one: takes no request before workers are here


async def run_router(
    config: RouterConfig,
    stop: asyncio.Event,
    on_ready: Callable[[tuple[str, int], list[Join]], None],
) -> None:
    """Serve until `stop`; then nothing that this process started is left.

    The end is in order: no new connection, `drain_s` for the requests in flight, then the workers,
    last the port where they joined. `on_ready` is told the HTTP address and who serves, once, when
    every local worker has joined. Raises SetupError if a port is taken or a worker cannot start.
    """
    members = Members(plan=LivePlan(config.plan) if config.plan else None)
    metrics, models = Metrics(), config.workers.names
    gateway = Gateway(members, models, config.routing)
    metrics.registry.register(ClusterCollector(members, gateway))
    secret = config.secret.encode()
    async with AsyncExitStack() as stack:
        bound = await stack.enter_async_context(
            listen(config.cluster.host, config.cluster.port, secret, members.serve)
        )
        specs = config.workers.specs(Address(*bound), config.others)
        tasks: list[asyncio.Task[None]] = []
        stack.push_async_callback(_end, tasks)
        limits, relay = HttpLimits(), None
        if config.endpoints:
            relay = Relay(config.endpoints, gateway, limits, alone=not models)
            metrics.registry.register(relay)
            tasks.append(asyncio.create_task(relay.run()))
        app = App(gateway, metrics, limits, relay)
        while config.sibling and models and not gateway.ready and not stop.is_set():
            await _either(stop, members.changed())
        shared = config.sibling or bool(config.siblings)
        http = await stack.enter_async_context(
            serve(app, config.http.host, config.http.port, drain_s=config.drain_s, shared=shared)
        )

        async def announce() -> None:
            while not all(members.get(spec.name) for spec in specs if spec.joins):
                await members.changed()
            on_ready(http, [member.join for member in members.of()])

        tasks.append(asyncio.create_task(announce()))
        _collect_rarely()
        if specs or config.siblings:
            processes = [*config.siblings, *specs]
            deployment = LocalDeployment(processes, config.secret, members.joined)
            tasks.append(asyncio.create_task(deployment.run()))
        await _until(stop, tasks)
        logger.info(
            "stopping: requests in flight have %g s; a second signal ends at once", config.drain_s
        )


def _collect_rarely() -> None:
    """What is here now stays; thousands of streams are no garbage and need no looking through."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_AFTER, *gc.get_threshold()[1:])


async def _either(stop: asyncio.Event, change: Coroutine[None, None, None]) -> None:
    """Wait for `stop` or for the other."""
    tasks = {asyncio.create_task(stop.wait()), asyncio.create_task(change)}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def several(config: RouterConfig, count: int, arguments: Sequence[str]) -> RouterConfig:
    """The first of `count` routers that share one HTTP port; it starts the others.

    Workers join all of them. The cluster ports follow each other, or are any that are free;
    `arguments` are those of this `motley serve`. An HTTP port of 0 is chosen here.
    """
    http = Address(config.http.host, config.http.port or _free_port())
    host, port = config.cluster.host, config.cluster.port
    others = tuple(
        Address(host, port + number if port else _free_port()) for number in range(1, count)
    )
    siblings = tuple(
        WorkerSpec(
            f"router-{number}",
            (
                *(*arguments, "--sibling", "--routers", "1", "--port", str(http.port)),
                *("--prefill", "0", "--decode", "0", "--mixed", "0"),
                *("--cluster", f"{at.host}:{at.port}"),
            ),
            joins=False,
            command="serve",
        )
        for number, at in enumerate(others, 1)
    )
    return replace(config, http=http, others=others, siblings=siblings)


async def _until(stop: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    """Wait for `stop`, or raise what a task raises."""
    stopping = asyncio.create_task(stop.wait())
    pending: set[asyncio.Task[Any]] = {stopping, *tasks}
    try:
        while stopping in pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        stopping.cancel()


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _free_port() -> int:
    """One that nobody listens on now; a group's ranks must know it before the first is up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
