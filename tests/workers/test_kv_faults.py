"""Faults between two workers in the middle of a hand-over: never a wrong token, never a hang.

`FaultyWire` stands between them and does to one frame, or to one slot of the memory that they
share, what a network, or a machine that dies, does. What must notice each fault is in CAUGHT.
"""

from __future__ import annotations

import asyncio
import enum
import random
import struct
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import msgspec
import pytest

from scheduler.errors import HandoffFailed, ProtocolError
from scheduler.messages import (
    Address,
    Again,
    Anything,
    Commit,
    Committed,
    FirstToken,
    KvBlocks,
    Peer,
    Reserve,
    Reserved,
    Taken,
)
from scheduler.transport import listen
from workers import kv_wire
from workers.engine_loop import EngineLoop
from workers.kv_memory import PeerMemory
from workers.kv_receive import KvReceiver
from workers.kv_send import KvSender
from workers.kv_wire import Limits

pytestmark = [pytest.mark.asyncio, pytest.mark.filterwarnings("ignore::ResourceWarning")]

SECRET = b"of this test"
PROMPT = list(b"many a prompt is longer than one block of a cache")
PREFIX = struct.Struct("!4sIQ")
PATIENT_S = 30.0
HASTY_S = 0.3  # where a limit is what notices it; more if the machine is so busy that it came first
TIMES, AT_ONCE = 100, 20
CHUNK_BYTES = 256  # so that every prompt has four chunks at least
WORDS = (Reserve, Reserved, KvBlocks, Commit, Committed)


class By(enum.Enum):
    """What notices a fault."""

    END = "the connection's end"
    LIMIT = "a limit of time"
    SEAL = "the seal of a Reserve or a Commit"
    CHECKSUM = "a chunk's checksum"
    MISSING = "the receiver, who knows what is missing"
    NOBODY = "nobody: it does no harm"
    ANY = "any of them"


CAUGHT = {
    ("drop", Reserve): By.LIMIT,
    ("drop", Reserved): By.LIMIT,
    ("drop", KvBlocks): By.MISSING,
    ("drop", Commit): By.LIMIT,
    ("drop", Committed): By.LIMIT,
    **{("truncate", word): By.END for word in WORDS},
    ("flip", Reserve): By.SEAL,
    ("flip", KvBlocks): By.CHECKSUM,
    ("flip", Commit): By.SEAL,
    ("reorder", KvBlocks): By.NOBODY,  # with the next chunk: each has its own place
    ("reorder", Commit): By.MISSING,  # with the chunk before it
    **{("gone", word): By.END for word in WORDS},
    **{("garble", word): By.ANY for word in (*WORDS, Taken)},
    # In shared memory, of which the connection knows nothing:
    ("memory drop", KvBlocks): By.CHECKSUM,
    ("memory truncate", KvBlocks): By.CHECKSUM,
    ("memory flip", KvBlocks): By.CHECKSUM,
    ("memory reorder", KvBlocks): By.CHECKSUM,
}


