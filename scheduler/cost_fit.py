"""A worker's cost model from steps: from many at once, from each as it runs, or from a profile."""

from __future__ import annotations

import itertools
import math
from operator import mul
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from scheduler.cost import LINK_BYTES_S, CostModel, Provenance, StepShape, context_sum

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from scheduler.profiles import Profile

SIZE = 5  # coefficients
OUTLIERS = 10.0  # median errors away: a step that something else held up
# The learner's random walk: between two steps a worker becomes faster or slower in everything by
# about SPEED, and each coefficient by DRIFT by itself. One that only decodes while it is throttled
# is thereby known to prefill slowly too.
SPEED, DRIFT = 0.02, 0.004
NOISE = 0.1  # relative, of a step's time
UNSURE = 0.5  # relative, of the coefficients that it starts from
MOST = 2.0  # relative: what was not seen for long is no less sure than this
CLIP = 3.0  # errors beyond so many usual ones count as so many
USUAL = 0.1  # weight of the newest error in the usual one
# Under a CPU quota, or beside other work, most steps run at full speed and some stand still for
# many times as long. Neither kind says what the next request will see: their sum does, and as the
# line adds up, steps that together took so long are one observation of it. The more its errors
# scatter, the more steps it is of: what varies by chance evens out. (Errors that are all alike are
# no chance, and are learned from soon.) No more than that, or a prompt's tokens and a sequence
# could not be told apart.
SEEN_S, LONGEST_S = 0.05, 0.5


def fit(
    steps: Iterable[tuple[StepShape, float]],
    *,
    provenance: Provenance = "fitted",
    kv_token_bytes: float = 0.0,
    link_bytes_s: float = LINK_BYTES_S,
) -> CostModel:
    """The non-negative coefficients of least relative error over (shape, seconds) of many steps.

    The first fit weighs each step by its own seconds, so it leans to those that were quick by
    chance. The second weighs by the first one's predictions, which is fair to the mean, and leaves
    out what is far off. Raises ValueError without steps.
    """
    measured = [(shape, seconds) for shape, seconds in steps if seconds > 0]
    if not measured:
        raise ValueError("no steps to fit")
    times = np.array([seconds for _, seconds in measured])
    rows = np.array([(1.0, *shape) for shape, _ in measured])
    ones = np.ones(len(times))
    predicted = rows @ _non_negative(rows / times[:, None], ones)
    errors = np.abs(times / predicted - 1)
    kept = errors <= max(OUTLIERS * float(np.median(errors)), 1e-9)
    weights = predicted[kept]
    best = _non_negative(rows[kept] / weights[:, None], times[kept] / weights)
    step, token, attend, sequence, context = best.tolist()
    return CostModel(
        step, token, attend, sequence, context, provenance, kv_token_bytes, link_bytes_s
    )


