"""Who is in the cluster: one connection per worker, kept by heartbeats.

Workers join by themselves, wherever they were started. A connection that ends, or is silent for
longer than `scheduler.suspicion` allows, means that the worker is lost; it may come back under its
name at any time, and what was learned of that name (how regularly it speaks, how often it failed)
is remembered.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scheduler import cost
from scheduler.admission import objection, remark
from scheduler.breaker import Breaker, State
from scheduler.errors import ProtocolError
from scheduler.fleet import Fleet, Worker
from scheduler.messages import Address, Join, Joined, Leaving, Load, Peer, Refused, ToRouter, Wire
from scheduler.models import BLOCK_TOKENS
from scheduler.routing import Route
from scheduler.suspicion import LOOK_S, STUCK_S, STUCK_STEPS, Progress, Suspicion

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.shares import Allowance
    from scheduler.transport import Connection
    from serving.live_plan import LivePlan

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.25
LISTEN_S = 2.5 * HEARTBEAT_S  # who lives is heard by then
REMEMBER_S = 600.0  # what is known of a worker that left


@dataclass(slots=True)
class Record:
    """What a worker's past says of it; it outlives a connection."""

    model: str
    suspicion: Suspicion = field(default_factory=Suspicion)
    breaker: Breaker = field(default_factory=Breaker)
    left: float = 0.0  # when it was last lost


@dataclass(eq=False, slots=True)
class Member:
    """One worker, as the router sees it."""

    join: Join
    worker: Worker  # as routing sees it
    connection: Connection
    since: float  # Unix seconds
    record: Record
    load: Load | None = None
    progress: Progress = field(default_factory=Progress)


