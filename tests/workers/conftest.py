"""What the workers' tests share: models, two workers with a hand-over between them, groups."""

from __future__ import annotations

import asyncio
import importlib
import threading
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from scheduler.messages import Address, Peer
from scheduler.transport import dial, listen
from workers.engine_loop import EngineLoop
from workers.group.leader import Leader
from workers.group.member import MemberConfig, run_member
from workers.group.part import Means
from workers.group.runner import GroupOptions, GroupRunner
from workers.group.shard_folder import ShardFolder
from workers.kv_receive import KvReceiver
from workers.kv_send import KvSender, Lease
from workers.kv_wire import Limits
from workers.text import Text
from workers.weights.catalogue import resolve
from workers.weights.checkpoint import open_checkpoint

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SECRET = b"of this test"
LIMITS = Limits(early_bytes=1)
PROMPT = list(b"once upon a time there was")
BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="session")
def smollm2_path():
    """The GGUF file of SmolLM2-135M-Instruct; the catalogue fetches it if it is not here yet."""
    return resolve("smollm2-135m-instruct").path


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """The same, opened: reading its vocabulary takes seconds."""
    checkpoint = open_checkpoint(smollm2_path)
    yield checkpoint
    checkpoint.close()


@pytest.fixture(scope="session")
def bench():
    """The commands bench/exact.py and bench/oracle.py as modules: what they check, tests check."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("exact"), importlib.import_module("oracle")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Makes random models: a family and its configuration → (transformers' model, its folder)."""

    def make(family, **config):
        torch.manual_seed(0)
        configuration = getattr(transformers, f"{family}Config")(**(TINY | config))
        model = getattr(transformers, f"{family}ForCausalLM")(configuration).eval()
        for name, weight in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0  # biases and norms too, which begin as 0 and 1
            torch.nn.init.normal_(weight, mean, 0.2)
        folder = tmp_path_factory.mktemp("tiny")
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_model):
    """Makes random Llamas: keywords of LlamaConfig → (transformers' model, our checkpoint)."""

    def make(**config):
        model, folder = tiny_model("Llama", **config)
        return model, open_checkpoint(folder)

    return make


@pytest.fixture(scope="session")
def smollm2_text(smollm2):
    """Its text, in and out."""
    return Text.from_checkpoint(smollm2)


# ── hand-overs ──────────────────────────────────────────────────────────────────────────────────


class Side:
    """An engine in its loop, and what it gave."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.outputs: list = []
        self.loop = EngineLoop(engine, self._on_outputs, self._on_broken)
        self._changed = asyncio.Event()

    async def _on_outputs(self, outputs) -> None:
        self.outputs += outputs
        self._changed.set()

    async def _on_broken(self, key, reason) -> None:
        raise AssertionError(reason)

    async def finished(self) -> None:
        async with asyncio.timeout(10):
            while not (self.outputs and self.outputs[-1].finish):
                await self._changed.wait()
                self._changed.clear()

    async def empty(self) -> None:
        async with asyncio.timeout(10):
            await self.loop.empty.wait()
        self.engine.check_integrity()
        assert self.engine.batcher.pool.free == self.engine.batcher.pool.size


class Link:
    """A prefill worker's engine and sender, and a decode worker's engine and receiver."""

    def __init__(self, prefill: Side, decode: Side, fingerprint: str, limits: Limits) -> None:
        self.prefill, self.decode = prefill, decode
        self.sender = KvSender("p", fingerprint, prefill.engine.runner.cache, SECRET, limits)
        self.receiver = KvReceiver("model", decode.engine.runner.cache, decode.loop)
        self.peer: Peer
        self.connections: list = []

    async def serve(self, connection) -> None:
        self.connections.append(connection)
        await self.receiver.serve(connection)

    async def hand_over(self, job, prompt=PROMPT) -> Lease:
        try:
            async with self.sender.reserve(job, self.peer) as lease:
                await lease.push(self.prefill.loop.prefill(job, prompt, lease.watch))
                return lease
        finally:
            self.prefill.loop.release((job.id, job.epoch))

    async def dial(self):
        return await dial(self.peer.address.host, self.peer.address.port, SECRET)


@pytest.fixture
def linked(make_engine):
    @asynccontextmanager
    async def start(
        fingerprint: str = "model",
        limits=LIMITS,
        decode_blocks=64,
        prefill=None,
        decode=None,
    ):
        here, there = prefill or make_engine(), decode or make_engine(decode_blocks)
        link = Link(Side(here), Side(there), fingerprint, limits)
        async with AsyncExitStack() as stack:
            for side in (link.prefill, link.decode):
                task = asyncio.create_task(side.loop.run())
                stack.push_async_callback(asyncio.gather, task, return_exceptions=True)
                stack.callback(task.cancel)
            bound = await stack.enter_async_context(listen("127.0.0.1", 0, SECRET, link.serve))
            stack.callback(link.sender.close)
            link.peer = Peer("d", Address(*bound))
            yield link
            await link.prefill.empty()
            await link.decode.empty()

    return start


# ── groups ──────────────────────────────────────────────────────────────────────────────────────


class Group:
    """Rank 0's leader, and members that can be ended one by one."""

    def __init__(self, shards):
        self.means = Means(1, ShardFolder(shards, "m"))
        self.leader = Leader("127.0.0.1", 0, SECRET, "m")
        self.stops = {}
        self.threads = []
        self.runners = []

    def config(self, name, weight=1.0, box=None, fetch=False):
        return MemberConfig(
            name=name,
            leader=Address(*self.leader.address),
            secret=SECRET,
            listen_host="127.0.0.1",
            advertise_host="",
            means=replace(self.means, shards=ShardFolder(self.means.shards.path, "m")),
            weight=weight,
            box=box,
            model="m",
            path="",
            fetch=fetch,
            pid=0,
        )

    def join(self, name, *config):
        stop = self.stops[name] = threading.Event()
        thread = threading.Thread(target=run_member, args=(self.config(name, *config), stop))
        thread.start()
        self.threads.append(thread)

    def runner(self, folder, weights=(1.0,), box=None, blocks=12, **options):
        """Of ranks with these weights, rank 0's first."""
        for number, weight in enumerate(weights[1:], 1):
            self.join(f"rank-{number}", weight)
        self.leader.wait_for(len(weights) - 1, 20)
        chosen = {"mode": "exact", "kv_dtype": "float16", "quantize": None} | options
        group_options = GroupOptions(
            path=str(folder),
            kv_blocks=blocks,
            max_rows=64,
            means=self.means,
            weight=weights[0],
            box=box,
            listen_host="127.0.0.1",
            secret=SECRET,
            **chosen,
        )
        self.runners.append(GroupRunner(self.leader, group_options))
        return self.runners[-1]

    def lose(self, name):
        """As if the process had died, and rank 0 had noticed."""
        self.stops[name].set()
        (member,) = [m for m in self.leader.members() if m.hello.name == name]
        member.control.close()
        self.leader.settle([member], epoch=1 << 60, limit_s=20)

    def end(self):
        for runner in self.runners:
            runner.close()
        for stop in self.stops.values():
            stop.set()
        self.leader.close()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def make_group(tmp_path):
    """Makes groups of ranks: real sockets, members as threads."""
    groups = []

    def make():
        groups.append(Group(tmp_path))
        return groups[-1]

    yield make
    for group in groups:
        group.end()
