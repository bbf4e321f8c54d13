"""Faults on a timeline, and what they did to the users.

Targets are processes (by pid, pid file, or a command that prints the pid) or commands to run: the
harness knows nothing of what it breaks. Whatever it stopped, slowed or cut off is healed on every
way out.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tomllib
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Literal

import msgspec

from loadtest.errors import LoadtestError, OptionError
from loadtest.integrity import Integrity
from loadtest.stats import design_effect, wilson, z_value

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from loadtest.outcome import Outcome

Kind = Literal["kill", "stop", "slow", "partition", "run"]

_COMMAND_LIMIT = 30.0
_SLOW_PERIOD = 0.1


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One fault of a plan, in seconds.

    kill: SIGKILL. stop: SIGSTOP, SIGCONT after `lasts`. slow: the process runs only `share` of the
    time, by stopping and continuing it, or by a cgroup's CPU quota of `share` cores. partition: the
    command `run`, and `heal` after `lasts`. run: the command `run`.
    """

    kind: Kind
    at: float
    lasts: float = 0.0
    pid: int | None = None
    pidfile: str | None = None
    find: list[str] = []  # prints the pid when the time has come
    share: float = 0.5
    cgroup: str | None = None
    run: list[str] = []
    heal: list[str] = []

    def __post_init__(self) -> None:
        needs_process = self.kind in ("kill", "stop") or (self.kind == "slow" and not self.cgroup)
        if needs_process and not (self.pid or self.pidfile or self.find):
            raise ValueError(f"a fault of kind {self.kind} needs pid, pidfile or find")
        if self.pid is not None and self.pid <= 1:
            raise ValueError(f"pid {self.pid} is no worker")
        if self.kind in ("partition", "run") and not self.run:
            raise ValueError(f'a fault of kind {self.kind} needs run = ["command", …]')
        if self.kind == "partition" and not self.heal:
            raise ValueError('a partition needs heal = ["command", …]')
        if self.kind in ("stop", "slow", "partition") and self.lasts <= 0:
            raise ValueError(f"a fault of kind {self.kind} needs lasts, in seconds")
        if self.at < 0 or not 0 < self.share <= 64:
            raise ValueError("at must not be negative, share must be above 0")
        if self.kind == "slow" and not self.cgroup and self.share >= 1:
            raise ValueError("share must be below 1 to slow a process")


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`recovery` seconds after a fault's end still count as its time."""

    fault: list[Fault]
    recovery: float = 5.0
    check_tokens: bool = True  # by an unbroken reference run of the same requests

    def check_within(self, last: float) -> None:
        """Raises OptionError when a fault comes after the last request and would hurt nobody."""
        for number, fault in enumerate(self.fault, 1):
            if fault.at >= last:
                raise OptionError(
                    f"--faults: fault {number}: at",
                    f"{fault.at:g} s, but the last request is due at {last:.1f} s",
                )

    def windows(self) -> list[tuple[float, float]]:
        return [(fault.at, fault.at + fault.lasts + self.recovery) for fault in self.fault]


class Phase(msgspec.Struct):
    """Requests before, during and after the faults, and how many met their SLO."""

    name: str
    scheduled: int
    failed: int
    met: int
    share: float
    low: float
    high: float


class Event(msgspec.Struct):
    """What was done, and when in seconds of the run."""

    at: float
    what: str


class FaultReport(msgspec.Struct):
    plan: Plan
    events: list[Event]
    phases: list[Phase]
    integrity: Integrity
    unbroken_share: float | None = None  # attainment of the reference run


def read_plan(path: Path) -> Plan:
    """Raises OptionError naming the file and the field."""
    try:
        plan = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Plan)
    except (OSError, ValueError) as error:
        raise OptionError(f"--faults {path}", str(error)) from None
    if not plan.fault:
        raise OptionError(f"--faults {path}", "no [[fault]] in it")
    return plan


def phases(plan: Plan, outcomes: Sequence[Outcome], met: Sequence[bool]) -> list[Phase]:
    """During: the request's life overlaps a fault's window. Before: it ended before all of them."""
    windows = plan.windows()
    first = min(begin for begin, _ in windows)
    flags: dict[str, list[tuple[Outcome, bool]]] = {"before": [], "during": [], "after": []}
    for outcome, held in zip(outcomes, met, strict=True):
        if any(outcome.scheduled < end and outcome.end > begin for begin, end in windows):
            name = "during"
        else:
            name = "before" if outcome.end <= first else "after"
        flags[name].append((outcome, held))
    return [_phase(name, members) for name, members in flags.items()]


