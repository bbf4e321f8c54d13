"""The application over real sockets, in front of a scripted generator."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import string
from contextlib import asynccontextmanager, suppress

import aiohttp
import openai
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from scheduler.errors import BadRequest, SetupError, Unavailable
from scheduler.messages import Alternative, FinishReason, TokenLogprob
from serving.app import App, serve
from serving.ask import Delta, ModelInfo
from serving.metrics import Metrics
from serving.openai.limits import HttpLimits
from serving.openai.requests import ChatBody, CompletionBody

pytestmark = pytest.mark.asyncio

SAY = [{"role": "user", "content": "Say it."}]
CHAT = {"model": "tiny", "messages": SAY}
TEXT = {"model": "tiny", "prompt": "Say it."}
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
WORDS = ("Hello", ", wör", "ld", "!")
ANSWER = "".join(WORDS)
LIMITS = HttpLimits(body_bytes=4096, n=8, choices=16)
LAST_CHUNK = b"0\r\n\r\n"  # of HTTP's chunked encoding
SOON = 5.0  # seconds: what hangs fails here instead of at the suite's limit

REFUSALS = {
    "long": BadRequest("Too long.", param="messages", code="context_length_exceeded"),
    "full": Unavailable("All are busy.", retry_after=2.2, status=429),
    "busy": Unavailable("No worker.", retry_after=0.1),
    "bug": ZeroDivisionError("secret detail"),
}
FAILURES = {"dies": Unavailable("The last worker was lost."), "breaks": KeyError("secret detail")}


class Script:
    """A Generator that says WORDS in every choice; the model's name says what goes wrong.

    REFUSALS refuse, FAILURES fail after the first word, `hangs` says nothing more after it, `slow`
    does not even accept, `floods` never ends.
    """

    known = ("tiny", "hangs", "slow", "floods", *REFUSALS, *FAILURES)

    def __init__(self):
        self.asks = []
        self.said = 0  # deltas
        self.begun = asyncio.Event()
        self.left = asyncio.Event()
        self.ready = True

    def models(self):
        return [ModelInfo(name, 2048, 1_700_000_000.5) for name in (*self.known, "a/b")]

    @asynccontextmanager
    async def open(self, ask):
        self.asks.append(ask)
        if ask.model not in self.known:
            raise BadRequest("No such model.", param="model", code="model_not_found", status=404)
        if ask.model in REFUSALS:
            raise REFUSALS[ask.model]
        try:
            if ask.model == "slow":
                self.begun.set()
                await asyncio.Event().wait()
            yield Saying(self, ask)
        finally:
            self.left.set()


class Saying:
    """The stream of one ask."""

    def __init__(self, script, ask):
        self.script = script
        self.ask = ask
        self.prompt_tokens = 3 * len(ask.prompts)
        self.deltas = self.say()

    async def pour(self, take):
        async for delta in self.deltas:
            if not take(delta):
                return False
        return True

    async def say(self):
        for number, word in enumerate(WORDS):
            for index in range(self.ask.n * len(self.ask.prompts)):
                yield self.delta(index, word)
            if number == 0:
                self.script.begun.set()
                if self.ask.model in FAILURES:
                    raise FAILURES[self.ask.model]
                if self.ask.model == "hangs":
                    await asyncio.Event().wait()
                while self.ask.model == "floods":
                    yield self.delta(0, "x" * 10_000)

    def delta(self, index, word):
        self.script.said += 1
        logprobs = ()
        if self.ask.sampling.logprobs is not None:
            top = (Alternative("~", b"~", float("-inf")),) * self.ask.sampling.logprobs
            logprobs = (TokenLogprob(word, word.encode(), -0.5, top),)
        finish = FinishReason.STOP if word == WORDS[-1] else None
        return Delta(index, word, 1, logprobs, finish)


class Edge:
    """A running application, and a client of it."""

    def __init__(self, script, metrics, address, http):
        self.script = script
        self.metrics = metrics
        self.address = address
        self.http = http

    async def post(self, path, body, **headers):
        """Status, headers and decoded JSON of the answer to `body`, an object or bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(path, data=data, headers=headers) as response:
            return response.status, response.headers, await response.json()

    async def events(self, path, body):
        """What follows each `data: ` of a stream."""
        async with self.http.post(path, json=body | {"stream": True}) as response:
            assert response.headers["Content-Type"] == "text/event-stream"
            text = (await response.read()).decode()
        assert text.endswith("\n\n")
        events = text.removesuffix("\n\n").split("\n\n")
        assert all(event.startswith("data: ") for event in events)
        return [event.removeprefix("data: ") for event in events]

    def count(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels)

    async def idle(self):
        """Let the event loop run until no request is in flight."""
        async with asyncio.timeout(SOON):
            while self.count("motley_requests_in_flight"):  # noqa: ASYNC110 - nobody sets an event
                await asyncio.sleep(0)


