"""What the tokens of one choice mean: its text, its end, and what is reported beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from scheduler.messages import Alternative, Echo, FinishReason, Output, TokenLogprob
from workers.runner import Reading
from workers.tools import CallParser, Said

if TYPE_CHECKING:
    from scheduler.request import Job, TokenIds
    from workers.grammar import Mask
    from workers.runner import Sampled
    from workers.text import Tokens

GATHERED = 16  # tokens that the router hears of at once, where nobody reads them one by one


class Choice:
    """One choice of a job, from its start or from where another worker left it."""

    def __init__(
        self, text: Tokens, job: Job, number: int, max_tokens: int, emitted: TokenIds, sent: int
    ) -> None:
        """For `emitted` and `sent` see workers.text.Tokens.stream."""
        self.reading: Reading | None = None  # filled while the prompt is computed
        self._text = text
        self._job = job
        self._number = number
        self._max_tokens = max_tokens
        self._position = len(emitted)
        self._parser = CallParser(text.call_style, job.tools) if job.tools else None
        if self._parser:
            # What has been said is known only by reading it again: calls do not count as text.
            self._stream = text.stream(job.limits.stop, tools=True)
            for token in emitted:
                self._parser.feed(self._stream.push(token))
        else:
            self._stream = text.stream(job.limits.stop, emitted, sent)
        self._matcher = text.grammars.start(job.grammar, emitted) if job.grammar else None
        self._repeats: TokenIds = []
        self._told = False
        self._untold: list[Output] = []

    @property
    def sent(self) -> int:
        """Characters given so far."""
        return self._stream.sent

    def allowed(self) -> Mask | None:
        """What its grammar allows next; None: anything. Raises BadRequest."""
        return self._matcher.allowed() if self._matcher else None

    @property
    def draftable(self) -> bool:
        """A grammar's masks depend on each token before them: it takes them one by one."""
        return self._matcher is None

    def embed(self) -> None:
        """The one output shall be the prompt's embedding."""
        self.reading = Reading(embed=True)

    def repeat(self, prompt: TokenIds) -> None:
        """The first output shall bring the prompt along."""
        self._repeats = prompt
        if self._job.sampling.logprobs is not None:
            self.reading = Reading(self._job.sampling.logprobs)

    def take(self, drawn: Sampled, cached: int) -> Output:
        """One more token. `cached` is what the first output says of the prompt."""
        first = self._position == 0
        wanted = self._max_tokens > 0
        text, finish = self._say(drawn.token) if wanted else ("", FinishReason.LENGTH)
        said = Said(text)
        if self._parser:
            said, finish = self._parse(self._parser, text, finish)
        logprobs = wanted and self._job.sampling.logprobs is not None
        output = Output(
            id=self._job.id,
            epoch=self._job.epoch,
            choice=self._number,
            position=self._position,
            ids=[drawn.token] if wanted else [],
            text=said.text,
            calls=tuple(said.calls),
            logprobs=(self._logprob(drawn),) if logprobs else (),
            finish=finish,
            echo=self._echo() if first and self._repeats else None,
            cached=cached if first else 0,
            embedding=self.reading.embedding if self.reading else b"",
        )
        self._position += len(output.ids)
        return output

    def tell(self, output: Output) -> Output | None:
        """What the router hears now: of an answer that is read as a whole, several tokens at once.

        The first goes alone, at once. If this worker is lost, those that were not told are computed
        again.
        """
        if not self._job.whole:
            return output
        untold = self._untold
        untold.append(output)
        if self._told and output.finish is None and len(untold) < GATHERED:
            return None
        self._told, self._untold = True, []
        return untold[0] if len(untold) == 1 else _join(untold)

    def _say(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that a token lets out, and why it is the last one, if it is."""
        stream, matcher = self._stream, self._matcher
        endless = self._job.limits.ignore_eos and not matcher  # nothing follows a grammar's end
        if token in self._text.eos_ids and not endless:
            return stream.finish(), FinishReason.STOP
        text = stream.push(token)
        if matcher:
            matcher.take(token)
        if stream.stopped:
            return text, FinishReason.STOP
        if matcher and matcher.finished:
            return text + stream.finish(), FinishReason.STOP
        if self._position + 1 >= self._max_tokens:
            return text + stream.finish(), FinishReason.LENGTH
        return text, None

    @staticmethod
    def _parse(
        parser: CallParser, text: str, finish: FinishReason | None
    ) -> tuple[Said, FinishReason | None]:
        said = parser.feed(text)
        if finish:
            rest = parser.finish()
            said = Said(said.text + rest.text, said.calls + rest.calls)
        elif parser.complete:
            finish = FinishReason.STOP
        if finish is FinishReason.STOP and parser.count:
            finish = FinishReason.TOOL_CALLS
        return said, finish

    def _echo(self) -> Echo:
        spelled = [self._text.token_bytes(token) for token in self._repeats]
        scores = self.reading.scores if self.reading else []
        self.reading = None
        return Echo(
            text=b"".join(spelled).decode(errors="replace"),
            first=spelled[0],
            tokens=tuple(self._logprob(score) for score in scores),
        )

    def _logprob(self, drawn: Sampled) -> TokenLogprob:
        top = tuple(Alternative(*self._spell(token), logprob) for token, logprob in drawn.top)
        return TokenLogprob(*self._spell(drawn.token), drawn.logprob, top)

    def _spell(self, token: int) -> tuple[str, bytes]:
        return self._text.token_text(token), self._text.token_bytes(token)


def _join(outputs: list[Output]) -> Output:
    """Outputs of one choice that follow each other, as one."""
    return msgspec.structs.replace(
        outputs[0],
        ids=[token for output in outputs for token in output.ids],
        text="".join(output.text for output in outputs),
        logprobs=tuple(logprob for output in outputs for logprob in output.logprobs),
        calls=tuple(call for output in outputs for call in output.calls),
        finish=outputs[-1].finish,
    )
