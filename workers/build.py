"""From a model's name to everything a worker runs: the one place that chooses the engine."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scheduler.batching import Batcher
from scheduler.blocks import BlockPool, blocks_for
from scheduler.errors import SetupError
from scheduler.pacing import Pace
from workers.allocator import keep_freed_memory
from workers.engine import Engine
from workers.fake import SHAPE, FakeRunner, FakeText, parse_options
from workers.installed import engine_installed
from workers.speculate import MOST_ROWS

if TYPE_CHECKING:
    from scheduler.messages import Address, Rates
    from scheduler.models import ModelShape
    from workers.group.part import Means
    from workers.kv_cache import KvDtype
    from workers.runner import Runner
    from workers.weights.checkpoint import Checkpoint

Mode = Literal["fast", "exact"]
JOIN_S = 120.0  # for the ranks of a group to be there

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """A model by the name that clients use, and where it is: a path, or `fake:…`."""

    name: str
    location: str

    def __str__(self) -> str:
        return f"{self.name}={self.location}"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How much a worker may use."""

    kv_tokens: int
    threads: int
    mode: Mode = "fast"
    kv_dtype: KvDtype = "float16"  # of fast mode
    quantize: Literal["int4", "int8"] | None = None  # of safetensors
    itl_bound_s: float | None = None  # a step beside decodes should not take longer
    speculate: bool = True
    max_step_tokens: int = 512
    max_sequences: int = 64

    @property
    def max_rows(self) -> int:
        """Rows of a step: its tokens, and those that are only guessed."""
        return self.max_step_tokens + MOST_ROWS


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A worker of several ranks, of which this process is the first."""

    listen: Address  # where the others join
    ranks: int  # to begin with
    weight: float | None  # how much this rank computes, relative to the others; None: measured
    means: Means
    secret: bytes
    allreduce: str | None = None  # the way of every sum; None: the fastest, by size
    sums: Literal["float32", "int8"] = "float32"  # int8: where that is faster


def find(text: str) -> Model:
    """Understand a model as the operator wrote it, fetching it if need be.

    `fake` or `fake:step_ms=5` is the worker without a model, `random:SHAPE` one that cannot read;
    for all others see workers.weights.catalogue. Raises SetupError that says what to do.
    """
    name, _, location = text.partition("=")
    if _kind(text) == "fake":
        name, location = "fake", text
    if _kind(location) == "fake":
        parse_options(location.partition(":")[2])
        return Model(name, location)
    with engine_installed():
        from workers.weights.catalogue import resolve
        from workers.weights.random_model import PREFIX
    if text.startswith(PREFIX):
        return Model(text.removeprefix(PREFIX), text)
    source = resolve(text)
    return Model(source.name, str(source.path))


def shape_of(model: Model, options: EngineOptions) -> ModelShape:
    """Without loading it. Raises SetupError that says what to do."""
    if _kind(model.location) == "fake":
        return SHAPE
    with engine_installed():
        from workers.weights.checkpoint import open_checkpoint
    checkpoint = open_checkpoint(Path(model.location), options.quantize)
    try:
        return checkpoint.shape
    finally:
        checkpoint.close()


def build(
    model: Model, options: EngineOptions, group: GroupSpec | None = None
) -> tuple[Engine, Rates]:
    """Load a model and measure it; with `group`, over its ranks once they have joined.

    Raises SetupError that says what to do.
    """
    fake = None
    if _kind(model.location) == "fake":
        fake = parse_options(model.location.partition(":")[2])
        tokens = max(options.max_step_tokens, 2 * fake.sequences)
        options = replace(options, max_sequences=fake.sequences, max_step_tokens=tokens)
    batcher = Batcher(
        BlockPool(blocks_for(options.kv_tokens)),
        max_step_tokens=options.max_step_tokens,
        max_sequences=options.max_sequences,
        pace=Pace(options.itl_bound_s),
    )
    if fake:
        runner = FakeRunner(batcher.pool.size, fake)
        text = FakeText(fake.context, fake.word)
        return Engine(runner, text, batcher, speculate=options.speculate), runner.rates()
    return _native(model, options, batcher, group)


def _kind(location: str) -> str:
    return location.partition(":")[0]


def _native(
    model: Model, options: EngineOptions, batcher: Batcher, group: GroupSpec | None
) -> tuple[Engine, Rates]:
    with engine_installed():
        from workers.measure import measure
        from workers.text import Text
        from workers.weights.checkpoint import open_checkpoint
    started = time.perf_counter()
    checkpoint = open_checkpoint(Path(model.location), options.quantize)
    try:
        text = Text.from_checkpoint(checkpoint)
        mode = _mode(checkpoint.shape, options)
        if mode == "exact" and options.kv_dtype == "int8":
            raise SetupError(
                "an int8 KV cache needs fast mode, and this model runs in exact mode, where the "
                "cache is float32: leave out --kv-dtype, or choose --mode fast if it was not so"
            )
        if group:
            runner = _group_runner(model, options, mode, batcher, group)
        else:
            runner = _runner(checkpoint, options, mode, batcher)
    finally:
        checkpoint.close()
    rates = measure(runner)
    logger.info(
        "%s ready in %.1f s: prefill %.0f tokens/s, decode %.1f ms per token",
        model.name,
        time.perf_counter() - started,
        rates.prefill_tokens_per_s,
        1000 * rates.decode_s_per_token,
    )
    return Engine(runner, text, batcher, speculate=options.speculate), rates


def _mode(shape: ModelShape, options: EngineOptions) -> Mode:
    """The mode that was asked for, or `exact` where `fast` cannot be."""
    from kernels import dispatch
    from workers.fast_model import objection

    if options.mode == "exact" or not dispatch.instruction_sets():
        return "exact"
    if reason := objection(shape):
        logger.warning("this model runs in exact mode, several times slower, since %s", reason)
        return "exact"
    return "fast"


def _runner(checkpoint: Checkpoint, options: EngineOptions, mode: Mode, batcher: Batcher) -> Runner:
    blocks = batcher.pool.size
    if mode == "fast":
        from workers.fast import FastRunner

        rows, kv_dtype = options.max_rows, options.kv_dtype
        return FastRunner(checkpoint, blocks, options.threads, rows, kv_dtype)
    with engine_installed():
        from workers.native import NativeRunner  # here: torch takes 190 MB and a second

    keep_freed_memory()
    return NativeRunner(checkpoint, blocks, options.threads)


def _group_runner(
    model: Model, options: EngineOptions, mode: Mode, batcher: Batcher, group: GroupSpec
) -> Runner:
    """Over the ranks that join within JOIN_S."""
    from workers.group.gauge import gauge
    from workers.group.leader import Leader
    from workers.group.runner import GroupOptions, GroupRunner

    if group.sums == "int8":
        check_int8_sums(mode, group.allreduce)
    leader = Leader(group.listen.host, group.listen.port, group.secret, model.name)
    leader.wait_for(group.ranks - 1, JOIN_S)
    group_options = GroupOptions(
        mode=mode,
        kv_dtype=options.kv_dtype,
        quantize=options.quantize,
        path=model.location,
        kv_blocks=batcher.pool.size,
        max_rows=options.max_rows,
        means=group.means,
        weight=group.weight,
        box=gauge("0", group.means) if group.weight is None else None,
        listen_host=group.listen.host,
        secret=group.secret,
        way=group.allreduce,
        sums=group.sums,
    )
    return GroupRunner(leader, group_options)


def check_int8_sums(mode: Mode, way: str | None) -> None:
    """Raise SetupError where sums cannot travel as int8."""
    if mode == "exact":
        raise SetupError("int8 sums round what ranks tell each other: leave out --mode exact")
    if way in ("star", "ring"):
        raise SetupError(f"int8 sums travel direct or two-shot: leave out --allreduce {way}")
