"""What `motley serve` prints for a person."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.messages import Join


def ready_text(http: tuple[str, int], workers: Sequence[Join]) -> str:
    """The ready line, what serves, and a command to paste."""
    host, port = http
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    models = sorted({worker.model for worker in workers})
    lines = [f"Motley is ready: {address}", ""]
    for model in models:
        roles = Counter(str(w.role) for w in workers if w.model == model)
        shape = ", ".join(f"{count} {role}" for role, count in sorted(roles.items(), reverse=True))
        lines.append(f"  {model}  ({shape})")
    if models:
        body = {
            "model": models[0],
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
        lines += [
            "",
            "Try it:",
            f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json' \\",
            f"    -d '{json.dumps(body)}'",
        ]
    return "\n".join([*lines, "", "Ctrl-C stops everything."])
