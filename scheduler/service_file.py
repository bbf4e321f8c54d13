"""A service in TOML: models, their SLOs and workloads, what may be rented, what is known of it."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from scheduler import aiconfigurator
from scheduler.aiconfigurator import Backend
from scheduler.capacity import Slo
from scheduler.errors import SetupError
from scheduler.hardware import Catalogue, Gpu, Model, Offer, convert, read_catalogue
from scheduler.measured import WorkerProfile, read_worker_profile
from scheduler.messages import Role
from scheduler.problem import Limit
from scheduler.profile_formats import Format
from scheduler.profiles import StepProfile
from scheduler.service_checks import (
    MOST_TOKENS,
    check_autoscale,
    check_choices,
    check_hardware,
    check_limits,
    check_shapes,
    check_sizes,
    check_slo,
    check_steps,
    positive,
)
from scheduler.workload import Arrival, SizeBucket, Workload, from_arrivals, read_trace

Key = tuple[str, str, int]  # model's name in the service, GPU, TP
DRAWS = 20_000  # of a distribution, with a fixed seed


class Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    input: float
    output: float
    weight: float


class Lognormal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Means and standard deviations in tokens; input and output are independent."""

    input_mean: float
    input_sd: float
    output_mean: float
    output_sd: float


class ServedModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model of the service. Its sizes come from just one of trace, sizes, lognormal.

    `rate` in requests/s; with a trace it may be left out. `shape` names a catalogue model.
    """

    name: str
    shape: str = ""
    rate: float | None = None
    trace: str | None = None
    sizes: tuple[Size, ...] = ()
    lognormal: Lognormal | None = None
    slo: Slo | None = None


class ProfileFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured of `model` on `tp` GPUs: by `motley profile`, or a benchmark's file.

    `model` may be left out where the file says it; `key` is the GPU's name in it if it differs.
    """

    file: str
    gpu: str
    format: Literal["motley"] | Format = "motley"
    model: str = ""
    tp: int = 1
    key: str = ""
    input_edges: tuple[float, ...] = ()
    output_edges: tuple[float, ...] = ()


class Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """aiconfigurator-core's tables for `model` (if left out, the only one), there called `path`."""

    path: str
    model: str = ""
    backend: Backend = "vllm"


class Choices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan may hold, and what is asked of it beyond cost (`planner_model.Options`).

    `certify` is for `scheduler.certify`, its words those of `simulate_load.parse_process`.
    """

    gpus: tuple[str, ...] = ()  # empty: all that have an offer
    tp: tuple[int, ...] = (1, 2, 4, 8)
    roles: tuple[Role, ...] = tuple(Role)
    head_room: bool = True
    spare: bool = False
    on_demand: float = 0.0
    switching: float = 0.0
    time_limit: float = 50.0
    gap: float = 0.001
    certify: tuple[str, ...] = ()  # empty: poisson, and the trace where there is one


class Autoscaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How `scheduler.autoscale` decides, once in every `window_s`.

    `start_s`: from renting a machine to its first request. `flip_s`, `drain_s`: until a worker has
    another role, or has ended its last answer. `hold_s`: for so long a cheaper plan must have been
    right. `horizon_s`: within it the saving pays for the switch. `cover`: of all windows, the share
    whose rate is at most the forecast. `band`: above that, before there is another switch.
    """

    window_s: float = 300.0
    start_s: float = 180.0
    flip_s: float = 10.0
    drain_s: float = 60.0
    hold_s: float = 1800.0
    horizon_s: float = 900.0
    cover: float = 0.8
    band: float = 0.05

    @property
    def ahead(self) -> int:
        """Windows that a decision has to do for: until the machines of the next one are there."""
        return 1 + math.ceil(self.start_s / self.window_s)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    slo: Slo
    model: tuple[ServedModel, ...]
    plan: Choices = Choices()
    autoscale: Autoscaling = Autoscaling()
    limit: tuple[Limit, ...] = ()
    gpu: tuple[Gpu, ...] = ()
    offer: tuple[Offer, ...] = ()
    shape: tuple[Model, ...] = ()
    step: tuple[StepProfile, ...] = ()
    profile: tuple[ProfileFile, ...] = ()
    aiconfigurator: tuple[Tables, ...] = ()


class Demand(msgspec.Struct, frozen=True):
    name: str
    model: Model
    slo: Slo
    workload: Workload


class Service(msgspec.Struct, frozen=True):
    """A service file with everything it names, checked. `folder` is where its paths start.

    `measured` are those of the `profiles` that are our own, by model's name here, GPU and TP;
    `tables` say what aiconfigurator-core may be asked, by model's name.
    """

    demands: tuple[Demand, ...]
    catalogue: Catalogue
    choices: Choices
    limits: tuple[Limit, ...]
    profiles: tuple[ProfileFile, ...]
    measured: dict[Key, WorkerProfile]
    tables: dict[str, Tables]
    folder: Path
    autoscale: Autoscaling = Autoscaling()


def read_service(path: Path) -> Service:
    """Raises SetupError that names the file and the field."""
    try:
        return parse_service(path.read_text(encoding="utf-8"), path.parent)
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{path}: {error}") from None
    except SetupError as error:
        raise SetupError(f"{path}: {error}") from None


