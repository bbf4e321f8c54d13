"""Clients of a cluster that is being hurt: each records when which piece of its answer came."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import aiohttp

if TYPE_CHECKING:
    from chaos_cluster import Blow

WORDS = (
    "once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "a",
    "machine",
    "that",
    "would",
    "not",
    "stop",
)


@dataclass
class Answer:
    """One streamed request, as its client saw it. Times are the event loop's."""

    name: str
    question: int
    start: float
    times: list[float] = field(default_factory=list)  # of each piece
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""

    @property
    def whole(self) -> bool:
        return not self.error and self.tokens > 0

    def like(self, other: Answer) -> bool:
        return self.whole and (self.text, self.tokens) == (other.text, other.tokens)

    def gap(self, moment: float) -> float | None:
        """Seconds without a piece around this moment; None if it lies outside the answer."""
        marks = [self.start, *self.times]
        if not (marks[0] <= moment <= marks[-1]):
            return None
        return next(b - a for a, b in pairwise(marks) if a <= moment <= b)

    @property
    def pace(self) -> float:
        """Its usual gap."""
        gaps = [b - a for a, b in pairwise(self.times)]
        return median(gaps) if gaps else 0.0


class Crowd:
    """So many clients at once, each asking one seeded question after the other."""

    def __init__(self, url: str, model: str, questions: list[str], tokens: int) -> None:
        self.answers: list[Answer] = []
        self._url = url
        self._model = model
        self._questions = questions
        self._tokens = tokens
        self._asked = 0
        self._enough = False

    async def unbroken(self) -> list[Answer]:
        """The answer to each question while nothing happens."""
        return list(await asyncio.gather(*map(self.ask, range(len(self._questions)))))

    async def ask(self, question: int) -> Answer:
        async with aiohttp.ClientSession() as session:
            return await self._ask(session, question)

    async def run(self, clients: int) -> None:
        """Until `stop`; then the last answers are awaited."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(self._client(session) for _ in range(clients)))

    def stop(self) -> None:
        self._enough = True

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while not self._enough:
            self._asked += 1
            self.answers.append(await self._ask(session, self._asked % len(self._questions)))

    async def _ask(self, session: aiohttp.ClientSession, question: int) -> Answer:
        loop = asyncio.get_running_loop()
        name = f"{self._asked}-{question}"
        answer = Answer(name, question, loop.time())
        body = {
            "model": self._model,
            "prompt": self._questions[question],
            "max_tokens": self._tokens,
            "seed": question,
            "temperature": question % 2,  # every other one is greedy
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"X-Request-Id": name}
        try:
            async with session.post(
                f"{self._url}/v1/completions", json=body, headers=headers
            ) as reply:
                async for line in reply.content:
                    self._take(answer, line, loop.time())
        except (aiohttp.ClientError, TimeoutError) as error:
            answer.error = repr(error)
        return answer

    @staticmethod
    def _take(answer: Answer, line: bytes, now: float) -> None:
        if not line.startswith(b"data: {"):
            answer.error = answer.error or (line.decode() if line.startswith(b"{") else "")
            return
        chunk = json.loads(line[6:])
        if "error" in chunk:
            answer.error = str(chunk["error"])
        for choice in chunk.get("choices", ()):
            answer.text += choice["text"]
            answer.times.append(now)
        if usage := chunk.get("usage"):
            answer.tokens = usage["completion_tokens"]
            answer.prompt_tokens = usage["prompt_tokens"]


def questions(count: int, words: int) -> list[str]:
    """Prompts of so many words, none the beginning of another."""
    return [
        f"{number}: " + " ".join(WORDS[(number + i) % len(WORDS)] for i in range(words))
        for number in range(count)
    ]


@dataclass(frozen=True)
class Toll:
    """What the blows cost the clients."""

    requests: int
    hit: int  # requests that a worker held something of when it was struck
    lost: int  # ended with an error, or without an end
    wrong: int  # other text than in the unbroken run
    miscounted: int  # other number of tokens: missing or repeated ones
    errors: tuple[str, ...]  # what the lost ones were told
    hits: tuple[tuple[Blow, float], ...]  # of each hit request: s without a piece, beyond its pace
    unlike: tuple[Answer, ...]  # lost, wrong or miscounted

    @property
    def clean(self) -> bool:
        return not (self.lost or self.wrong or self.miscounted)

    def gap(self, share: float) -> float:
        """This percentile of the hits' gaps."""
        ordered = sorted(gap for _, gap in self.hits)
        return ordered[min(len(ordered) - 1, round(share * len(ordered)))] if ordered else 0.0


def toll(answers: list[Answer], unbroken: list[Answer], blows: list[Blow]) -> Toll:
    by_name = {answer.name: answer for answer in answers}
    hits = [
        (blow, max(0.0, gap - answer.pace))
        for blow in blows
        for answer in filter(None, map(by_name.get, blow.requests))
        if (gap := answer.gap(blow.time)) is not None
    ]
    whole = [answer for answer in answers if answer.whole]
    return Toll(
        requests=len(answers),
        hit=len({name for blow in blows for name in blow.requests}),
        lost=len(answers) - len(whole),
        wrong=sum(a.text != unbroken[a.question].text for a in whole),
        miscounted=sum(a.tokens != unbroken[a.question].tokens for a in whole),
        errors=tuple(sorted({answer.error or "no end" for answer in answers if not answer.whole})),
        hits=tuple(hits),
        unlike=tuple(a for a in answers if not a.like(unbroken[a.question])),
    )
