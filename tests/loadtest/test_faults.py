from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest

from loadtest.errors import LoadtestError, OptionError
from loadtest.faults import Fault, Plan, Saboteur, phases, read_plan
from loadtest.integrity import Difference, Integrity, differ, inspect
from loadtest.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def victim():
    """A process that does nothing, to do things to."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"], {})
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def state(pid: int) -> str:
    """R running, S sleeping, T stopped, Z dead (proc_pid_stat(5))."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


async def seen(condition: Callable[[], bool]) -> None:
    """Other processes tell nobody when they change: look until they have."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def until(pid: int, states: str) -> None:
    await seen(lambda: state(pid) in states)


def saboteur(*faults: Fault) -> Saboteur:
    start = time.monotonic()
    return Saboteur(Plan(list(faults)), lambda: start)


@pytest.mark.asyncio
async def test_a_killed_process_is_dead_and_the_deed_is_noted(victim, tmp_path):
    pidfile = tmp_path / "pid"
    pidfile.write_text(f"{victim}\n")
    work = saboteur(Fault("kill", at=0.05, pidfile=str(pidfile)))
    await work.work()
    await until(victim, "Z")
    (event,) = work.events
    assert event.what == f"killed {victim}"
    assert event.at >= 0.05


@pytest.mark.asyncio
async def test_a_stopped_process_goes_on_after_its_time(victim):
    work = saboteur(Fault("stop", at=0, lasts=0.2, find=["echo", str(victim)]))
    task = asyncio.create_task(work.work())
    await until(victim, "T")
    await task
    await until(victim, "SR")
    assert [event.what for event in work.events] == [f"stopped {victim}", f"continued {victim}"]


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["stop", "slow"])
async def test_a_run_that_ends_early_heals_what_it_did(victim, kind):
    work = saboteur(Fault(kind, at=0, lasts=60, share=0.1, pid=victim))
    task = asyncio.create_task(work.work())
    await until(victim, "T")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(victim, "SR")


@pytest.mark.asyncio
async def test_a_slowed_process_runs_only_its_share(victim):
    work = saboteur(Fault("slow", at=0, lasts=0.3, share=0.2, pid=victim))
    task = asyncio.create_task(work.work())
    await until(victim, "T")
    await until(victim, "SR")
    await until(victim, "T")
    await task
    await until(victim, "SR")


@pytest.mark.asyncio
async def test_a_cgroups_quota_is_lowered_and_put_back(tmp_path):
    quota = tmp_path / "cpu.max"
    quota.write_text("max 100000")
    seen = []
    work = saboteur(Fault("slow", at=0, lasts=0.1, share=0.25, cgroup=str(tmp_path)))
    task = asyncio.create_task(work.work())
    async with asyncio.timeout(5):
        while not task.done():
            seen.append(quota.read_text())
            await asyncio.sleep(0.01)
    assert "25000 100000" in seen
    assert quota.read_text() == "max 100000"


@pytest.mark.asyncio
async def test_a_partition_is_healed_also_when_the_run_is_cut_short(tmp_path):
    cut, healed = tmp_path / "cut", tmp_path / "healed"
    fault = Fault("partition", at=0, lasts=60, run=["touch", str(cut)], heal=["touch", str(healed)])
    task = asyncio.create_task(saboteur(fault).work())
    await seen(cut.exists)
    assert not healed.exists()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert healed.exists()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("run", at=0, run=["false"]), "exit 1"),
        (Fault("run", at=0, run=["/no/such/command"]), "No such file"),
        (Fault("kill", at=0, pidfile="/no/such/file"), "exit 1"),
        (Fault("kill", at=0, find=["echo", "nothing"]), "no pid"),
        (Fault("kill", at=0, find=["echo", "1"]), "no worker"),
        (Fault("slow", at=0, lasts=1, cgroup="/no/such/group"), "cgroup"),
    ],
)
async def test_a_fault_that_cannot_be_brought_about_says_why(fault, says):
    with pytest.raises(LoadtestError, match=says):
        await saboteur(fault).work()


def test_a_plan_is_read(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(
        'recovery = 3\n[[fault]]\nkind = "stop"\nat = 10\nlasts = 5\npidfile = "w.pid"\n'
        '[[fault]]\nkind = "partition"\nat = 30\nlasts = 2\nrun = ["a"]\nheal = ["b"]\n'
    )
    plan = read_plan(path)
    assert plan.windows() == [(10, 18), (30, 35)]


def test_a_fault_after_the_last_request_is_refused():
    plan = Plan([Fault("kill", at=10, pid=99)])
    plan.check_within(10.1)
    with pytest.raises(OptionError, match="fault 1: at"):
        plan.check_within(9.9)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "fault"),
        ("fault = []", "no"),
        ('[[fault]]\nkind = "melt"\nat = 1', "kind"),
        ('[[fault]]\nkind = "kill"\nat = 1', "pid, pidfile or find"),
        ('[[fault]]\nkind = "kill"\nat = 1\npid = 1', "no worker"),
        ('[[fault]]\nkind = "kill"\nat = -1\npid = 99', "negative"),
        ('[[fault]]\nkind = "stop"\nat = 1\npid = 99', "lasts"),
        ('[[fault]]\nkind = "slow"\nat = 1\nlasts = 1\npid = 99\nshare = 2', "below 1"),
        ('[[fault]]\nkind = "partition"\nat = 1\nlasts = 1\nrun = ["x"]', "heal"),
        ('[[fault]]\nkind = "run"\nat = 1', "run ="),
        ('[[fault]]\nkind = "kill"\nat = 1\npid = 99\ncolour = 3', "colour"),
        ("[[fault", "--faults"),
    ],
)
def test_a_broken_plan_names_the_field(tmp_path, text, says):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=says):
        read_plan(path)


def outcome(index: int, scheduled: float, end: float, **fields) -> Outcome:
    return Outcome(index, 0, scheduled, scheduled, end, **fields)


def test_requests_are_before_during_or_after_by_their_whole_life():
    plan = Plan([Fault("kill", at=10, pid=99)], recovery=5)
    lives = [(0, 1), (9, 9.9), (9, 11), (12, 13), (14.9, 30), (15, 16), (20, 21)]
    outcomes = [outcome(n, *life) for n, life in enumerate(lives)]
    met = [True, True, False, False, True, True, True]
    found = {phase.name: (phase.scheduled, phase.met) for phase in phases(plan, outcomes, met)}
    assert found == {"before": (2, 2), "during": (3, 1), "after": (2, 2)}


ANSWER = " t0 t1 t2 t3 t4 t5"


@pytest.mark.parametrize(
    ("got", "found"),
    [
        (ANSWER, Difference()),
        (" t0 t1 t4 t5", Difference(lost=2)),
        (" t0 t1 t2 t3", Difference(lost=2)),
        (" t0 t1 t2 t1 t2 t3 t4 t5", Difference(repeated=2)),
        (ANSWER + " t5", Difference(repeated=1)),
        (" t0 t1 t2 x y t5", Difference(changed=2)),
        (ANSWER + " x", Difference(changed=1)),
    ],
)
def test_what_was_lost_repeated_or_changed_is_told_apart(got, found):
    difference = differ(ANSWER, got)
    difference.where = ""
    assert difference == found


def test_answers_are_checked_against_the_reference_and_the_endpoints_count():
    def one(index: int, **fields) -> Outcome:
        fields = {"text": ANSWER, "tokens": 6, "chunks": 6, "asked_output": 6} | fields
        return outcome(index, 0, 1, **fields)

    reference = [one(n) for n in range(7)]
    outcomes = [
        one(0),
        one(1, text=" t0 t1 t4 t5"),
        one(2, text=ANSWER + " t5"),
        one(3, text=" x"),
        one(4, tokens=5, chunks=5),
        one(5, chunks=7),
        one(6, error="cut"),
        one(9),
    ]
    found = inspect(outcomes, reference, ignore_eos=True)
    examples, found.examples = found.examples, []
    assert found == Integrity(1, compared=6, lost=1, repeated=1, changed=1, short=1, over=1)
    assert not found.ok
    assert examples[0].startswith("request 1: at word 2")
    assert inspect([one(4, tokens=5, chunks=5)], [], ignore_eos=False).ok
