"""Groups of small boxes: seconds a token, memory of each rank, and how near to the floor.

    python bench/edge.py                          SmolLM2: 1 to 3 ranks, resident and under a cap
    python bench/edge.py --shape llama2-70b --ranks 4 --cap 3GB --shards /big/disk --keep
    python bench/edge.py --tiny                   seconds: does everything still run?

Ranks are processes on this machine that share its cores and its disk. The floor of a streamed token
is the bytes that all ranks read for it divided by the disk's rate (read past the page cache, before
and after in the same run); with `--cgroup` (as root, cgroup v1) the kernel enforces each cap.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from scheduler.argument_types import size
from workers.build import find
from workers.group.gauge import read_rate
from workers.weights.checkpoint import open_checkpoint
from workers.weights.random_model import PREFIX, SHAPES

if TYPE_CHECKING:
    from collections.abc import Iterator

CGROUPS = Path("/sys/fs/cgroup/memory")
SECRET = "edge"
MEASURED_BYTES = 1 << 30  # of a shard file, for the disk's rate


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run one model."""

    title: str
    ranks: int
    cap: int | None = None  # bytes of each rank
    mode: str = "fast"
    threads: int = 1
    direct: bool = True
    prompt_tokens: int = 5
    new_tokens: int = 24
    batch: int = 0
    batch_steps: int = 3
    chunk: int = 512


@dataclass(slots=True)
class Result:
    """What an arm measured; seconds and bytes."""

    title: str
    ranks: int
    token_s: float
    prompt_s: float
    batch_s: float | None
    peak_rss: list[int]
    streamed_share: float
    read_per_token: int  # by all ranks
    disk_rate: list[float] = field(default_factory=list)  # bytes/s before and after
    floor_s: float | None = None
    tokens: list[int] = field(default_factory=list)


def main() -> None:
    options = arguments()
    model = PREFIX + options.shape if options.shape else options.model
    with ExitStack() as stack:
        shards = options.shards or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        check_space(model, shards)
        results = [run(arm, model, shards, options) for arm in arms(options)]
    if options.shape and not options.keep:
        shutil.rmtree(shards, ignore_errors=True)
    if options.json:
        print(json.dumps({"conditions": conditions(), "results": [asdict(r) for r in results]}))
    else:
        show(results)


def arms(options: argparse.Namespace) -> list[Arm]:
    """What is asked for: one arm of a shape, or SmolLM2's."""
    if options.shape or options.cap:
        return [
            Arm(
                f"{options.shape or options.model}, cap {options.cap / 1e6:.0f} MB",
                options.ranks,
                options.cap,
                prompt_tokens=options.prompt_tokens,
                new_tokens=options.tokens,
                batch=options.batch,
                chunk=options.chunk,
            )
        ]
    if options.tiny:
        return [Arm("resident", 2, new_tokens=2), Arm("cap", 1, CAPS[1], new_tokens=2, batch=2)]
    resident = [Arm(f"{n} resident", n, threads=2 if n == 1 else 1) for n in (1, 2, 3)]
    cached = [Arm(f"{n} streamed, page cache", n, CAPS[n], direct=False) for n in CAPS]
    return [*resident, *cached, *(Arm(f"{n} streamed, disk", n, CAPS[n], batch=8) for n in CAPS)]


CAPS = {1: 174_000_000, 2: 136_000_000}  # of SmolLM2's ranks: most of its weights pass through


def run(arm: Arm, model: str, shards: Path, options: argparse.Namespace) -> Result:
    """Start the ranks, let rank 0 measure, read everybody's memory, stop them."""
    found = find(model)
    shape = open_checkpoint(Path(found.location)).shape
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    setup = asdict(arm) | {
        "port": port,
        "name": found.name,
        "path": found.location,
        "secret": SECRET,
        "shards": str(shards),
        "vocab": shape.vocab,
        "way": options.way,
    }
    note(f"{arm.title}: starting {arm.ranks} ranks")
    with ExitStack() as stack:
        members = [
            stack.enter_context(started(member_command(arm, number, found, port, shards)))
            for number in range(1, arm.ranks)
        ]
        first = stack.enter_context(
            started([sys.executable, "bench/edge_rank.py", json.dumps(setup)])
        )
        processes = [first, *members]
        for number, process in enumerate(processes):
            if options.cgroup and arm.cap:
                stack.enter_context(capped(process.pid, f"{os.getpid()}-{number}", arm.cap))
        answer(first)
        before = disk_rate(shards) if arm.cap and arm.direct else None
        go(first)
        note(f"{arm.title}: measuring")
        measured = answer(first)
        peaks = [peak_rss(process.pid) for process in processes]
        for process in members:
            if process.poll() is not None:
                sys.exit(f"a rank ended with {process.returncode}")
        go(first)
    after = disk_rate(shards) if before else None
    return result(arm, measured, peaks, [rate for rate in (before, after) if rate])


