"""A process that has imported Motley and forks workers from itself: a start costs milliseconds.

One line of JSON each way: the arguments of `motley worker`, and the new process's id. The workers'
standard input is a pipe that only this process holds open, so they end with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import uvloop  # noqa: F401  # imported here, once

import motley
import workers.build
import workers.run
import workers.service  # noqa: F401


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the bench, and that ends us
    alive, hold = os.pipe()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.close(hold)
            os.dup2(alive, 0)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.stdin = os.fdopen(0)
            os._exit(motley.main(["worker", *json.loads(line), "--child"]))
        print(child, flush=True)


if __name__ == "__main__":
    main()
