"""Others' benchmark files as capacity: Mélange's and AIBrix's tables, vLLM's and GuideLLM's runs.

A table gives requests/s on a grid of sizes and is interpolated in the logarithms of sizes. Runs
give requests/s at single sizes: the seconds of a request are fitted as α·input + β·output. Sizes
outside what was measured are extrapolated, never dropped, and called `modelled`.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from scheduler.cost import Provenance
from scheduler.errors import SetupError
from scheduler.profile_formats import Format, Grid, read

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from scheduler.capacity import Slo

OUTPUT_WEIGHT = 10.0  # input tokens that an output token costs, where one size only was measured


class Rate(NamedTuple):
    rate: float  # requests/s
    provenance: Provenance


class CapacityTable(msgspec.Struct, frozen=True):
    """requests/s at each (input, output) of a full grid; 0 where the SLO could not be met."""

    inputs: tuple[float, ...]  # ascending
    outputs: tuple[float, ...]  # ascending
    rates: tuple[tuple[float, ...], ...]  # [inputs][outputs]
    source: str

    @property
    def provenance(self) -> Provenance:
        return "measured"

    def rate(self, size: tuple[float, float]) -> Rate | None:
        """None next to a size at which the SLO could not be met."""
        (i, j), inside = _place(self.inputs, size[0]), self._covers(size)
        k, m = _place(self.outputs, size[1])
        corners = [self.rates[a][b] for a, b in itertools.product({i, j}, {k, m})]
        if min(corners) <= 0:
            return None
        across = [
            _between(size[1], self.outputs[k], self.outputs[m], self.rates[a][k], self.rates[a][m])
            for a in (i, j)
        ]
        rate = _between(size[0], self.inputs[i], self.inputs[j], *across)
        if inside:
            return Rate(rate, "measured")
        held = _clamp(size[0], self.inputs), _clamp(size[1], self.outputs)
        return Rate(rate * min(1.0, sum(held) / sum(size)), "modelled")

    def _covers(self, size: tuple[float, float]) -> bool:
        return all(
            axis[0] <= tokens <= axis[-1]
            for axis, tokens in zip((self.inputs, self.outputs), size, strict=True)
        )


class CapacityFit(msgspec.Struct, frozen=True):
    """Seconds of a replica that a request takes: `input_s` and `output_s` per token."""

    input_s: float
    output_s: float
    provenance: Provenance
    source: str

    def rate(self, size: tuple[float, float]) -> Rate | None:
        return Rate(1 / (self.input_s * size[0] + self.output_s * size[1]), self.provenance)


Imported = CapacityTable | CapacityFit


def read_profile(
    path: Path,
    form: Format,
    gpu: str,
    slo: Slo,
    edges: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Imported:
    """`edges`: the sizes of a Mélange table's rows and columns, which its file does not hold.

    Raises SetupError naming the file and the field.
    """
    try:
        found = read(path.read_text(encoding="utf-8"), form, gpu, slo, edges)
        if isinstance(found, Grid):
            made = f", made for {found.made_for}" if found.made_for else ""
            return CapacityTable(found.inputs, found.outputs, found.rates, path.name + made)
        in_time = [run for run in found if run.ttft <= slo.ttft_ms and run.tpot <= slo.tpot_ms]
        return _fit([run[:3] for run in in_time], path.name)
    except OSError as error:
        raise SetupError(f"{path}: {error}") from None
    except ValueError as error:
        raise SetupError(f"{path}: {error}; is it a {form} file?") from None


def _fit(points: Sequence[tuple[float, float, float]], name: str) -> CapacityFit:
    """Of several rates at one size the highest counts: the others were only not asked for more."""
    best: dict[tuple[int, int], tuple[float, float, float]] = {}
    for point in points:
        key = round(point[0]), round(point[1])
        if key not in best or point[2] > best[key][2]:
            best[key] = point
    if not best:
        raise ValueError("no run in it meets the SLO")
    if len(best) == 1:
        ((inputs, outputs, rate),) = best.values()
        token = 1 / rate / (inputs + OUTPUT_WEIGHT * outputs)
        return CapacityFit(token, OUTPUT_WEIGHT * token, "assumed", f"{name}, one size")
    # Each row is scaled to 1, so that relative errors count alike.
    rows = np.array([(inputs * rate, outputs * rate) for inputs, outputs, rate in best.values()])
    input_s, output_s = _least_squares(rows)
    return CapacityFit(input_s, output_s, "fitted", f"{name}, {len(best)} sizes")


def _least_squares(rows: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The (α, β) ≥ 0 whose rows·(α, β) come nearest to 1."""
    ones = np.ones(len(rows))
    first, second = (float(value) for value in np.linalg.lstsq(rows, ones)[0])
    if min(first, second) >= 0:
        return first, second
    alone = [float(column.sum() / (column @ column)) for column in rows.T]
    misses = [float(((column * a - 1) ** 2).sum()) for column, a in zip(rows.T, alone, strict=True)]
    return (alone[0], 0.0) if misses[0] < misses[1] else (0.0, alone[1])


def _clamp(tokens: float, axis: Sequence[float]) -> float:
    return min(max(tokens, axis[0]), axis[-1])


def _place(axis: Sequence[float], tokens: float) -> tuple[int, int]:
    """Indexes of the neighbours of `tokens`; twice the same on a point of the axis or outside."""
    tokens = _clamp(tokens, axis)
    high = next(at for at, value in enumerate(axis) if value >= tokens)
    return (high, high) if axis[high] == tokens else (high - 1, high)


def _between(tokens: float, low: float, high: float, at_low: float, at_high: float) -> float:
    """Linear in the logarithms of size and rate: rates fall by powers of sizes."""
    if low == high:
        return at_low
    part = math.log(min(max(tokens, low), high) / low) / math.log(high / low)
    return math.exp((1 - part) * math.log(at_low) + part * math.log(at_high))
