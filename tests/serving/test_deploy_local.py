"""The local deployer with real child processes: who dies comes back, and nobody is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from scheduler.errors import SetupError
from scheduler.transport import listen
from serving.deploy import local
from serving.deploy.local import LocalDeployment, WorkerSpec
from serving.members import Members

pytestmark = pytest.mark.asyncio

SECRET = "of this test"


def runs(pid: int) -> bool:
    """A zombie has ended, though its parent has not asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def spec(name: str, port: int, *arguments: str, model: str = "fake") -> WorkerSpec:
    common = ("--join", f"127.0.0.1:{port}", "--listen", "127.0.0.1", "--child", "--name", name)
    return WorkerSpec(name, (model, *common, *arguments))


def children() -> list[int]:
    pid = os.getpid()
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


@asynccontextmanager
async def deployed(names: tuple[str, ...], *arguments: str, model: str = "fake"):
    """The deployment's task, and the members that its workers join."""
    members = Members()
    before = set(children())
    async with listen("127.0.0.1", 0, SECRET.encode(), members.serve) as (_, port):
        specs = [spec(name, port, *arguments, model=model) for name in names]
        deployment = LocalDeployment(specs, SECRET, members.joined)
        task = asyncio.create_task(deployment.run())
        try:
            yield task, members
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    assert set(children()) <= before, "a child is left"


async def joined(task: asyncio.Task, members: Members, *names: str) -> list[int]:
    """Process ids of the workers, once all have joined."""
    waiting = asyncio.gather(*map(members.joined, names))
    await asyncio.wait([task, waiting], timeout=20, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert not task.done(), task.exception()
    return [members.get(name).join.pid for name in names]


async def test_a_killed_worker_starts_again_and_joins_again_after_growing_pauses(until, caplog):
    async with deployed(("a", "b")) as (task, members):
        first, other = await joined(task, members, "a", "b")
        lives = [first]
        for _ in range(2):
            os.kill(lives[-1], signal.SIGKILL)
            await until(lambda: members.get("a") is None)
            lives += await joined(task, members, "a")
        assert len(set(lives)) == 3
        assert members.get("b").join.pid == other
    assert [r.args[-1] for r in caplog.records if "starts again" in r.msg] == [0.1, 0.2]
    assert not any(map(runs, lives))
    assert not runs(other)


async def test_a_worker_that_cannot_start_stops_everything_and_says_so(capfd):
    async with deployed(("a",), model="fake:tokens=many") as (task, _members):
        with pytest.raises(SetupError, match=r"worker a stopped \(exit code 2\)"):
            await asyncio.wait_for(task, 30)
    assert "motley: fake:tokens=many" in capfd.readouterr().err


async def test_one_of_two_cannot_start(capfd):
    members = Members()
    async with listen("127.0.0.1", 0, SECRET.encode(), members.serve) as (_, port):
        specs = [spec("good", port), spec("bad", port, "--role", "king")]
        deployment = LocalDeployment(specs, SECRET, members.joined)
        before = set(children())
        with pytest.raises(SetupError, match="worker bad stopped"):
            await asyncio.wait_for(deployment.run(), 30)
        assert set(children()) <= before
    assert "invalid choice: 'king'" in capfd.readouterr().err


async def test_a_worker_that_does_not_obey_is_killed(monkeypatch):
    monkeypatch.setattr(local, "STOP_S", 0.05)
    async with deployed(("a",)) as (task, members):
        (pid,) = await joined(task, members, "a")
        os.kill(pid, signal.SIGSTOP)
    assert not runs(pid)


async def test_what_lies_in_the_working_directory_is_not_our_code(tmp_path, monkeypatch):
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    async with deployed(("a",)) as (task, members):
        await joined(task, members, "a")


PARENT = """
import asyncio, sys
from scheduler.transport import listen
from serving.deploy.local import LocalDeployment, WorkerSpec
from serving.members import Members

async def main():
    members = Members()
    async with listen("127.0.0.1", 0, b"s", members.serve) as (_, port):
        arguments = ("fake", "--join", f"127.0.0.1:{port}", "--child", "--name", "a")
        deployment = LocalDeployment([WorkerSpec("a", arguments)], "s", members.joined)
        task = asyncio.create_task(deployment.run())
        await members.joined("a")
        print(members.get("a").join.pid, flush=True)
        await task

asyncio.run(main())
"""


async def test_children_end_with_a_parent_that_was_killed(until):
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, stdout=asyncio.subprocess.PIPE
    )
    child = int(await parent.stdout.readline())
    assert runs(child)
    parent.kill()
    await parent.wait()
    await until(lambda: not runs(child))
