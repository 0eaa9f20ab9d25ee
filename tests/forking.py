"""Several processes for a test, forked from one interpreter: importing torch once costs half of importing it twice."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any


def fork(world: int, work: Callable[[], Any]) -> list[int]:
    """Run ``work`` in ``world`` processes with ``torchrun``'s environment variables.

    Returns:
        Their exit statuses as a shell's caller sees them; minus the signal's number for one that was killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ |= {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            }
            os._exit(_status(work))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _status(work: Callable[[], Any]) -> int:
    """What an interpreter that runs ``work`` would say and return at its end."""
    try:
        work()
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
