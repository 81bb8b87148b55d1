"""Work of several ranks as processes of this machine: forked, so that they share what was captured before.

Only for a process that has used no GPU and one thread for arithmetic: `python -m tests.train.ranks.scenarios` is one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence

import torch


def free_port() -> int:
    with contextlib.closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def on_ranks(work: Callable[[int], object], size: int = 2) -> Sequence[int]:
    """Run `work(rank)` in a process per rank, in a launcher's environment; their exit codes (negative: the signal)."""
    port = free_port()
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)  # makes the pool that a fork leaves out, before two threads ask for it at once
            code = 1
            try:
                work(rank)
                code = 0
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
