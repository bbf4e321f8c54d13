"""The second half of a layer: a dense feed-forward, or a few experts chosen for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from kernels import reference as ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.models import ModelShape


class FeedForward(Protocol):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """SwiGLU. Matrices are [in, out], so that y = x @ w reads them in order."""

    gate_up: torch.Tensor  # [D, 2F]
    down: torch.Tensor  # [F, D]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.silu_mul(x @ self.gate_up) @ self.down


@dataclass(frozen=True, slots=True)
class Experts:
    """A weighted sum of the experts that the router chooses (Jiang et al. 2024, Mixtral, §2.1)."""

    router: torch.Tensor  # [D, experts]
    expert: Callable[[int], Dense]  # by its number
    used: int
    weights_sum_to_one: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = ops.route(x @ self.router, self.used, self.weights_sum_to_one)
        out = torch.zeros_like(x)
        # Ascending, so that a token's sum does not depend on its batch.
        for number in sorted(set(chosen.flatten().tolist())):
            rows, places = torch.where(chosen == number)
            y = self.expert(number).forward(x[rows])
            out.index_add_(0, rows, y * weights[rows, places, None])
        return out


def load_feed_forward(
    matrix: Callable[..., torch.Tensor], shape: ModelShape, layer: int, *, keep: bool
) -> FeedForward:
    """`matrix(name, …)` gives the layer's weights of these names, joined, as [in, out].

    Without `keep`, an expert is read when rows have chosen it, and forgotten then.
    """

    def dense(prefix: str) -> Dense:
        return Dense(
            gate_up=matrix(f"{prefix}.gate_proj", f"{prefix}.up_proj"),
            down=matrix(f"{prefix}.down_proj"),
        )

    if layer not in shape.expert_layers:
        return dense("mlp")

    def read(number: int) -> Dense:
        return dense(f"mlp.experts.{number}")

    kept = list(map(read, range(shape.experts))) if keep else []
    return Experts(
        router=matrix("mlp.gate"),
        expert=kept.__getitem__ if keep else read,
        used=shape.experts_used,
        weights_sum_to_one=shape.expert_weights_sum_to_one,
    )
