"""The routers that bench/router.py compares, each with what is behind it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.error import URLError

import msgspec
from engine_process import cpu_seconds
from msgspec.structs import replace
from router_floor import Floor
from router_load import Load, Loaded

if TYPE_CHECKING:
    from collections.abc import Callable

READY_S = 90.0
LOAD, FLOOR = (Path(__file__).with_name(f"router_{name}.py") for name in ("load", "floor"))
ROOT = Path(__file__).parents[1]
QUESTION = b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"Hello"}]}'


class Arm(ABC):
    """A context: inside, the router answers on `port`."""

    def __init__(self, peers: Path, step_ms: float, processes: int, engines: int) -> None:
        self.port = free_port()
        self.processes = 1
        self._peers = peers
        self._step_ms = step_ms
        self._asked = processes
        self.engines = engines
        self._started: list[subprocess.Popen[bytes]] = []

    @abstractmethod
    def start(self) -> None:
        """Start everything; the router last."""

    @abstractmethod
    def floor(self, load: Load) -> list[float]:
        """Latencies of the same requests, at the same rate, without the router. Seconds."""

    @property
    def routers(self) -> list[int]:
        """The process ids of the router."""
        parent = self._started[-1].pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        return [parent, *(pid for pid, line in lines.items() if b"--sibling" in line)]

    def cpu_s(self) -> float:
        """What the router has used."""
        return cpu_seconds(self.routers)

    def rss_mb(self) -> float:
        pages = [Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in self.routers]
        return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def __enter__(self) -> Self:
        try:
            self.start()
            self._wait(f"http://127.0.0.1:{self.port}/v1/chat/completions", QUESTION)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._started):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self._started):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _begin(self, *command: str) -> None:
        environment = {**os.environ, "MOTLEY_SECRET": "of the router bench", "RUST_LOG": "error"}
        self._started.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def _wait(self, url: str, body: bytes | None = None) -> None:
        """Until it answers with success."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers)
        end = time.monotonic() + READY_S
        while True:
            if (code := self._started[-1].poll()) is not None:
                raise SystemExit(f"the router ended with {code}: run bench/peers.sh routers?")
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except (URLError, OSError) as error:
                if time.monotonic() > end:
                    raise SystemExit(f"{url} did not answer in {READY_S:g} s: {error}") from None
            time.sleep(0.2)


class Motley(Arm):
    """Our router and its workers, over our own link, with the full policy."""

    @property
    def model(self) -> str:
        return f"m=fake:step_ms={self._step_ms},word=4,sequences=1024"

    def floor(self, load: Load) -> list[float]:
        floor = Floor(
            model=self.model,
            workers=self.engines,
            rate=load.rate,
            requests=load.requests,
            prompt_bytes=load.prompt_bytes,
            tokens=load.tokens,
        )
        command = [sys.executable, str(FLOOR), msgspec.json.encode(floor).decode()]
        done = subprocess.run(command, capture_output=True, check=True, timeout=300)
        return msgspec.json.decode(done.stdout, type=list[float])

    def start(self) -> None:
        self.processes = self._asked
        roles = ("--prefill", "0", "--decode", "0", "--mixed", str(self.engines))
        routers = ("--routers", str(self._asked)) if self._asked > 1 else ()
        self._begin(
            *(sys.executable, "motley.py", "serve", self.model, *roles, *routers),
            *("--port", str(self.port), "--kv-tokens", "4000000"),
        )


class Relay(Arm):
    """A peer between HTTP and HTTP."""

    module = ""
    words: tuple[str, ...] = ()

    def floor(self, load: Load) -> list[float]:
        share = replace(load, port=self._ports[0], rate=load.rate / self.engines)
        return run_load(replace(share, requests=load.requests // self.engines)).latencies

    def start(self) -> None:
        self._ports = [free_port() for _ in range(self.engines)]
        for port in self._ports:
            engine = str(Path(__file__).with_name("router_engine.py"))
            self._begin(sys.executable, engine, str(port), str(self._step_ms))
            self._wait(f"http://127.0.0.1:{port}/health")
        self.route([f"http://127.0.0.1:{port}" for port in self._ports])

    def route(self, urls: list[str]) -> None:
        """Start the router."""
        program = self._peers / "bin" / self.module
        if not program.exists():
            raise SystemExit(f"{program} is not there: run bench/peers.sh routers")
        self._begin(
            *(str(program), *self.words, "--worker-urls", *urls, "--policy", "round_robin"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error"),
            *("--prometheus-port", str(free_port())),
        )


class SglangRouter(Relay):
    module = "sglang-router"
    words = ("launch",)


class VllmRouter(Relay):
    module = "vllm-router"


class MotleyRelay(Relay):
    """Our router between HTTP and HTTP."""

    def route(self, urls: list[str]) -> None:
        self.processes = self._asked
        self._begin(
            *(sys.executable, "motley.py", "serve", "--endpoint", ",".join(urls)),
            *("--routers", str(self._asked), "--port", str(self.port)),
        )


ARMS: dict[str, Callable[[Path, float, int, int], Arm]] = {
    "motley": Motley,
    "motley-relay": MotleyRelay,
    "sglang-router": SglangRouter,
    "vllm-router": VllmRouter,
}


def run_load(load: Load) -> Loaded:
    """In a process of its own."""
    command = [sys.executable, str(LOAD), msgspec.json.encode(load).decode()]
    done = subprocess.run(command, capture_output=True, check=True, timeout=300)
    return msgspec.json.decode(done.stdout, type=Loaded)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
