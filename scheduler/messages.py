"""The words that processes exchange, one section per link. No logic.

Every struct is tagged by its class name on the wire (MessagePack maps). A receiver ignores fields
that it does not know, so a field may be added with a default; anything else raises `VERSION`.
A release speaks OLDEST to VERSION, two connected processes the newest that both know: a cluster is
upgraded process by process, in any order, by one release at a time.

    1  the first release
    2  a worker serves several routers (Joined.router)
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from scheduler.cost import CostModel
from scheduler.request import Job, Prompt, TokenIds

VERSION = 2
OLDEST = 1
HANDSHAKE = 1  # the handshake's own version, which every release frames alike
Versions = tuple[int, int]  # the oldest and the newest that a process speaks
SPEAKS: Versions = (OLDEST, VERSION)
FIRST: Versions = (1, 1)  # the first release did not say


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


class Wire(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of everything that is framed."""


# ── handshake: either side of any link ──────────────────────────────────────────────────────────


class Challenge(Wire, frozen=True):
    """The listener speaks first."""

    version: int
    nonce: bytes
    speaks: Versions = FIRST


class Answer(Wire, frozen=True):
    """The dialler proves that it knows the cluster secret, and asks for the same proof."""

    version: int
    nonce: bytes
    proof: bytes
    speaks: Versions = FIRST


class Welcome(Wire, frozen=True):
    """The listener's own proof: from here on both sides trust each other."""

    proof: bytes


class Refused(Wire, frozen=True):
    """Said instead of the expected word; the connection then closes."""

    reason: str


# ── worker → router ─────────────────────────────────────────────────────────────────────────────


class Address(msgspec.Struct, frozen=True):
    """Where a worker listens for other workers' KV caches."""

    host: str
    port: int


class Rates(msgspec.Struct, frozen=True):
    """What a worker measured of itself before it joined."""

    prefill_tokens_per_s: float
    decode_s_per_token: float  # one sequence alone


class Join(Wire, frozen=True):
    """A worker introduces itself."""

    name: str  # unique within the cluster; a worker that comes back keeps it
    model: str
    role: Role
    address: Address
    fingerprint: str  # hash of tokenizer, template and model shape: equal within a model
    context_length: int
    kv_blocks: int
    rates: Rates
    pid: int
    numbers: str = ""  # mode, weights and KV cache: equal within a model; unknown of older workers
    kind: str = ""  # the plan's column that it is a replica of


class Load(Wire, frozen=True):
    """Heartbeat: what the worker holds now, and counters since it started."""

    running: int
    waiting: int
    free_blocks: int
    steps: int
    tokens: int
    cancelled: int
    cancel_steps_max: (
        int  # most steps that ran between a cancel's arrival and its blocks being free
    )
    preempted: int
    kv_bytes_sent: int
    kv_bytes_received: int
    drafted: int = 0  # tokens guessed by speculation
    drafts_accepted: int = 0  # of those, the right ones
    cost: CostModel | None = None  # what its steps cost, as learned from each that ran
    standing_s: float = 0.0  # how long the step that runs has taken beyond what was predicted
    others_running: int = 0  # sequences of other routers' requests that run or wait here
    others_queued: int = 0  # tokens of their prompts that are not computed
    tasks: int = 0  # of its event loop


class Accepted(Wire, frozen=True):
    """The worker tokenised the prompt and will serve it."""

    id: str
    epoch: int
    prompt_ids: TokenIds


class AcceptedUnread(Wire, frozen=True, tag="Accepted"):
    """Accepted, as a router reads it: see scheduler/packed.

    The ids lie in the connection's memory, so they are gone with its next word.
    """

    id: str
    epoch: int
    prompt_ids: msgspec.Raw


class Alternative(msgspec.Struct, frozen=True, array_like=True):
    token: str
    raw: bytes  # the token itself: text may be only a part of a character
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token: str
    raw: bytes  # the token itself: text may be only a part of a character
    logprob: float
    top: tuple[Alternative, ...]


class Echo(msgspec.Struct, frozen=True, omit_defaults=True):
    """A prompt, for an answer that repeats it. Where logprobs are asked for, its tokens too."""

    text: str
    first: bytes  # the first token: nothing comes before it, so it has no logprob
    tokens: tuple[TokenLogprob, ...] = ()  # the others


class CallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of an answer's tool call number `index`; the first piece has the name."""

    index: int
    name: str | None = None
    arguments: str = ""  # the pieces of one call, joined, are JSON


