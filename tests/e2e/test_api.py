"""What a client asks beyond plain answers, through real processes, with the openai package."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal

import aiohttp
import openai
import pytest
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "maxLength": 12}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "look_up"}}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 60}, "b": {"enum": [1, 2]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
ASK = {"messages": [{"role": "user", "content": "Answer me."}], "seed": 3}


def client(cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0)


async def check_echo(api, model) -> None:
    prompts = ["One prompt.", "And another one."]
    reply = await api.completions.create(
        model=model, prompt=prompts, echo=True, logprobs=2, max_tokens=1, n=2, seed=1
    )
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    for choice in reply.choices:
        prompt, found = prompts[choice.index // 2], choice.logprobs
        assert choice.text.startswith(prompt)
        assert found.token_logprobs[0] is None
        assert all(logprob < 0 for logprob in found.token_logprobs[1:])
        assert found.text_offset[0] == 0
        assert sum(at < len(prompt) for at in found.text_offset) == len(found.tokens) - 1
    scored = await api.completions.create(model=model, prompt=prompts[0], echo=True, max_tokens=0)
    assert (scored.choices[0].text, scored.usage.completion_tokens) == (prompts[0], 0)


async def check_tools(api, model) -> None:
    for choice in ("required", NAMED):
        ask = {"model": model, "tools": [TOOL], "tool_choice": choice, **ASK}
        ask |= {"parallel_tool_calls": False, "max_tokens": 200}
        whole = await api.chat.completions.create(**ask)
        ChatCompletion.model_validate(whole.to_dict(), strict=True)
        assert whole.choices[0].finish_reason == "tool_calls"
        (call,) = whole.choices[0].message.tool_calls
        assert call.function.name == "look_up"
        assert list(json.loads(call.function.arguments)) == ["word"]
        async with api.chat.completions.stream(**ask) as stream:
            streamed = await stream.get_final_completion()
        (again,) = streamed.choices[0].message.tool_calls
        assert again.function.arguments == call.function.arguments
        history = [
            *ASK["messages"],
            whole.choices[0].message.to_dict(),
            {"role": "tool", "tool_call_id": call.id, "content": "a meaning"},
        ]
        after = await api.chat.completions.create(
            model=model, messages=history, tools=[TOOL], max_tokens=8
        )
        assert after.usage.prompt_tokens > whole.usage.prompt_tokens


async def check_tokens(cluster, model) -> None:
    async with aiohttp.ClientSession(cluster.url) as http:

        async def ask(path, **body):
            async with http.post(path, json={"model": model, **body}) as response:
                return await response.json()

        found = await ask("/tokenize", prompt="Hello there", return_token_strs=True)
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert "".join(found["token_strs"]) == "Hello there"
        assert found["max_model_len"] > 0
        back = await ask("/detokenize", tokens=found["tokens"])
        assert back == {"prompt": "Hello there"}
        chat = await ask("/tokenize", messages=ASK["messages"])
        bare = await ask("/tokenize", messages=ASK["messages"], add_generation_prompt=False)
        assert chat["token_strs"] is None
        assert chat["tokens"][: bare["count"]] == bare["tokens"]
        refused = await ask("/detokenize", tokens=[10**6])
        assert refused["error"]["param"] == "tokens"


async def check_embeddings(api, model) -> None:
    texts = ["A cat sat.", "A dog ran.", "A cat sat."]
    plain = await api.embeddings.create(model=model, input=texts, encoding_format="float")
    packed = await api.embeddings.create(model=model, input=texts)  # the client asks for base64
    CreateEmbeddingResponse.model_validate(plain.to_dict(), strict=True)
    vectors = [item.embedding for item in plain.data]
    assert [item.index for item in plain.data] == [0, 1, 2]
    assert [item.embedding for item in packed.data] == vectors
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-4)
    assert vectors[0] != vectors[1]
    assert all(sum(x * x for x in vector) == pytest.approx(1, abs=1e-4) for vector in vectors)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 0
    with pytest.raises(openai.BadRequestError) as refused:
        await api.embeddings.create(model=model, input="")
    assert refused.value.param == "input"


async def check_refusals(api, model) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        await api.chat.completions.create(model=model, response_format=bad, **ASK)
    assert refused.value.param == "response_format"


@pytest.mark.asyncio
@pytest.mark.parametrize("shape", [(), ("--prefill", "0", "--decode", "0", "--mixed", "1")])
async def test_everything_in_each_shape(serve, shape):
    with serve("fake:tokens=24", *shape) as cluster:
        async with client(cluster) as api:
            await check_echo(api, "fake")
            await check_tools(api, "fake")
            await check_tokens(cluster, "fake")
            await check_embeddings(api, "fake")
            await check_refusals(api, "fake")


@pytest.mark.asyncio
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_killed_worker_costs_no_brace_and_no_call(serve, until, victim):
    with serve("fake:step_ms=20,tokens=60", "--prefill", "1", "--decode", "2") as cluster:
        pids = dict(re.findall(r"\[(\S+)\] process (\d+)", cluster.log))

        async def ask(api, **fields):
            reply = await api.chat.completions.create(model="fake", n=2, **ASK, **fields)
            return [(c.message.content, c.finish_reason) for c in reply.choices], [
                call.function for c in reply.choices for call in c.message.tool_calls or ()
            ]

        kinds = [
            {"response_format": FORMAT},
            {"tools": [TOOL], "tool_choice": NAMED},
            {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        ]
        async with client(cluster) as api:
            unbroken = [await ask(api, **fields) for fields in kinds]
            running = [asyncio.create_task(ask(api, **fields)) for fields in kinds]
            await asyncio.to_thread(
                until, lambda: cluster.metric("motley_worker_running", "decode-0") > 0, 10
            )
            os.kill(int(pids[victim]), signal.SIGKILL)
            assert await asyncio.gather(*running) == unbroken
            cluster.wait_for(rf"worker {victim} ended")
        assert list(json.loads(unbroken[0][0][0][0])) == ["a", "b"]


@pytest.mark.model
@pytest.mark.timeout(240)
@pytest.mark.asyncio
async def test_the_real_model_does_it_all(serve):
    model = "smollm2-135m-instruct"
    with serve(model) as cluster:
        async with client(cluster) as api:
            await check_echo(api, model)
            await check_tools(api, model)
            await check_tokens(cluster, model)
            await check_embeddings(api, model)
            reply = await api.chat.completions.create(
                model=model, response_format=FORMAT, max_tokens=200, **ASK
            )
            assert list(json.loads(reply.choices[0].message.content)) == ["a", "b"]
