"""Both event loops, and JSON with one field set wrong."""

from __future__ import annotations

import asyncio
import json

import pytest
import uvloop


# The product runs on uvloop, and anything may embed it on asyncio's own.
def pytest_asyncio_loop_factories(config, item):
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def _changed(content, path, value) -> str:
    """`content` as JSON with the field at this path set, or left out if the value is None."""
    changed = json.loads(json.dumps(content))
    *way, last = path
    place = changed
    for step in way:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(changed)


@pytest.fixture(scope="session")
def changed():
    """`changed(content, path, value)` -> JSON."""
    return _changed
