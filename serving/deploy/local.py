"""The embedded deployer: workers as child processes of this one.

A worker that ends before it ever joined is the operator's to mend: everything stops and says so.
One that joined and then died is started again, with growing pauses.

Children get a pipe as standard input and end when it closes, so they do not outlive this process,
however it dies; and a session of their own, so that Ctrl-C reaches them through us, in order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scheduler.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

logger = logging.getLogger(__name__)

STOP_S = 10.0  # from SIGTERM to SIGKILL
RESTART_FIRST_S, RESTART_MAX_S = 0.1, 30.0
STABLE_S = 10.0  # a worker that lived this long did not die of its start: the pauses begin anew


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One process to keep running: its name, and the arguments of `motley COMMAND`."""

    name: str
    arguments: tuple[str, ...]
    joins: bool = True  # a router; a rank of a group joins that instead
    command: str = "worker"


@dataclass(slots=True)
class _Child:
    spec: WorkerSpec
    joined: bool = False
    pause: float = field(default=RESTART_FIRST_S)


class LocalDeployment:
    """Keeps the given workers running on this machine.

    `joined` waits until the router knows a worker by this name.
    """

    def __init__(
        self, specs: Sequence[WorkerSpec], secret: str, joined: Callable[[str], Awaitable[None]]
    ) -> None:
        self._children = [_Child(spec) for spec in specs]
        self._environment = {**os.environ, "MOTLEY_SECRET": secret}
        self._joined = joined

    async def run(self) -> None:
        """Until cancelled; then every child is gone. Raises SetupError if one cannot start."""
        keepers = [asyncio.create_task(self._keep(child)) for child in self._children]
        try:
            done, _ = await asyncio.wait(keepers, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in keepers:
                task.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)

    async def _keep(self, child: _Child) -> None:
        """Start one worker, and start it again whenever it ends."""
        while True:
            started = asyncio.get_running_loop().time()
            code = await self._live(child)
            if not child.joined:
                raise SetupError(
                    f"worker {child.spec.name} stopped (exit code {code}) before it was ready; "
                    "its own message is above."
                )
            if asyncio.get_running_loop().time() - started > STABLE_S:
                child.pause = RESTART_FIRST_S
            logger.warning(
                "worker %s ended (exit code %s); it starts again in %.1f s",
                child.spec.name,
                code,
                child.pause,
            )
            await asyncio.sleep(child.pause)
            child.pause = min(2 * child.pause, RESTART_MAX_S)

    async def _live(self, child: _Child) -> int:
        """One life of a worker, from start to exit code."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # what lies in the working directory must not stand in for our packages
            "-m",
            "motley",
            child.spec.command,
            *child.spec.arguments,
            stdin=asyncio.subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        watching = asyncio.create_task(self._watch(child))
        try:
            return await process.wait()
        finally:
            watching.cancel()
            await _stop(process)

    async def _watch(self, child: _Child) -> None:
        if child.spec.joins:
            await self._joined(child.spec.name)
        child.joined = True


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Ask, wait, insist. Returns when the process is gone."""
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
