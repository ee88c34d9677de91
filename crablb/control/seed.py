"""The deployment's seed: the key of every hash.

Load balancers that share it send a connection to the same backend.  Who does not know it cannot choose connections that
collide.  Unless the configuration gives it, it is made once and kept, so that a restart changes nothing.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import structlog

from crablb.values import guarded, read_bytes

PATH = Path("/var/lib/crablb/seed")


def load(path: Path = PATH) -> bytes:
    """16 bytes, from ``path``, which is made (mode 0600) if it does not exist.

    Raises :class:`ConfigError` if others can write it, or every user can read it.
    """
    try:
        seed = bytes.fromhex(read_bytes(path).decode())
        guarded(path)
        if len(seed) == 16:
            return seed
        reason = "it does not hold 32 hexadecimal digits"
    except FileNotFoundError:
        seed = secrets.token_bytes(16)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Beside and then renamed: two daemons that start at once agree on one.
            fresh = path.with_name(f".{path.name}.{os.getpid()}")
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(seed.hex() + "\n")
            try:
                os.link(fresh, path)
            except FileExistsError:
                return load(path)
            finally:
                fresh.unlink()
            return seed
        except OSError as error:
            reason = error.strerror or str(error)
    except (OSError, ValueError) as error:
        reason = str(error)
    structlog.get_logger().warning(
        "the seed cannot be kept: after a restart, fallback connections may change their backend",
        path=str(path),
        reason=reason,
    )
    return secrets.token_bytes(16)
