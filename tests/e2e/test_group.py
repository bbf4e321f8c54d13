"""Three processes that together are one worker, and the loss of one of them."""

from __future__ import annotations

import os
import re
import signal

import openai
import pytest

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]

MODEL = "smollm2-135m-instruct"
QUESTION = {
    "model": MODEL,
    "prompt": "Once upon a time there was a",
    "temperature": 0,
    "max_tokens": 24,
    "extra_body": {"ignore_eos": True},
}


@pytest.mark.asyncio
async def test_a_rank_killed_in_the_middle_of_an_answer_changes_no_token_of_it(serve):
    arguments = (MODEL, "--mode", "exact", "--prefill", "0", "--decode", "0", "--mixed", "1")
    with serve(*arguments) as alone:
        async with openai.AsyncOpenAI(base_url=f"{alone.url}/v1", api_key="unused") as api:
            unbroken = (await api.completions.create(**QUESTION)).choices[0].text
    with serve(*arguments, "--group-ranks", "3", "--threads", "1") as group:
        victim = re.search(r"\[mixed-0-rank-2\] process (\d+)", group.log)
        assert victim
        async with openai.AsyncOpenAI(
            base_url=f"{group.url}/v1", api_key="unused", max_retries=0
        ) as api:
            pieces = []
            async for chunk in await api.completions.create(**QUESTION, stream=True):
                pieces.append(chunk.choices[0].text)
                if len(pieces) == 6:
                    os.kill(int(victim.group(1)), signal.SIGKILL)
        assert "".join(pieces) == unbroken
        group.wait_for("a group of 2 ranks")
