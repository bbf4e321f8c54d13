"""What the ranks of a group say to each other. No logic."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
from msgspec.msgpack import Decoder

from scheduler.request import TokenIds
from workers.group.partition import Share
from workers.group.plan import Box
from workers.group.shard_file import Manifest
from workers.kv_cache import KvDtype


class Word(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of everything that is framed."""


# ── control link: a rank → rank 0 ───────────────────────────────────────────────────────────────


class Hello(Word, frozen=True):
    """A process offers itself as a rank."""

    name: str  # unique within the group; a rank that comes back keeps it
    host: str  # where it listens for the links of other ranks; empty: as rank 0 sees it
    port: int
    model: str  # its name: ranks of another are refused
    path: str  # of the model on its own disk, or empty
    weight: float | None  # how much it computes, relative to others; None: as `box` says
    box: Box | None  # what it can do, where that was measured
    pid: int


class Probe(Word, frozen=True):
    """Before Hello, a few times: so many bytes follow, to be thrown away; a Probe comes back."""

    size: int


class Want(Word, frozen=True):
    """Instead of Hello, on a link of its own: this share's shard, please."""

    share: Share


class Get(Word, frozen=True):
    """These bytes of the shard's file; they come raw."""

    offset: int
    size: int


class Ready(Word, frozen=True):
    """The share is in memory and the links stand."""

    epoch: int


class Left(Word, frozen=True):
    """The rank is in this formation no more; it waits for the next."""

    epoch: int
    reason: str  # what broke it; empty if rank 0 ended it


class Beat(Word, frozen=True):
    """It lives; said every BEAT_S."""


# ── control link: rank 0 → a rank ───────────────────────────────────────────────────────────────


class Peer(msgspec.Struct, frozen=True):
    name: str
    host: str  # empty: where rank 0 listens for members
    port: int


class Form(Word, frozen=True):
    """Become this rank of the group. A later epoch ends an earlier one."""

    epoch: int
    rank: int
    peers: tuple[Peer, ...]  # in the order of ranks
    share: Share
    mode: Literal["fast", "exact"]
    kv_dtype: KvDtype
    quantize: Literal["int4", "int8"] | None
    path: str  # of the model, on rank 0's disk
    kv_blocks: int
    max_rows: int
    hidden: int  # D


class Shipment(Word, frozen=True):
    """What the shard's file holds."""

    manifest: Manifest


class Refuse(Word, frozen=True):
    """There is no place in the group, or no shard; the rank ends."""

    reason: str


# ── data links ──────────────────────────────────────────────────────────────────────────────────


class Memory(msgspec.Struct, frozen=True):
    """Where a rank's memory is for another of its host (workers/host_memory)."""

    host: str
    process: int
    descriptor: int
    nonce: bytes


class Introduce(Word, frozen=True):
    """Said first by whoever dials."""

    epoch: int
    rank: int
    kv: bool = False  # the link is for the KV cache (kv_exchange), else for steps
    memory: Memory | None = None  # for long messages; Met comes back


class Met(Word, frozen=True):
    """Whether both have the memory that was offered."""

    shared: bool


class RowSpan(msgspec.Struct, frozen=True, array_like=True):
    """See kernels.program.Span."""

    first: int
    count: int
    start: int
    blocks: TokenIds


class Run(Word, frozen=True):
    """Rows [T, D] float32 of the embedding follow; logits of the drawn rows go back."""

    rows: int
    spans: tuple[RowSpan, ...]
    drawn: tuple[int, ...]
    counts: tuple[int, ...]  # of each drawn row: only so many of the best; 0: all (candidates.py)


class Logits(Word, frozen=True):
    """Hidden rows [n, D] float32 follow; their logits go back."""

    rows: int


class Copy(Word, frozen=True):
    """Copy KV blocks, (from, to) each."""

    pairs: tuple[tuple[int, int], ...]


class Try(Word, frozen=True):
    """Sum so many bytes so many times in this way: rank 0 looks at its clock."""

    way: str
    size: int
    count: int


class Use(Word, frozen=True):
    """The ways of all sums from here on: (up to so many bytes, the way), ascending."""

    ways: tuple[tuple[int, str], ...]


class Leave(Word, frozen=True):
    """The formation ends; wait for the next on the control link."""


# ── KV links: rank 0 → a rank, beside its steps ─────────────────────────────────────────────────


class KvTake(Word, frozen=True):
    """Send these tokens of a sequence, layers [first, last): they come raw, your heads only."""

    blocks: TokenIds  # of the sequence
    tokens: tuple[int, int]
    layers: tuple[int, int]


class KvPut(Word, frozen=True):
    """They follow, your heads only; KvKept comes back."""

    blocks: TokenIds
    tokens: tuple[int, int]
    layers: tuple[int, int]


class KvKept(Word, frozen=True):
    """They are in the cache."""


FromRank: TypeAlias = Ready | Left | Beat
ToRank: TypeAlias = Form | Refuse
Order: TypeAlias = Run | Logits | Copy | Try | Use | Leave
KvOrder: TypeAlias = KvTake | KvPut

OFFER: Decoder[Probe | Hello | Want] = Decoder(Probe | Hello | Want)
GET = Decoder(Get)
SHIPMENT: Decoder[Shipment | Refuse] = Decoder(Shipment | Refuse)
PROBE = Decoder(Probe)
FROM_RANK: Decoder[FromRank] = Decoder(FromRank)
TO_RANK: Decoder[ToRank] = Decoder(ToRank)
INTRODUCE = Decoder(Introduce)
MET = Decoder(Met)
ORDER: Decoder[Order] = Decoder(Order)
KV_ORDER: Decoder[KvOrder] = Decoder(KvOrder)
KV_KEPT = Decoder(KvKept)