def _non_negative(rows: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """x ≥ 0 that brings rows·x nearest to the target.

    The answer is the plain least squares over the coefficients that are not 0, and of five there
    are few enough to try every choice.
    """
    scale = np.abs(rows).max(axis=0)
    scale[scale == 0] = 1.0
    best, least = np.zeros(SIZE), float(np.sum(target**2))
    for count in range(1, SIZE + 1):
        for chosen in itertools.combinations(range(SIZE), count):
            columns = rows[:, chosen] / scale[list(chosen)]
            found, *_ = np.linalg.lstsq(columns, target, rcond=None)
            error = float(np.sum((columns @ found - target) ** 2))
            if error < least * (1 - 1e-9) and (found >= 0).all():
                best, least = np.zeros(SIZE), error
                best[list(chosen)] = found / scale[list(chosen)]
    return best


def of_profile(
    profile: Profile, *, kv_token_bytes: float = 0.0, link_bytes_s: float = LINK_BYTES_S
) -> CostModel:
    """A planner's profile as one line, fitted over the steps that a worker is likely to run.

    Unless it is one, it has a start of its own for prompts and for decodes, and a bend in these.
    """
    if profile.line:
        return msgspec.structs.replace(
            profile.line, kv_token_bytes=kv_token_bytes, link_bytes_s=link_bytes_s
        )
    steps: list[tuple[StepShape, float]] = []
    for tokens in (64, 128, 256, 512, 1024, 2048):
        ms = profile.prefill_ms(tokens, tokens**2) + profile.overhead_ms(tokens)
        steps.append((StepShape(tokens, context_sum(0, tokens)), ms / 1e3))
    for batch, each in itertools.product((1, 4, 16, 64, 128), (128, 512, 2048)):
        context = batch * each
        ms = profile.decode_ms(batch, context) + profile.overhead_ms(context)
        steps.append((StepShape(0, 0, batch, context), ms / 1e3))
    return fit(
        steps,
        provenance=profile.provenance,
        kv_token_bytes=kv_token_bytes,
        link_bytes_s=link_bytes_s,
    )


class Learner:
    """Corrects a cost model by the steps that run: recursive least squares that forgets.

    It is the Kalman filter of a line whose coefficients walk at random, mostly together (see
    SPEED). Errors are relative; a single wild one moves the model by little, a run of them is
    believed within about ten steps. `model` may be asked for after each step.
    """

    def __init__(self, start: CostModel) -> None:
        self._fitted = False
        self._sum, self._seconds = [0.0] * SIZE, 0.0  # of steps that were seen and not learned
        self._start = start
        self._theta = list(start.coefficients)
        # Coefficients that start at 0 may turn out not to be: about a doubling of the others'
        # time at a context of so many tokens.
        step, token, attend, sequence, context = start.coefficients
        floor = (step + sequence) / 100
        self._own = (
            max(step, floor),
            max(token, floor / 100),
            max(attend, token / 16384),
            max(sequence, floor),
            max(context, floor / 1024),
        )
        self._spread = self._walk(UNSURE, UNSURE / 2)
        self._usual = NOISE
        self._error, self._scatter = 0.0, NOISE  # the last one, and how unlike the next one is

    @property
    def model(self) -> CostModel:
        """As learned so far."""
        return self._start.with_coefficients(self._theta, "fitted" if self._fitted else None)

    def see(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took so long: learned together with its neighbours.

        What is no time, or no work, teaches nothing.
        """
        if not 0 < seconds < float("inf") or not any(shape):
            return
        self._seconds += seconds
        self._sum = [total + value for total, value in zip(self._sum, (1.0, *shape), strict=True)]
        longer = max(1.0, self._scatter / NOISE) ** 2  # a mean's variance falls with its length
        if self._seconds >= min(SEEN_S * longer, LONGEST_S):
            self._learn(self._sum, self._seconds)
            self._sum, self._seconds = [0.0] * SIZE, 0.0

    def _learn(self, work: Sequence[float], seconds: float) -> None:
        """`work` is a sum of (1, *StepShape)."""
        predicted = _dot(work, self._theta)
        if predicted <= 0:
            return
        self._fitted = True
        row = [value / predicted for value in work]
        error = seconds / predicted - 1
        self._usual += USUAL * (min(abs(error), 1.0) - self._usual)
        last, self._error = self._error, min(error, 1.0)
        unlike = abs(self._error - last) / math.sqrt(2)  # of two of one spread
        self._scatter += USUAL * (unlike - self._scatter)
        most = CLIP * max(self._usual, NOISE)
        spread = self._widened()
        towards = [_dot(line, row) for line in spread]
        certainty = _dot(row, towards) + NOISE**2
        move = max(-most, min(most, error)) / certainty
        self._theta = [
            max(0.0, value + gain * move) for value, gain in zip(self._theta, towards, strict=True)
        ]
        self._spread = [
            [cell - left * right / certainty for cell, right in zip(line, towards, strict=True)]
            for line, left in zip(spread, towards, strict=True)
        ]

    def _widened(self) -> list[list[float]]:
        """The covariance before a step: a random walk later, but never beyond MOST."""
        walk = self._walk(SPEED, DRIFT)
        grown = [
            [cell + more for cell, more in zip(line, extra, strict=True)]
            for line, extra in zip(self._spread, walk, strict=True)
        ]
        shrink = []
        for at, own in enumerate(self._own):
            most = MOST * max(own, self._theta[at])
            shrink.append(min(1.0, most / grown[at][at] ** 0.5))
        return [
            [cell * left * right for cell, right in zip(line, shrink, strict=True)]
            for line, left in zip(grown, shrink, strict=True)
        ]

    def _walk(self, together: float, alone: float) -> list[list[float]]:
        """Covariance of coefficients that move by these shares, all at once and one by one."""
        walk = [[together**2 * left * right for right in self._theta] for left in self._theta]
        for at, own in enumerate(self._own):
            walk[at][at] += (alone * own) ** 2
        return walk


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return float(sum(map(mul, left, right)))
