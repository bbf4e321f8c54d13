"""The cluster secret: what lets a worker join, and nobody else."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from scheduler.errors import SetupError

VARIABLE = "MOTLEY_SECRET"


def cluster_secret(*, create: bool) -> str:
    """The secret from the environment, else from this user's file.

    Without either, `create` makes the file; otherwise raises SetupError that says what to do.
    """
    if secret := os.environ.get(VARIABLE):
        return secret
    path = _path()
    try:
        if create:
            _create(path)
        if secret := path.read_text().strip():
            return secret
    except FileNotFoundError:
        raise SetupError(
            f"no cluster secret: run `motley secret` on the router's machine, and start this "
            f"process with {VARIABLE} set to what it prints"
        ) from None
    except OSError as error:
        raise SetupError(f"cannot use {path}: {error}; or set {VARIABLE}") from error
    raise SetupError(f"{path} is empty: remove it, or set {VARIABLE}")


def _path() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "motley" / "secret"


def _create(path: Path) -> None:
    """Write a new secret, whole or not at all, unless there is one."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(prefix="secret.", dir=path.parent)  # mode 600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        if not path.exists():
            os.link(draft, path)
    except FileExistsError:
        pass  # another process was first: its secret it is
    finally:
        os.unlink(draft)
