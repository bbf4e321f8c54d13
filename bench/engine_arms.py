"""The engines that bench/engine.py can measure: where each is installed, and its process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from engine_process import Facts, Setup
from engine_workloads import Measured, Workload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

HERE = Path(__file__).parent
LOAD_LIMIT_S = 400  # vLLM compiles at its first start
RUN_LIMIT_S = 600
STOP_LIMIT_S = 20
LINE_LIMIT = 1 << 24
# In one process, nothing sent anywhere, OpenMP's threads unbound and asleep when idle.
VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "KMP_BLOCKTIME": "1",
}


class Absent(Exception):
    """The engine is not installed; says how to install it."""


class Broken(Exception):
    """The engine's process failed; says what it printed last."""


@dataclass(frozen=True)
class Kind:
    """An engine: what it needs to import, and what to do where that is missing."""

    module: str
    install: str
    needs_folder: bool  # reads fp32 safetensors, not the GGUF file
    environment: Mapping[str, str]


KINDS = {
    "motley": Kind("workers", "make test", False, {}),
    "motley_http": Kind("serving", "make test", False, {}),
    "llama_cpp": Kind("llama_cpp", "bench/peers.sh llama_cpp", False, {"GGML_NO_BACKTRACE": "1"}),
    "transformers": Kind("transformers", "make test", True, {}),
    "vllm": Kind("vllm", "bench/peers.sh vllm", True, VLLM_ENVIRONMENT),
}


@dataclass(frozen=True)
class Arm:
    """One column of the table: an engine, in one of its variants."""

    name: str  # as the operator wrote it: NAME or NAME:VARIANT
    python: Path

    @property
    def engine(self) -> str:
        return self.name.partition(":")[0]

    @property
    def variant(self) -> str:
        return self.name.partition(":")[2]

    @property
    def kind(self) -> Kind:
        return KINDS[self.engine]

    def environment(self, threads: int) -> dict[str, str]:
        own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **self.kind.environment}
        openmp = self.python.parents[1] / "lib" / "libiomp5.so"
        if self.engine == "vllm" and openmp.exists():
            own["LD_PRELOAD"] = str(openmp)
        return os.environ | own


def find_arm(name: str, peers: Path) -> Arm:
    """The environment that has the engine: the peers' or this one. Raises Absent."""
    kind = KINDS[name.partition(":")[0]]
    places = [peers, peers.with_name(f"{peers.name}-{name.partition(':')[0]}")]
    pythons = [Path(sys.executable), *(place / "bin" / "python" for place in places)]
    for python in pythons:
        if python.exists() and _has(python, kind.module):
            return Arm(name, python.absolute())
    raise Absent(f"{name} is not installed; install it with: {kind.install}")


def _has(python: Path, module: str) -> bool:
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", probe], check=False, timeout=60).returncode == 0


class ArmProcess:
    """One arm's engine, loaded in a process of its own."""

    def __init__(self, arm: Arm, process: asyncio.subprocess.Process, log: Path) -> None:
        self.arm = arm
        self._process = process
        self._log = log

    async def facts(self) -> Facts:
        return Facts(**msgspec.json.decode(await self._line(LOAD_LIMIT_S)))

    async def run(self, workload: Workload, round_number: int) -> Measured:
        """Raises Broken."""
        assert self._process.stdin, "started with a pipe"
        prompts = workload.prompts(round_number)
        request = {"prompts": prompts, "new_tokens": workload.new_tokens}
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        measured = msgspec.json.decode(await self._line(RUN_LIMIT_S), type=Measured)
        expected = workload.requests * workload.new_tokens
        if sum(measured.counts) != expected:
            raise Broken(f"{self.arm.name} gave {sum(measured.counts)} tokens, not {expected}")
        return measured

    async def _line(self, limit_s: float) -> bytes:
        assert self._process.stdout, "started with a pipe"
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), limit_s)
        except TimeoutError:
            raise Broken(f"{self.arm.name} said nothing for {limit_s:.0f} s") from None
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise Broken(f"{self.arm.name} ended:\n{tail}")
        return line

    async def stop(self) -> None:
        """Closed stdin ends it; what does not end is killed with all that it started."""
        assert self._process.stdin, "started with a pipe"
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_LIMIT_S)
        except TimeoutError:
            os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()


@asynccontextmanager
async def start(arm: Arm, setup: Setup) -> AsyncIterator[ArmProcess]:
    """A fresh process of an arm, which is stopped on every way out."""
    with tempfile.NamedTemporaryFile(prefix="motley-bench-", suffix=".log") as log:
        process = await asyncio.create_subprocess_exec(
            arm.python,
            HERE / f"engine_arm_{arm.engine}.py",
            msgspec.json.encode(vars(setup) | {"variant": arm.variant}),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            limit=LINE_LIMIT,
            env=arm.environment(setup.threads),
            start_new_session=True,
        )
        running = ArmProcess(arm, process, Path(log.name))
        try:
            yield running
        finally:
            await running.stop()
