"""Linear programs with integers, built variable by variable and solved by HiGHS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize, sparse  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

TIME_LIMIT = 1  # scipy's words for why HiGHS stopped


@dataclass(frozen=True, slots=True)
class Solution:
    """`values` of all variables; `bound` is below every solution's objective.

    `duals` has what the objective gains per unit of a row's bound; only from `relaxed`.
    """

    values: npt.NDArray[np.float64]
    objective: float
    bound: float
    duals: npt.NDArray[np.float64] | None = None


class Infeasible(Exception):
    """No assignment meets all rows."""


class OutOfTime(Exception):
    """The time limit came before any assignment that meets all rows."""


class LinearProgram:
    """Minimise cost·v subject to lower ≤ A·v ≤ upper."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._integer: list[int] = []
        self._at: tuple[list[int], list[int], list[float]] = [], [], []  # row, variable, factor
        self._row_lower: list[float] = []
        self._row_upper: list[float] = []

    def variable(
        self,
        *,
        cost: float = 0.0,
        lower: float = 0.0,
        upper: float = math.inf,
        integer: bool = False,
    ) -> int:
        self.costs.append(cost)
        self._lower.append(lower)
        self._upper.append(upper)
        self._integer.append(int(integer))
        return len(self.costs) - 1

    def row(
        self,
        terms: Iterable[tuple[int, float]],
        *,
        lower: float = -math.inf,
        upper: float = math.inf,
    ) -> int:
        """Σ factor·variable within [lower, upper]."""
        number = len(self._row_lower)
        rows, variables, factors = self._at
        for variable, factor in terms:
            rows.append(number)
            variables.append(variable)
            factors.append(factor)
        self._row_lower.append(lower)
        self._row_upper.append(upper)
        return number

    def limit(self, row: int, upper: float) -> None:
        """The row's upper end."""
        self._row_upper[row] = upper

    def bound(self, variable: int, lower: float, upper: float) -> None:
        self._lower[variable], self._upper[variable] = lower, upper

    def fix(self, variable: int, value: float) -> None:
        self.bound(variable, value, value)

    def solve(self, *, time_limit: float, gap: float) -> Solution:
        """Raises Infeasible, or OutOfTime when `time_limit` seconds brought no solution.

        Stops early when the solution is proven to be within `gap` (a share) of the best.
        """
        result = optimize.milp(
            self.costs,
            integrality=self._integer,
            bounds=optimize.Bounds(self._lower, self._upper),
            constraints=optimize.LinearConstraint(self._matrix, self._row_lower, self._row_upper),
            options={"time_limit": time_limit, "mip_rel_gap": gap},
        )
        if result.x is None:
            raise OutOfTime if result.status == TIME_LIMIT else Infeasible(result.message)
        bound = result.mip_dual_bound
        objective = float(result.fun)
        if bound is None or not math.isfinite(bound):
            bound = objective if result.status == 0 else -math.inf
        return Solution(result.x, objective, min(float(bound), objective))

    def relaxed(self) -> Solution:
        """The same without integers, with duals. Raises Infeasible."""
        equal = np.equal(self._row_lower, self._row_upper)
        above = np.isfinite(self._row_upper) & ~equal
        below = np.isfinite(self._row_lower) & ~equal
        matrix, upper = self._matrix, np.array(self._row_upper)
        lower = np.array(self._row_lower)
        result = optimize.linprog(
            self.costs,
            A_ub=sparse.vstack([matrix[above], -matrix[below]]),
            b_ub=np.concatenate([upper[above], -lower[below]]),
            A_eq=matrix[equal],
            b_eq=upper[equal],
            bounds=np.column_stack([self._lower, self._upper]),
            method="highs",
        )
        if result.x is None:
            raise Infeasible(result.message)
        duals = np.zeros(len(upper))
        duals[equal] = result.eqlin.marginals
        duals[above] = result.ineqlin.marginals[: above.sum()]
        duals[below] -= result.ineqlin.marginals[above.sum() :]
        return Solution(result.x, float(result.fun), float(result.fun), duals)

    @property
    def _matrix(self) -> sparse.csr_matrix:
        rows, variables, factors = self._at
        shape = len(self._row_lower), len(self.costs)
        return sparse.csr_matrix((factors, (rows, variables)), shape=shape)