@asynccontextmanager
async def running(limits=LIMITS):
    script, metrics = Script(), Metrics()
    async with serve(App(script, metrics, limits), "127.0.0.1", 0, drain_s=0.1) as address:
        base = f"http://127.0.0.1:{address[1]}"
        async with aiohttp.ClientSession(base) as http, asyncio.timeout(SOON * 10):
            yield Edge(script, metrics, address, http)


@pytest_asyncio.fixture
async def edge():
    async with running() as running_edge:
        yield running_edge


@pytest_asyncio.fixture
async def client(edge):
    base = f"http://127.0.0.1:{edge.address[1]}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as real:
        yield real


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


async def test_the_openai_client_reads_a_whole_chat(client):
    answer = await client.chat.completions.create(**CHAT, n=2, logprobs=True, top_logprobs=1)

    ChatCompletion.model_validate(answer.to_dict(), strict=True)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.message.content for choice in answer.choices} == {ANSWER}
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    tokens = answer.choices[1].logprobs.content
    assert [token.token for token in tokens] == list(WORDS)
    assert tokens[1].bytes == list(", wör".encode())
    assert tokens[1].top_logprobs[0].logprob == -9999.0
    details, usage = {"cached_tokens": 0}, answer.usage.to_dict()
    assert usage.pop("prompt_tokens_details") == details
    assert usage == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    assert answer.model == "tiny"


async def test_the_openai_client_reads_a_streamed_chat(client):
    stream = await client.chat.completions.create(
        **CHAT, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.to_dict(), strict=True)
    *pieces, last = chunks
    assert last.choices == []
    assert last.usage.total_tokens == 3 + 8
    assert {piece.usage for piece in pieces} == {None}
    for index in range(2):
        mine = [p.choices[0] for p in pieces if p.choices[0].index == index]
        assert "".join(choice.delta.content for choice in mine) == ANSWER
        assert [choice.delta.role for choice in mine] == ["assistant", None, None, None]
        assert [choice.finish_reason for choice in mine] == [None, None, None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_openai_client_reads_whole_completions(client):
    answer = await client.completions.create(model="tiny", prompt=["a", "b"], n=2, logprobs=1)

    Completion.model_validate(answer.to_dict(), strict=True)
    assert [choice.text for choice in answer.choices] == [ANSWER] * 4
    assert answer.choices[3].logprobs.to_dict() == {
        "tokens": list(WORDS),
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{word: -0.5, "~": -9999.0} for word in WORDS],
        "text_offset": [0, 5, 10, 12],
    }
    assert answer.usage.prompt_tokens == 6


async def test_the_openai_client_reads_streamed_completions(client):
    stream = await client.completions.create(**TEXT, stream=True, logprobs=0)
    choices = [chunk.choices[0] async for chunk in stream]

    assert "".join(choice.text for choice in choices) == ANSWER
    assert [choice.logprobs.text_offset for choice in choices] == [[0], [5], [10], [12]]
    assert [choice.finish_reason for choice in choices] == [None, None, None, "stop"]


