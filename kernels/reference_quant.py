"""What `fast` mode's numbers mean, in plain torch: quantised activations times quantised weights.

Weights are GGUF's (Q4_0, Q4_1, Q8_0, Q4_K, Q6_K), dequantised by the `gguf` package. Activations
are rounded to int8 in groups of 32 columns by one rule, in prefill and decode alike. The kernels in
kernels/cpu compute the same sums in integers; they differ from these functions by float32 rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.reference import silu_mul

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUP = 32
OUTLIER = 4.0  # times a row's root mean square


def quantised(x: torch.Tensor) -> torch.Tensor:
    """Each value as the kernels see it. x [T, D], D a multiple of 32 -> [T, D].

    In a group, q = round(x / d) with d = max|x| / 127. Where a group holds an outlier, larger than
    4 times the row's root mean square, its other values would be coarse, so what is left, x - d·q,
    is kept as a second int8 in steps of d / 254. (Outliers keep to few columns: Dettmers et al.
    2022, LLM.int8(), §4.) With SmolLM2-135M a tenth of the groups have one.
    """
    groups = x.view(x.shape[0], -1, GROUP)  # [T, D / 32, 32]
    largest = groups.abs().amax(-1, keepdim=True)
    steps = torch.where(largest > 0, largest / 127, 1.0)
    coarse = (groups / steps).round() * steps
    fine = coarse + ((groups - coarse) / (steps / 254)).round() * (steps / 254)
    limit = OUTLIER * x.square().mean(-1).sqrt()[:, None, None]
    return torch.where(largest > limit, fine, coarse).flatten(-2)


def kv_rounded(x: torch.Tensor) -> torch.Tensor:
    """Keys or values as an int8 cache keeps them. x [T, K, E] float32 -> [T, K, E].

    q = round(x / d), with one d for each token and head: max|x| / 127 rounded up to bfloat16.
    """
    steps = x.abs().amax(-1, keepdim=True) / 127
    above = (steps.view(torch.int32) + 0xFFFF) >> 16 << 16
    steps = torch.where(steps > 0, above.view(torch.float32), 1.0)
    return (x / steps).round() * steps


def matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """quantised(x [T, D]) · weightᵀ, with dequantised weights [outputs, D] -> [T, outputs]."""
    return quantised(x) @ weight.t()


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gate_up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Weighted sums of the experts that rows chose, by ascending expert (Jiang et al. 2024, §2.1).

    `chosen` and `weights` [T, used] are reference.route's, of logits that no rounding touched. x
    [T, D], dequantised weights gate_up [2F, D] and down [D, F] of each expert -> [T, D].
    """
    out = torch.zeros_like(x)
    for number in sorted(set(chosen.flatten().tolist())):
        rows, places = torch.where(chosen == number)
        y = matmul(silu_mul(matmul(x[rows], gate_up[number])), down[number])
        out.index_add_(0, rows, y * weights[rows, places, None])
    return out
