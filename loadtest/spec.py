"""A run, described whole: with the seed it says which bytes are sent when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from loadtest.api import Endpoint
from loadtest.arrivals import Arrivals
from loadtest.errors import OptionError
from loadtest.sizes import Sizes
from loadtest.slo import SloClass
from loadtest.traces import Scaling

if TYPE_CHECKING:
    from typing import Self


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds and tokens throughout. Raises OptionError when its parts contradict each other."""

    endpoint: Endpoint
    classes: list[SloClass]
    arrivals: Arrivals = Arrivals()
    trace: str | None = None
    scaling: Scaling = Scaling()
    requests: int | None = None
    duration: float | None = None
    concurrency: int | None = None  # a closed loop of so many users; None: open loop
    think: float = 0.0  # between an answer and the next request of that user or session
    turns: int = 1  # requests of one session, each holding all that was said before
    input: Sizes = Sizes(64, 64)
    output: Sizes = Sizes(16, 16)
    shared_prefix: int = 0  # tokens that all prompts begin with
    seed: int = 0
    warmup: float = 0.0  # requests scheduled before this are sent but not counted
    timeout: float = 600.0
    grace: float = 60.0  # after the last arrival; what has not ended then is unfinished
    processes: int = 1
    keep_text: bool = False

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.trace is not None:
            raise OptionError("--concurrency", "a trace is replayed in an open loop: leave one out")
        if self.concurrency is not None and self.requests is None and self.duration is None:
            raise OptionError("--concurrency", "give --requests or --duration too")
        if self.concurrency is not None and self.concurrency < self.processes:
            raise OptionError("--processes", "more processes than users in --concurrency")

    @property
    def closed(self) -> bool:
        return self.concurrency is not None

    def load(self) -> str:
        """The load in words, for a report's head."""
        if self.concurrency is not None:
            return f"closed loop, {self.concurrency} users, {self.think:g} s of thought"
        sessions = f", sessions of {self.turns} turns" if self.turns > 1 else ""
        if self.trace is None:
            return f"{self.arrivals}{sessions}"
        scaling = self.scaling
        parts = [f"trace {self.trace.rpartition('/')[2]}"]
        if scaling.time_scale != 1:
            parts.append(f"time × {scaling.time_scale:.4g}")
        if scaling.rate_scale != 1:
            parts.append(f"{scaling.rate_scale:.3g} of its requests")
        if scaling.length_scale != 1 or scaling.max_input or scaling.max_output:
            caps = f"{scaling.max_input or '∞'} in, {scaling.max_output or '∞'} out"
            parts.append(f"lengths × {scaling.length_scale:.4g} (at most {caps})")
        if scaling.dequantise:
            parts.append(f"ticks of {scaling.dequantise:g} s spread")
        return ", ".join(parts) + sessions

    def without_secrets(self) -> Self:
        """For reports, which are there to be shared."""
        key = "***" if self.endpoint.api_key else ""
        endpoint = msgspec.structs.replace(self.endpoint, api_key=key)
        return msgspec.structs.replace(self, endpoint=endpoint)

    def at_rate(self, rate: float, natural: float, seed: int) -> Self:
        """The same load at another mean rate in requests/s; `natural` is a trace's own rate."""
        if self.trace is None:
            arrivals = msgspec.structs.replace(self.arrivals, rate=rate)
            return msgspec.structs.replace(self, arrivals=arrivals, seed=seed)
        scaling = msgspec.structs.replace(self.scaling, time_scale=natural / rate)
        return msgspec.structs.replace(self, scaling=scaling, seed=seed)
