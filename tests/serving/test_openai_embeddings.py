"""Bodies of /v1/embeddings and /tokenize that are refused, by which field's name."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import aiohttp
import pytest

from serving.app import App, serve
from serving.metrics import Metrics
from serving.openai.limits import HttpLimits

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def running(it):
    app = App(it.gateway, Metrics(), HttpLimits(choices=3))
    async with (
        serve(app, "127.0.0.1", 0, drain_s=0.1) as (_, port),
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http,
    ):

        async def post(path, **body):
            raw = json.dumps({"model": "fake"} | body).encode()
            async with http.post(path, data=raw) as response:
                return response.status, await response.json()

        yield post


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/embeddings", {"input": ""}, 400, "input"),
        ("/v1/embeddings", {"input": []}, 400, "input"),
        ("/v1/embeddings", {"input": ["a", 1]}, 400, "input"),
        ("/v1/embeddings", {"input": [999]}, 400, "input"),
        ("/v1/embeddings", {"input": ["a"] * 4}, 400, "input"),
        ("/v1/embeddings", {}, 400, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 4}, 400, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [999]}, 400, "tokens"),
    ],
)
async def test_a_bad_body_is_refused_by_its_fields_name(cluster, path, body, status, param):
    async with cluster("m") as it, running(it) as post:
        found, answer = await post(path, **body)
        assert (found, answer["error"]["param"]) == (status, param)


async def test_no_tokens_are_no_text(cluster):
    async with cluster("m") as it, running(it) as post:
        assert await post("/detokenize", tokens=[]) == (200, {"prompt": ""})


async def test_the_four_shapes_of_an_input_and_their_usage(cluster):
    async with cluster("p", "d") as it, running(it) as post:
        shapes = ["ab", ["ab"], list(b"ab"), [list(b"ab")]]
        answers = [(await post("/v1/embeddings", input=shape))[1] for shape in shapes]
        assert len({json.dumps(answer) for answer in answers}) == 1
        assert answers[0]["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
