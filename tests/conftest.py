"""What tests of several packages share: jobs, and the fake engine that can serve them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from scheduler.batching import Batcher
from scheduler.blocks import BlockPool
from scheduler.request import Grammar, Job, Limits, Prompt, Sampling, ToolUse
from workers.engine import Engine
from workers.fake import FakeOptions, FakeRunner, FakeText

if TYPE_CHECKING:
    from collections.abc import Callable


def _job(
    text: str | None = "once upon a time",
    *,
    id: str = "job",  # noqa: A002  # the field's name
    epoch: int = 1,
    ids: list[int] | None = None,
    choices: tuple[int, ...] = (0,),
    seed: int = 7,
    logprobs: int | None = None,
    emitted: list[int] | None = None,
    sent: int = 0,
    echo: bool = False,
    embed: bool = False,
    grammar: Grammar | None = None,
    tools: ToolUse | None = None,
    temperature: float = 1.0,
    whole: bool = False,
    **limits,
) -> Job:
    prompt = Prompt(text=text) if ids is None else Prompt(ids=ids)
    return Job(
        id=id,
        epoch=epoch,
        model="fake",
        prompt=prompt,
        sampling=Sampling(seed=seed, temperature=temperature, logprobs=logprobs),
        limits=Limits(**limits),
        created=0.0,
        choices=choices,
        emitted=emitted or [],
        sent=sent,
        grammar=grammar,
        tools=tools,
        echo=echo,
        embed=embed,
        whole=whole,
    )


def _engine(
    blocks: int = 64, options: FakeOptions | None = None, runner=None, **batching: int
) -> Engine:
    options = options or FakeOptions()
    batcher = Batcher(BlockPool(blocks), **batching)
    return Engine(runner or FakeRunner(blocks, options), FakeText(options.context), batcher)


def _move_kv(held, source: Engine, sequence, target: Engine) -> None:
    """What a transfer does: the held prompt's bytes into the blocks reserved for the sequence."""
    layers = range(source.runner.cache.layers)
    data = b"".join(source.runner.cache.views(held.blocks, range(held.tokens), layers))
    start = 0
    for view in target.runner.cache.views(sequence.blocks, range(len(sequence.tokens)), layers):
        view[:] = data[start : start + view.nbytes]
        start += view.nbytes
    assert start == len(data)


async def _until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Let the event loop turn until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0)


@pytest.fixture(scope="session")
def until():
    """`await until(lambda: …)`: for what no event tells of; fails after ten seconds."""
    return _until


@pytest.fixture(scope="session")
def move_kv():
    """`move_kv(held, engine, sequence, engine)` copies a held prompt's KV between two engines."""
    return _move_kv


@pytest.fixture(scope="session")
def make_job():
    """`make_job(text, id=…, max_tokens=…, stop=…)` -> Job."""
    return _job


@pytest.fixture(scope="session")
def make_engine():
    """`make_engine(blocks, options, runner, max_step_tokens=…)` -> Engine of the fake model."""
    return _engine