async def test_the_first_event_waits_for_nothing_and_the_last_one_leaves_with_the_end(edge):
    reader, writer = await send(edge, CHAT | {"stream": True})
    await reader.readuntil(b"\r\n\r\n")
    sizes = []
    while size := int(await reader.readline(), 16):
        sizes.append((await reader.readexactly(size)).count(b"data: "))
        await reader.readline()
    assert (sizes[0], sum(sizes)) == (1, len(WORDS) + 1)
    assert sizes[-1] > 1
    writer.close()


async def test_events_are_one_for_each_delta_then_done(edge):
    events = await edge.events(CHAT_PATH, CHAT)

    assert len(events) == len(WORDS) + 1
    assert events[-1] == "[DONE]"
    first = json.loads(events[0])
    assert first | {"id": "", "created": 0} == {
        "id": "",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "delta": {"content": "Hello", "role": "assistant"},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
    }


async def test_models_are_listed_and_found_by_names_with_slashes(edge, client):
    listed = [model.id async for model in await client.models.list()]
    assert "tiny" in listed
    async with edge.http.get("/v1/models/a/b") as response:
        model = Model.model_validate(await response.json())
    assert (model.id, model.created, model.max_model_len) == ("a/b", 1_700_000_000, 2048)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("nowhere")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "status", "param", "code", "retry_after"),
    [
        ("nobody's", 404, "model", "model_not_found", None),
        ("long", 400, "messages", "context_length_exceeded", None),
        ("full", 429, None, "rate_limit_exceeded", "3"),
        ("busy", 503, None, "unavailable", "1"),
        ("bug", 500, None, "internal_error", None),
    ],
)
async def test_a_refusal_is_a_json_error_even_for_a_stream(
    edge, model, stream, status, param, code, retry_after
):
    got, headers, body = await edge.post(CHAT_PATH, CHAT | {"model": model, "stream": stream})

    assert (got, headers.get("Retry-After")) == (status, retry_after)
    assert (body["error"]["param"], body["error"]["code"]) == (param, code)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in body["error"]["message"]


async def test_an_unforeseen_error_is_logged_with_the_request_id(edge, caplog):
    with caplog.at_level(logging.ERROR):
        await edge.post(CHAT_PATH, CHAT | {"model": "bug"}, **{"X-Request-Id": "abc-1"})

    record = next(r for r in caplog.records if r.name == "serving.openai.errors")
    assert "abc-1" in record.message
    assert record.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize(("model", "code"), [("dies", "unavailable"), ("breaks", "internal_error")])
async def test_a_failure_midway_ends_the_stream_with_an_error_and_no_done(edge, model, code):
    first, last = await edge.events(CHAT_PATH, CHAT | {"model": model})

    assert json.loads(first)["choices"][0]["delta"]["content"] == WORDS[0]
    assert json.loads(last)["error"]["code"] == code
    assert "secret" not in last
    assert edge.script.left.is_set()


@pytest.mark.parametrize(("model", "status"), [("dies", 503), ("breaks", 500)])
async def test_a_failure_midway_of_a_whole_answer_is_its_status(edge, model, status):
    assert (await edge.post(CHAT_PATH, CHAT | {"model": model}))[0] == status


async def test_the_openai_client_raises_on_a_failure_midway(client):
    stream = await client.chat.completions.create(**CHAT | {"model": "dies"}, stream=True)
    with pytest.raises(openai.APIError, match="last worker"):
        async for _ in stream:
            pass


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"null", 400, None),
        (b"\xff\xfe", 400, None),
        (b'{"model": "\xff"}', 400, None),
        (b'{"model": "\\ud800"}', 400, None),
        (b'{"temperature": NaN}', 400, None),
        (b'{"seed": 1' + b"0" * 4000 + b"}", 400, "model"),
        (b'{"x":' + b"[" * 2040 + b"]" * 2040 + b"}", 400, None),
        (b'{"model": "tiny"}', 400, "messages"),
        (b" " * 4097, 413, None),
    ],
)
async def test_a_damaged_body_is_refused(edge, body, status, param):
    got, _, answer = await edge.post(CHAT_PATH, body)

    assert got == status
    assert answer["error"]["param"] == param
    assert answer["error"]["type"] == "invalid_request_error"


