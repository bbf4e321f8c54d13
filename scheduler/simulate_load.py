"""When requests come and how large they are: drawn, or as a trace has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import msgspec
import numpy as np

from scheduler.errors import SetupError
from scheduler.workload import Arrival

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Kind = Literal["poisson", "gamma", "on-off", "trace"]


class Process(msgspec.Struct, frozen=True):
    """How requests are spread over time, at a mean rate that is given apart.

    poisson: independent of each other. gamma: the gaps' standard deviation is `cv` times their
    mean. on-off: Poisson, but only in the first `on_s` of every `on_s + off_s` seconds. trace: at
    its own times, faster or slower as a whole.
    """

    kind: Kind = "poisson"
    cv: float = 2.0
    on_s: float = 10.0
    off_s: float = 20.0


def parse_process(text: str) -> Process:
    """`poisson`, `trace`, `gamma:CV`, `on-off:ON_S,OFF_S`. Raises SetupError naming the text."""
    kind, _, rest = text.partition(":")
    try:
        if kind not in get_args(Kind):
            raise ValueError
        numbers = [float(number) for number in rest.split(",")] if rest else []
        if not all(0 < number < float("inf") for number in numbers):
            raise ValueError
        if kind == "gamma":
            return Process("gamma", *numbers)
        if kind == "on-off":
            on, off = numbers or (Process.on_s, Process.off_s)
            return Process("on-off", on_s=on, off_s=off)
        if numbers:
            raise ValueError
        return Process("trace" if kind == "trace" else "poisson")
    except (TypeError, ValueError):
        raise SetupError(
            f"arrivals {text!r}: poisson, trace, gamma:CV or on-off:ON_S,OFF_S"
        ) from None


def draw(
    sizes: Sequence[Arrival],
    process: Process,
    rng: np.random.Generator,
    *,
    count: int,
    rate: float,
) -> list[Arrival]:
    """`count` requests at `rate` a second; sizes drawn from `sizes`, or as they follow in a trace.

    A trace that is too short begins anew, with the mean gap between its end and its beginning.
    Prefixes stay with their sizes.
    """
    if process.kind == "trace":
        times = _repeated([size.at for size in sizes], count, rate)
        chosen = np.arange(count) % len(sizes)
    else:
        times = _times(process, rng, count, rate)
        chosen = rng.integers(0, len(sizes), count)
    return [
        Arrival(at, sizes[number].input, sizes[number].output, sizes[number].prefix)
        for at, number in zip(times.tolist(), chosen.tolist(), strict=True)
    ]


def _times(
    process: Process, rng: np.random.Generator, count: int, rate: float
) -> NDArray[np.float64]:
    """Times of arrivals, the first at 0."""
    if process.kind == "gamma":
        shape = process.cv**-2
        gaps = rng.gamma(shape, 1 / shape, count)
    else:
        gaps = rng.exponential(1.0, count)
    gaps[0] = 0.0
    times = np.cumsum(gaps) / rate
    if process.kind == "on-off":
        period = process.on_s + process.off_s
        busy = times * (process.on_s / period)  # the time that counts only while it is on
        times = busy // process.on_s * period + busy % process.on_s
    return np.asarray(times)


def _repeated(times: Sequence[float], count: int, rate: float) -> NDArray[np.float64]:
    """A trace's times from 0 on, over and over, at this mean rate."""
    moments = np.array(times) - times[0]
    period = moments[-1] * len(moments) / max(1, len(moments) - 1)
    if period <= 0:
        raise SetupError("the trace's requests all arrive at one moment: it has no rate")
    rounds, within = np.divmod(np.arange(count), len(moments))
    return np.asarray((rounds * period + moments[within]) * (len(moments) / period / rate))
