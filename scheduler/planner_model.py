"""The optimisation: shares x of each bucket on each column, and whole numbers y of replicas.

For every bucket b of rate r_b, and every column c with capacity cap_c(b):

    Σ mixed x + Σ prefill x + u_b = 1            u_b is what is shed
    Σ prefill x = Σ decode x, in each region     a KV cache does not leave its region
    Σ_b r_b·x / cap_c(b) ≤ usable(y_c)           and the same for the link that KV caches cross

With slices, x is a multiple of 1/S: Mélange's form (arXiv 2404.14527, §5.2) without the symmetry of
its equal slices, so it has the same optimum.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from scheduler.head_room import enough, line_below, ranges, usable
from scheduler.linear import LinearProgram
from scheduler.messages import Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    import numpy.typing as npt

    from scheduler.problem import Column, Problem

ON_DEMAND = "on-demand"
SMALL_LOAD = 0.05  # replicas
FLIP = 0.1  # of a start or a stop: a machine that only changes its role is warm in seconds
Terms = list[tuple[int, float]]  # variable, factor


class Options(msgspec.Struct, frozen=True):
    """What is asked of a plan beyond its cost.

    `spare`: the loss of any one replica leaves enough. `on_demand`: least share of each model's
    requests on machines that are not taken away. `previous` with `switching` and `wasted`: $/h that
    starting or stopping a replica counts for, and the share of its own price besides; one whose
    role is flipped counts for FLIP of that. `gap`: stop when the cost is proven to be within this
    share.
    """

    slices: int | None = None
    spare: bool = False
    on_demand: float = 0.0
    previous: dict[str, int] = {}
    switching: float = 0.0
    wasted: float = 0.0
    time_limit: float = 50.0  # s
    gap: float = 0.0


class PlanModel:
    """The program and the variables in it; columns and buckets by their index in the problem."""

    def __init__(self, problem: Problem, options: Options) -> None:
        self.problem = problem
        self.options = options
        self.program = LinearProgram()
        self.asked = [at for at, bucket in enumerate(problem.buckets) if bucket.rate > 0]
        self.pairs = sorted(useful_pairs(problem, self.asked))
        self.shed = {b: self.program.variable(upper=1.0) for b in self.asked}
        self.limit_rows: list[int] = []
        self._paid: Terms = []
        loads = [0.0] * len(problem.columns)
        for b, c in self.pairs:
            loads[c] += max(self._load(b, c), self._link_load(b, c))
        self.y: list[int] = []
        self._room: list[Terms] = []
        self._room_after_loss: list[Terms] = []
        for column, load in zip(problem.columns, loads, strict=True):
            self._add_count(column, load)
        self.x = self._add_routing(self._room, sliced=options.slices)
        self._add_least_counts()
        self._add_limits()
        self._add_on_demand_share()
        self._add_switching()
        shed = [(u, problem.buckets[b].rate) for b, u in self.shed.items()]
        self._shed_row = self.program.row(shed)
        self._true_costs = list(self.program.costs)
        self.serve_all()

    # ── objectives ──────────────────────────────────────────────────────────────────────────────

    def serve_all(self) -> None:
        """Nothing is shed but what no column can serve; the cost is the objective."""
        served = {b for b, _ in self.pairs}
        for b, u in self.shed.items():
            self.program.fix(u, 0.0 if b in served else 1.0)

    def shed_least(self) -> None:
        """Requests shed per second are the objective, whatever was kept before."""
        self.program.limit(self._shed_row, math.inf)
        served = {b for b, _ in self.pairs}
        for b in served:
            self.program.bound(self.shed[b], 0.0, 1.0)
        rates = {u: self.problem.buckets[b].rate for b, u in self.shed.items()}
        self.program.costs = [rates.get(v, 0.0) for v in range(len(self.program.costs))]

    def keep_shed(self, rate: float) -> None:
        """The cost is the objective again, while no more than `rate` requests/s are shed."""
        self.program.limit(self._shed_row, rate * (1 + 1e-9) + 1e-9)
        self.program.costs = self._true_costs + [0.0] * (
            len(self.program.costs) - len(self._true_costs)
        )

    def cost_of(self, values: npt.NDArray[np.float64]) -> float:
        """$/h of the replicas, or of the nodes where only whole nodes are let."""
        total = math.fsum(price * round(float(values[v])) for v, price in self._paid)
        return round(total, 9)

    def balance(self, counts: list[int], shed: dict[int, float]) -> None:
        """With these counts, the smallest share of load on the fullest column is the objective."""
        for variable, count in zip(self.y, counts, strict=True):
            self.program.fix(variable, count)
        for b, share in shed.items():
            self.program.fix(self.shed[b], share)
        fullest = self.program.variable(upper=1.0)
        self.program.costs = [0.0] * len(self.program.costs)
        self.program.costs[fullest] = 1.0
        by_column = self._loads_of(self.x)
        for c, terms in by_column.items():
            column = self.problem.columns[c]
            room = usable(counts[c], column.burst)
            self.program.row([*terms, (fullest, -room)], upper=0.0)

    def serve_with(self, counts: list[int], room: list[float]) -> None:
        """With these counts, of which so many are usable, requests shed per second are the
        objective."""
        self.shed_least()
        for variable, count in zip(self.y, counts, strict=True):
            self.program.fix(variable, count)
        for c, terms in self._loads_of(self.x).items():
            self.program.row(terms, upper=room[c])

    def add_loss(self, lost: int) -> None:
        """Everything that is served must still be when one replica of column `lost` is gone."""
        room = list(self._room)
        room[lost] = self._room_after_loss[lost]
        self._add_routing(room, sliced=None)

    # ── variables and rows ──────────────────────────────────────────────────────────────────────

    def _load(self, b: int, c: int) -> float:
        """Replicas of column c that bucket b would need if all of it went there."""
        bucket = self.problem.buckets[b]
        return bucket.rate / self.problem.columns[c].capacity[bucket.name]

    def _link_load(self, b: int, c: int) -> float:
        """The same for the link that KV caches cross; 0 where none do."""
        bucket = self.problem.buckets[b]
        rate = self.problem.columns[c].link.get(bucket.name)
        return bucket.rate / rate if rate else 0.0

    def _most(self, column: Column) -> float:
        """Replicas that the limits leave room for."""
        return min(
            (limit.gpus // column.gpus for limit in self.problem.limits if limit.covers(column)),
            default=math.inf,
        )

    def _add_count(self, column: Column, load: float) -> None:
        """y of a column, and its usable capacity as terms, now and after one replica's loss."""
        needed = enough(load, column.burst) + (1 if self.options.spare and load > 0 else 0)
        if self.options.switching or self.options.wasted:  # to keep one may be the cheapest
            needed = max(needed, self.options.previous.get(column.name, 0))
        most = int(min(needed, self._most(column)))
        paid_by_node = any(nodes.covers(column) for nodes in self.problem.nodes)
        price = 0.0 if paid_by_node else column.price
        y = self.program.variable(cost=price, upper=most, integer=True)
        self._paid.append((y, price))
        self.y.append(y)
        if column.burst == 0 and not self.options.spare:
            self._room.append([(y, 1.0)])
            self._room_after_loss.append([])
            return
        self._add_pieces(y, most, column.burst)

    def _add_pieces(self, y: int, most: int, burst: float) -> None:
        """`usable` is convex, so it takes a binary for each range of counts: 1, 2, 3, 4, 5-6, …"""
        counts: Terms = [(y, -1.0)]
        now: Terms = []
        after: Terms = []
        choices: Terms = []
        for low, high in ranges(most):
            chosen = self.program.variable(upper=1.0, integer=True)
            choices.append((chosen, 1.0))
            if low == high:
                counts.append((chosen, low))
                now.append((chosen, usable(low, burst)))
                after.append((chosen, usable(low - 1, burst)))
                continue
            count = self.program.variable(upper=high)
            counts.append((count, 1.0))
            self.program.row([(count, 1.0), (chosen, -low)], lower=0.0)
            self.program.row([(count, 1.0), (chosen, -high)], upper=0.0)
            for terms, lost in ((now, 0), (after, 1)):
                start, slope = line_below(low, high, burst, lost)
                terms += [(chosen, start), (count, slope)]
        self.program.row(counts, lower=0.0, upper=0.0)
        self.program.row(choices, upper=1.0)
        self._room.append(now)
        self._room_after_loss.append(after)

    def _add_routing(self, room: list[Terms], *, sliced: int | None) -> dict[tuple[int, int], int]:
        """Shares and their rows, within `room`; shares are counted in slices if there are any."""
        top = float(sliced or 1)
        x = {
            pair: self.program.variable(upper=top, integer=sliced is not None)
            for pair in self.pairs
        }
        first: dict[int, Terms] = {b: [(self.shed[b], top)] for b in self.asked}
        handed: dict[tuple[int, str], Terms] = {}
        for (b, c), variable in x.items():
            column = self.problem.columns[c]
            if column.role is not Role.DECODE:
                first[b].append((variable, 1.0))
            if column.role is not Role.MIXED:
                sign = 1.0 if column.role is Role.PREFILL else -1.0
                handed.setdefault((b, column.region), []).append((variable, sign))
        for terms in first.values():
            self.program.row(terms, lower=top, upper=top)
        for terms in handed.values():
            self.program.row(terms, lower=0.0, upper=0.0)
        for c, terms in self._loads_of(x).items():
            minus = [(variable, -factor * top) for variable, factor in room[c]]
            self.program.row([*terms, *minus], upper=0.0)
        for c, terms in self._link_loads_of(x).items():
            self.program.row([*terms, (self.y[c], -top)], upper=0.0)
        return x

    def _loads_of(self, x: dict[tuple[int, int], int]) -> dict[int, Terms]:
        loads: dict[int, Terms] = {}
        for (b, c), variable in x.items():
            loads.setdefault(c, []).append((variable, self._load(b, c)))
        return loads

    def _link_loads_of(self, x: dict[tuple[int, int], int]) -> dict[int, Terms]:
        loads: dict[int, Terms] = {}
        for (b, c), variable in x.items():
            if load := self._link_load(b, c):
                loads.setdefault(c, []).append((variable, load))
        return loads

    def _add_least_counts(self) -> None:
        """x ≤ y for loads that are small beside a replica, and could hide in a tolerance.

        True of whole numbers anyway; for larger loads it would only make the program longer.
        """
        top = float(self.options.slices or 1)
        for (b, c), variable in self.x.items():
            if self._load(b, c) < SMALL_LOAD:
                self.program.row([(variable, 1.0), (self.y[c], -top)], upper=0.0)

    def _add_limits(self) -> None:
        nodes = [
            (kind, self.program.variable(cost=kind.price, integer=True))
            for kind in self.problem.nodes
        ]
        self._paid += [(variable, kind.price) for kind, variable in nodes]
        columns = list(zip(self.problem.columns, self.y, strict=True))
        for kind, variable in nodes:
            terms: Terms = [(y, column.gpus) for column, y in columns if kind.covers(column)]
            self.program.row([*terms, (variable, -kind.size)], upper=0.0)
        for limit in self.problem.limits:
            terms = []
            for column, y in columns:
                if limit.covers(column) and not any(kind.covers(column) for kind, _ in nodes):
                    terms.append((y, column.gpus))
            for kind, variable in nodes:
                inside = limit.market in (None, kind.market) and limit.region in (None, kind.region)
                if kind.gpu == limit.gpu and inside:
                    terms.append((variable, kind.size))
            self.limit_rows.append(self.program.row(terms, upper=limit.gpus))

    def _add_on_demand_share(self) -> None:
        """Per model: of first tokens (prefill, mixed), and of the others (decode, mixed)."""
        least = self.options.on_demand
        top = float(self.options.slices or 1)
        if not least:
            return
        for model in sorted({bucket.model for bucket in self.problem.buckets}):
            asked = [b for b in self.asked if self.problem.buckets[b].model == model]
            rates = {b: self.problem.buckets[b].rate for b in asked}
            for left_out in (Role.DECODE, Role.PREFILL):
                terms = [
                    (variable, rates[b] / top)
                    for (b, c), variable in self.x.items()
                    if b in rates
                    and self.problem.columns[c].market == ON_DEMAND
                    and self.problem.columns[c].role is not left_out
                ]
                terms += [(self.shed[b], least * rate) for b, rate in rates.items()]
                self.program.row(terms, lower=least * sum(rates.values()))

    def _add_switching(self) -> None:
        for columns, price in changes(self.problem, self.options):
            changed = self.program.variable(cost=price)
            before = _before(self.problem, self.options, columns)
            for sign in (1.0, -1.0):
                terms = [(self.y[c], sign) for c in columns]
                self.program.row([*terms, (changed, -1.0)], upper=sign * before)


