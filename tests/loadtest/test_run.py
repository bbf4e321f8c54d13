"""The client against the built-in server, over real sockets."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import time
from contextlib import asynccontextmanager

import msgspec
import pytest

from loadtest.api import Endpoint, error_text, model_names
from loadtest.arrivals import Arrivals
from loadtest.client import Client, Exchange, fetch
from loadtest.deadlines import Deadlines
from loadtest.errors import OptionError
from loadtest.measure import Measurement
from loadtest.report import build
from loadtest.server import Behaviour, Server
from loadtest.sizes import Sizes
from loadtest.slo import Slo, SloClass
from loadtest.spec import Spec

QUICK = Behaviour(ttft=0.01, itl=0.002)

# What real time shows, a machine whose cores are taken cannot: it gets further tries.
REAL_TIME = pytest.mark.flaky(reruns=4, reruns_delay=1)


def spec_of(port: int, **changes) -> Spec:
    spec = Spec(
        endpoint=Endpoint(f"http://127.0.0.1:{port}", "known"),
        classes=[SloClass("all", Slo(ttft=1, tpot=1))],
        arrivals=Arrivals("constant", rate=200),
        requests=40,
        input=Sizes(8, 8),
        output=Sizes(4, 4),
    )
    return msgspec.structs.replace(spec, **changes)


async def run(behaviour: Behaviour = QUICK, **changes):
    async with Server(behaviour) as server:
        return await Measurement(spec_of(server.port, **changes)).run()


@pytest.mark.asyncio
@REAL_TIME
async def test_an_open_loop_sends_on_time_and_measures_the_servers_own_times():
    found = await run(arrivals=Arrivals("constant", rate=50))
    assert [round(o.scheduled, 3) for o in found.outcomes] == [at / 50 for at in range(40)]
    assert all(o.ok and o.tokens == o.chunks == 4 for o in found.outcomes)
    assert all(o.prompt_tokens == 8 for o in found.outcomes)
    ordered = sorted(o.ttft for o in found.outcomes)
    assert ordered[0] >= 0.01
    assert ordered[0] < 0.1
    assert found.parts[0].gaps.chunk.count == 40 * 3


@pytest.mark.asyncio
@REAL_TIME
async def test_a_stalled_server_does_not_hold_back_the_schedule():
    """One slot of 20 ms for 40 requests in 0.2 s: the last waits some 0.6 s, measured as such."""
    found = await run(Behaviour(ttft=0.02, itl=0, slots=1), output=Sizes(1, 1))
    last = found.outcomes[-1]
    assert last.sent < found.outcomes[30].end
    assert last.ttft >= 40 * 0.02 - 39 / 200


@pytest.mark.asyncio
@REAL_TIME
async def test_a_closed_loop_keeps_its_users_busy():
    found = await run(concurrency=4)
    assert len(found.outcomes) == 40
    begun = sorted((o.sent, o.end) for o in found.outcomes)
    assert max(sum(s <= at < e for s, e in begun) for at, _ in begun) == 4
    assert all(check.ok for check in build(found).checks if "lag" in check.name)


@pytest.mark.asyncio
async def test_sessions_send_the_answers_back():
    found = await run(turns=3, requests=9)
    by_turn = {(o.session, o.turn): o for o in found.outcomes}
    assert len(by_turn) == 9
    for (session, turn), outcome in by_turn.items():
        if turn:
            assert outcome.scheduled >= by_turn[session, turn - 1].end
            assert outcome.prompt_tokens == 8 * (turn + 1) + 4 * turn


@pytest.mark.asyncio
@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("stream", [True, False])
async def test_both_apis_work_streamed_or_whole(api, stream):
    async with Server(QUICK) as server:
        endpoint = Endpoint(f"http://127.0.0.1:{server.port}/v1", "known", api, stream=stream)
        found = await Measurement(spec_of(server.port, endpoint=endpoint)).run()
    assert all(o.ok and o.tokens == 4 and o.prompt_tokens == 8 for o in found.outcomes)


@pytest.mark.asyncio
async def test_what_has_no_end_times_out_and_what_is_left_is_unfinished():
    slow = Behaviour(ttft=60, itl=0)
    late = await run(slow, requests=3, timeout=0.3)
    assert [o.error for o in late.outcomes] == ["timeout"] * 3
    left = await run(slow, requests=3, grace=0.2)
    assert [o.error for o in left.outcomes] == ["unfinished"] * 3
    assert build(left).share == 0


@pytest.mark.asyncio
async def test_a_stopped_run_ends_at_once_and_is_invalid():
    async with Server(Behaviour(ttft=60)) as server:
        measurement = Measurement(spec_of(server.port, requests=None, duration=600.0))
        running = asyncio.create_task(measurement.run())
        await measurement.started.wait()
        asyncio.get_running_loop().call_later(0.2, measurement.stop)
        found = await asyncio.wait_for(running, 5)
    assert found.parts[0].stopped
    assert {o.error for o in found.outcomes} == {"unfinished"}
    assert not build(found).valid


@pytest.mark.asyncio
async def test_several_client_processes_send_one_schedule():
    found = await run(processes=2)
    assert [o.index for o in found.outcomes] == list(range(40))
    assert len(found.parts) == 2
    assert sum(part.gaps.chunk.count for part in found.parts) == 40 * 3
    report = build(found)
    assert report.latencies["itl_chunk"].count == 40 * 3


@pytest.mark.asyncio
async def test_client_processes_stop_when_they_are_told_to():
    async with Server(Behaviour(ttft=60)) as server:
        spec = spec_of(server.port, requests=None, duration=600.0, processes=2)
        measurement = Measurement(spec)
        running = asyncio.create_task(measurement.run())
        await measurement.started.wait()
        asyncio.get_running_loop().call_later(0.3, measurement.stop)
        found = await asyncio.wait_for(running, 10)
    assert [part.stopped for part in found.parts] == [True, True]
    assert {o.error for o in found.outcomes} == {"unfinished"}


@pytest.mark.asyncio
async def test_an_endpoint_that_is_not_there_fails_each_request():
    found = await Measurement(spec_of(1, requests=3)).run()
    assert [o.error for o in found.outcomes] == ["connect"] * 3
    assert found.outcomes[0].detail


@asynccontextmanager
async def endpoint_that_says(*replies: bytes, then_close: bool = True):
    """A TCP server that answers each request on its connection with the next of `replies`."""
    asked = []

    async def serve(reader, writer):
        while replies[len(asked) :]:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            asked.append(head + await reader.readexactly(length))
            writer.write(replies[len(asked) - 1])
            await writer.drain()
            if then_close:
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], asked
    finally:
        server.close()
        await server.wait_closed()


def stream(*events: bytes) -> bytes:
    body = b"".join(b"data: %s\n\n" % event for event in events)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def plain(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


TOKEN = b'{"choices":[{"delta":{"content":"x"}}]}'
TOOL = b'{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"x"}}]}}]}'
END = b'{"choices":[{"delta":{},"finish_reason":"stop"}]}'


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("reply", "error", "detail"),
    [
        (plain(b"429 Busy", b'{"error":{"message":"later"}}'), "http_429", "later"),
        (plain(b"500 Oops", b"<html>"), "http_500", "<html>"),
        (stream(TOKEN), "cut", "finish_reason"),
        (stream(TOKEN, END)[:-20], "cut", "closed"),
        (stream(END, b"[DONE]"), "empty", "without any text"),
        (stream(TOKEN, b'{"error":{"message":"worker lost"}}'), "stream_error", "worker lost"),
        (stream(TOKEN, b"{"), "protocol", "truncated"),
        (b"SSH-2.0\r\n\r\n", "protocol", "status line"),
        (plain(b"200 OK", b"{"), "protocol", "truncated"),
        (stream(TOKEN, END), None, ""),
        (stream(TOOL, END), None, ""),
        (stream(b'{"choices":[{"text":"x"}]}', b"[DONE]"), None, ""),
    ],
)
async def test_errors_have_their_kind_and_the_endpoints_words(reply, error, detail):
    async with endpoint_that_says(reply) as (port, _):
        endpoint = Endpoint(f"http://127.0.0.1:{port}", "m")
        found = await fetch(endpoint, endpoint.post([{"role": "user", "content": "hi"}], 1), 5)
    assert found.error == error
    assert detail in found.detail


@pytest.mark.asyncio
async def test_an_idle_connection_that_the_server_closed_is_replaced_unnoticed():
    """The second request meets a closing connection, gets nothing, and goes out once more."""
    async with endpoint_that_says(stream(TOKEN, END), stream(TOKEN, END)) as (port, asked):
        client = Client(Endpoint(f"http://127.0.0.1:{port}", "m"))
        loop = asyncio.get_running_loop()
        for _ in range(2):
            done = loop.create_future()
            client.send(Exchange(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", done.set_result))
            assert (await asyncio.wait_for(done, 5)).error is None
        await client.close()
    assert len(asked) == 2


@pytest.mark.asyncio
async def test_keys_slo_headers_and_extra_fields_are_sent():
    async with endpoint_that_says(stream(TOKEN, END)) as (port, asked):
        endpoint = Endpoint(
            f"http://127.0.0.1:{port}", "m", api_key="k", slo_headers=True, extra={"top_p": 0.5}
        )
        slo = SloClass("all", Slo(ttft=0.25, tpot=0.1))
        found = await Measurement(spec_of(port, endpoint=endpoint, requests=1, classes=[slo])).run()
    (sent,) = asked
    assert b"Authorization: Bearer k\r\n" in sent
    assert b"x-slo-ttft-ms: 250\r\nx-slo-tpot-ms: 100\r\n" in sent
    body = msgspec.json.decode(sent.partition(b"\r\n\r\n")[2])
    assert (body["top_p"], body["ignore_eos"], body["stream_options"]) == (
        0.5,
        True,
        {"include_usage": True},
    )
    assert "k" not in build(found).spec.endpoint.api_key


@pytest.mark.asyncio
async def test_chunks_that_come_in_one_read_are_counted():
    async with endpoint_that_says(stream(TOKEN, TOKEN, TOKEN, END)) as (port, _):
        found = await Measurement(spec_of(port, requests=1)).run()
    assert (found.outcomes[0].chunks, found.outcomes[0].coalesced) == (3, 2)


@pytest.fixture
def certificate(tmp_path):
    path = tmp_path / "both.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    words += ["-subj", "/CN=localhost", "-keyout", str(path), "-out", str(tmp_path / "c.pem")]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl command to make a certificate with")
    path.write_text(path.read_text() + (tmp_path / "c.pem").read_text())
    return path


@pytest.mark.asyncio
async def test_https_endpoints_work_and_their_certificates_are_checked(certificate):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(plain(b"200 OK", b'{"data":[{"id":"m"}]}'))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    trusting, strict = Endpoint(url, "m", insecure=True), Endpoint(url, "m")
    answer = await fetch(trusting, trusting.get("/models"), 5)
    refused = await fetch(strict, strict.get("/models"), 5)
    server.close()
    assert model_names(answer.body) == ["m"]
    assert refused.error == "connect"
    assert "certificate" in refused.detail


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", b"200"),
        (b"GET /nowhere HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\n\r\n{", b"400"),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b""),
        (b"x" * 70_000, b""),
    ],
)
async def test_the_built_in_server_refuses_what_it_does_not_understand(request_, status):
    async with Server(QUICK) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request_)
        try:
            line = await asyncio.wait_for(reader.readline(), 5)
        except ConnectionResetError:
            line = b""
        writer.close()
    assert line.split()[1:2] == ([status] if status else [])


@pytest.mark.asyncio
async def test_the_built_in_server_serves_whom_still_waits():
    """One slot: the second of three leaves its queue, so the third is served in its place."""
    async with Server(Behaviour(ttft=0.2, itl=0, slots=1)) as server:
        client = Client(Endpoint(f"http://127.0.0.1:{server.port}", "known"))
        loop, begin = asyncio.get_running_loop(), time.monotonic()
        payload = Endpoint("http://h", "m").post([{"role": "user", "content": "hi"}], 1)
        futures = [loop.create_future() for _ in range(3)]
        exchanges = [Exchange(payload, future.set_result) for future in futures]
        for exchange in exchanges:
            client.send(exchange)
        loop.call_later(0.02, client.cancel, exchanges[1], "cancelled", "")
        ended = await asyncio.wait_for(asyncio.gather(*futures), 5)
        await client.close()
    assert [exchange.error for exchange in ended] == [None, "cancelled", None]
    assert ended[2].end - begin < 0.55


@pytest.mark.asyncio
async def test_deadlines_ring_in_order_and_in_time():
    loop = asyncio.get_running_loop()
    deadlines, rung, done = Deadlines(loop), [], asyncio.Event()
    start = time.monotonic()
    deadlines.at(
        start + 0.02, lambda: (rung.append(2), deadlines.at(start, lambda: rung.append(3)))
    )
    deadlines.at(start + 0.03, lambda: (rung.append(4), done.set()))
    deadlines.at(start + 0.01, lambda: rung.append(1))
    await asyncio.wait_for(done.wait(), 5)
    deadlines.close()
    assert rung == [1, 2, 3, 4]
    assert time.monotonic() >= start + 0.03


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", ""])
def test_a_url_that_is_none_names_the_option(url):
    with pytest.raises(OptionError, match="--url"):
        Endpoint(url, "m")


@pytest.mark.parametrize(
    ("url", "port", "path"),
    [
        ("http://h", 80, "/v1/models"),
        ("https://h/v1/", 443, "/v1/models"),
        ("http://h:81/base", 81, "/base/v1/models"),
    ],
)
def test_urls_may_end_before_v1_or_in_it(url, port, path):
    endpoint = Endpoint(url, "m")
    assert (endpoint.port, endpoint.path("/models")) == (port, path)


def test_error_bodies_of_any_shape_have_a_text():
    assert error_text(b'{"error":{"message":"no"}}') == "no"
    assert error_text(b"\xff plain") == "\ufffd plain"
