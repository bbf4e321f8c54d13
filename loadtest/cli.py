"""The command: `motley bench …`, which is `python -m loadtest …`.

Exit codes: 0 all well · 1 an SLO was missed (or `compare` found B worse) · 2 an option or a file is
wrong, or the endpoint cannot be reached · 3 the run is INVALID · 4 tokens were lost or repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import sys
from typing import TYPE_CHECKING

import uvloop

from loadtest import commands
from loadtest.errors import LoadtestError
from loadtest.measure import serve_part

if TYPE_CHECKING:
    from collections.abc import Coroutine

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # as a shell says of SIGINT and SIGPIPE
EXIT_PIPE = 141


def main(argv: list[str]) -> int:
    """Runs one command and returns its exit code. Without a command's name it is `run`."""
    if argv == ["_part"]:
        return _loop(_part())  # a client process of a larger run; not for people
    names = {*commands.COMMANDS, "-h", "--help"}
    parser = _parser()
    try:
        args = parser.parse_args(argv if argv and argv[0] in names else ["run", *argv])
        return _loop(args.command(args))
    except LoadtestError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone; say nothing more, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    return EXIT_USAGE


async def _part() -> int:
    await serve_part()
    return 0


def _loop(work: Coroutine[object, object, int]) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:  # each request under way is a connection
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="motley bench",
        description="Measure an OpenAI endpoint from outside. Without a command it is `run`.",
        epilog=__doc__.partition("\n\n")[2] if __doc__ else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in commands.COMMANDS.items():
        sub = choices.add_parser(
            name,
            help=command.help,
            description=command.help,
            epilog=f"example:\n  motley bench {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.options(sub)
        sub.set_defaults(command=command.run)
    return parser