class FaultyWire:
    """Passes frames on between a dialler and a listener, and does `fault` to one such `word`."""

    def __init__(self, fault: str, word: type, seed: int, target: tuple[str, int]) -> None:
        self.fault, self.word, self.target = fault, word, target
        self.done = False
        self.asked: list[Again] = []  # what the receiver asked for again
        self._chance = random.Random(seed)
        self._skip = self._chance.randrange(3) if word is KvBlocks else 0  # of the first chunks
        self._late = b""
        self._memory: PeerMemory | None = None
        self._decoder = msgspec.msgpack.Decoder(Anything)
        self._tasks: list[asyncio.Task] = []

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
            if self._memory:
                self._memory.close()

    async def _accept(self, reader, writer) -> None:
        there, back = await asyncio.open_connection(*self.target)
        ends = (writer, back)
        self._tasks.append(asyncio.current_task())
        try:
            with suppress(asyncio.CancelledError):  # the streams' own callback would log it
                ways = (self._pass(reader, back, ends), self._pass(there, writer, ends))
                await asyncio.gather(*ways)
        finally:
            for end in ends:
                end.transport.abort()

    async def _pass(self, reader, writer, ends) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                prefix = await reader.readexactly(PREFIX.size)
                _, size, payload = PREFIX.unpack(prefix)
                header, payload = await reader.readexactly(size), await reader.readexactly(payload)
                message = self._decoder.decode(header)
                if isinstance(message, Again):
                    self.asked.append(message)
                if isinstance(message, Reserved) and message.memory:
                    self._memory = PeerMemory(message.memory)
                frame = self._harmed(message, prefix, header, payload)
                writer.write(frame)
                if self.done and self.fault in ("truncate", "gone"):
                    break
        for end in ends:  # whoever is gone for one is gone for the other
            with suppress(ConnectionError):
                await end.drain()
            end.close()

    def _harmed(self, message, prefix: bytes, header: bytes, payload: bytes) -> bytes:
        """What is passed on of this frame, now."""
        frame = prefix + header + payload
        if self.done:
            return frame
        if self.fault == "reorder":
            return self._reordered(message, frame)
        if not isinstance(message, self.word) or self._skipped():
            return frame
        if self.fault.startswith("memory "):
            self.done = self._harm_slot(message)
            return frame
        self.done = True
        if self.fault in ("drop", "gone"):
            return b""
        if self.fault == "truncate":
            return frame[: self._chance.randrange(len(frame))]
        if self.fault == "garble":  # one bit of it, wherever
            return self._flipped(frame)
        if payload:
            return prefix + header + self._flipped(payload)
        changed = msgspec.msgpack.encode(self._changed(message))
        return PREFIX.pack(prefix[:4], len(changed), 0) + changed

    def _skipped(self) -> bool:
        self._skip -= 1
        return self._skip >= 0

    def _reordered(self, message, frame: bytes) -> bytes:
        """A chunk is late by one frame: by the next chunk, or by the Commit if that is `word`."""
        if not isinstance(message, KvBlocks | Commit):
            return frame
        late, self._late = self._late, b""
        if late and isinstance(message, self.word):
            self.done = True
            return frame + late
        if isinstance(message, KvBlocks) and (self.word is Commit or not self._skipped()):
            self._late, frame = frame, b""
        return late + frame

    def _flipped(self, data: bytes) -> bytes:
        harmed, bit = bytearray(data), self._chance.randrange(8 * len(data))
        harmed[bit // 8] ^= 1 << bit % 8
        return bytes(harmed)

    def _changed(self, message):
        """The message with one bit of one of its numbers changed, as no parser can notice."""
        if isinstance(message, Commit):
            (first,) = message.firsts
            first = self._with_a_bit_changed(first, FirstToken.__struct_fields__)
            return msgspec.structs.replace(message, firsts=(first,))
        if self._chance.random() < 0.5:
            ids, at = list(message.job.prompt.ids), self._chance.randrange(len(PROMPT))
            ids[at] ^= 1 << self._chance.randrange(7)
            prompt = msgspec.structs.replace(message.job.prompt, ids=ids)
            job = msgspec.structs.replace(message.job, prompt=prompt)
        else:
            job = self._with_a_bit_changed(message.job, ("epoch", "sent", "prompt_index"))
        return msgspec.structs.replace(message, job=job)

    def _with_a_bit_changed(self, struct, names):
        name = self._chance.choice(names)
        value = getattr(struct, name) ^ 1 << self._chance.randrange(7)
        return msgspec.structs.replace(struct, **{name: value})

    def _harm_slot(self, message: KvBlocks) -> bool:
        """Whether anything is changed by it in the slot that this message is about."""
        memory, size = self._memory, 8 * message.layers * message.tokens
        at = [_place(memory, slot) for slot in (message.slot, (message.slot + 1) % memory.slots)]
        mine = memory._map[at[0] : at[0] + size]
        other = memory._map[at[1] : at[1] + size]  # what a late write of another chunk left there
        cut = self._chance.randrange(size)
        harmed = {
            "drop": bytes(size),
            "truncate": mine[:cut] + bytes(size - cut),
            "flip": self._flipped(mine),
            "reorder": other,
        }[self.fault.removeprefix("memory ")]
        memory._map[at[0] : at[0] + size] = harmed
        return harmed != mine


def _place(memory: PeerMemory, slot: int) -> int:
    place, _ = next(memory._pieces(slot, [memoryview(b" ")]))
    return place


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
        pool = self.engine.batcher.pool
        if pool.free < pool.size:  # and perhaps in the middle of a step
            return False
        self.engine.check_integrity()
        return True


@dataclass
class Outcome:
    """Of one hand-over."""

    tokens: dict[int, int] = field(default_factory=dict)
    arrived: bool = False
    injected: bool = False
    refused: str = ""  # what the decode worker found wrong with a word
    cause: BaseException | None = None  # of a hand-over that failed
    damaged: int = 0  # chunks
    asked: list[Again] = field(default_factory=list)

    @property
    def noticed(self) -> By:
        if "damaged on its way" in self.refused:
            return By.SEAL
        if self.cause:
            late = isinstance(self.cause, TimeoutError) or "lease ran out" in str(self.cause)
            assert late or isinstance(self.cause, ConnectionError), self
            return By.LIMIT if late else By.END
        if not self.asked:
            return By.NOBODY
        (again,) = self.asked
        if self.damaged:
            return By.CHECKSUM
        return By.MISSING if again.parts else By.SEAL


async def hand_over(make_engine, until, job, fault: str, word: type, seed: int, share: bool):
    """One hand-over with one fault; raises if anything of it is left.

    Where a limit may come before the fault, it is tried again with a longer one.
    """
    if CAUGHT[fault, word] not in (By.LIMIT, By.ANY):
        return await attempt(make_engine, until, job, fault, word, seed, share, PATIENT_S)
    limit, outcome = HASTY_S, Outcome()
    while not outcome.injected:
        outcome = await attempt(make_engine, until, job, fault, word, seed, share, limit)
        limit *= 3
    return outcome


async def attempt(
    make_engine, until, job, fault: str, word: type, seed: int, share: bool, limit: float
):
    outcome = Outcome()
    prefill, decode = Side(make_engine(max_step_tokens=20)), Side(make_engine())
    receiver = KvReceiver("model", decode.engine.runner.cache, decode.loop)
    limits = Limits(reserve_s=limit, lease_s=limit, push_s=limit, early_bytes=1, share=share)
    sender = KvSender("p", "model", prefill.engine.runner.cache, SECRET, limits)

    async def serve(connection) -> None:
        try:
            await receiver.serve(connection)
        except ProtocolError as error:
            outcome.refused = str(error)
            raise

    async with AsyncExitStack() as stack:
        for side in (prefill, decode):
            task = asyncio.create_task(side.loop.run())
            stack.push_async_callback(asyncio.gather, task, return_exceptions=True)
            stack.callback(task.cancel)
        bound = await stack.enter_async_context(listen("127.0.0.1", 0, SECRET, serve))
        wire = FaultyWire(fault, word, seed, bound)
        peer = Peer("d", Address(*await stack.enter_async_context(wire.standing())))
        stack.callback(sender.close)
        try:
            async with sender.reserve(job, peer) as lease:
                await lease.push(prefill.loop.prefill(job, PROMPT, lease.watch))
            await decode.finished.wait()
            outcome.arrived = True
        except HandoffFailed as error:
            outcome.cause = error.__cause__
            decode.loop.cancel((job.id, job.epoch))  # as the router does, which then replays
        finally:
            prefill.loop.release((job.id, job.epoch))
        await until(lambda: prefill.clean() and decode.clean())
    outcome.tokens = prefill.tokens | decode.tokens
    outcome.injected, outcome.asked, outcome.damaged = wire.done, wire.asked, receiver.damaged
    return outcome


def cases(fault: str, share: bool) -> list[tuple[str, type]]:
    """What this fault can be done to, each as often as the others."""
    words = [key for key in CAUGHT if key[0] == fault and (share or key[1] is not Taken)]
    if not share or fault in ("gone", "garble"):
        return words
    return [key for key in CAUGHT if key[0] == f"memory {fault}"] + [
        key for key in words if key[1] is not KvBlocks
    ]


@pytest.mark.parametrize("share", [False, True], ids=["network", "shared memory"])
@pytest.mark.parametrize("fault", ["drop", "truncate", "flip", "reorder", "gone", "garble"])
async def test_every_fault_is_noticed_by_what_is_meant_for_it_and_no_token_is_wrong(
    make_engine, make_job, until, monkeypatch, fault, share
):
    monkeypatch.setattr(kv_wire, "CHUNK_BYTES", CHUNK_BYTES)
    job = make_job(ids=PROMPT, max_tokens=8, ignore_eos=True)
    right = tokens_of(make_engine(), job)
    possible = cases(fault, share)
    for start in range(0, TIMES, AT_ONCE):
        seeds = range(start, start + AT_ONCE)
        chosen = [possible[seed % len(possible)] for seed in seeds]
        async with asyncio.timeout(25):
            outcomes = await asyncio.gather(
                *(
                    hand_over(make_engine, until, job, *case, seed, share)
                    for case, seed in zip(chosen, seeds, strict=True)
                )
            )
        for case, seed, outcome in zip(chosen, seeds, outcomes, strict=True):
            expected = CAUGHT[case]
            told = f"{case}, seed {seed}: {outcome}"
            assert outcome.injected, told
            assert outcome.tokens.items() <= right.items(), told
            assert not outcome.arrived or outcome.tokens == right, told
            if expected is not By.ANY:
                assert outcome.noticed is expected, told
                fatal = expected in (By.END, By.LIMIT) or case[1] is Reserve
                assert outcome.arrived is not fatal, told


def tokens_of(engine, job) -> dict[int, int]:
    engine.add(job, PROMPT)
    tokens: dict[int, int] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            tokens |= dict(enumerate(output.ids, output.position))
    return tokens