class Members:
    """The workers that are here now. `on_message` and `on_lost` are told what happens."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, plan: LivePlan | None = None
    ) -> None:
        self.on_message: Callable[[str, Wire], None] = lambda worker, message: None
        self.on_lost: Callable[[str], None] = lambda worker: None
        self.lost = 0
        self.revision = 0  # grows whenever a worker comes or goes
        self.router = secrets.token_hex(4)  # this router's id: several may share their workers
        self.clock = clock
        self._plan = plan
        self._members: dict[str, Member] = {}
        self._records: dict[str, Record] = {}
        self._fleets: dict[str, Fleet] = {}
        self._changed = asyncio.Condition()

    def of(self, model: str | None = None) -> list[Member]:
        """The members that serve this model, or all."""
        members = self._members.values()
        return [m for m in members if model is None or m.join.model == model]

    def get(self, name: str) -> Member | None:
        return self._members.get(name)

    def remembers(self, model: str) -> bool:
        """A worker of this model was here not long ago."""
        return any(record.model == model for record in self._records.values())

    def fleet(self, model: str) -> Fleet:
        """This model's workers, as routing sees them. The same object for as long as we live."""
        return self._fleets.setdefault(model, Fleet())

    def route(self, prefill: str, decode: str) -> Route:
        """These two were chosen: how the one reaches the other."""
        for name in {prefill, decode}:
            self._members[name].record.breaker.tried(self.clock())
        if prefill == decode:
            return Route(prefill)
        address = self._reachable(self._members[prefill], self._members[decode])
        return Route(prefill, Peer(decode, address))

    def praise(self, *workers: str) -> None:
        """They did what they were asked."""
        for member in filter(None, map(self.get, workers)):
            member.record.breaker.succeeded()

    def blame(self, *workers: str) -> None:
        """They failed. Whoever does so again and again is spared for a while."""
        for member in filter(None, map(self.get, workers)):
            member.record.breaker.failed(self.clock())

    def ended(self, *workers: str) -> None:
        """What they were asked is over, well or badly."""
        for member in filter(None, map(self.get, workers)):
            member.record.breaker.untried()

    def spared(self, member: Member) -> bool:
        """It kept failing: its circuit breaker is open, or half open."""
        return member.record.breaker.state(self.clock()) is not State.CLOSED

    def post(self, worker: str, message: Wire) -> None:
        """Send in order, without waiting. A worker that is gone needs no message."""
        if member := self._members.get(worker):
            member.connection.post(message)

    async def changed(self) -> None:
        """Wait until a worker joins."""
        async with self._changed:
            await self._changed.wait()

    async def joined(self, name: str) -> None:
        """Wait until this worker is here."""
        while name not in self._members:
            await self.changed()

    async def serve(self, connection: Connection) -> None:
        """One worker's membership: for `transport.listen`."""
        async with asyncio.timeout(10):
            join = await connection.expect(Join)
        others = [m.join for m in self.of(join.model) if m.join.name != join.name]
        if reason := objection(join, others) or await self._name_taken(join):
            await connection.send(Refused(reason))
            raise ProtocolError(f"worker {join.name} may not join: {reason}")
        connection.hears(ToRouter)
        record = self._recall(join)
        allowance = self._plan.allowance(join) if self._plan else None
        worker = _worker(join, record, allowance)
        member = Member(join, worker, connection, since=time.time(), record=record)
        watch: asyncio.Task[None] | None = None
        try:
            await connection.send(Joined(HEARTBEAT_S, self.router))
            if old := self._members.get(join.name):
                self._remove(old)  # it came back before we noticed that it was gone
            self._members[join.name] = member
            self.revision += 1
            self.fleet(join.model).add(member.worker)
            logger.info("worker %s joined: %s, %s", join.name, join.model, join.role)
            if said := remark(join, others):
                logger.warning("worker %s: %s", join.name, said)
            async with self._changed:
                self._changed.notify_all()
            watch = asyncio.create_task(self._watch(member))
            await self._read(member)
        finally:
            if watch:
                watch.cancel()
            self._remove(member)

    async def _name_taken(self, join: Join) -> str | None:
        """Why this worker may not have its name, or None.

        Whoever is still heard keeps it: two workers of one name would evict each other for ever.
        A worker that comes back before its loss was noticed is the same, or its former self is
        silent.
        """
        old = self.get(join.name)
        if old is None or (old.join.pid, old.join.address) == (join.pid, join.address):
            return None
        heard = old.connection.bytes_read
        await asyncio.sleep(LISTEN_S)
        if self.get(join.name) is not old or old.connection.bytes_read == heard:
            return None
        return f"a worker called {join.name} is here already. Start it with another --name."

    def _recall(self, join: Join) -> Record:
        """The record of this name; those of workers that are gone for good are forgotten."""
        now = self.clock()
        for other in [n for n, r in self._records.items() if n not in self._members]:
            if now - self._records[other].left > REMEMBER_S:
                del self._records[other]
        record = self._records.setdefault(join.name, Record(join.model))
        record.model = join.model
        record.suspicion.silence = 0.0
        return record

    async def _read(self, member: Member) -> None:
        while True:
            message, _ = await member.connection.receive()
            if isinstance(message, Load):
                self._report(member, message)
            elif isinstance(message, Leaving):
                member.worker.draining = True
            else:
                self.on_message(member.join.name, message)

    def _report(self, member: Member, load: Load) -> None:
        member.load, worker = load, member.worker
        worker.report(load, self.clock())
        still = member.progress.report(load.steps, busy=load.running > 0, now=self.clock())
        if still > max(STUCK_S, STUCK_STEPS * worker.token_s * worker.step_tokens):
            logger.warning("worker %s has taken no step for %.0f s", member.join.name, still)
            self._remove(member)

    async def _watch(self, member: Member) -> None:
        """Bytes are signs of life: a long message on a slow link is one."""
        suspicion, connection = member.record.suspicion, member.connection
        heard, looked = connection.bytes_read, self.clock()
        while True:
            await asyncio.sleep(LOOK_S)
            before, looked = looked, self.clock()
            patience = suspicion.patience
            if suspicion.look(heard=connection.bytes_read > heard, elapsed=looked - before):
                logger.warning("worker %s is silent for %.1f s", member.join.name, patience)
                self._remove(member)
                return
            heard = connection.bytes_read

    def _remove(self, member: Member) -> None:
        member.connection.close()
        if self._members.get(member.join.name) is member:
            if not member.worker.draining:
                self.blame(member.join.name)
            member.record.left = self.clock()
            del self._members[member.join.name]
            self.revision += 1
            self.fleet(member.join.model).remove(member.join.name)
            self.lost += 1
            logger.info("worker %s left", member.join.name)
            self.on_lost(member.join.name)

    @staticmethod
    def _reachable(sender: Member, receiver: Member) -> Address:
        """Where `sender` finds `receiver`.

        A worker beside the router may be known by a loopback address only; to a sender elsewhere
        its host is the router's, at the address that the sender itself uses for the router.
        """
        address = receiver.join.address
        beside_us = _is_loopback(address.host)
        if beside_us and not _is_loopback(sender.connection.remote[0]):
            return Address(sender.connection.local[0], address.port)
        return address


def _worker(join: Join, record: Record, allowance: Allowance | None) -> Worker:
    """It is unsound while it keeps failing, or is suspiciously silent."""
    return Worker(
        name=join.name,
        role=join.role,
        address=join.address,
        cost=cost.of_rates(join.rates),
        kv_tokens=join.kv_blocks * BLOCK_TOKENS,
        overlaps=True,
        allowance=allowance,
        sound=lambda now: record.breaker.allows(now) and not record.suspicion.doubtful,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
