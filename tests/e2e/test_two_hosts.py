"""Two hosts, as network namespaces: a worker on the second one joins and takes traffic."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip"),
        reason="making network namespaces needs root and iproute2",
    ),
]

ROUTER, WORKER = "10.77.0.1", "10.77.0.2"
ASK = """
import json, sys, urllib.request
tokens = int(sys.argv[3])
body = {"model": "fake", "prompt": sys.argv[2], "seed": 1, "max_tokens": tokens}
body = json.dumps(body).encode()
reply = urllib.request.urlopen(sys.argv[1] + "/v1/completions", body, timeout=20)
print(json.load(reply)["choices"][0]["text"])
"""
SCRAPE = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1] + "/metrics", timeout=10).read().decode())
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


@contextmanager
def host(name: str):
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine refuses network namespaces: {error.stderr.decode().strip()}")
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        ip("netns", "delete", name)


@pytest.fixture
def hosts():
    """Names of two namespaces joined by a cable; ROUTER's and WORKER's address on its ends."""
    tag = f"{os.getpid():x}"
    with ExitStack() as stack:
        one, two = (stack.enter_context(host(f"motley-{tag}-{side}")) for side in "ab")
        ends = (f"ma{tag}", f"mb{tag}")
        ip("link", "add", ends[0], "netns", one, "type", "veth", "peer", ends[1], "netns", two)
        for name, end, address in ((one, ends[0], ROUTER), (two, ends[1], WORKER)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
        yield one, two


def inside(name: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", name)


def python(name: str, code: str, *arguments: str) -> str:
    """What a small program prints on that host."""
    command = [*inside(name), "python3", "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def ask(cluster, name: str, prompt: str, tokens: int = 20) -> str:
    return python(name, ASK, cluster.url, prompt, str(tokens))


def counts(cluster, name: str, metric: str, worker: str) -> bool:
    """This figure of the worker is not zero."""
    text = python(name, SCRAPE, cluster.url)
    pattern = rf'^{metric}{{.*worker="{worker}"}} [1-9]'
    return re.search(pattern, text, re.MULTILINE) is not None


def has_sent_kv(cluster, name: str, worker: str) -> bool:
    return counts(cluster, name, "motley_worker_kv_bytes_sent_total", worker)


@pytest.mark.parametrize(
    ("here", "there"),
    [("prefill", "decode"), ("decode", "prefill")],
    ids=["pushes KV to the other host", "takes KV from the other host"],
)
def test_a_worker_on_another_host_joins_and_takes_its_share(
    serve, launch, until, hosts, here, there
):
    one, two = hosts
    secret = {"MOTLEY_SECRET": "between the two of us"}
    counts = {"prefill": "0", "decode": "0", here: "1"}
    shape = [word for role, count in counts.items() for word in (f"--{role}", count)]
    with serve(
        "fake", *shape, "--cluster", "0.0.0.0:8100", prefix=inside(one), environment=secret
    ) as router:
        alone = ask(router, one, "hello")
        join = ("worker", "fake", "--role", there, "--name", "far", "--join", f"{ROUTER}:8100")
        with launch(*join, prefix=inside(two), environment=secret) as far:
            far.wait_for("joined the router")
            router.wait_for("worker far joined")
            assert ask(router, one, "hello") == alone
            sender = f"{here}-0" if there == "decode" else "far"
            assert until(lambda: has_sent_kv(router, one, sender), 10)
            assert far.stop() == 0
        router.wait_for("worker far left")
        assert ask(router, one, "hello") == alone


def test_a_worker_with_another_secret_is_refused(launch, serve, hosts):
    one, two = hosts
    shape = ("--prefill", "0", "--decode", "0", "--mixed", "1", "--cluster", "0.0.0.0:8100")
    with serve("fake", *shape, prefix=inside(one), environment={"MOTLEY_SECRET": "one"}):
        join = ("worker", "fake", "--join", f"{ROUTER}:8100")
        with launch(*join, prefix=inside(two), environment={"MOTLEY_SECRET": "two"}) as stranger:
            assert stranger.process.wait(30) == 2
            assert "motley: the router refused this worker: wrong cluster secret" in stranger.log


def test_a_cable_that_is_pulled_costs_nobody_a_token(launch, serve, until, hosts):
    """No connection is reset: the far worker is only silent, until the cable is back."""
    one, two = hosts
    cable = f"mb{os.getpid():x}"
    secret = {"MOTLEY_SECRET": "between the two of us"}
    model = "fake:step_ms=30,tokens=400"
    shape = ("--prefill", "0", "--decode", "0", "--mixed", "1", "--cluster", "0.0.0.0:8100")
    with serve(model, *shape, prefix=inside(one), environment=secret) as router:
        alone = ask(router, one, "hello", 100)
        join = ("worker", model, "--name", "far", "--join", f"{ROUTER}:8100")
        with (
            launch(*join, prefix=inside(two), environment=secret),
            ThreadPoolExecutor() as clients,
        ):
            router.wait_for("worker far joined")
            asked = [clients.submit(ask, router, one, "hello", 100) for _ in range(6)]
            assert until(lambda: counts(router, one, "motley_worker_running", "far"), 10)
            ip("-n", two, "link", "set", cable, "down")
            router.wait_for("worker far is silent")
            assert [answer.result() for answer in asked] == [alone] * 6
            ip("-n", two, "link", "set", cable, "up")
            router.wait_for(r"(?s)worker far left.*worker far joined")
            assert ask(router, one, "hello", 100) == alone
