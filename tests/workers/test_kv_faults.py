"""Faults between two workers in the middle of a hand-over: never a wrong token, never a hang.

`FaultyWire` stands between them and does to one frame what a network, or a machine that dies, does.
"""

from __future__ import annotations

import asyncio
import random
import struct
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

import pytest

from scheduler.errors import HandoffFailed
from scheduler.messages import Address, Peer
from scheduler.transport import listen
from workers.engine_loop import EngineLoop
from workers.kv_receive import KvReceiver
from workers.kv_send import KvSender
from workers.kv_wire import Limits

pytestmark = [pytest.mark.asyncio, pytest.mark.filterwarnings("ignore::ResourceWarning")]

SECRET = b"of this test"
PROMPT = list(b"many a prompt is longer than one block of a cache")
PREFIX = struct.Struct("!4sIQ")
LIMITS = Limits(reserve_s=0.1, lease_s=0.1, push_s=0.1, early_bytes=1)
TIMES = 100
FAULTS = ("drop", "truncate", "flip", "reorder", "gone")


class FaultyWire:
    """Passes frames on between a dialler and a listener, and does `fault` to one of them."""

    def __init__(self, fault: str, chance: random.Random, target: tuple[str, int]) -> None:
        self.fault, self.chance, self.target = fault, chance, target
        self.done = False
        self._tasks: list[asyncio.Task] = []
        # Of those after the handshake: Reserve, Reserved, chunks, Commit, Committed.
        self._backwards = fault != "reorder" and chance.random() < 0.2
        self._turn = chance.randrange(2) if self._backwards else chance.randrange(4)

    @asynccontextmanager
    async def standing(self):
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[:2]
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader, writer) -> None:
        there, back = await asyncio.open_connection(*self.target)
        ends = (writer, back)
        self._tasks.append(asyncio.current_task())
        ways = (self._pass(reader, back, False, ends), self._pass(there, writer, True, ends))
        try:
            with suppress(asyncio.CancelledError):  # the streams' own callback would log it
                await asyncio.gather(*ways)
        finally:
            for end in ends:
                end.transport.abort()

    async def _pass(self, reader, writer, backwards: bool, ends) -> None:
        late, number = b"", -(2 if backwards else 1)  # frames of the handshake
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                prefix = await reader.readexactly(PREFIX.size)
                _, header, payload = PREFIX.unpack(prefix)
                frame = prefix + await reader.readexactly(header + payload)
                if backwards is self._backwards and number == self._turn and not self.done:
                    self.done = True
                    if self.fault == "reorder":
                        late = frame
                        number += 1
                        continue
                    frame = self._harm(frame)
                    if self.fault in ("truncate", "gone"):
                        writer.write(frame)
                        break
                writer.write(frame + late)
                late = b""
                number += 1
        for end in ends:  # whoever is gone for one is gone for the other
            with suppress(ConnectionError):
                await end.drain()
            end.close()

    def _harm(self, frame: bytes) -> bytes:
        if self.fault in ("drop", "gone"):
            return b""
        if self.fault == "truncate":
            return frame[: self.chance.randrange(len(frame))]
        harmed, bit = bytearray(frame), self.chance.randrange(8 * len(frame))
        harmed[bit // 8] ^= 1 << bit % 8
        return bytes(harmed)


class Side:
    """An engine in its loop, and the tokens that it gave."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.tokens: dict[int, int] = {}
        self.finished = asyncio.Event()
        self.loop = EngineLoop(engine, self._on_outputs, self._on_broken)

    async def _on_outputs(self, outputs) -> None:
        for output in outputs:
            self.tokens |= dict(enumerate(output.ids, output.position))
            if output.finish:
                self.finished.set()

    async def _on_broken(self, key, reason) -> None:
        raise AssertionError(reason)

    def clean(self) -> bool:
        self.engine.check_integrity()
        pool = self.engine.batcher.pool
        return pool.free == pool.size


@asynccontextmanager
async def faulty_hand_over(make_engine, wire_fault: str, seed: int):
    """(prefill, decode, wire, peer, sender): two workers, and what stands between them."""
    prefill, decode = Side(make_engine(max_step_tokens=20)), Side(make_engine())
    receiver = KvReceiver("model", decode.engine.runner.cache, decode.loop)
    limits = replace(LIMITS, share=seed % 2 == 0)
    sender = KvSender("p", "model", prefill.engine.runner.cache, SECRET, limits)
    async with AsyncExitStack() as stack:
        for side in (prefill, decode):
            task = asyncio.create_task(side.loop.run())
            stack.push_async_callback(asyncio.gather, task, return_exceptions=True)
            stack.callback(task.cancel)
        bound = await stack.enter_async_context(listen("127.0.0.1", 0, SECRET, receiver.serve))
        wire = FaultyWire(wire_fault, random.Random(seed), bound)
        address = Address(*await stack.enter_async_context(wire.standing()))
        stack.callback(sender.close)
        yield prefill, decode, wire, sender, Peer("d", address)


@pytest.mark.parametrize("fault", FAULTS)
async def test_no_fault_gives_a_wrong_token_or_a_hang(make_engine, make_job, until, fault):
    job = make_job(ids=PROMPT, max_tokens=8, ignore_eos=True)
    right = tokens_of(make_engine(), job)
    arrived = harmed = 0
    for seed in range(TIMES):
        async with (
            asyncio.timeout(10),
            faulty_hand_over(make_engine, fault, seed) as (prefill, decode, wire, sender, peer),
        ):
            try:
                async with sender.reserve(job, peer) as lease:
                    await lease.push(prefill.loop.prefill(job, PROMPT, lease.watch))
                arrived += 1
                await decode.finished.wait()
            except HandoffFailed:
                decode.loop.cancel((job.id, job.epoch))  # as the router does, which then replays
            finally:
                prefill.loop.release((job.id, job.epoch))
            await until(lambda p=prefill, d=decode: p.clean() and d.clean())
            harmed += wire.done
            for token, expected in (prefill.tokens | decode.tokens).items():
                assert right[token] == expected, f"seed {seed}"
    assert harmed == TIMES
    assert arrived >= {"drop": 1, "flip": 1, "reorder": 1}.get(fault, 0)


def tokens_of(engine, job) -> dict[int, int]:
    engine.add(job, PROMPT)
    tokens: dict[int, int] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            tokens |= dict(enumerate(output.ids, output.position))
    return tokens
