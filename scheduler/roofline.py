"""Step times from data sheets alone: the last resort, where nothing was measured.

A step moves bytes and multiplies; each takes its time at a share of the data sheet's rate, and
tensor parallelism adds two allreduces a layer. The shares are those that come nearest to published
step times of OPT-13B and 66B on A100 (DistServe's repository): to within `ERROR` of all, by 8 % on
the mean. On other hardware and engines the error is unknown, and may be larger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.profiles import StepProfile

if TYPE_CHECKING:
    from scheduler.hardware import Gpu, Model

COMPUTE, MEMORY, LINK = 0.70, 0.70, 0.60  # shares of the data sheet's rates
STEP_MS = 4.0  # launching a step
ALLREDUCE_MS = 0.06  # each, before any bytes
ERROR = 0.22  # the largest, over prompts of 256-2,048 tokens and 1-64 sequences of 800


def roofline(model: Model, gpu: Gpu, tp: int) -> StepProfile:
    """The profile of `tp` GPUs."""
    flops = gpu.tflops * 1e12 * COMPUTE * tp / 1e3  # per ms
    memory = gpu.bandwidth * 1e9 * MEMORY * tp / 1e3  # bytes per ms
    link = gpu.link * 1e9 * LINK / 1e3
    reduces = 2 * model.layers if tp > 1 else 0
    reduced_bytes = 2 * (tp - 1) / tp * model.hidden * 2  # each GPU sends, per token and allreduce
    fixed = STEP_MS + model.parameters * model.weight_bytes / memory + reduces * ALLREDUCE_MS
    token = 2 * model.used / flops + reduces * reduced_bytes / link
    square = 2 * model.layers * model.heads * model.head_dim / flops  # causal: half of 4·L·H·E
    return StepProfile(
        model=model.name,
        gpu=gpu.name,
        tp=tp,
        prefill=(fixed, token, square),
        decode=(fixed, model.kv_token_bytes(tp) / memory, token),
        provenance="modelled",
        source=f"roofline, ± {ERROR:.0%} where it was compared",
    )
