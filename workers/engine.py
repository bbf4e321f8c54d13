"""The engine step: plan → run → give. Synchronous; whoever owns it calls it from one place.

A *key* (job id, epoch) names everything that one job holds here.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from scheduler.batching import Batcher, Due, Sequence, Slice, Step
from scheduler.blocks import blocks_for
from scheduler.cost import StepShape
from scheduler.errors import BadRequest
from scheduler.messages import FirstToken, Output
from scheduler.models import BLOCK_TOKENS
from workers.choice import Choice
from workers.held import Held, Ready
from workers.measure import borrowed
from workers.runner import CacheLost, Wishes
from workers.sampling import check
from workers.speculate import Speculator
from workers.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scheduler.request import Job, TokenIds
    from workers.grammar import Mask
    from workers.runner import Reading, Runner, Sampled
    from workers.text import Tokens

Key = tuple[str, int]
LOOK_TOKENS = 16  # of the sequence by which an idle worker is measured


@dataclass(slots=True)
class StepResult:
    outputs: list[Output] = field(default_factory=list)
    granted: dict[Key, Sequence] = field(default_factory=dict)
    held: dict[Key, Held] = field(default_factory=dict)
    refused: dict[Key, BadRequest] = field(default_factory=dict)  # cannot go on: to be cancelled
    accepted: int = 0  # draft tokens that were right
    idle: bool = False  # nothing could be done: wait for an event before the next step


class Engine:
    """All sequences of one worker."""

    def __init__(
        self,
        runner: Runner,
        text: Tokens,
        batcher: Batcher,
        clock: Callable[[], float] = time.perf_counter,
        *,
        speculate: bool = True,
    ) -> None:
        self.runner = runner
        self.text = text
        self.batcher = batcher
        self.clock = clock
        self.steps = 0
        self.tokens = 0
        self.watch = Stopwatch(clock)
        self.speculator = Speculator() if speculate else None
        self._choices: dict[Sequence, Choice] = {}
        self._jobs: dict[Key, list[Sequence]] = {}
        self._slices: tuple[Slice, ...] = ()  # of the step that runs

    @property
    def has_work(self) -> bool:
        return self.batcher.has_work

    @property
    def keys(self) -> list[Key]:
        """Every job that holds something here."""
        return list(self._jobs)

    @property
    def computing(self) -> list[Key]:
        """The jobs that a step may touch; not those whose KV only waits for a transfer."""
        places = (*self.batcher.running, *self.batcher.waiting)
        return list({(s.job.id, s.job.epoch): None for s in places})

    def check(self, job: Job, prompt: TokenIds) -> None:
        """Raises BadRequest for a job that can never run here."""
        self.output_limit(job, prompt)
        check(job.sampling, self.runner.vocab)

    def output_limit(self, job: Job, prompt: TokenIds) -> int:
        """The job's max_tokens, filled in. Raises BadRequest if it can never run here."""
        context = self.text.context_length
        room = context - len(prompt)
        asked = job.limits.max_tokens
        if room < (1 if asked is None else asked):
            wish = f"{asked} tokens of output" if asked and room >= 1 else "an answer"
            raise BadRequest(
                f"This model's context is {context} tokens; the prompt has {len(prompt)}, which "
                f"leaves no room for {wish}. Shorten the prompt or lower max_tokens.",
                param="max_tokens" if asked and room >= 1 else _prompt_field(job),
                code="context_length_exceeded",
            )
        limit = room if asked is None else asked
        capacity = self.batcher.pool.size
        if blocks_for(len(prompt) + (asked or 1)) > capacity:
            raise BadRequest(
                f"This worker's KV cache holds {capacity * 16} tokens; the prompt has "
                f"{len(prompt)} and {asked or 1} are asked for.",
                param=_prompt_field(job),
                code="context_length_exceeded",
            )
        return min(limit, capacity * 16 - len(prompt))

    def add(self, job: Job, prompt: TokenIds, *, hold: bool = False) -> None:
        """Compute a job here; with `hold` only its prompt and first tokens (see Held)."""
        sequence = self._sequence(job, prompt, job.choices[0], job.choices[1:])
        sequence.hold = hold
        choice = self._begin(sequence, job.emitted, job.sent)
        if job.echo and not job.emitted:
            choice.repeat(prompt)
            sequence.read = choice.reading is not None
        if job.embed:
            choice.embed()
        self.batcher.add(sequence)

    def reserve(self, job: Job, prompt: TokenIds) -> None:
        """Queue for the blocks of a KV cache that will arrive; a step's `granted` answers."""
        sequence = self._sequence(job, prompt, job.choices[0], ())
        sequence.awaits_kv = True
        self._jobs[job.id, job.epoch] = [sequence]
        self.batcher.add(sequence)

    def resume(self, key: Key, firsts: tuple[FirstToken, ...], generation: int = 0) -> bool:
        """The KV has arrived: continue these choices.

        False if the job is gone meanwhile, or the `generation` of the cache that the KV came into.
        """
        if key not in self._jobs or generation != self.runner.cache.generation:
            return False
        (parent,) = self._jobs.pop(key)
        job, prompt = parent.job, parent.tokens[: parent.prompt_len]
        parent.awaits_kv = False
        parent.choice = firsts[0].choice
        parent.computed = len(parent.tokens)
        children = [self._sequence(job, prompt, first.choice, ()) for first in firsts[1:]]
        for sequence, first in zip([parent, *children], firsts, strict=True):
            sequence.tokens.append(first.token)
            self._begin(sequence, [*job.emitted, first.token], first.sent)
        self.batcher.resume(parent)
        self._fork(parent, children)
        return True

    def cancel(self, key: Key) -> bool:
        """Free all that a job holds. False if it held nothing."""
        sequences = self._jobs.pop(key, [])
        for sequence in sequences:
            self._forget(sequence)
        return bool(sequences)

    def step(self) -> StepResult:
        """Run one step: at most `max_step_tokens` tokens of any number of sequences."""
        if self.speculator:
            self.speculator.propose(self._draftable())
        plan = self.batcher.next_step()
        result = StepResult(idle=not plan.slices and not plan.granted)
        self.runner.cache.mark.reset()
        for sequence in plan.granted:
            result.granted[sequence.job.id, sequence.job.epoch] = sequence
        if not plan.slices:
            self.watch.rest()
            self.batcher.advance(plan)
            return result
        self._slices = plan.slices
        self.watch.start(StepShape.of(plan))
        try:
            drawn = iter(self._run(plan, result))
            seconds = self.watch.stop()
        except CacheLost:
            self.batcher.restart()
            return result
        finally:
            self._slices = ()
            self.watch.drop()
        self.batcher.advance(plan)
        for piece in plan.slices:
            give = self._verify if piece.draft else self._give
            give(piece, list(islice(drawn, piece.draws)), result)
        self._learn(plan, result, seconds)
        return result

    def look(self) -> None:
        """Decode a token that nobody asked for, to see how fast this worker is. Only when idle."""
        assert not self._jobs, "an idle engine"
        self.runner.cache.mark.reset()
        with borrowed(self.runner, LOOK_TOKENS) as sequence:
            sequence.tokens.append(0)
            self.watch.start(StepShape(0, 0, 1, LOOK_TOKENS + 1))
            try:
                self.runner.run([Slice(sequence, LOOK_TOKENS, LOOK_TOKENS + 1)])
                self.watch.stop()
            except CacheLost:
                self.batcher.restart()
            finally:
                self.watch.drop()

    def _run(self, plan: Step, result: StepResult) -> list[Sampled]:
        return self.runner.run(plan.slices, self._wishes(plan, result))

    def ready(self, key: Key) -> Ready | None:
        """How much of a held prompt's KV is in the cache. May be asked while a step runs."""
        sequence = next(iter(self._jobs.get(key, ())), None)
        if sequence is None:
            return None
        slices, blocks, computed = self._slices, sequence.blocks, sequence.computed
        cache = self.runner.cache
        piece = next((piece for piece in slices if piece.sequence is sequence), None)
        if piece is None:
            # The step may be preempting or admitting it just now: tokens and blocks one by one.
            computed = min(computed, len(blocks) * BLOCK_TOKENS)
            return Ready(sequence, blocks, computed, computed, 0, cache.generation)
        layers = cache.mark.value  # read after the slices: never of an older step
        return Ready(sequence, blocks, piece.start, piece.end, layers, cache.generation)

    def _draftable(self) -> list[Sequence]:
        """The sequences that will decode, and may do so several tokens at a time.

        Not a prompt whose last token is left alone by a chunk's end: what it draws may be the
        first token of several choices, or all that is wanted here of a prompt that is held.
        """
        running = [s for s in self.batcher.running if s.remaining == 1]
        return [s for s in running if s.position and not s.hold and self._choices[s].draftable]

    def _learn(self, plan: Step, result: StepResult, seconds: float) -> None:
        self.steps += 1
        if not plan.drafted:
            self.batcher.pace.learn(plan.decodes, plan.prompt_tokens, seconds)
        if self.speculator:
            self.speculator.learn(plan, result.accepted, seconds)

    def _wishes(self, plan: Step, result: StepResult) -> Wishes:
        readings: dict[Sequence, Reading] = {}
        masks: dict[Sequence, Mask] = {}
        for piece in plan.slices:
            sequence, choice = piece.sequence, self._choices[piece.sequence]
            if choice.reading:
                readings[sequence] = choice.reading
            try:
                if piece.choices and (mask := choice.allowed()) is not None:
                    masks[sequence] = mask
            except BadRequest as error:
                result.refused[sequence.job.id, sequence.job.epoch] = error
        return Wishes(readings, masks)

    def check_integrity(self) -> None:
        """Every sequence belongs to a job; blocks as the batcher checks them."""
        self.batcher.check_integrity()
        known = {s for sequences in self._jobs.values() for s in sequences}
        placed = {*self.batcher.running, *self.batcher.staged, *self.batcher.waiting}
        assert placed <= known, "a sequence belongs to no job"

    def _sequence(
        self, job: Job, prompt: TokenIds, choice: int, forks: tuple[int, ...]
    ) -> Sequence:
        return Sequence(
            job=job,
            choice=choice,
            tokens=[*prompt, *job.emitted],
            prompt_len=len(prompt),
            max_tokens=self.output_limit(job, prompt),
            forks=forks,
            due=self._due(job),
        )

    def _due(self, job: Job) -> Due:
        turn = job.turn
        left = math.inf if turn.left_s is None else turn.left_s
        return turn.priority, turn.share, self.clock() + left

    def _begin(self, sequence: Sequence, emitted: TokenIds, sent: int) -> Choice:
        """Know the sequence: what it has said so far, and the job it belongs to."""
        job = sequence.job
        choice = Choice(self.text, job, sequence.choice, sequence.max_tokens, emitted, sent)
        self._choices[sequence] = choice
        self._jobs.setdefault((job.id, job.epoch), []).append(sequence)
        return choice

    def _fork(self, parent: Sequence, children: list[Sequence]) -> None:
        for child in children:
            self.runner.cache.copy(self.batcher.fork(parent, child))

    def _give(self, piece: Slice, drawn: list[Sampled], result: StepResult) -> None:
        """Append the drawn tokens of one slice to its choices and say so."""
        parent = piece.sequence
        if not drawn or (parent.job.id, parent.job.epoch) in result.refused:
            return
        sequences = [parent, *self._branch(parent)]
        outputs = [self._append(s, d) for s, d in zip(sequences, drawn, strict=True)]
        for told, output in zip(sequences, outputs, strict=True):
            self._tell(told, output, result)
        if parent.hold:
            self._hold(sequences, outputs, result)
        else:
            for sequence, output in zip(sequences, outputs, strict=True):
                if output.finish:
                    self._finish(sequence)

    def _verify(self, piece: Slice, drawn: list[Sampled], result: StepResult) -> None:
        """Append the draws as far as the draft before each is right: one at least."""
        sequence, right = piece.sequence, 0
        for expected, sampled in zip((*piece.draft, None), drawn, strict=True):
            output = self._append(sequence, sampled)
            self._tell(sequence, output, result)
            if output.finish or sampled.token != expected:
                break
            right += 1
        assert self.speculator, "a draft has an author"
        self.speculator.verified(sequence, len(piece.draft), right)
        result.accepted += right
        if output.finish:
            self._finish(sequence)
        else:
            self.batcher.accept(sequence, right)

    def _branch(self, parent: Sequence) -> Iterator[Sequence]:
        """The prompt is computed: its further choices become sequences of their own."""
        prompt = parent.tokens[: parent.prompt_len]
        children = [self._sequence(parent.job, prompt, c, ()) for c in parent.forks]
        parent.forks = ()
        for child in children:
            self._begin(child, [], 0)
        if not parent.hold:  # a held prompt has one KV for all; they fork where it goes
            self._fork(parent, children)
        yield from children

    def _hold(self, sequences: list[Sequence], outputs: list[Output], result: StepResult) -> None:
        parent = sequences[0]
        job = parent.job
        assert parent.position <= len(job.emitted) + 1, "a held prompt gives one token a choice"
        firsts = tuple(
            FirstToken(o.choice, o.ids[0], self._choices[s].sent)
            for s, o in zip(sequences, outputs, strict=True)
            if not o.finish
        )
        generation = self.runner.cache.generation
        held = Held(parent.blocks, parent.computed, firsts, generation)
        result.held[job.id, job.epoch] = held
        self.batcher.stage(parent)

    def _append(self, sequence: Sequence, drawn: Sampled) -> Output:
        output = self._choices[sequence].take(drawn, sequence.cached)
        sequence.tokens += output.ids
        self.tokens += len(output.ids)
        sequence.read = False
        return output

    def _tell(self, sequence: Sequence, output: Output, result: StepResult) -> None:
        if (told := self._choices[sequence].tell(output)) is not None:
            result.outputs.append(told)

    def _forget(self, sequence: Sequence) -> None:
        """Everything that is known of it but its place among its job's sequences."""
        self._choices.pop(sequence, None)
        if self.speculator:
            self.speculator.forget(sequence)
        self.batcher.remove(sequence)

    def _finish(self, sequence: Sequence) -> None:
        key = (sequence.job.id, sequence.job.epoch)
        self._forget(sequence)
        self._jobs[key].remove(sequence)
        if not self._jobs[key]:
            del self._jobs[key]


def _prompt_field(job: Job) -> str:
    return "messages" if job.prompt.messages is not None else "prompt"
