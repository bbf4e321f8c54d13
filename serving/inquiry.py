"""Questions to a worker that no generation belongs to: what a prompt is in tokens, and back."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from scheduler.errors import BadRequest, Unavailable
from scheduler.messages import Failed, FailureKind, Tokenise, Tokenised
from scheduler.request import job_id

if TYPE_CHECKING:
    from scheduler.request import Prompt
    from serving.members import Members

ANSWER_S = 10.0  # a worker answers beside its steps, so it is quick unless it is lost


class Inquiries:
    """The questions that wait for an answer."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._waiting: dict[str, tuple[str, asyncio.Future[Tokenised]]] = {}  # worker, answer
        self._numbers = itertools.count()

    async def tokenise(self, model: str, prompt: Prompt, created: float) -> Tokenised:
        """Ask the least busy worker of a model. Raises BadRequest or Unavailable."""
        members = [m for m in self._members.of(model) if not m.worker.draining]
        if not members:
            raise Unavailable(f"the workers of {model!r} are not ready", retry_after=2)
        member = min(members, key=lambda m: (m.worker.outstanding, m.join.name))
        question = job_id(self._members.router, next(self._numbers), "tokens")
        answer: asyncio.Future[Tokenised] = asyncio.get_running_loop().create_future()
        self._waiting[question] = (member.join.name, answer)
        self._members.post(member.join.name, Tokenise(question, prompt, created))
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            message = f"no worker answered within {ANSWER_S:g} s"
            raise Unavailable(message, retry_after=ANSWER_S) from None
        finally:
            del self._waiting[question]

    def answered(self, message: Tokenised | Failed) -> None:
        """A worker says what it found; nothing if nobody waits for it any more."""
        _, answer = self._waiting.get(message.id, ("", None))
        if answer is None or answer.done():
            return
        if isinstance(message, Tokenised):
            answer.set_result(message)
        elif message.kind is FailureKind.BAD_REQUEST:
            refusal = BadRequest(message.message, param=message.param, code=message.code)
            answer.set_exception(refusal)
        else:
            answer.set_exception(Unavailable(message.message))

    def lost(self, worker: str) -> None:
        for name, answer in self._waiting.values():
            if name == worker and not answer.done():
                answer.set_exception(Unavailable(f"worker {worker} was lost"))