class Output(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What one step gave one choice: ids[0] is the choice's token number `position`.

    `echo` and `cached` (prompt tokens whose KV was here already) come with the first output of a
    job's first choice. An answer of no tokens has one output without ids.
    """

    id: str
    epoch: int
    choice: int
    position: int
    ids: TokenIds
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    calls: tuple[CallDelta, ...] = ()
    echo: Echo | None = None
    cached: int = 0
    embedding: bytes = b""  # [D] float32, little-endian, of length 1


class Outputs(Wire, frozen=True):
    """All that one step gave."""

    items: tuple[Output, ...]


class HandedOver(Wire, frozen=True):
    """The decode worker has the KV cache and continues; this worker holds nothing any more."""

    id: str
    epoch: int
    kv_bytes: int = 0  # of the KV cache, before any codec
    link_s: float = 0.0  # that it kept the link busy; 0: not known


class FailureKind(enum.StrEnum):
    BAD_REQUEST = "bad_request"
    HANDOFF = "handoff"  # replay elsewhere
    INTERNAL = "internal"  # replay elsewhere


class Failed(Wire, frozen=True):
    """The worker holds nothing of this job any more and will say no more about it."""

    id: str
    epoch: int
    kind: FailureKind
    message: str
    param: str | None = None
    code: str | None = None


class Tokenised(Wire, frozen=True):
    """The answer to Tokenise, unless that is a Failed."""

    id: str
    ids: TokenIds
    spelled: tuple[str, ...]  # each token readable
    text: str  # what the tokens stand for


class Leaving(Wire, frozen=True):
    """The worker drains: send it nothing new."""


# ── router → worker ─────────────────────────────────────────────────────────────────────────────


class Joined(Wire, frozen=True):
    """The router takes the worker in."""

    heartbeat_s: float
    router: str = ""  # its id, with which the ids of its jobs begin (see request.router_of)


class Peer(msgspec.Struct, frozen=True):
    """The decode worker that a prefill worker hands over to."""

    name: str
    address: Address


class Submit(Wire, frozen=True):
    """Serve this job; with `handoff`, only its first token here and the rest there."""

    job: Job
    handoff: Peer | None = None


class Tokenise(Wire, frozen=True):
    """Say what a prompt is in tokens, beside the steps; nothing is held."""

    id: str
    prompt: Prompt
    created: float


class Cancel(Wire, frozen=True):
    """Free all that the job holds. Idempotent; an unknown id is no error."""

    id: str
    epoch: int


# ── prefill worker → decode worker ──────────────────────────────────────────────────────────────


class Reserve(Wire, frozen=True):
    """Hold blocks for this job (its prompt as ids). The answer may wait until blocks are free.

    The lease ends with the connection, or `lease_s` seconds after the answer if no Commit came.
    """

    job: Job
    prefill: str  # name of the worker that asks
    fingerprint: str
    lease_s: float
    host: str = ""  # which others must be on to share memory with the sender; empty: none can
    checksums: tuple[str, ...] = ()  # that it can compute, best first; none: it knows no Again
    seal: int | None = None  # checksum of all else (workers/kv_wire)


class KvMemory(msgspec.Struct, frozen=True):
    """The receiver's memory for one connection, found by way of /proc (workers/kv_memory)."""

    process: int
    descriptor: int
    slots: int
    slot_bytes: int
    nonce: bytes  # what it begins with


class Reserved(Wire, frozen=True):
    id: str
    epoch: int
    checksum: str = ""  # of those that the sender knows; none: whole layers, unchecked, no Again
    codecs: tuple[str, ...] = ()  # that it can unpack, besides raw
    memory: KvMemory | None = None  # where chunks may be put instead of sent


class KvPart(msgspec.Struct, frozen=True, array_like=True):
    """Neighbouring layers and tokens of a prompt's KV."""

    first_layer: int
    layers: int
    first_token: int
    tokens: int


class KvBlocks(Wire, frozen=True):
    """Announces a payload: KV of `tokens` tokens of `layers` layers, [layers, 2, tokens, K, E]."""

    id: str
    epoch: int
    first_layer: int
    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    dtype: str  # numpy's name: float32, float16
    codec: str  # raw, int8 or int4 (workers/kv_pack)
    first_token: int = 0
    slot: int | None = None  # of the shared memory: that is where the bytes are, and not here
    checksum: int | None = None  # of the payload and of all else here


class Taken(Wire, frozen=True):
    """This slot of the shared memory has been read and may be written."""

    slot: int


class FirstToken(msgspec.Struct, frozen=True):
    """What the prefill worker already gave one choice."""

    choice: int
    token: int
    sent: int  # characters already sent to the client


class Commit(Wire, frozen=True):
    """All KV is there: continue these choices."""

    id: str
    epoch: int
    firsts: tuple[FirstToken, ...]
    seal: int | None = None  # checksum of all else


class Again(Wire, frozen=True):
    """Not all has arrived whole: send these parts once more, then the Commit."""

    id: str
    epoch: int
    parts: tuple[KvPart, ...]


class Committed(Wire, frozen=True):
    id: str
    epoch: int
    link_s: float = 0.0  # from the heads of chunks to their last bytes, in all


Handshake: TypeAlias = Challenge | Answer | Welcome | Refused
FromWorker: TypeAlias = Join | Load | Accepted | Outputs | HandedOver | Failed | Tokenised | Leaving
FromRouter: TypeAlias = Joined | Submit | Tokenise | Cancel | Refused
ToDecode: TypeAlias = Reserve | KvBlocks | Commit
FromDecode: TypeAlias = Reserved | Taken | Again | Committed | Refused
FromWorkerUnread: TypeAlias = (
    Join | Load | AcceptedUnread | Outputs | HandedOver | Failed | Tokenised | Leaving
)
Anything: TypeAlias = Handshake | FromWorker | FromRouter | ToDecode | FromDecode
ToRouter: TypeAlias = Handshake | FromWorkerUnread | FromRouter | ToDecode | FromDecode
