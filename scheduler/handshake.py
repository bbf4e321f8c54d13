"""What two processes say first: proofs that both know the cluster secret, and a version to speak.

    listener  Challenge(nonce_l, speaks)
    dialler   Answer(nonce_d, HMAC(secret, "dial" ‖ nonce_l ‖ nonce_d), speaks)
    listener  Welcome(HMAC(secret, "listen" ‖ nonce_d ‖ nonce_l))

These three are framed as version HANDSHAKE by every release; what follows bears the newest version
that both speak. This authenticates peers on a network that may be shared; it does not encrypt what
follows.
"""

from __future__ import annotations

import hmac
import secrets
from typing import TYPE_CHECKING

from scheduler.errors import ProtocolError
from scheduler.messages import HANDSHAKE, SPEAKS, Answer, Challenge, Refused, Versions, Welcome

if TYPE_CHECKING:
    from scheduler.transport import Connection

_MOST = 4096  # bytes: nobody unknown makes us hold more than this


async def greet(connection: Connection, secret: bytes) -> None:
    """The listener's side. Raises ProtocolError, after a Refused that says why."""
    nonce = secrets.token_bytes(16)
    await connection.send(Challenge(HANDSHAKE, nonce, SPEAKS))
    answer, _ = await connection.receive(_MOST)
    if not isinstance(answer, Answer):
        raise ProtocolError("no answer to our challenge")
    try:
        if not hmac.compare_digest(answer.proof, _proof(secret, b"dial", nonce, answer.nonce)):
            raise ProtocolError("wrong cluster secret: give this process the router's")
        version = agreed(SPEAKS, answer.speaks)
    except ProtocolError as error:
        await connection.send(Refused(str(error)))
        raise
    await connection.send(Welcome(_proof(secret, b"listen", answer.nonce, nonce)))
    connection.version = version


async def introduce(connection: Connection, secret: bytes) -> None:
    """The dialler's side. Raises ProtocolError."""
    challenge = await connection.expect(Challenge)
    version = agreed(SPEAKS, challenge.speaks)
    nonce = secrets.token_bytes(16)
    proof = _proof(secret, b"dial", challenge.nonce, nonce)
    await connection.send(Answer(HANDSHAKE, nonce, proof, SPEAKS))
    welcome = await connection.expect(Welcome)
    if not hmac.compare_digest(welcome.proof, _proof(secret, b"listen", nonce, challenge.nonce)):
        raise ProtocolError(f"{connection.remote} does not know the cluster secret")
    connection.version = version


def agreed(ours: Versions, theirs: Versions) -> int:
    """The newest version that both speak. Raises ProtocolError if there is none."""
    version = min(ours[1], theirs[1])
    if version < max(ours[0], theirs[0]):
        raise ProtocolError(
            f"one side speaks versions {ours[0]} to {ours[1]} of our protocol, the other "
            f"{theirs[0]} to {theirs[1]}: upgrade the older one, by one release at a time"
        )
    return version


def _proof(secret: bytes, side: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(secret, side + first + second, "sha256")
