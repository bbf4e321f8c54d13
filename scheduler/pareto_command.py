"""The body of `motley plan --pareto`: plans every point, with a progress bar, and draws."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from scheduler import pareto_svg as drawn
from scheduler.errors import SetupError
from scheduler.pareto_page import figures, page, titles

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import RenderableType
    from rich.progress import Progress

    from scheduler.certify import Certificate
    from scheduler.pareto import Curve, Point, Task
    from scheduler.plan import Plan
    from scheduler.planner_columns import Built
    from scheduler.service_file import Service

CERTIFY_S = 120.0  # for all points but the one asked for: those nearest to it first
DRAW_S = 60.0
KINDS = (".html", ".svg", ".png")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pareto",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="draw cost against attainment, TTFT, TPOT and rate: .html, .svg or .png; again for "
        "another",
    )


def check(paths: Sequence[Path]) -> None:
    """Raises SetupError naming the first file that cannot be drawn, before minutes are spent."""
    for path in paths:
        if path.suffix not in KINDS:
            raise SetupError(f"--pareto {path}: a file that ends in {', '.join(KINDS)}")
        if not path.absolute().parent.is_dir():
            raise SetupError(f"--pareto {path}: there is no folder {path.parent}")
        if path.suffix == ".png":
            _renderer(path)


def run(
    service: Service,
    built: Built,
    plan: Plan,
    certificate: tuple[Plan, Certificate] | None,
    certify: Callable[[Service, Built, Plan], tuple[Plan, Certificate]],
) -> tuple[Curve, ...]:
    """Curves through `plan`; with its certificate, points are certified as far as time allows."""
    from rich.console import Console
    from rich.progress import Progress

    from scheduler import pareto

    tasks = pareto.tasks(service)
    sure: dict[int, tuple[Plan, Certificate]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        found = [
            pareto.solve(task, built.options.previous, time.perf_counter)
            for task in progress.track(tasks, description="planning")
        ]
        if certificate:
            sure = _certify(tasks, found, certify, progress)
    points: dict[str, dict[float, Point]] = {}
    for at, task in enumerate(tasks):
        points.setdefault(task.axis.name, {})[task.factor] = pareto.point(
            service, task.axis, task.factor, *found[at], sure.get(at)
        )
    for axis in pareto.axes(service):
        points[axis.name][1.0] = pareto.point(service, axis, 1.0, built, plan, certificate)
    return tuple(
        pareto.curve(service, axis, [points[axis.name][factor] for factor in axis.factors])
        for axis in pareto.axes(service)
    )


def _certify(
    tasks: Sequence[Task],
    found: Sequence[tuple[Built, Plan]],
    certify: Callable[[Service, Built, Plan], tuple[Plan, Certificate]],
    progress: Progress,
) -> dict[int, tuple[Plan, Certificate]]:
    """As long as the longest so far would still end in time."""
    from scheduler.pareto import nearest_first

    sure: dict[int, tuple[Plan, Certificate]] = {}
    begun, longest = time.perf_counter(), 0.0
    bar = progress.add_task("simulating", total=CERTIFY_S)
    for at in nearest_first(tasks):
        built, plan = found[at]
        if plan.shed:
            continue
        before = time.perf_counter()
        if before - begun + longest > CERTIFY_S:
            break
        sure[at] = certify(tasks[at].service, built, plan)
        longest = max(longest, time.perf_counter() - before)
        progress.update(bar, completed=time.perf_counter() - begun)
    return sure


def write(paths: Sequence[Path], service: Service, curves: Sequence[Curve], seconds: float) -> None:
    """Raises SetupError naming the file that cannot be written."""
    asked = said(service)
    for path in paths:
        sheet = drawn.sheet(asked, titles(curves), drawn.gpus(curves))
        try:
            if path.suffix == ".png":
                _render(sheet, drawn.size(len(curves)), path)
            elif path.suffix == ".svg":
                path.write_text(sheet, encoding="utf-8")
            else:
                facts = list(_facts(service, curves, seconds))
                path.write_text(page(asked, curves, facts), encoding="utf-8")
        except OSError as error:
            raise SetupError(f"--pareto {path}: {error}") from None


def said(service: Service) -> str:
    """What is asked for, in a line."""
    models = [
        f"{demand.name} at {demand.workload.rate:.3g} requests/s, {demand.slo.share * 100:.4g} % "
        f"within {drawn.label('ms', demand.slo.ttft_ms)} to the first token and "
        f"{drawn.label('ms', demand.slo.tpot_ms)} a token"
        for demand in service.demands
    ]
    return models[0] if len(models) == 1 else f"{len(models)} models: " + "; ".join(models)


def _facts(service: Service, curves: Sequence[Curve], seconds: float) -> Iterator[tuple[str, str]]:
    points = [point for curve in curves for point in curve.points]
    sure = sum(point.certified is not None for point in points if point.factor != 1)
    yield (
        "Points",
        f"each a plan of its own, {seconds:.0f} s in all; besides what is asked {sure} simulated",
    )
    yield "Differences", "of what was planned from what was planned, simulation aside"
    yield "Least cost", f"proven within {max(point.gap for point in points):.1%}"
    yield "Staircases", "a plan for more is one for less: between two points the dearer one counts"
    limits = "; ".join(f"{limit}: {limit.gpus}" for limit in service.limits)
    yield "GPUs there are", limits or "as many as it takes"
    used = {gpu for point in points for gpu in point.by_gpu}
    for offer in service.catalogue.offers:
        if offer.gpu in used:
            where = " ".join(filter(None, (offer.market, offer.region)))
            yield (
                f"{offer.gpu} ({where})",
                f"{offer.price:.2f} $/h, {offer.provenance}: {offer.source}, {offer.date}",
            )


def tables(curves: Sequence[Curve]) -> Iterator[RenderableType]:
    from rich.table import Table

    for curve in curves:
        table = Table(curve.name, "$/h", "against asked", "in simulation", "replicas")
        for point in curve.points:
            table.add_row(
                drawn.label(curve.unit, point.value),
                *figures(curve, point),
                drawn.mix(curve, point),
                style="bold" if point.factor == 1 else None,
            )
        yield table


def _renderer(path: Path) -> str:
    """A program here that draws SVG as PNG."""
    for name in ("rsvg-convert", "chromium", "chromium-browser", "google-chrome"):
        if program := shutil.which(name):
            return program
    raise SetupError(
        f"--pareto {path}: to draw PNG install rsvg-convert (librsvg) or chromium, or write .svg"
    )


def _render(sheet: str, size: tuple[float, float], path: Path) -> None:
    """At twice the size on the screen. Raises SetupError saying what the program said."""
    program = _renderer(path)
    with tempfile.TemporaryDirectory() as folder:
        svg = Path(folder) / "sheet.svg"
        svg.write_text(sheet, encoding="utf-8")
        if Path(program).name == "rsvg-convert":
            arguments = ["--zoom", "2", "--output", str(path), str(svg)]
        else:
            arguments = _browser(size, svg, path)
        try:
            done = subprocess.run(
                [program, *arguments], capture_output=True, timeout=DRAW_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise SetupError(f"--pareto {path}: {program} took over {DRAW_S:.0f} s") from None
    if done.returncode or not path.exists():
        told = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SetupError(f"--pareto {path}: {program} failed: {''.join(told)}")


def _browser(size: tuple[float, float], svg: Path, path: Path) -> list[str]:
    """A window as large as the sheet; a browser that root starts has no sandbox."""
    window = "--window-size={},{}".format(*(math.ceil(each) for each in size))
    arguments = ["--headless", "--hide-scrollbars", "--force-device-scale-factor=2", window]
    arguments += [f"--user-data-dir={svg.parent}", f"--screenshot={path.absolute()}", svg.as_uri()]
    return arguments if os.geteuid() else ["--no-sandbox", *arguments]