async def test_a_body_without_length_is_refused_once_it_is_too_large(edge):
    async def parts():
        for _ in range(5):
            yield b" " * 1000

    async with edge.http.post(CHAT_PATH, data=parts()) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "body_too_large"


async def test_a_compressed_body_is_read_and_its_size_counts_unpacked(edge):
    good, bomb = (gzip.compress(body) for body in (json.dumps(CHAT).encode(), b" " * 1_000_000))
    packed = {"Content-Encoding": "gzip"}

    assert (await edge.post(CHAT_PATH, good, **packed))[0] == 200
    assert (await edge.post(CHAT_PATH, bomb, **packed))[0] == 413
    assert (await edge.post(CHAT_PATH, b"not gzip", **packed))[0] == 400


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "odd"])
async def test_the_content_type_does_not_matter(edge, kind):
    assert (await edge.post(CHAT_PATH, CHAT, **{"Content-Type": kind}))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/", 404, None),
        ("POST", "/v1/images/generations", 404, None),
        ("GET", CHAT_PATH, 405, "POST"),
        ("DELETE", "/v1/models", 405, "GET,HEAD"),
        ("GET", "/v1/models/", 404, None),
        ("GET", "/%ff%fe?q=%ff", 404, None),
    ],
)
async def test_other_routes_are_refused_in_openais_shape(edge, method, path, status, allow):
    async with edge.http.request(method, path) as response:
        error = (await response.json())["error"]
        assert (response.status, response.headers.get("Allow")) == (status, allow)
    assert error["type"] == "invalid_request_error"


async def test_head_answers_like_get_and_sends_no_body(edge):
    reader, writer = await asyncio.open_connection(*edge.address)
    writer.write(b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    got, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()

    length = b"Content-Length: %d" % len(body)
    assert length in head.split(b"\r\n")
    assert length in got.split(b"\r\n")


async def test_a_body_that_its_client_holds_back_is_asked_for(edge):
    async with edge.http.post(CHAT_PATH, json=CHAT, expect100=True) as response:
        assert response.status == 200
    status, _, error = await edge.post(CHAT_PATH, CHAT, Expect="a miracle")
    assert (status, error["error"]["type"]) == (417, "invalid_request_error")


async def test_bytes_that_are_no_text_in_the_request_line_do_no_harm(edge):
    reader, writer = await asyncio.open_connection(*edge.address)
    writer.write(b"GET /\xff\xed\xa0\x80 HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xff\r\n\r\n")
    status = await reader.readline()
    writer.close()

    assert status.split()[1] in (b"400", b"404")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    sorted({*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__, "unknown"})
)
# Values that some field takes, and their neighbours: they get past the first check.
NEAR = st.sampled_from(
    json.loads("""[
        0, 1, -1, 2, 20, 21, 2147483648, 9223372036854775808, 0.5, 1e-320, 1e308, true,
        "", "tiny", "none", [], [""], ["a"], [1], [[1]], [[]], ["a", 1], [-1], {"type": "text"},
        {"1": 1}, {"-1": 1}, {"x": 1}, {"1": 101}, {"include_usage": true},
        [{"role": "user"}], [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]
    ]""")
)
ENDPOINTS = st.sampled_from([(CHAT_PATH, CHAT), (TEXT_PATH, TEXT)])


