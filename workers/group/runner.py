"""The runner of a group: rank 0 computes its own part and has the others compute theirs."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from scheduler.errors import ProtocolError, SetupError
from scheduler.models import BLOCK_TOKENS
from workers.group.allreduce import ALGORITHMS
from workers.group.candidates import packed_bytes, unpack, wanted
from workers.group.demand import demand_of
from workers.group.formation import connect
from workers.group.kv_exchange import Exchange, GroupCache, Keeper
from workers.group.lineup import Lineup, Offer, line_up
from workers.group.links import listener
from workers.group.part import Means, Wanted, load_part, make_shard
from workers.group.sharded import Embedder
from workers.group.travel import Shelf
from workers.group.ways import ALL, ALWAYS, Combine, measure
from workers.group.words import Copy, Form, Leave, Logits, Peer, RowSpan, Run, Use
from workers.layout import lay_out, make_draws
from workers.reading import read, rms_norm
from workers.runner import NO_WISHES, CacheLost
from workers.sampling import Sampler
from workers.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.batching import Slice
    from workers.group.allreduce import Mesh
    from workers.group.leader import Leader, Member
    from workers.group.part import Part
    from workers.group.partition import Share
    from workers.group.plan import Box
    from workers.group.words import Word
    from workers.kv_cache import KvCache, KvDtype
    from workers.runner import Sampled, Wishes

    Array = np.ndarray[Any, np.dtype[np.float32]]

logger = logging.getLogger(__name__)

SETTLE_S = 10.0  # for the ranks of a broken formation to say so
LOAD_S = 1800.0  # for every rank to have its share in memory
SETTLED_STEPS = (
    16  # before a newcomer is taken in: a lost rank that is back costs one pause, not two
)
ATTEMPTS = 8  # formations in a row that broke before they stood


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """How a group computes."""

    mode: Literal["fast", "exact"]
    kv_dtype: KvDtype  # of `fast` mode
    quantize: Literal["int4", "int8"] | None
    path: str  # of the model
    kv_blocks: int
    max_rows: int
    means: Means  # of rank 0
    weight: float | None  # how much rank 0 computes, relative to the others; None: as `box` says
    box: Box | None  # what rank 0 can do
    listen_host: str
    secret: bytes
    way: str | None = None  # of all allreduces; None: the fastest, by size
    sums: Literal["float32", "int8"] = "float32"  # int8: where that is faster


class GroupRunner:
    """Runner over the ranks that are there; forms the group anew when one is lost or comes."""

    def __init__(self, leader: Leader, options: GroupOptions) -> None:
        """Raises SetupError when no formation stands."""
        self._leader, self._options = leader, options
        checkpoint = self._checkpoint = open_checkpoint(Path(options.path), options.quantize)
        self._shape = checkpoint.shape
        self.vocab = self._shape.vocab
        self.numbers = f"{options.mode} mode, weights {checkpoint.quantisation}"
        dtype = options.kv_dtype if options.mode == "fast" else "float32"
        self._kv = GroupCache(self._shape, options.kv_blocks, dtype, self.copy)
        self.cache: KvCache = self._kv
        self._embedder = Embedder(checkpoint)
        self._norm = checkpoint.array("model.norm.weight")
        self._server = listener(options.listen_host, 0)
        self._sampler = Sampler()
        self._epoch = 0
        self._demand = demand_of(
            checkpoint,
            options.quantize,
            options.mode,
            options.kv_dtype,
            options.kv_blocks * BLOCK_TOKENS,
            options.max_rows,
        )
        self._steps = 0  # since the group formed
        self._present: list[Member] = []  # with the spares
        self._members: list[Member] = []  # ranks from 1 on
        leader.shelf = Shelf(lambda share: make_shard(self._wanted(share), options.means))
        self._mesh: Mesh
        self.part: Part
        self._shares: tuple[Share, ...]
        self._form()

    @property
    def ranks(self) -> int:
        return 1 + len(self._members)

    def run(self, slices: Sequence[Slice], wishes: Wishes = NO_WISHES) -> list[Sampled]:
        """See Runner.run."""
        present = self._leader.members()
        lost = any(member not in present for member in self._members)
        settled = self._steps >= SETTLED_STEPS
        if present != self._present and (lost or settled) and not self._stays(present):
            self._reform("a rank came or went")  # the newcomer gets its share now
        if self._kv.exchange and self._kv.exchange.broken:
            self._reform("a rank does not give or take KV")
        self._steps += 1
        try:
            return self._step(slices, wishes)
        except (OSError, ProtocolError) as error:
            reason = str(error)
        self._reform(reason)

    def final(self, hidden: Array) -> Array:
        """See Head.final."""
        return rms_norm(hidden, self._norm, self._shape.norm_eps)

    def logits(self, hidden: Array) -> Array:
        """See Head.logits."""
        rows = np.ascontiguousarray(hidden)
        self._order(Logits(len(rows)), rows)
        return self._gather(self.part.logits(rows), [0] * len(rows))

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy KV blocks on every rank. A rank that is lost is noticed by the next step."""
        if pairs:
            with suppress(OSError):
                self._order(Copy(tuple(pairs)))
            self.part.cache.copy(pairs)

    def close(self) -> None:
        """The other ranks wait for another rank 0."""
        self._mesh.close()
        self._kv.close()
        self.part.close()
        self._leader.close()
        self._server.close()
        self._checkpoint.close()
        self._options.means.shards.close()

    def _step(self, slices: Sequence[Slice], wishes: Wishes) -> list[Sampled]:
        layout = lay_out(slices)
        x = self._embedder.rows(layout.tokens)
        spans = tuple(RowSpan(s.first, s.count, s.start, list(s.blocks)) for s in layout.spans)
        draws = make_draws(slices, wishes.masks)
        counts = wanted(draws, len(layout.drawn))
        self._order(Run(len(x), spans, tuple(layout.drawn), counts), x)
        hidden, own = self.part.run(x, layout.spans, layout.drawn)
        logits = self._gather(own, counts)
        if wishes.readings:
            read(slices, hidden, self, wishes.readings)
        return self._sampler.sample(logits, draws)

    def _order(self, order: Word, x: Array | None = None) -> None:
        """Tell every rank what to do, with these rows."""
        for link in self._mesh.links.values():
            link.say(order)
            if x is not None:
                link.send(x.data.cast("B"))

    def _gather(self, own: Array, counts: Sequence[int]) -> Array:
        """Our logits [n, V_0] and those of the other ranks -> [n, V]; see candidates.wanted."""
        whole = np.empty((len(own), self.vocab), np.float32)
        if not len(own):
            return whole
        whole[:, : own.shape[1]] = own
        for rank, share in enumerate(self._shares[1:], 1):
            data = memoryview(bytearray(packed_bytes(counts, share.vocab.count)))
            self._mesh.links[rank].receive_into(data)
            unpack(data, counts, whole[:, share.vocab.first : share.vocab.last])
        return whole

    # ── formations ──────────────────────────────────────────────────────────────────────────────

    def _reform(self, reason: str) -> NoReturn:
        """Part the ranks and put those who are there together again. Raises CacheLost."""
        logger.warning("the group forms anew: %s", reason)
        with suppress(OSError):
            self._order(Leave())
        self._mesh.close()
        self._kv.exchange = None
        self.part.close()
        del self.part  # its memory is needed for the next
        self._leader.settle(self._members, self._epoch, SETTLE_S)
        self._form()
        raise CacheLost(reason)

    def _form(self) -> None:
        """Make one worker of all ranks that are there. Raises SetupError when it never stands."""
        for _ in range(ATTEMPTS):
            self._epoch += 1
            self._present = self._leader.members()
            self._members, self._shares = self._line_up(self._present)
            try:
                if self._try():
                    self._steps = 0
                    logger.info("a group of %d ranks", self.ranks)
                    return
            except (OSError, ProtocolError) as error:
                logger.warning("formation %d broke: %s", self._epoch, error)
            self._leader.settle(self._members, self._epoch, SETTLE_S)
        raise SetupError(f"the group's ranks broke {ATTEMPTS} formations; their logs say why")

    def _line_up(self, present: list[Member]) -> Lineup:
        own = Offer(self._options.weight, self._options.box)
        return line_up(self._demand, self._options.mode, own, present)

    def _stays(self, present: list[Member]) -> bool:
        """Whether the formation is still the best: only spares came or went."""
        if not all(member in present for member in self._members):
            return False
        if self._line_up(present).members != self._members:
            return False
        self._present = present
        return True

    def _try(self) -> bool:
        """One formation with the members that we know; says whether it stands."""
        options, members = self._options, self._members
        peers = (
            Peer("rank 0", "", self._server.getsockname()[1]),
            *(Peer(member.hello.name, member.host, member.hello.port) for member in members),
        )
        for rank, member in enumerate(members, 1):
            self._leader.tell(member, self._form_of(rank, peers))
        self._mesh = connect(self._server, options.secret, self._epoch, 0, peers)
        try:
            combine = Combine(self._mesh)
            self.part = load_part(self._wanted(self._shares[0]), options.means, combine)
            ready = self._leader.all_ready(members, self._epoch, LOAD_S)
            if ready:
                self._agree(combine)
                self._kv.exchange = self._exchange()
                options.means.shards.stands()
        except BaseException:
            self._mesh.close()
            raise
        if not ready:
            self._mesh.close()
            self.part.close()
            del self.part
        return ready

    def _exchange(self) -> Exchange:
        links = (None, *(self._mesh.kv_links[rank] for rank in range(1, self.ranks)))
        heads = (share.kv_heads for share in self._shares)
        return Exchange(self._epoch, self.part.cache, tuple(map(Keeper, heads, links)))

    def _wanted(self, share: Share) -> Wanted:
        options = self._options
        return Wanted(
            share=share,
            mode=options.mode,
            quantize=options.quantize,
            path=options.path,
            kv_dtype=options.kv_dtype,
            kv_blocks=options.kv_blocks,
            max_rows=options.max_rows,
        )

    def _form_of(self, rank: int, peers: tuple[Peer, ...]) -> Form:
        options = self._options
        return Form(
            epoch=self._epoch,
            rank=rank,
            peers=peers,
            share=self._shares[rank],
            mode=options.mode,
            kv_dtype=options.kv_dtype,
            quantize=options.quantize,
            path=options.path,
            kv_blocks=options.kv_blocks,
            max_rows=options.max_rows,
            hidden=self._shape.hidden,
        )

    def _agree(self, combine: Combine) -> None:
        """On the ways of sums: the one that was asked for, or the fastest for each size."""
        if self.ranks == 1:
            return
        row = 4 * self._shape.hidden  # of one token
        sizes = [row * rows for rows in (1, 16, self._options.max_rows)]
        chosen, int8 = self._options.way, self._options.sums == "int8"
        if chosen:
            ways: tuple[tuple[int, str], ...] = ((ALWAYS, chosen + "-int8" if int8 else chosen),)
        else:
            ways = measure(self._mesh, self._order, sizes, ALL if int8 else ALGORITHMS)
        self._order(Use(ways))
        combine.use(ways)
        logger.info("sums travel: %s", ", ".join(f"{way} up to {size} B" for size, way in ways))
