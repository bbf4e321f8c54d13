"""Questions to workers: an answer, a refusal, or an end in time."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from scheduler.errors import BadRequest, Unavailable
from scheduler.messages import Failed, FailureKind, Tokenised
from scheduler.request import Prompt
from serving import inquiry

pytestmark = pytest.mark.asyncio

HELLO = Prompt(text="Hé")


@pytest.mark.parametrize("workers", [("m",), ("p", "d")])
async def test_a_worker_says_what_a_prompt_is_in_tokens_and_back(cluster, workers):
    async with cluster(*workers) as it:
        found = await it.gateway.tokenise("fake", HELLO, 0.0)
        assert (found.ids, found.text) == (list("Hé".encode()), "Hé")
        assert found.spelled == ("H", "\ufffd", "\ufffd")
        assert (await it.gateway.tokenise("fake", Prompt(ids=found.ids), 0.0)).text == "Hé"


async def test_what_a_worker_refuses_is_the_clients_to_change(cluster):
    async with cluster("m") as it:
        with pytest.raises(BadRequest) as caught:
            await it.gateway.tokenise("fake", Prompt(ids=[999]), 0.0)
        assert caught.value.param == "prompt"


async def test_an_unknown_model_and_one_without_workers(cluster):
    async with cluster() as it:
        with pytest.raises(BadRequest):
            await it.gateway.tokenise("other", HELLO, 0.0)
        with pytest.raises(Unavailable):
            await it.gateway.tokenise("fake", HELLO, 0.0)


class Silent:
    """Members of which one is there, and says nothing by itself."""

    router = "here"

    def __init__(self, member):
        self.member = member
        self.posted = []

    def of(self, model):
        return [self.member]

    def post(self, worker, message):
        self.posted.append(message)


@pytest.fixture
def asked(cluster):
    """A question that waits: `async with asked() as (inquiries, id, answer)`."""

    @asynccontextmanager
    async def ask():
        async with cluster("m") as it:
            members = Silent(it.members.get("m"))
            inquiries = inquiry.Inquiries(members)
            answer = asyncio.create_task(inquiries.tokenise("fake", HELLO, 0.0))
            await asyncio.sleep(0)
            yield inquiries, members.posted[0].id, answer

    return ask


async def test_a_lost_worker_ends_its_questions(asked):
    async with asked() as (inquiries, _, answer):
        inquiries.lost("another")
        inquiries.lost("m")
        with pytest.raises(Unavailable, match="lost"):
            await answer


async def test_a_worker_that_fails_by_its_own_fault_is_tried_again_later(asked):
    async with asked() as (inquiries, number, answer):
        inquiries.answered(Failed(number, 0, FailureKind.INTERNAL, "KeyError: 1"))
        with pytest.raises(Unavailable, match="KeyError"):
            await answer


async def test_silence_has_a_limit_and_a_late_answer_no_effect(asked, monkeypatch):
    monkeypatch.setattr(inquiry, "ANSWER_S", 0.01)
    async with asked() as (inquiries, number, answer):
        with pytest.raises(Unavailable, match="within"):
            await answer
        inquiries.answered(Tokenised(number, [], (), ""))
