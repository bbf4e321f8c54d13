"""Step times from the measured tables of `aiconfigurator-core`, an optional extra.

Its engine layer is asked directly: data-centre GPUs, several serving engines, tensor parallelism.
It has no prices and does not look whether a model fits: both are ours. Only models whose shape it
ships are asked for, since for others it goes to the network.
"""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scheduler.errors import SetupError
from scheduler.profiles import Bounds

if TYPE_CHECKING:
    from scheduler.cost import CostModel, Provenance

Backend = Literal["vllm", "sglang", "trtllm"]
PACKAGE = "aiconfigurator_core"
SYSTEMS = {  # the catalogue's GPUs of which it has measured tables
    "L40S": "l40s",
    "A100-80GB": "a100_sxm",
    "H100": "h100_sxm",
    "H200": "h200_sxm",
    "B200": "b200_sxm",
}
PROBES = ((1, 128), (1, 2048), (64, 1024))  # sequences and context by which its answer is judged


@dataclass(frozen=True)
class TableProfile:
    """A `profiles.Profile`. `handle` is the library's compiled engine: one model, system, TP."""

    handle: Any
    provenance: Provenance
    source: str

    @property
    def bounds(self) -> Bounds:
        return Bounds()

    @property
    def line(self) -> CostModel | None:
        return None

    def prefill_ms(self, tokens: float, squares: float) -> float:
        """As of prompts of one length: Σ t² / Σ t."""
        length = max(1, round(squares / tokens))
        return float(self.handle.predict_prefill_latency(max(1, round(tokens / length)), length))

    def decode_ms(self, batch: int, context: float) -> float:
        each = max(1, round(context / max(1, batch)))
        # Two tokens out are one step of decoding: the first one is the prefill's.
        return float(self.handle.predict_decode_latency(max(1, batch), each, 2))

    def overhead_ms(self, tokens: float) -> float:
        """Nothing: what it measured are an engine's kernels, and it adds what is between them."""
        return 0.0


def check_installed() -> None:
    """Raises SetupError where the extra is not."""
    if find_spec(PACKAGE) is None:
        raise SetupError(
            "aiconfigurator-core is not installed, whose tables the service asks for: "
            "pip install 'motley[aiconfigurator]'"
        )


def check_known(path: str, field: str) -> None:
    """Raises SetupError for a model whose shape it does not ship."""
    folder = Path(str(importlib.import_module(PACKAGE).__file__)).parent / "model_configs"
    if not (folder / f"{path.replace('/', '--')}_config.json").is_file():
        names = sorted(file.name.removesuffix("_config.json") for file in folder.glob("*.json"))
        known = [name.replace("--", "/", 1) for name in names if not name.endswith(".json")]
        raise SetupError(f"{field}: aiconfigurator-core has no {path!r}; it has {', '.join(known)}")


@functools.cache
def table_profile(path: str, gpu: str, tp: int, backend: Backend) -> TableProfile | None:
    """None where it has no table of this GPU, or none that holds this model so divided."""
    if gpu not in SYSTEMS:
        return None
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)  # it warns of tables that others stand for
    engine = importlib.import_module(f"{PACKAGE}.sdk.engine")
    provenance: Provenance = "measured"
    try:
        handle = engine.EngineHandle.compile(path, SYSTEMS[gpu], backend, tp_size=tp)
        for sequences, context in PROBES:
            handle.predict_prefill_latency(1, context)
            tiers = [handle.last_provenance()]
            handle.predict_decode_latency(sequences, context, 2)
            if any((*tiers, handle.last_provenance())):  # None: of its measurements alone
                provenance = "modelled"
    except (AssertionError, ValueError, RuntimeError, KeyError):
        return None
    said = f"aiconfigurator-core {version('aiconfigurator-core')}, {backend} on {SYSTEMS[gpu]}"
    return TableProfile(handle, provenance, said)
