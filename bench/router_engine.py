"""A fake OpenAI engine for routers that relay HTTP: as little as aiohttp can do.

    python bench/router_engine.py PORT STEP_MS

All streams advance together, a token each STEP_MS, as in a worker that batches.
"""

from __future__ import annotations

import asyncio
import sys

import msgspec
import uvloop
from aiohttp import web

MODEL = "m"
HEAD = b'{"id":"c","object":"chat.completion%s","created":1,"model":"m","choices":[{"index":0,'
CHUNK = b"data: " + HEAD % b".chunk" + b'"delta":{"content":"word "},"finish_reason":null}]}\n\n'
LAST = b"data: " + HEAD % b".chunk" + b'"delta":{},"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'


class Asked(msgspec.Struct):
    """What matters of a body."""

    max_tokens: int = 0
    max_completion_tokens: int = 0  # what some routers make of it
    stream: bool = False

    @property
    def tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens


class Engine:
    """Answers when so many steps have gone by."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._tick = asyncio.Event()
        self._decoder = msgspec.json.Decoder(Asked)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            tick, self._tick = self._tick, asyncio.Event()
            tick.set()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        asked = self._decoder.decode(await request.read())
        if asked.stream:
            return await self._stream(request, asked.tokens)
        for _ in range(asked.tokens):
            await self._tick.wait()
        message = b'"message":{"role":"assistant","content":"%s"},"finish_reason":"length"}],'
        usage = b'"usage":{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":9}}'
        body = HEAD % b"" + message % (b"word " * asked.tokens) + usage % asked.tokens
        return web.Response(body=body, content_type="application/json")

    async def _stream(self, request: web.Request, tokens: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(tokens):
            await self._tick.wait()
            await response.write(CHUNK)
        await response.write(LAST)
        return response


async def models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})


async def health(_: web.Request) -> web.Response:
    return web.json_response({"model_path": MODEL, "is_generation": True})


async def main(port: int, step_s: float) -> None:
    engine = Engine(step_s)
    app = web.Application(client_max_size=1 << 24)
    app.add_routes([web.post("/v1/chat/completions", engine.chat), web.get("/v1/models", models)])
    for path in ("/health", "/health_generate", "/get_model_info", "/get_server_info", "/version"):
        app.add_routes([web.get(path, health)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
    await engine.run()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        loop.run(main(int(sys.argv[1]), float(sys.argv[2]) / 1000))
