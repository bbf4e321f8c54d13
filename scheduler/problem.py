"""What a planner is asked: size buckets with rates, columns that may serve them, and limits.

A column is one way to run one replica of a model. The problem file is the same in JSON, without
what only a service file can know.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from scheduler.errors import SetupError
from scheduler.messages import Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

T = TypeVar("T")

MOST = 1e9  # of any number: what the solver can hold beside the others
LEAST_CAPACITY = 1e-6  # requests/s


class Bucket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests of like size: `rate` is in requests/s, `name` is unique within the model."""

    name: str
    model: str
    rate: float


class Column(msgspec.Struct, frozen=True):
    """One kind of replica: `gpus` GPUs of one type, `price` in $/h for all of them together.

    `capacity` is what one replica sustains, in requests/s, were all its requests of that bucket;
    a bucket that is missing cannot be served. `link` is the same for what it can hand over or take
    as KV cache. `burst` widens the head-room (`head_room.usable`); 0 is none.
    """

    name: str
    model: str
    gpu: str
    gpus: int
    role: Role
    price: float
    capacity: dict[str, float]
    market: str = "on-demand"
    region: str = ""
    link: dict[str, float] = {}
    burst: float = 0.0

    @property
    def machine(self) -> tuple[str, ...]:
        """What it runs on; columns that share it differ in their role alone."""
        return self.model, self.gpu, f"{self.gpus}", self.market, self.region


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """At most `gpus` GPUs of a type; None is any market, any region."""

    gpu: str
    gpus: int
    market: str | None = None
    region: str | None = None

    def covers(self, column: Column) -> bool:
        return (
            column.gpu == self.gpu
            and self.market in (None, column.market)
            and self.region in (None, column.region)
        )

    def __str__(self) -> str:
        return " ".join(filter(None, (self.gpu, self.market, self.region)))


class WholeNodes(msgspec.Struct, frozen=True):
    """GPUs that are only let by the node: `size` of them for `price` $/h."""

    gpu: str
    market: str
    region: str
    size: int
    price: float

    def covers(self, column: Column) -> bool:
        return (column.gpu, column.market, column.region) == (self.gpu, self.market, self.region)


class Problem(msgspec.Struct, frozen=True):
    """Checked once, by `check`; columns of one model serve that model's buckets only."""

    buckets: tuple[Bucket, ...]
    columns: tuple[Column, ...]
    limits: tuple[Limit, ...] = ()
    nodes: tuple[WholeNodes, ...] = ()


def price_of(problem: Problem, replicas: Mapping[str, int]) -> float:
    """$/h of so many replicas of each column, by the node where only whole nodes are let."""
    total = 0.0
    for column in problem.columns:
        if not any(nodes.covers(column) for nodes in problem.nodes):
            total += column.price * replicas.get(column.name, 0)
    for nodes in problem.nodes:
        gpus = sum(c.gpus * replicas.get(c.name, 0) for c in problem.columns if nodes.covers(c))
        total += math.ceil(gpus / nodes.size) * nodes.price
    return total


class _FileColumn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    model: str
    gpu: str
    gpus: int
    role: Role
    price: float
    capacity: dict[str, Any]  # of float: whose fault it is if not, `_rates` says by name


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    buckets: tuple[Bucket, ...]
    columns: tuple[_FileColumn, ...]
    limits: dict[str, Any] = {}  # of int, likewise


def read_problem(path: Path) -> Problem:
    """A problem file. Raises SetupError that names the file and the field."""
    try:
        return parse_problem(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{path}: {error}") from None
    except SetupError as error:
        raise SetupError(f"{path}: {error}") from None


def parse_problem(text: str) -> Problem:
    """Raises SetupError that names the field, such as `columns[2].price`."""
    try:
        file = msgspec.convert(json.loads(text), _File)
    except ValueError as error:  # of either library
        raise SetupError(str(error).replace("$.", "")) from None
    except RecursionError:
        raise SetupError(
            "brackets within brackets within brackets: no problem is that deep"
        ) from None
    problem = Problem(
        buckets=file.buckets,
        columns=tuple(_column(f"columns[{at}]", each) for at, each in enumerate(file.columns)),
        limits=tuple(
            Limit(gpu, _typed(f"limits.{gpu}", number, int)) for gpu, number in file.limits.items()
        ),
    )
    check(problem)
    return problem


def _column(where: str, column: _FileColumn) -> Column:
    fields = {field: getattr(column, field) for field in _FileColumn.__struct_fields__}
    fields["capacity"] = {
        bucket: _typed(f"{where}.capacity.{bucket}", rate, float)
        for bucket, rate in column.capacity.items()
    }
    return Column(**fields)


def _typed(field: str, value: object, kind: type[T]) -> T:
    """The library's own message has no name where a table's keys are free."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise SetupError(f"{field}: {error}") from None


def check(problem: Problem) -> None:
    """Raises SetupError naming the first field that cannot be meant."""
    if not problem.buckets:
        raise SetupError("buckets: none; there is nothing to plan for")
    names: dict[str, set[str]] = {}
    for at, bucket in enumerate(problem.buckets):
        _number(f"buckets[{at}].rate", bucket.rate, least=0)
        of_model = names.setdefault(bucket.model, set())
        if bucket.name in of_model:
            raise SetupError(
                f"buckets[{at}].name: {bucket.name!r} twice for model {bucket.model!r}"
            )
        of_model.add(bucket.name)
    _unique("columns", [column.name for column in problem.columns])
    for at, column in enumerate(problem.columns):
        _check_column(f"columns[{at}]", column, names.get(column.model, set()))
    for limit in problem.limits:
        _number(f"limits.{limit.gpu}", limit.gpus, least=0)
        if limit.gpu not in {column.gpu for column in problem.columns}:
            raise SetupError(f"limits.{limit.gpu}: no column uses a GPU of this name")


def _check_column(where: str, column: Column, buckets: Iterable[str]) -> None:
    if column.gpus < 1:
        raise SetupError(f"{where}.gpus: {column.gpus} is below 1")
    _number(f"{where}.price", column.price, least=0)
    for field in ("capacity", "link"):
        for name, rate in getattr(column, field).items():
            if name not in buckets:
                raise SetupError(
                    f"{where}.{field}.{name}: model {column.model!r} has no bucket of this name"
                )
            if not LEAST_CAPACITY <= rate <= MOST:
                raise SetupError(
                    f"{where}.{field}.{name}: {rate:g} requests/s is not a number from "
                    f"{LEAST_CAPACITY:g} to {MOST:g}; leave out the buckets that this column "
                    "cannot serve"
                )


def _number(field: str, value: float, *, least: float) -> None:
    if not least <= value <= MOST:
        raise SetupError(f"{field}: {value} is not a number from {least:g} to {MOST:g}")


def _unique(field: str, names: Sequence[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            at = len(names) - 1 - names[::-1].index(name)
            raise SetupError(f"{field}[{at}].name: {name!r} is taken by another")
