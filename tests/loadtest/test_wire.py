from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.errors import WireError
from loadtest.wire import Events, Response

EVENTS = [b'{"a":1}', b"first\nsecond", b"[DONE]", b""]
STREAM = (
    b': hello\n\ndata: {"a":1}\n\nevent: x\ndata: first\ndata:second\n\ndata: [DONE]\n\ndata\n\n'
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x;x=y\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


def read(data: bytes, cuts: list[int]) -> tuple[Response, list[bytes]]:
    response, events, found = Response(), Events(), []
    for piece in pieces(data, cuts):
        body = response.feed(piece)
        if body:
            found += events.feed(body)
    return response, found


cuts = st.lists(st.integers(0, 10_000), max_size=60)


@given(cuts, st.integers(1, 90))
def test_a_chunked_stream_reads_the_same_however_it_is_cut(cuts, size):
    data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(STREAM, size)
    response, found = read(data, cuts)
    assert (response.status, response.complete, response.keep_alive) == (200, True, True)
    assert found == EVENTS


@given(cuts)
def test_a_counted_body_reads_the_same_however_it_is_cut(cuts):
    data = HEAD + b"content-length: %d\r\n\r\n" % len(STREAM) + STREAM
    response, found = read(data, cuts)
    assert response.complete
    assert found == EVENTS


@given(cuts, st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_every_line_end_of_the_standard_is_understood(cuts, line_end):
    events, found = Events(), []
    data = STREAM.replace(b"\n", line_end) + b": flushes a held CR"
    for piece in pieces(data, cuts):
        found += events.feed(piece)
    assert found == EVENTS


def test_every_cut_in_two_is_right():
    data = HEAD + b"Transfer-Encoding: chunked\r\nX: y\r\n\r\n" + chunked(STREAM, 7)
    assert all(read(data, [cut])[1] == EVENTS for cut in range(len(data)))


def test_a_body_without_length_ends_with_the_connection():
    response = Response()
    assert response.feed(HEAD + b"\r\nabc") == b"abc"
    assert not response.complete
    response.close()
    assert response.complete
    assert not response.keep_alive


def test_closing_early_leaves_a_counted_body_incomplete():
    response = Response()
    response.feed(HEAD + b"content-length: 9\r\n\r\nabc")
    response.close()
    assert not response.complete


def test_trailers_and_interim_responses_are_skipped():
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    response = Response()
    assert response.feed(data + b"3\r\nabc\r\n0\r\nDigest: x\r\n\r\n") == b"abc"
    assert response.complete


def test_connection_close_is_obeyed():
    response = Response()
    response.feed(b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    assert (response.status, response.complete, response.keep_alive) == (503, True, False)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nmore",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 5000,
        b"H" * 70_000,
    ],
)
def test_what_is_no_response_is_refused(data):
    with pytest.raises(WireError):
        Response().feed(data)


@given(st.binary(max_size=300), cuts)
def test_garbage_raises_only_wire_errors(garbage, cuts):
    response, events = Response(), Events()
    try:
        for piece in pieces(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + garbage, cuts):
            events.feed(response.feed(piece))
    except WireError:
        pass
