"""Plain OpenAI endpoints behind the router, over real sockets, with servers that misbehave."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress

import aiohttp
import pytest

from scheduler.errors import SetupError, WorkerLost
from serving.app import App, serve
from serving.endpoint import Endpoint
from serving.gateway import Gateway
from serving.members import Members
from serving.metrics import Metrics
from serving.openai.limits import HttpLimits
from serving.relay import Relay

pytestmark = pytest.mark.asyncio

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
MODELS = json.dumps({"data": [{"id": "m", "max_model_len": None}]}).encode()
ANSWER = b'{"id":"x","choices":[]}'
EVENTS = (b'data: {"n":1}\n\n', b'data: {"n":2}\n\n', b"data: [DONE]\n\n")


END = object()


def whole(body, status=b"200 OK", more=b""):
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n"
    return head % (status, more, len(body)) + body


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


class Server:
    """An endpoint that answers each POST with the next of `says`: bytes, sent one by one.

    `None` among them cuts the connection there, END closes it in order, an Event is waited for.
    """

    def __init__(self):
        self.says = []
        self.heads, self.bodies = [], []
        self.left = asyncio.Event()  # a client closed its connection before the answer's end
        self.url = ""
        self.tasks = set()

    async def handle(self, reader, writer):
        self.tasks.add(asyncio.current_task())
        try:
            while await self.answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client is done
        finally:
            writer.close()

    async def answer(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /v1/models "):
            writer.write(whole(MODELS))
            return True
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        self.heads.append(head)
        self.bodies.append(await reader.readexactly(length))
        for piece in self.says.pop(0) if len(self.says) > 1 else self.says[0]:
            if piece is None:
                writer.transport.abort()
                return False
            if piece is END:
                return False
            if isinstance(piece, asyncio.Event):
                if not await self.told(piece, reader):
                    return False
            else:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
        return True

    async def told(self, event, reader):
        """Wait for it; False if the client left meanwhile."""
        tasks = [asyncio.create_task(wait) for wait in (reader.read(1), event.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not event.is_set():
            self.left.set()
        return event.is_set()


@asynccontextmanager
async def servers(count):
    made = [Server() for _ in range(count)]
    listening = []
    for server in made:
        listening.append(await asyncio.start_server(server.handle, "127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{listening[-1].sockets[0].getsockname()[1]}"
        server.close = listening[-1].close
    try:
        yield made
    finally:
        for each in listening:
            each.close()
        for server in made:
            if server.tasks:
                await asyncio.wait(server.tasks, timeout=5)


class Front:
    def __init__(self, relay, metrics, http, address):
        self.relay, self.metrics, self.http, self.address = relay, metrics, http, address

    async def post(self, path="/v1/chat/completions", **fields):
        """Status, headers and bytes."""
        headers = {"Authorization": "Bearer k", "X-Request-Id": "me"}
        async with self.http.post(path, json=CHAT | fields, headers=headers) as response:
            return response.status, response.headers, await response.read()

    def count(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels)


@asynccontextmanager
async def router(*urls, until):
    metrics, limits, gateway = Metrics(), HttpLimits(), Gateway(Members())
    relay = Relay(urls, gateway, limits, alone=True)
    metrics.registry.register(relay)
    watching = asyncio.create_task(relay.run())
    app = App(gateway, metrics, limits, relay)
    try:
        async with (
            serve(app, "127.0.0.1", 0, drain_s=0.1) as (host, port),
            aiohttp.ClientSession(f"http://{host}:{port}") as http,
        ):
            await until(lambda: all(each.models for each in relay.endpoints))
            yield Front(relay, metrics, http, (host, port))
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


@pytest.fixture
def relayed(until):
    """`async with relayed(n) as (front, servers)`: a router in front of n endpoints."""

    @asynccontextmanager
    async def start(count=1):
        async with servers(count) as made, router(*(s.url for s in made), until=until) as front:
            yield front, made

    return start


async def test_body_headers_and_answer_pass_as_they_are(relayed):
    async with relayed() as (front, (server,)):
        server.says = [[whole(ANSWER, b"422 Unprocessable Entity", b"Retry-After: 7\r\n")]]
        status, headers, body = await front.post(odd="field")
        assert (status, body, headers["Retry-After"]) == (422, ANSWER, "7")
        assert headers["X-Request-Id"] == "me"
        assert json.loads(server.bodies[0]) == CHAT | {"odd": "field"}
        (head,) = server.heads
        assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:")
        assert b"Authorization: Bearer k\r\n" in head
        assert head.lower().count(b"x-request-id: me\r\n") == 1
        assert head.lower().count(b"content-length:") == 1
        assert front.count("motley_requests_total", model="m", code="422") == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
async def test_the_other_paths_are_relayed_too(relayed, path):
    async with relayed() as (front, (server,)):
        server.says = [[whole(ANSWER)]]
        assert (await front.post(path, prompt="a", input="b"))[::2] == (200, ANSWER)
        assert server.heads[0].startswith(b"POST " + path.encode())


@pytest.mark.parametrize(
    "says",
    [
        [HEAD, *(chunk(event) for event in EVENTS), b"0\r\n\r\n"],
        [HEAD + chunk(EVENTS[0]), chunk(b"".join(EVENTS[1:])) + b"0\r\n", b"Trailer: x\r\n\r\n"],
        [bytes([b]) for b in HEAD + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", *EVENTS, END],
        [b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD, chunk(b"".join(EVENTS)), b"0;x=y\r\n\r\n"],
    ],
    ids=["chunks", "trailer", "byte by byte", "until close", "100 first"],
)
async def test_events_pass_however_they_are_framed(relayed, says):
    async with relayed() as (front, (server,)):
        server.says = [says]
        for _ in range(2):  # the connection is used again
            status, headers, body = await front.post(stream=True)
            assert (status, body) == (200, b"".join(EVENTS))
            assert headers["Content-Type"] == "text/event-stream"


async def test_connections_are_used_again_and_one_that_went_stale_costs_nobody(relayed):
    async with relayed() as (front, (server,)):
        server.says = [[whole(ANSWER)], [whole(ANSWER)], [None], [whole(ANSWER)]]
        assert [(await front.post())[0] for _ in range(3)] == [200] * 3
        assert front.relay.retried == 0


@pytest.mark.parametrize(
    "says",
    [
        [None],
        [HEAD, None],
        [whole(ANSWER)[:-3], None],
        [whole(b"{}", b"503 Service Unavailable")],
        [b"SSH-2.0-OpenSSH\r\n\r\n"],
        [HEAD, b"zz\r\n"],
        [b"HTTP/1.1 200 OK\r\nX-A: a\nX-B: b\r\nContent-Length: 0\r\n\r\n"],
    ],
    ids=["no word", "head only", "half a body", "503", "no HTTP", "no chunk", "a line in a line"],
)
async def test_before_the_first_byte_another_endpoint_is_asked(relayed, says):
    async with relayed(2) as (front, made):
        for server in made:
            server.says = [[whole(ANSWER)]]
        made[0].says = [says]
        answers = [await front.post() for _ in range(2)]
        assert [(status, body) for status, _, body in answers] == [(200, ANSWER)] * 2
        assert front.relay.retried == 2  # both began where they had to fail
        assert front.count("motley_endpoint_retries_total") == 2


async def test_a_stream_whose_endpoint_is_lost_says_so_and_is_not_done(relayed):
    async with relayed() as (front, (server,)):
        server.says = [[HEAD, chunk(EVENTS[0]), None]]
        status, _, body = await front.post(stream=True)
        first, error = body.removesuffix(b"\n\n").split(b"\n\n")
        assert (status, first) == (200, EVENTS[0].strip())
        error = json.loads(error.removeprefix(b"data: "))["error"]
        assert error["type"] == "server_error"
        assert "lost in the middle" in error["message"]
        assert front.count("motley_requests_total", model="m", code="503") == 1


async def test_when_no_endpoint_answers_it_is_a_503_of_openais_shape(relayed):
    async with relayed(2) as (front, made):
        for server in made:
            server.says = [[None]]
        status, headers, body = await front.post()
        error = json.loads(body)["error"]
        assert (status, error["code"], headers["Retry-After"]) == (503, "unavailable", "1")
        assert "no endpoint that serves 'm' answers" in error["message"]


async def test_the_fewest_in_flight_go_first_and_equals_take_turns(relayed):
    async with relayed(3) as (front, made):
        done = asyncio.Event()
        for server in made:
            server.says = [[done, whole(ANSWER)]]
        asks = [asyncio.create_task(front.post()) for _ in range(9)]
        while sum(len(server.bodies) for server in made) < 9:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0)
        assert [len(server.bodies) for server in made] == [3] * 3
        assert front.count("motley_endpoint_requests_in_flight", endpoint=made[0].url) == 3
        done.set()
        assert {(await ask)[0] for ask in asks} == {200}


async def test_who_does_not_read_its_answer_is_not_given_the_next_one(relayed):
    big, count = bytes(16 << 20), 3  # more than the sockets between take
    async with relayed() as (front, (server,)):
        server.says = [[whole(big)]]
        body = json.dumps(CHAT).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        reader, writer = await asyncio.open_connection(*front.address)
        writer.write((head % len(body) + body) * count)
        (endpoint,) = front.relay.endpoints
        async with asyncio.timeout(20):
            while endpoint.in_flight or not server.bodies:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0)
            for _ in range(100):
                await asyncio.sleep(0)
            assert len(server.bodies) == 1
            for _ in range(count):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
                assert await reader.readexactly(len(big)) == big
        assert len(server.bodies) == count
        writer.close()


async def test_a_client_that_leaves_takes_its_request_along(relayed):
    async with relayed() as (front, (server,)):
        server.says = [[HEAD, chunk(EVENTS[0]), asyncio.Event()]]
        ask = asyncio.create_task(front.post(stream=True))
        while not server.bodies:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0)
        ask.cancel()
        async with asyncio.timeout(5):
            await server.left.wait()


async def test_an_endpoint_that_is_silent_is_lost_with_what_it_holds(relayed, until):
    """The watch closes it after its second miss, which is done here without waiting for them."""
    async with relayed(2) as (front, made):
        for server in made:
            server.says = [[whole(ANSWER)]]
        made[0].says = [[asyncio.Event()]]
        held = asyncio.create_task(front.post())
        await until(lambda: made[0].bodies or held.done())
        made[0].close()
        front.relay.endpoints[0].close()
        assert (await held)[0] == 200
        assert front.count("motley_endpoint_up", endpoint=made[0].url) == 0


async def test_models_health_and_unknown_models(relayed):
    async with relayed() as (front, _):
        async with front.http.get("/v1/models") as response:
            (model,) = (await response.json())["data"]
        assert (model["id"], model["max_model_len"]) == ("m", 0)
        async with front.http.get("/ready") as response:
            assert response.status == 200
        front.relay.endpoints[0].close()
        async with front.http.get("/ready") as response:
            assert response.status == 503
        status, _, body = await front.post(model="gpt")
        assert (status, json.loads(body)["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://a..b", "https://127.0.0.1:1"])
async def test_what_cannot_be_reached_is_lost(url):
    with pytest.raises(WorkerLost, match="no connection"):
        await Endpoint(url).look()


@pytest.mark.parametrize("url", ["gpu:8000", "ftp://gpu", "http://", "http://gpu:99999"])
async def test_what_is_no_url_is_refused(url):
    with pytest.raises(SetupError, match="write it as http://HOST:PORT"):
        Endpoint(url)