async def answers_well(edge, path, body):
    async with edge.http.post(path, data=body) as response:
        text = await response.text()
        assert response.status in (200, 400, 404), text
        assert response.headers["X-Request-Id"]
        if response.status != 200:
            error = json.loads(text)["error"]
            assert error["message"]
            assert set(error) == {"message", "type", "param", "code"}


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(ENDPOINTS, st.binary() | JSON.map(json.dumps))
async def test_no_body_is_answered_by_500(edge, endpoint, body):
    await answers_well(edge, endpoint[0], body)


@FUZZ
@given(ENDPOINTS, st.dictionaries(FIELDS, NEAR | JSON, min_size=1, max_size=3))
async def test_no_value_in_a_valid_body_is_answered_by_500(edge, endpoint, changed):
    path, body = endpoint
    await answers_well(edge, path, json.dumps(body | changed))


# ── ids ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", [CHAT_PATH, TEXT_PATH, "/nowhere"])
async def test_a_request_id_comes_back_on_every_answer(edge, path):
    for body in (CHAT | TEXT, b"{"):
        _, headers, answer = await edge.post(path, body, **{"X-Request-Id": "my id/1"})
        assert headers["X-Request-Id"] == "my id/1"
        assert answer.get("id", "my id/1").endswith("my id/1")


@pytest.mark.parametrize("sent", ["ä", "x" * 129, "\t"])
async def test_an_unfit_request_id_is_replaced(edge, sent):
    _, headers, answer = await edge.post(CHAT_PATH, CHAT, **{"X-Request-Id": sent})

    given_id = headers["X-Request-Id"]
    assert len(given_id) == 32
    assert set(given_id) <= set(string.hexdigits)
    assert answer["id"] == f"chatcmpl-{given_id}"


async def test_a_stream_carries_the_request_id(edge):
    headers = {"X-Request-Id": "s-1"}
    async with edge.http.post(TEXT_PATH, json=TEXT | {"stream": True}, headers=headers) as answer:
        assert answer.headers["X-Request-Id"] == "s-1"
        assert b'"id":"cmpl-s-1"' in await answer.read()


# ── clients that leave, stall, or are slow ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "stream"), [("hangs", True), ("hangs", False), ("slow", True), ("slow", False)]
)
async def test_a_client_that_leaves_ends_its_generation_at_once(edge, model, stream):
    _, writer = await send(edge, CHAT | {"model": model, "stream": stream})
    async with asyncio.timeout(SOON):
        await edge.script.begun.wait()
        assert not edge.script.left.is_set()
        writer.close()
        await edge.script.left.wait()
        await edge.idle()

    assert edge.count("motley_requests_total", model=model, code="499") == 1


async def test_a_client_that_does_not_read_holds_the_generator_back_then_is_let_go():
    async with running(HttpLimits(stall_s=0.1)) as edge:
        reader, writer = await send(edge, CHAT | {"model": "floods", "stream": True})
        async with asyncio.timeout(SOON):
            await edge.script.left.wait()
            received = b""
            with suppress(ConnectionResetError):
                while more := await reader.read(2**20):
                    received = (received + more)[-8:]
        assert not received.endswith(LAST_CHUNK), "the connection must be cut, not drained"
        writer.close()

        # Each delta is 10 kB: what lies in the sockets' buffers, not more.
        assert edge.script.said < 2000
        await edge.idle()
        assert edge.count("motley_requests_total", model="floods", code="499") == 1


async def test_a_length_beyond_the_limit_is_refused_before_the_body_comes(edge):
    reader, writer = await asyncio.open_connection(*edge.address)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4097\r\n\r\n")
    async with asyncio.timeout(SOON):
        assert (await reader.readline()).split()[1] == b"413"
    writer.close()


async def test_a_body_that_does_not_come_is_refused():
    async with running(HttpLimits(body_s=0.05)) as edge:
        reader, writer = await asyncio.open_connection(*edge.address)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        async with asyncio.timeout(SOON):
            assert (await reader.readline()).split()[1] == b"408"
        writer.close()