def changes(problem: Problem, options: Options) -> Iterable[tuple[list[int], float]]:
    """Columns whose replicas together became more or fewer, and the $/h that each counts for.

    A flip changes two columns and no machine; a start or a stop, one of each.
    """
    if not options.previous or not (options.switching or options.wasted):
        return
    machines: dict[tuple[str, ...], list[int]] = {}
    for c, column in enumerate(problem.columns):
        machines.setdefault(column.machine, []).append(c)
    for alike in machines.values():
        price = options.switching + options.wasted * problem.columns[alike[0]].price
        yield from (([c], price * FLIP / 2) for c in alike)
        yield alike, price * (1 - FLIP / 2)


def switching_cost(problem: Problem, options: Options, replicas: Mapping[str, int]) -> float:
    """$/h that a plan of these replicas counts for beside its own cost."""
    return math.fsum(
        price
        * abs(
            sum(replicas.get(problem.columns[c].name, 0) for c in columns)
            - _before(problem, options, columns)
        )
        for columns, price in changes(problem, options)
    )


def _before(problem: Problem, options: Options, columns: Iterable[int]) -> int:
    return sum(options.previous.get(problem.columns[c].name, 0) for c in columns)


def useful_pairs(problem: Problem, asked: Iterable[int]) -> Iterable[tuple[int, int]]:
    """(bucket, column) where the column can serve it, with a partner in its region if it splits."""
    by_model: dict[str, list[tuple[int, Column]]] = {}
    for c, column in enumerate(problem.columns):
        by_model.setdefault(column.model, []).append((c, column))
    for b in asked:
        bucket = problem.buckets[b]
        able = [
            (c, col) for c, col in by_model.get(bucket.model, []) if bucket.name in col.capacity
        ]
        regions = {
            role: {col.region for _, col in able if col.role is role}
            for role in (Role.PREFILL, Role.DECODE)
        }
        both = regions[Role.PREFILL] & regions[Role.DECODE]
        yield from ((b, c) for c, col in able if col.role is Role.MIXED or col.region in both)
