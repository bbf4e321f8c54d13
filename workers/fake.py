"""A worker without a model: deterministic, no torch, real in everything else.

It tokenises (a byte is a token), batches, pages and hands over a KV cache like the native engine.
The token at each position is a hash of all tokens before it *as the KV cache holds them*, the
seed, the choice and the position: a KV cache that was lost, mixed up or cut changes the answer.
For tests, and for load tests of the router, with optional time per token.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from scheduler.errors import BadRequest, SetupError
from scheduler.messages import Rates
from scheduler.models import BLOCK_TOKENS, ModelShape
from workers.kv_cache import KvCache
from workers.runner import NO_WISHES, Sampled
from workers.tools import HERMES
from workers.tools_prompt import explain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from scheduler import batching
    from scheduler.batching import Slice
    from scheduler.request import Prompt, TokenIds
    from workers.grammar import Grammars, Mask
    from workers.runner import Reading, Wishes

EOS = 256
_ALPHABET = b"abcdefghijklmnopqrstuvwxyz     "
_CLOSING = (EOS, *b'"}]0:,{[')  # what ends an answer that follows a grammar, best first
_SAMPLED = 256  # positions that the hash reads, evenly spread: long prompts stay cheap
SHAPE = ModelShape(
    layers=2,
    hidden=1,
    heads=1,
    kv_heads=1,
    head_dim=1,
    ffn=1,
    vocab=257,
    context_length=1 << 20,
    rope_theta=1.0,
    norm_eps=1.0,
    tied_embeddings=True,
)


class FakeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What follows `fake:` in a model's name, as in `fake:step_ms=5,tokens=64`."""

    tokens: Annotated[int, msgspec.Meta(ge=0)] = 16  # length of an answer that nothing else ends
    step_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # time of one step
    prefill_tps: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # prompt tokens a second; 0: no time
    context: Annotated[int, msgspec.Meta(ge=1)] = SHAPE.context_length
    word: Annotated[int, msgspec.Meta(ge=1)] = 1  # bytes of a prompt that a token stands for
    sequences: Annotated[int, msgspec.Meta(ge=1)] = 64  # that run at once
    parrot: bool = False  # say the prompt again and again: what drafts are right about


def parse_options(text: str) -> FakeOptions:
    """Read `key=value,…`. Raises SetupError naming the key."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    try:
        return msgspec.convert({k: v for k, _, v in pairs}, FakeOptions, strict=False)
    except msgspec.ValidationError as error:
        raise SetupError(f"fake:{text}: {error}; known: {FakeOptions.__struct_fields__}") from None


class FakeText:
    """Bytes as tokens: implements workers.text.Tokens."""

    eos_ids = frozenset({EOS})
    fingerprint = "fake-1"
    call_style = HERMES

    def __init__(self, context_length: int, word: int = 1) -> None:
        """Of `word` bytes of a prompt only the first becomes a token: it is as short as others'."""
        self.context_length = context_length
        self._word = word

    @cached_property
    def grammars(self) -> Grammars:
        """Structured output in bytes."""
        # Here, because it needs what a machine without an engine does not have.
        from workers.grammar import Grammars

        spelled = [self.token_bytes(token) for token in range(SHAPE.vocab)]
        return Grammars(spelled, self.eos_ids, self.eos_ids, lambda text: list(text.encode()))

    def encode(self, prompt: Prompt, created: float) -> TokenIds:
        """UTF-8 bytes; messages as `role: content` lines."""
        if prompt.ids is not None:
            if any(not 0 <= token < EOS for token in prompt.ids):
                raise BadRequest("token ids of this model are 0 to 255", param="prompt")
            tokens = prompt.ids
        elif prompt.text is not None:
            tokens = list(prompt.text.encode()[:: self._word])
        else:
            messages = prompt.messages or ()
            if prompt.tools:
                messages = explain(messages, prompt.tools)
            lines = (f"{m.role}: {m.content}\n" for m in messages)
            tokens = list("".join(lines).encode()[:: self._word])
        if not tokens:
            raise BadRequest("the prompt is empty", param="prompt")
        return tokens

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < EOS else b""

    def stream(
        self,
        stop: tuple[str, ...],
        emitted: Sequence[int] = (),
        sent: int = 0,
        *,
        tools: bool = False,
    ) -> FakeStream:
        return FakeStream(stop, emitted, sent)


class FakeStream:
    """The text of one choice: ASCII, so a token is a character."""

    def __init__(self, stop: tuple[str, ...], emitted: Sequence[int], sent: int) -> None:
        self.sent = sent
        self.stopped = False
        self._stop = stop
        self._text = bytes(emitted).decode()

    def push(self, token: int) -> str:
        self._text += chr(token) if token < EOS else ""
        for stop in self._stop:
            found = self._text.find(stop)
            if found >= 0:
                self.stopped = True
                return self._until(max(found, self.sent))
        held = max((_overlap(self._text, stop) for stop in self._stop), default=0)
        return self._until(len(self._text) - held)

    def finish(self) -> str:
        return self._until(len(self._text))

    def _until(self, end: int) -> str:
        piece = self._text[self.sent : end]
        self.sent = max(self.sent, end)
        return piece