async def send(edge, body):
    """A raw connection over which `body` has been posted to the chat endpoint."""
    data = json.dumps(body).encode()
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(*edge.address, limit=1024)
    writer.write(head.encode() + data)
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("version", "sent", "said", "stays"),
    [
        ("1.1", "", "", True),
        ("1.1", "close", "close", False),
        ("1.0", "", "", False),
        ("1.0", "keep-alive", "keep-alive", True),
    ],
)
async def test_a_connection_stays_where_both_ends_can_tell(
    edge, version, sent, said, stays, stream
):
    data = json.dumps(CHAT | {"stream": stream}).encode()
    head = f"POST {CHAT_PATH} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    head += f"Connection: {sent}\r\n\r\n" if sent else "\r\n"
    reader, writer = await asyncio.open_connection(*edge.address)
    writer.write(head.encode() + data)
    endless = stream and version == "1.0"  # only its connection's end ends it
    async with asyncio.timeout(SOON):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        assert lines[0] == f"HTTP/{version} 200 OK"
        assert headers.get("Connection", "") == ("" if endless else said)
        assert {"X-Request-Id", "Date", "Content-Type"} <= headers.keys()
        if "Content-Length" in headers:
            await reader.readexactly(int(headers["Content-Length"]))
        elif endless:
            assert (await reader.read()).endswith(b"data: [DONE]\n\n")
        else:
            assert headers["Transfer-Encoding"] == "chunked"
            await reader.readuntil(LAST_CHUNK)
        if stays and not endless:
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        else:
            assert await reader.read() == b""
    writer.close()


# ── the process ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/health", "/ping", "/ready", "/version"])
async def test_the_process_says_how_it_is(edge, path):
    async with edge.http.get(path) as response:
        assert response.status == 200


async def test_not_ready_is_503_while_health_stays_200(edge):
    edge.script.ready = False
    async with edge.http.get("/ready") as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert (await response.json())["error"]["code"] == "unavailable"
    async with edge.http.get("/health") as response:
        assert response.status == 200


async def test_metrics_count_each_request_once_under_known_models_only(edge):
    for model in ("tiny", "busy", "made-up", "dies"):
        await edge.post(CHAT_PATH, CHAT | {"model": model})
    await edge.post(CHAT_PATH, b"{")
    await edge.events(CHAT_PATH, CHAT | {"model": "dies"})

    async with edge.http.get("/metrics") as response:
        text = await response.text()
    for line in (
        'motley_requests_total{code="200",model="tiny"} 1.0',
        'motley_requests_total{code="503",model="busy"} 1.0',
        'motley_requests_total{code="404",model="unknown"} 1.0',
        'motley_requests_total{code="400",model="unknown"} 1.0',
        'motley_requests_total{code="503",model="dies"} 2.0',
        'motley_prompt_tokens_total{model="tiny"} 3.0',
        'motley_generation_tokens_total{model="tiny"} 4.0',
        'motley_request_ttft_seconds_count{model="tiny"} 1.0',
        'motley_request_tpot_seconds_count{model="tiny"} 1.0',
        'motley_request_duration_seconds_count{model="tiny"} 1.0',
        "motley_requests_in_flight 0.0",
    ):
        assert f"\n{line}\n" in text
    assert "made-up" not in text


async def test_a_taken_port_says_what_to_do(edge):
    host, port = edge.address
    app = App(edge.script, edge.metrics, LIMITS)
    with pytest.raises(SetupError, match=f"{host}:{port}.*choose another"):
        async with serve(app, host, port):
            pass


async def test_stopping_cancels_what_does_not_end_in_time():
    async with running() as edge:
        reader, writer = await send(edge, CHAT | {"model": "hangs", "stream": True})
        await edge.script.begun.wait()
    assert edge.script.left.is_set()
    await reader.read()
    writer.close()