def result(arm: Arm, measured: dict[str, Any], peaks: list[int], rates: list[float]) -> Result:
    read = measured["read_per_step"] * arm.ranks  # shares of equal weight
    return Result(
        title=arm.title,
        ranks=arm.ranks,
        token_s=median(measured["step_s"]),
        prompt_s=measured["prompt_s"],
        batch_s=median(measured["batch_s"]) if measured["batch_s"] else None,
        peak_rss=peaks,
        streamed_share=measured["streamed"] / measured["weights"] if measured["weights"] else 0.0,
        read_per_token=read,
        disk_rate=rates,
        floor_s=read / (sum(rates) / len(rates)) if rates else None,
        tokens=measured["tokens"],
    )


def member_command(arm: Arm, number: int, found: Any, port: int, shards: Path) -> list[str]:
    command = [sys.executable, "-m", "motley", "worker", f"{found.name}={found.location}"]
    if found.location.startswith(PREFIX):
        command[-1] = found.location
    command += ["--group", "edge", "--join", f"127.0.0.1:{port}", "--name", f"rank-{number}"]
    command += ["--listen", "127.0.0.1", "--threads", str(arm.threads), "--shards", str(shards)]
    command += ["--weight", "1"]
    command += ["--memory-cap", f"{arm.cap / 1e6}MB"] if arm.cap else []
    return command + ([] if arm.direct else ["--stream-cached"])


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "MOTLEY_SECRET": SECRET}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def capped(pid: int, name: str, cap: int) -> Iterator[None]:
    """The kernel kills the process beyond its cap."""
    group = CGROUPS / f"motley-edge-{name}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(cap))
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        until = time.monotonic() + 5
        while group.exists():
            try:
                for task in (group / "cgroup.procs").read_text().split():
                    (CGROUPS / "cgroup.procs").write_text(task)
                group.rmdir()
            except OSError:  # a process is ending just now
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        sys.exit("rank 0 ended; its message is above")
    said: dict[str, Any] = json.loads(line)
    return said


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def peak_rss(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def disk_rate(shards: Path) -> float:
    """Bytes/s of one thread that reads a shard past the page cache."""
    path = max(shards.glob("*/weights.bin"), key=lambda file: file.stat().st_size)
    return read_rate(path, MEASURED_BYTES, direct=True)


def check_space(model: str, shards: Path) -> None:
    """Before tens of GB are written."""
    shards.mkdir(parents=True, exist_ok=True)
    if not model.startswith(PREFIX) or any(shards.glob("*/weights.bin")):
        return
    needed = SHAPES[model.removeprefix(PREFIX)].parameters * 18 // 32
    free = shutil.disk_usage(shards).free
    if free < needed * 1.02:
        sys.exit(f"{shards} has {free / 1e9:.0f} GB free and {needed / 1e9:.0f} GB are needed")


def conditions() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "load": os.getloadavg(), "time": time.strftime("%FT%TZ")}


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(results: list[Result]) -> None:
    table = Table(title="Groups on this machine")
    for column in ("arm", "s/token", "floor", "×", "prompt s", "batch s", "streamed", "peak MB"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for r in results:
        table.add_row(
            r.title,
            f"{r.token_s:.4f}",
            f"{r.floor_s:.4f}" if r.floor_s else "",
            f"{r.token_s / r.floor_s:.2f}" if r.floor_s else "",
            f"{r.prompt_s:.3f}",
            f"{r.batch_s:.4f}" if r.batch_s else "",
            f"{r.streamed_share:.0%} ({r.read_per_token / 1e6:.0f} MB)",
            ", ".join(f"{peak / 1e6:.0f}" for peak in r.peak_rss),
        )
    Console().print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--cap", type=size, help="memory of each rank, such as 3GB")
    parser.add_argument("--prompt-tokens", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prompt in one step")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=0, help="sequences at once, beside one")
    parser.add_argument("--way", choices=["star", "direct", "two-shot", "ring"])
    parser.add_argument("--shards", type=Path, help="folder of the shards (default: a new one)")
    parser.add_argument("--keep", action="store_true", help="do not delete them")
    parser.add_argument("--cgroup", action="store_true", help="let the kernel enforce the caps")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