def parse_service(text: str, folder: Path) -> Service:
    """Raises SetupError that names the field."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SetupError(str(error)) from None
    file = convert(tables, _File, "service")
    own = {
        at: read_worker_profile(folder / each.file)
        for at, each in enumerate(file.profile)
        if each.format == "motley"
    }
    catalogue = _extended(read_catalogue(), file, list(own.values()))
    check_choices(file.plan, catalogue, traced=all(model.trace for model in file.model))
    check_limits(file.limit, catalogue)
    check_slo(file.slo, "slo")
    if not file.model:
        raise SetupError("model: none; there is nothing to plan for")
    demands = tuple(
        _demand(model, f"model[{at}]", file.slo, catalogue, folder)
        for at, model in enumerate(file.model)
    )
    names = [demand.name for demand in demands]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SetupError(f"model: {twice.pop()!r} twice")
    places = [_place(file, at, own.get(at), names, catalogue) for at in range(len(file.profile))]
    if again := [at for at, place in enumerate(places) if place in places[:at]]:
        raise SetupError(f"profile[{again[0]}]: there is one of this model, GPU and TP already")
    measured = {places[at]: profile for at, profile in own.items()}
    check_autoscale(file.autoscale)
    return Service(
        demands,
        catalogue,
        file.plan,
        file.limit,
        file.profile,
        measured,
        _tables(file, names),
        folder,
        file.autoscale,
    )


def _place(
    file: _File, at: int, own: WorkerProfile | None, names: list[str], catalogue: Catalogue
) -> Key:
    """What a profile is of."""
    profile = file.profile[at]
    catalogue.gpu(profile.gpu, f"profile[{at}].gpu")
    if own and not profile.model:
        of = [each.name for each in file.model if own.model.name in (each.name, each.shape)]
        model = of[0] if len(of) == 1 else own.model.name
    else:
        model = profile.model
    if model not in names:
        raise SetupError(f"profile[{at}].model: no [[model]] is called {model!r}")
    return model, profile.gpu, profile.tp


def _tables(file: _File, names: list[str]) -> dict[str, Tables]:
    found: dict[str, Tables] = {}
    for at, each in enumerate(file.aiconfigurator):
        model = each.model or (names[0] if len(names) == 1 else "")
        if model not in names or model in found:
            raise SetupError(f"aiconfigurator[{at}].model: name a [[model]], each at most once")
        aiconfigurator.check_installed()
        aiconfigurator.check_known(each.path, f"aiconfigurator[{at}].path")
        found[model] = each
    return found


def _extended(shipped: Catalogue, file: _File, measured: list[WorkerProfile]) -> Catalogue:
    """The file's own hardware, shapes, steps and prices go before what is shipped.

    Shapes of models that were measured come last: they are only those of models unknown otherwise.
    """
    gpus = shipped.gpus | {gpu.name: gpu for gpu in file.gpu}
    priced = {(offer.gpu, offer.market, offer.region) for offer in file.offer}
    kept = [o for o in shipped.offers if (o.gpu, o.market, o.region) not in priced]
    catalogue = Catalogue(
        gpus=gpus,
        offers=(*file.offer, *kept),
        models={profile.model.name: profile.model for profile in measured}
        | shipped.models
        | {model.name: model for model in file.shape},
        steps=(*file.step, *shipped.steps),
    )
    check_hardware(file.gpu, file.offer, catalogue)
    check_shapes(file.shape)
    check_steps(file.step, catalogue)
    return catalogue


def _demand(
    served: ServedModel, where: str, slo: Slo, catalogue: Catalogue, folder: Path
) -> Demand:
    model = catalogue.model(served.shape or served.name, f"{where}.shape")
    check_slo(served.slo or slo, f"{where}.slo")
    given = [name for name in ("trace", "sizes", "lognormal") if getattr(served, name)]
    if len(given) != 1:
        raise SetupError(
            f"{where}: give just one of trace, sizes, lognormal; not {given or 'none'}"
        )
    if served.rate is None and served.trace is None:
        raise SetupError(f"{where}.rate: missing; only a trace brings its own")
    if served.rate is not None:
        positive(f"{where}.rate", served.rate)
    workload = _workload(served, where, folder)
    if served.rate is not None:
        workload = workload.scaled(served.rate / workload.rate)
    return Demand(served.name, model, served.slo or slo, workload)


def _workload(served: ServedModel, where: str, folder: Path) -> Workload:
    if served.trace is not None:
        path = folder / served.trace
        try:
            return from_arrivals(read_trace(path))
        except SetupError as error:
            raise SetupError(f"{where}.trace: {error}") from None
    if served.lognormal is not None:
        return _drawn(served.lognormal, where)
    check_sizes(served.sizes, f"{where}.sizes")
    return Workload(
        tuple(
            SizeBucket(f"{size.input:g}/{size.output:g}", (size.input, size.output), size.weight)
            for size in served.sizes
        )
    )


def _drawn(spread: Lognormal, where: str) -> Workload:
    rng = np.random.default_rng(0)
    columns = []
    for side in ("input", "output"):
        mean, sd = getattr(spread, f"{side}_mean"), getattr(spread, f"{side}_sd")
        positive(f"{where}.lognormal.{side}_mean", mean, MOST_TOKENS)
        positive(f"{where}.lognormal.{side}_sd", sd, MOST_TOKENS)
        variance = math.log(1 + (sd / mean) ** 2)
        drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), DRAWS)
        columns.append(np.maximum(1, np.rint(drawn)).astype(int).tolist())
    arrivals = [Arrival(float(at), *sizes) for at, sizes in enumerate(zip(*columns, strict=True))]
    timeless = tuple(arrival._replace(at=0.0) for arrival in arrivals)
    return msgspec.structs.replace(from_arrivals(arrivals), dispersion=1.0, arrivals=timeless)