class FakeRunner:
    """Writes token ids as KV, and draws by hashing what the cache holds of the prompt."""

    def __init__(
        self, blocks: int, options: FakeOptions, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.cache = KvCache(SHAPE, blocks)
        self.vocab = SHAPE.vocab
        self.numbers = "fake"
        self._options = options
        self._sleep = sleep

    def run(self, slices: Sequence[Slice], wishes: Wishes = NO_WISHES) -> list[Sampled]:
        """See Runner.run."""
        seconds = self._options.step_ms / 1000
        if self._options.prefill_tps:
            prefill = sum(s.end - s.start for s in slices if s.end - s.start > 1)
            seconds += prefill / self._options.prefill_tps
        if seconds:
            self._sleep(seconds)
        for layer in range(SHAPE.layers):
            for piece in slices:
                self._write(piece, layer)
            self.cache.mark.reach(layer + 1)
        for piece in slices:
            if reading := wishes.readings.get(piece.sequence):
                self._read(piece, reading)
        return [
            self._draw(piece.sequence, choice, drafted, wishes.masks.get(piece.sequence))
            for piece in slices
            for choice, drafted in _wanted(piece)
        ]

    def rates(self) -> Rates:
        """What a measurement of this worker would find."""
        step = self._options.step_ms / 1000
        return Rates(self._options.prefill_tps or 1e6, step or 1e-4)

    def _write(self, piece: Slice, layer: int) -> None:
        tokens = piece.tokens
        positions = np.arange(piece.start, piece.start + len(tokens))
        blocks = np.asarray(piece.sequence.blocks)[positions // BLOCK_TOKENS]
        values = np.asarray(tokens, np.float32)
        self.cache.data[layer, :, blocks, positions % BLOCK_TOKENS, 0, 0] = values[:, None]

    def _read(self, piece: Slice, reading: Reading) -> None:
        """Scores as `_scores` says; an embedding counts the prompt's tokens modulo 8."""
        if reading.top is not None:
            reading.take(piece.start, _scores(piece, reading.top))
        if reading.embed and piece.end == piece.sequence.prompt_len:
            tokens = self._kv(piece.sequence, np.arange(piece.end))[0, 0].ravel().astype(int)
            counts = np.bincount(tokens % 8, minlength=8)
            reading.embedding = (counts / np.linalg.norm(counts)).astype("<f4").tobytes()

    def _draw(
        self, sequence: batching.Sequence, choice: int, drafted: int, allowed: Mask | None
    ) -> Sampled:
        sampling, position = sequence.job.sampling, sequence.position + drafted
        ends = position >= self._options.tokens and not sequence.job.limits.ignore_eos
        if ends and allowed is None:
            return Sampled(EOS)
        count = len(sequence.tokens) + drafted
        if self._options.parrot:
            kv = self._kv(sequence, np.array([position % sequence.prompt_len]))
            return Sampled(int(kv[0, 0, 0].item()), -0.5, _top(sampling.logprobs or 0))
        kv = self._kv(sequence, np.linspace(0, count - 1, min(count, _SAMPLED)).astype(int))
        context = zlib.crc32(np.ascontiguousarray(kv).data)
        noise = (context, count, sampling.seed, sequence.job.prompt_index, choice, position)
        digest = hashlib.blake2b(repr(noise).encode(), digest_size=1).digest()[0]
        token = _ALPHABET[digest % len(_ALPHABET)]
        if allowed is not None:
            token = _follow(allowed, token, ends)
        return Sampled(token, -0.5, _top(sampling.logprobs or 0))

    def _kv(self, sequence: batching.Sequence, positions: npt.NDArray[np.int64]) -> Any:
        """What the cache holds at these positions: [layers, 2, positions, 1, 1]."""
        blocks = np.asarray(sequence.blocks)[positions // BLOCK_TOKENS]
        return self.cache.data[:, :, blocks, positions % BLOCK_TOKENS]


def _wanted(piece: Slice) -> list[tuple[int, int]]:
    """The slice's draws: choice, and how many tokens of the draft come before it."""
    drafts = range(1, len(piece.draft) + 1)
    return [(choice, 0) for choice in piece.choices] + [(piece.sequence.choice, n) for n in drafts]


def _scores(piece: Slice, top: int) -> list[Sampled]:
    """Of the prompt's tokens after those of the slice: a number that depends on what precedes."""
    sequence = piece.sequence
    ends = range(piece.start + 1, min(piece.end + 1, sequence.prompt_len))
    return [
        Sampled(sequence.tokens[i], -float(sequence.tokens[i - 1]) / 100, _top(top)) for i in ends
    ]


def _follow(allowed: Mask, token: int, ends: bool) -> int:
    """The token if the grammar lets it, else what brings the answer to an end."""
    wanted: list[int] = [*_CLOSING, token] if ends else [token, *_CLOSING]
    possible: list[int] = np.flatnonzero(allowed).tolist()
    return next((candidate for candidate in wanted if candidate in possible), possible[0])


def _top(count: int) -> tuple[tuple[int, float], ...]:
    return tuple((_ALPHABET[i], -1.0 - i) for i in range(count))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
