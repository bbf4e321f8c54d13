"""The command `motley`: the one place where the parts are put together."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from scheduler.autoscale_command import EXAMPLES as AUTOSCALE_EXAMPLES
from scheduler.autoscale_command import add_arguments as add_autoscale_arguments
from scheduler.errors import SetupError
from scheduler.messages import Address, Role
from scheduler.plan_command import EXAMPLES as PLAN_EXAMPLES
from scheduler.plan_command import add_arguments as add_plan_arguments
from scheduler.simulate_command import EXAMPLES as SIMULATE_EXAMPLES
from scheduler.simulate_command import add_arguments as add_simulate_arguments
from serving.arguments import DEFAULT_MODEL, add_serve_arguments
from serving.arguments import EXAMPLES as SERVE_EXAMPLES
from serving.deploy_arguments import EXAMPLES as DEPLOY_EXAMPLES
from serving.deploy_arguments import add_deploy_arguments
from serving.routing_arguments import routing_options
from workers.arguments import EXAMPLES as WORKER_EXAMPLES
from workers.arguments import add_engine_arguments, add_worker_arguments
from workers.group.plan_command import EXAMPLES as GROUP_PLAN_EXAMPLES
from workers.group.plan_command import add_arguments as add_group_plan_arguments
from workers.profile_command import EXAMPLES as PROFILE_EXAMPLES
from workers.profile_command import add_arguments as add_profile_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from scheduler.plan_file import PlanFile
    from serving.run import LocalWorkers
    from workers.build import EngineOptions, GroupSpec, Model
    from workers.group.part import Means

logger = logging.getLogger("motley")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Exit codes: 0, or 2 when the operator must change something."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["bench"]:  # the load test has commands and exit codes of its own
        from loadtest.cli import main as bench

        return bench(arguments[1:])
    options = _parser().parse_args(arguments)
    options.given = arguments[1:]
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format=f"%(asctime)s [{getattr(options, 'name', None) or 'router'}] %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    try:
        options.run(options)
    except SetupError as error:
        print(f"motley: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while still loading: nothing was started yet
        return 130
    return 0


def _serve(options: argparse.Namespace) -> None:
    """Router and workers on this machine."""
    from scheduler.plan_file import read_deployable
    from serving.run import LocalWorkers
    from workers.build import find

    counts = {role: getattr(options, role) for role in Role}
    wanted = sum(counts.values()) or options.sibling
    asked = options.models or ([] if options.endpoint else [DEFAULT_MODEL])
    models = [find(text) for text in asked] if wanted else []
    names = [model.name for model in models]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SetupError(f"two models are called {twice.pop()!r}: write NAME=MODEL for one of them")
    processes = max(1, len(models) * sum(counts.values()) * options.group_ranks)
    workers = LocalWorkers(
        models=tuple((model.name, model.location) for model in models),
        counts=counts,
        threads=options.threads or max(1, (os.cpu_count() or 1) // processes),
        arguments=_passed_on(options),
        ranks=options.group_ranks,
        caps=_caps(options, options.group_ranks),
    )
    plan = read_deployable("--plan", options.plan) if options.plan else None
    _router(options, workers, plan)


def _deploy(options: argparse.Namespace) -> None:
    """A plan's router, and its workers on this machine."""
    from scheduler.plan_file import read_deployable
    from serving.deploy.planned import commands_elsewhere, located, wanted_here
    from serving.run import LocalWorkers
    from workers.build import find

    plan = read_deployable("PLAN.json", options.plan)
    here = {c.model for c in plan.columns.values() if not options.here or c.gpu in options.here}
    texts = located(plan, options.models)
    models = {name: find(text).location for name, text in texts.items() if name in here}
    wanted = wanted_here(plan, options.here, models)
    ranks = {each.ranks for each in wanted}
    processes = max(1, sum(each.replicas * each.ranks for each in wanted))
    workers = LocalWorkers(
        models=(),
        counts={},
        threads=options.threads or max(1, (os.cpu_count() or 1) // processes),
        arguments=_passed_on(options),
        caps=_caps(options, max(ranks, default=1)) if len(ranks) < 2 else (),
        planned=wanted,
    )
    elsewhere = commands_elsewhere(plan, options.here, options.cluster)
    if elsewhere and not options.cluster.port:
        raise SetupError("--cluster HOST:PORT: say where the plan's other workers join this router")
    print(*elsewhere, sep="\n", flush=True)
    _router(options, workers, plan)


def _router(options: argparse.Namespace, workers: LocalWorkers, plan: PlanFile | None) -> None:
    """Serve until told to stop."""
    from serving.console import ready_text
    from serving.run import RouterConfig, run_router, several
    from serving.secret import cluster_secret
    from workers.run import end_with_input

    config = RouterConfig(
        http=Address(options.host, options.port),
        cluster=options.cluster,
        secret=cluster_secret(create=True),
        workers=workers,
        routing=routing_options(options, plan),
        plan=plan,
        drain_s=options.drain_s,
        endpoints=options.endpoint,
        sibling=options.sibling,
    )
    if options.routers > 1:
        config = several(config, options.routers, options.given)
    if options.sibling:  # it ends with the process that started it
        threading.Thread(target=end_with_input, name="input", daemon=True).start()
    _run(
        lambda stop: run_router(
            config, stop, lambda http, joins: print(ready_text(http, joins), flush=True)
        )
    )


def _caps(options: argparse.Namespace, ranks: int) -> tuple[int, ...]:
    """The memory cap of each rank; none at all where there is no cap."""
    caps: tuple[int, ...] = options.memory_cap
    if len(caps) not in (0, 1, ranks):
        raise SetupError(
            f"--memory-cap has {len(caps)} sizes for {ranks} ranks: one for all, or one each"
        )
    return caps * ranks if len(caps) == 1 else caps


def _worker(options: argparse.Namespace) -> None:
    """One worker that joins a router."""
    from serving.secret import cluster_secret
    from workers.build import Model, build, find
    from workers.run import run_worker
    from workers.service import WorkerConfig, WorkerService

    secret = cluster_secret(create=False)
    logger.info("process %d", os.getpid())
    model = Model(options.model, "") if options.fetch else find(options.model)
    threads = options.threads or os.cpu_count() or 1
    if options.fetch and (not options.group or options.rank == 0):
        raise SetupError("--fetch is for ranks of a group other than 0, which needs the model")
    if options.group and options.rank != 0:
        _member(options, model, threads, secret.encode())
        return
    group = _group(options, model.name, threads, secret.encode()) if options.group else None
    engine, rates = build(model, _engine_options(options, threads), group)
    config = WorkerConfig(
        name=options.name,
        model=model.name,
        role=Role(options.role),
        routers=options.join,
        secret=secret.encode(),
        listen_host=options.listen,
        advertise_host=options.advertise,
        kv_codecs=options.kv_codecs,
        kind=options.kind,
    )
    _run(lambda stop: run_worker(WorkerService(config, engine, rates), stop, child=options.child))


def _group(options: argparse.Namespace, model: str, threads: int, secret: bytes) -> GroupSpec:
    """The group of which this worker is rank 0."""
    from workers.build import GroupSpec

    return GroupSpec(
        listen=options.group_listen,
        ranks=options.ranks,
        weight=options.weight,
        means=_means(options, model, threads),
        secret=secret,
        allreduce=options.allreduce,
        sums=options.sums,
    )


def _means(options: argparse.Namespace, model: str, threads: int) -> Means:
    from workers.group.part import Means
    from workers.group.shard_folder import ShardFolder
    from workers.weights.wheel import models_folder

    shards = options.shards or models_folder().parent / "shards"
    return Means(
        threads=threads,
        shards=ShardFolder(shards, model),
        memory_cap=options.memory_cap,
        direct=not options.stream_cached,
    )


def _member(options: argparse.Namespace, model: Model, threads: int, secret: bytes) -> None:
    """A rank of a group that is not the first."""
    from workers.group.gauge import gauge
    from workers.group.member import MemberConfig
    from workers.run import run_rank

    means = _means(options, model.name, threads)
    config = MemberConfig(
        name=options.name,
        leader=options.join[0],
        secret=secret,
        listen_host=options.listen,
        advertise_host=options.advertise or "",
        means=means,
        weight=options.weight,
        box=gauge(options.name, means) if options.weight is None else None,
        model=model.name,
        path=model.location,
        fetch=options.fetch,
        pid=os.getpid(),
    )
    run_rank(config, child=options.child)


def _engine_options(options: argparse.Namespace, threads: int) -> EngineOptions:
    from workers.build import EngineOptions

    return EngineOptions(
        kv_tokens=options.kv_tokens,
        threads=threads,
        mode=options.mode,
        kv_dtype=options.kv_dtype,
        quantize=options.quantize,
        itl_bound_s=options.itl_bound_ms / 1000 if options.itl_bound_ms else None,
        speculate=options.speculate,
    )


def _passed_on(options: argparse.Namespace) -> tuple[str, ...]:
    """What `motley serve` was told about each worker's engine, as arguments of `motley worker`."""
    words = ["--kv-tokens", str(options.kv_tokens), "--mode", options.mode]
    words += ["--kv-dtype", options.kv_dtype, "--kv-codecs", ",".join(options.kv_codecs)]
    words += ["--quantize", options.quantize] if options.quantize else []
    words += ["--itl-bound-ms", str(options.itl_bound_ms)] if options.itl_bound_ms else []
    words += [] if options.speculate else ["--no-speculation"]
    words += ["--verbose"] if options.verbose else []
    return tuple(words)


def _plan(options: argparse.Namespace) -> None:
    """The cheapest mix of GPU types, roles and TP degrees that keeps the SLO."""
    from scheduler.plan_command import run

    run(options)


def _profile(options: argparse.Namespace) -> None:
    """Measure a worker on this machine: what planning and simulation rest on."""
    from workers.profile_command import run

    run(options)


def _simulate(options: argparse.Namespace) -> None:
    """What a cluster or a plan does under a load, on simulated time."""
    from scheduler.simulate_command import run

    run(options)


def _autoscale(options: argparse.Namespace) -> None:
    """A day of traffic under the autoscaler, simulated, and what it saves."""
    from scheduler.autoscale_command import run

    run(options)


def _group_plan(options: argparse.Namespace) -> None:
    """Shares of a model for unlike machines, what a token takes, and whom to leave out."""
    from workers.group.plan_command import run

    run(options)


def _secret(options: argparse.Namespace) -> None:
    """Print what workers on other machines need."""
    from serving.secret import cluster_secret

    print(cluster_secret(create=True))


def _run(main: Callable[[asyncio.Event], Coroutine[object, object, None]]) -> None:
    """Run `main` with an event that the first Ctrl-C or SIGTERM sets; the second one kills."""

    async def run() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def ask() -> None:
            stop.set()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
                # No clean-up by exceptions: children end because their standard input closes.
                signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ask)
        await main(stop)

    from uvloop import new_event_loop

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="motley",
        description="Serve LLMs behind one OpenAI-compatible endpoint on machines not alike.",
        epilog="`motley COMMAND --help` has examples; `motley bench --help` is the load test.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = _command(commands, "serve", _serve, SERVE_EXAMPLES)
    add_serve_arguments(serve)
    add_engine_arguments(serve)
    deploy = _command(commands, "deploy", _deploy, DEPLOY_EXAMPLES)
    add_deploy_arguments(deploy)
    add_engine_arguments(deploy)
    add_worker_arguments(_command(commands, "worker", _worker, WORKER_EXAMPLES))
    add_plan_arguments(_command(commands, "plan", _plan, PLAN_EXAMPLES))
    add_profile_arguments(_command(commands, "profile", _profile, PROFILE_EXAMPLES))
    add_simulate_arguments(_command(commands, "simulate", _simulate, SIMULATE_EXAMPLES))
    add_autoscale_arguments(_command(commands, "autoscale", _autoscale, AUTOSCALE_EXAMPLES))
    groups = commands.add_parser("group", help="Plan a group of machines that share one model.")
    of_groups = groups.add_subparsers(required=True, metavar="COMMAND")
    add_group_plan_arguments(_command(of_groups, "plan", _group_plan, GROUP_PLAN_EXAMPLES))
    _command(commands, "secret", _secret, "example:\n  motley secret\n")
    commands.add_parser("bench", help="Measure an OpenAI endpoint: load test, search, report.")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    examples: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=run.__doc__,
        description=run.__doc__,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    command.add_argument("--verbose", action="store_true", help="log more")
    return command


if __name__ == "__main__":
    sys.exit(main())