def _phase(name: str, members: list[tuple[Outcome, bool]]) -> Phase:
    held = [held for _, held in members]
    low, high = wilson(sum(held), len(held), z_value(0.95), design_effect(held))
    failed = sum(not outcome.ok for outcome, _ in members)
    share = sum(held) / len(held) if held else 0.0
    return Phase(name, len(members), failed, sum(held), share, low, high)


class Saboteur:
    """Carries out a plan; `events` says what it did."""

    def __init__(self, plan: Plan, start: Callable[[], float]) -> None:
        self._plan = plan
        self._start = start  # the run's start on the monotonic clock, once it is known
        self.events: list[Event] = []

    async def work(self) -> None:
        """Ends when the last fault is healed; cancelled, it heals at once.

        Raises LoadtestError when a fault could not be brought about.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for fault in self._plan.fault:
                    group.create_task(self._one(fault))
        except* LoadtestError as failed:
            raise LoadtestError("; ".join(map(str, failed.exceptions))) from None

    async def _one(self, fault: Fault) -> None:
        await asyncio.sleep(max(0.0, self._start() + fault.at - monotonic()))
        acts: dict[Kind, Callable[[Fault], Awaitable[None]]] = {
            "kill": self._kill,
            "stop": self._stop,
            "slow": self._slow_cgroup if fault.cgroup else self._slow,
            "partition": self._partition,
            "run": self._run,
        }
        await acts[fault.kind](fault)

    async def _kill(self, fault: Fault) -> None:
        pid = await _pid(fault)
        _signal(pid, signal.SIGKILL)
        self._note(f"killed {pid}")

    async def _stop(self, fault: Fault) -> None:
        pid = await _pid(fault)
        _signal(pid, signal.SIGSTOP)
        self._note(f"stopped {pid}")
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            self._continue(pid)

    async def _slow(self, fault: Fault) -> None:
        pid = await _pid(fault)
        end = monotonic() + fault.lasts
        self._note(f"slowed {pid} to {fault.share:.0%}")
        try:
            while monotonic() < end:
                _signal(pid, signal.SIGSTOP)
                await asyncio.sleep(_SLOW_PERIOD * (1 - fault.share))
                _signal(pid, signal.SIGCONT)
                await asyncio.sleep(_SLOW_PERIOD * fault.share)
        finally:
            self._continue(pid)

    async def _slow_cgroup(self, fault: Fault) -> None:
        group = Path(fault.cgroup or "")
        quota, text = group / "cpu.max", f"{round(fault.share * 100_000)} 100000"
        if not quota.exists():  # cgroup v1
            quota, text = group / "cpu.cfs_quota_us", str(round(fault.share * 100_000))
        try:
            before = quota.read_text()
            quota.write_text(text)
        except OSError as error:
            raise LoadtestError(f"--faults: cannot slow the cgroup: {error}") from None
        self._note(f"slowed {group} to {fault.share:g} cores")
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            quota.write_text(before)
            self._note(f"healed {group}")

    async def _partition(self, fault: Fault) -> None:
        try:
            await self._run(fault)
            await asyncio.sleep(fault.lasts)
        finally:
            # Shielded, so that a cancelled run heals too.
            await asyncio.shield(asyncio.ensure_future(_command(fault.heal)))
            self._note(f"ran {' '.join(fault.heal)}")

    async def _run(self, fault: Fault) -> None:
        await _command(fault.run)
        self._note(f"ran {' '.join(fault.run)}")

    def _continue(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
            self._note(f"continued {pid}")

    def _note(self, what: str) -> None:
        self.events.append(Event(monotonic() - self._start(), what))


async def _pid(fault: Fault) -> int:
    if fault.pid is not None:
        return fault.pid
    try:
        pid = int((await _command(fault.find or ["cat", str(fault.pidfile)])).split()[0])
    except (ValueError, IndexError):
        source = fault.pidfile or " ".join(fault.find)
        raise LoadtestError(f"--faults: no pid from {source}") from None
    if pid <= 1:
        raise LoadtestError(f"--faults: pid {pid} is no worker")
    return pid


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except OSError as error:
        raise LoadtestError(f"--faults: {number.name} to {pid}: {error}") from None


async def _command(words: list[str]) -> str:
    """Its output. Raises LoadtestError when it fails or takes too long."""
    try:
        process = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except OSError as error:
        raise LoadtestError(f"--faults: {' '.join(words)}: {error}") from None
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _COMMAND_LIMIT)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise LoadtestError(f"--faults: {' '.join(words)}: no end in {_COMMAND_LIMIT} s") from None
    if process.returncode:
        said = output.decode(errors="replace").strip()[:200]
        raise LoadtestError(f"--faults: {' '.join(words)}: exit {process.returncode}: {said}")
    return output.decode(errors="replace")
