"""A request's stream: deltas are given away where they arrive, and kept while nobody takes them."""

from __future__ import annotations

import asyncio

import pytest

from scheduler.errors import Unavailable
from serving.ask import Delta
from serving.stream import Stream

pytestmark = pytest.mark.asyncio

ONE, TWO, THREE = (Delta(0, text, 1) for text in ("a", "b", "c"))


class Reader:
    """Takes deltas as long as it has room."""

    def __init__(self, stream, room):
        self.got = []
        self.room = room
        self.task = asyncio.create_task(stream.pour(self.take))

    def take(self, delta):
        self.got.append(delta)
        return len(self.got) < self.room


async def pouring(stream, room=100):
    reader = Reader(stream, room)
    await asyncio.sleep(0)
    return reader


async def test_a_delta_is_taken_at_once_and_the_end_is_told():
    stream = Stream(1)
    stream.feed(ONE)
    reader = await pouring(stream)
    stream.feed(TWO)
    assert reader.got == [ONE, TWO]
    stream.end(None)
    assert await reader.task is True


async def test_without_room_what_comes_waits_in_order():
    stream = Stream(1)
    reader = await pouring(stream, room=1)
    stream.feed(ONE)
    stream.feed(TWO)
    assert await reader.task is False
    stream.feed(THREE)
    stream.end(None)
    assert reader.got == [ONE]
    rest = await pouring(stream)
    assert await rest.task is True
    assert rest.got == [TWO, THREE]


async def test_an_error_comes_after_what_came_before_it():
    stream = Stream(2)
    stream.feed(ONE)
    stream.end(Unavailable("The last worker was lost."))
    reader = await pouring(stream)
    with pytest.raises(Unavailable):
        await reader.task
    assert reader.got == [ONE]


async def test_an_error_of_the_reader_is_the_readers():
    def take(_):
        raise ZeroDivisionError

    stream = Stream(1)
    pour = asyncio.create_task(stream.pour(take))
    await asyncio.sleep(0)
    stream.feed(ONE)  # raises nothing here, where a worker's other answers wait
    stream.feed(TWO)
    with pytest.raises(ZeroDivisionError):
        await pour
