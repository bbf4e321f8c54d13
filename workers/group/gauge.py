"""What a rank can do, measured in a fraction of a second before it offers itself."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kernels import dispatch
from kernels.program import Matrix, Pool, Program, Span, packed_bytes
from scheduler.errors import ProtocolError, SetupError
from workers.group.memory import used_bytes
from workers.group.plan import Box
from workers.group.shard_file import DATA
from workers.group.stream import REQUEST, open_file
from workers.group.words import PROBE, Probe

if TYPE_CHECKING:
    from workers.group.links import Link
    from workers.group.part import Means

KIND, SIDE = "Q4_1", 2048
WORKING_SET = 96 << 20  # more than the caches of most processors; under a cap a quarter of that
COMPUTE_S = 0.3
OPENING = 16 << 20  # bytes that a process grows by until its weights are loaded
STEP = 2**0.25  # what is measured is rounded so: the same machine gets the same shares next time
DISK_BYTES = 64 << 20
PINGS, BURSTS, BURST = 5, 3, 512 << 10
PROBES = PINGS + BURSTS
LIMIT_S = 10.0  # for rank 0 to answer


def gauge(name: str, means: Means) -> Box | None:
    """This process as a rank; what its link is like is not known yet (`gauge_link`).

    None without the kernels that are measured. The disk matters only under a cap. Raises
    SetupError if its folder cannot be written.
    """
    if not dispatch.instruction_sets():
        return None
    base = used_bytes() + OPENING
    working_set = min(WORKING_SET, (means.memory_cap or 4 * WORKING_SET) // 4)
    rate = disk_rate(means.shards.path, direct=means.direct) if means.memory_cap else 0.0
    return Box(
        name=name,
        weights_per_s=_rounded(compute_rate(means.threads, working_set)),
        latency_s=0.0,
        link_bytes_per_s=1e12,
        cap=means.memory_cap,
        disk_bytes_per_s=_rounded(rate) if rate else 0.0,
        base=-(-base // OPENING) * OPENING,
    )


def compute_rate(threads: int, working_set: int) -> float:
    """Weights of 4 bits that one row is multiplied by in a second, out of so many bytes of them."""
    size = packed_bytes(KIND, SIDE, SIDE)
    matrices = max(1, working_set // size)
    program = Program(Pool(threads), 1)
    acts, out = program.acts(SIDE), program.floats(SIDE)
    acts.data[:] = 0
    for _ in range(matrices):
        program.matmul(Matrix.packed(KIND, SIDE, SIDE, np.ones(size, np.uint8)), acts, out)
    times: list[float] = []
    until = time.perf_counter() + COMPUTE_S
    while len(times) < 3 or time.perf_counter() < until:
        begun = time.perf_counter()
        program.run([0], [Span(0, 1, 0, [0])], [])
        times.append(time.perf_counter() - begun)
    return matrices * SIDE * SIDE / min(times)  # undisturbed


def disk_rate(shards: Path, *, direct: bool) -> float:
    """Bytes/s of reading a shard that lies there, or else a file written for it."""
    with suppress(FileNotFoundError):  # deleted just now (shard_folder)
        found = max(shards.glob(f"*/{DATA}"), key=lambda file: file.stat().st_size, default=None)
        if found and found.stat().st_size >= REQUEST:
            return read_rate(found, DISK_BYTES, direct=direct)
    try:
        shards.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=shards, prefix="gauge-") as file:
            block = os.urandom(REQUEST)
            for _ in range(DISK_BYTES // REQUEST):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return read_rate(Path(file.name), DISK_BYTES, direct=direct)
    except OSError as error:
        raise SetupError(
            f"cannot try how fast {shards} is ({error}): give a folder with {DISK_BYTES >> 20} MiB "
            "free with --shards, or say --weight"
        ) from error


def gauge_link(link: Link) -> tuple[float, float]:
    """One-way latency and bytes/s to rank 0, which answers each Probe (`answer_probe`)."""
    link.set_limit(LIMIT_S)
    round_trip = min(_probe(link, b"") for _ in range(PINGS))
    burst = bytes(BURST)
    seconds = min(_probe(link, burst) for _ in range(BURSTS))  # the first ones open the window
    return _rounded(round_trip / 2), _rounded(BURST / max(seconds - round_trip, 1e-6))


def answer_probe(link: Link, probe: Probe) -> None:
    """Raises ProtocolError for one that is larger than any of ours."""
    if not 0 <= probe.size <= BURST:
        raise ProtocolError(f"a probe of {probe.size} bytes")
    link.receive_into(memoryview(bytearray(probe.size)))
    link.say(Probe(0))


def _rounded(value: float) -> float:
    """To a power of STEP."""
    return float(STEP ** round(math.log(value, STEP)))


def _probe(link: Link, content: bytes) -> float:
    begun = time.perf_counter()
    link.say(Probe(len(content)))
    link.send(content)
    link.hear(PROBE)
    return time.perf_counter() - begun


def read_rate(path: Path, most: int, *, direct: bool) -> float:
    """Bytes/s of one thread that reads a file's first `most` bytes."""
    size = min(most, path.stat().st_size)
    buffer = memoryview(mmap.mmap(-1, REQUEST))
    file = open_file(path, direct=direct)
    try:
        begun, done = time.perf_counter(), 0
        while done < size and (count := os.preadv(file, [buffer], done)):
            done += count
        return done / (time.perf_counter() - begun)
    finally:
        os.close(file)
