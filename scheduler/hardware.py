"""Hardware and its prices: a dated catalogue, to which a service file adds its own."""

from __future__ import annotations

import datetime
import math
import tomllib
from importlib import resources
from typing import Any, TypeVar

import msgspec

from scheduler.cost import Provenance
from scheduler.errors import SetupError
from scheduler.profiles import StepProfile

FOLDER = "catalogue"
USABLE_MEMORY = 0.9  # the rest is the engine's own, and fragments

T = TypeVar("T")


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One accelerator, or one machine without any. Memory in 1e9 bytes, bandwidths in 1e9 bytes/s.

    `link` joins the GPUs of a node, `network` leaves it; `node` is the most GPUs of one.
    """

    name: str
    memory: float
    bandwidth: float
    tflops: float
    link: float
    network: float
    node: int
    source: str


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one GPU-hour costs where. With `whole`, only nodes of so many GPUs are let."""

    gpu: str
    price: float
    date: datetime.date
    source: str
    provenance: Provenance = "assumed"
    market: str = "on-demand"
    region: str = ""
    whole: int = 0


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model's shape; L layers, D hidden, H heads, K kv heads, E head dim.

    `weight_bytes` per parameter and `kv_bytes` per element of KV cache: 2 is bf16.
    """

    name: str
    parameters: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    active: float = 0.0  # parameters that one token uses; 0 is all
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0

    @property
    def used(self) -> float:
        return self.active or self.parameters

    def kv_token_bytes(self, tp: int) -> float:
        """Of all `tp` shards; kv heads are copied where there are fewer than shards."""
        heads = max(self.kv_heads, tp)
        return 2 * self.layers * heads * self.head_dim * self.kv_bytes

    def kv_tokens(self, gpu: Gpu, tp: int, pp: int = 1) -> int:
        """Tokens of KV cache that fit beside the weights; 0 where the weights alone do not fit."""
        room = gpu.memory * 1e9 * USABLE_MEMORY * tp * pp - self.parameters * self.weight_bytes
        return max(0, math.floor(room / self.kv_token_bytes(tp)))


class Catalogue(msgspec.Struct, frozen=True):
    gpus: dict[str, Gpu]
    offers: tuple[Offer, ...]
    models: dict[str, Model]
    steps: tuple[StepProfile, ...]

    def gpu(self, name: str, field: str) -> Gpu:
        """Raises SetupError naming `field`."""
        if name not in self.gpus:
            known = ", ".join(self.gpus)
            raise SetupError(f"{field}: unknown GPU {name!r}; known: {known}")
        return self.gpus[name]

    def model(self, name: str, field: str) -> Model:
        """Raises SetupError naming `field`."""
        if name not in self.models:
            known = ", ".join(self.models)
            raise SetupError(f"{field}: unknown model {name!r}; known: {known}; or give its shape")
        return self.models[name]


def read_catalogue() -> Catalogue:
    """The one that is shipped."""
    hardware, models, steps = (_table(name) for name in ("hardware", "models", "steps"))
    return Catalogue(
        gpus={gpu.name: gpu for gpu in convert(hardware["gpu"], list[Gpu], "gpu")},
        offers=tuple(convert(hardware["offer"], list[Offer], "offer")),
        models={model.name: model for model in convert(models["model"], list[Model], "model")},
        steps=tuple(convert(steps["step"], list[StepProfile], "step")),
    )


def convert(value: object, kind: type[T], field: str) -> T:
    """A decoded TOML or JSON value as `kind`. Raises SetupError naming the path from `field`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise SetupError(str(error).replace("`$", f"`{field}")) from None


def _table(name: str) -> dict[str, Any]:
    text = (resources.files("scheduler") / FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
