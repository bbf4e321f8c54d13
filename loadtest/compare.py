"""Whether run B differs from run A by more than chance.

Requests in one busy period share its luck, so each run is resampled in blocks of neighbouring
requests (moving block bootstrap, Künsch 1989); treating them as independent finds differences
between two runs of the same thing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from loadtest.errors import OptionError
from loadtest.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

_DRAWS = 1000
_AT_ONCE = 100
_NEGLIGIBLE = 0.01
_SEED = 1


class Line(msgspec.Struct):
    """One figure of both runs; `low` and `high` bound B - A at 95 %. Seconds, or a share."""

    name: str
    unit: Literal["s", "share"]
    a: float
    b: float
    low: float
    high: float
    better: Literal["lower", "higher"]
    verdict: Literal["same", "better", "worse"] = "same"  # of B, derived

    def __post_init__(self) -> None:
        """Different is what is beyond chance, and beyond what anybody minds: 1 % of A."""
        beyond_chance = self.low > 0 or self.high < 0
        if beyond_chance and abs(self.b - self.a) > _NEGLIGIBLE * abs(self.a):
            improved = (self.b < self.a) == (self.better == "lower")
            self.verdict = "better" if improved else "worse"


class Comparison(msgspec.Struct):
    lines: list[Line]
    warnings: list[str]
    schema: Literal["motley.loadtest.comparison/1"] = "motley.loadtest.comparison/1"

    @property
    def worse(self) -> bool:
        return any(line.verdict == "worse" for line in self.lines)


def read_report(path: Path) -> Report:
    """Raises OptionError naming the file when it is no report of this version."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, ValueError) as error:
        raise OptionError(str(path), f"no report of `motley bench --save`: {error}") from None


def compare(a: Report, b: Report) -> Comparison:
    rng = np.random.default_rng(_SEED)
    lines = [_line("attainment", "share", "higher", a, b, "met", _mean, rng)]
    for metric in ("ttft", "tpot", "e2e"):
        for share in (0.5, 0.99):
            name = f"{metric.upper()} p{share * 100:g}"
            lines.append(_line(name, "s", "lower", a, b, metric, _quantile(share), rng))
    return Comparison([line for line in lines if not math.isnan(line.a + line.b)], _warnings(a, b))


def _warnings(a: Report, b: Report) -> list[str]:
    found = [f"{name} is INVALID" for name, run in (("A", a), ("B", b)) if not run.valid]
    if a.load != b.load:
        found.append(f"the loads differ: {a.load} against {b.load}")
    if [group.slo for group in a.classes] != [group.slo for group in b.classes]:
        found.append("the SLOs differ")
    if a.spec.seed != b.spec.seed:
        found.append("the seeds differ")
    return found


def _line(
    name: str,
    unit: Literal["s", "share"],
    better: Literal["lower", "higher"],
    a: Report,
    b: Report,
    column: str,
    statistic: Callable[[Vector], Vector],
    rng: np.random.Generator,
) -> Line:
    values = [_column(report, column) for report in (a, b)]
    if min(len(found) for found in values) < 2:
        return Line(name, unit, math.nan, math.nan, 0.0, 0.0, better)
    draws = [_draws(found, statistic, rng) for found in values]
    low, high = np.quantile(draws[1] - draws[0], (0.025, 0.975))
    points = [float(statistic(found)) for found in values]
    return Line(name, unit, points[0], points[1], float(low), float(high), better)


def _column(report: Report, name: str) -> Vector:
    values = np.array(report.columns.get(name, []))
    return values[values >= 0]


def _mean(values: Vector) -> Vector:
    """Of the last axis, as `_quantile`'s."""
    return np.asarray(np.mean(values, axis=-1))


def _quantile(share: float) -> Callable[[Vector], Vector]:
    return lambda values: np.asarray(np.quantile(values, share, axis=-1))


def _draws(
    values: Vector, statistic: Callable[[Vector], Vector], rng: np.random.Generator
) -> Vector:
    """The statistic of `_DRAWS` resamples, made of blocks of n^(1/2) neighbours."""
    count = len(values)
    size = max(1, math.isqrt(count))
    blocks = -(-count // size)
    around = np.concatenate([values, values[:size]])  # so that each value is drawn as often
    steps = np.arange(size)
    drawn = []
    for _ in range(0, _DRAWS, _AT_ONCE):
        starts = rng.integers(0, count, (_AT_ONCE, blocks))
        picked = (starts[:, :, None] + steps).reshape(_AT_ONCE, -1)[:, :count]
        drawn.append(statistic(around[picked]))
    return np.concatenate(drawn)
