"""How many threads a command computes with, and how they wait for each other: chosen for the machine that it finds.

torch's CPU operators share their work among OpenMP threads and wait for the last one after each operator, by default in
a loop. On a machine where others compute too, that loop takes the core which the awaited thread needs: two threads on
two busy cores are tens of times slower than one. Waiting without a loop costs next to nothing, but has to be asked for
before torch is loaded, in the environment (`manage`). How many threads pay depends on the size of the model (`settle`).

Commands do both; a Python program that wants it calls `manage()` before it imports torch. The number that a user set in
OMP_NUM_THREADS (or MKL_NUM_THREADS), and a policy that is set, are left alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables with which users choose the number of threads."""
POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables with which users choose how threads wait."""
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
PER_THREAD = 1_500_000
"""Parameters that a thread should have to work on: the operators of smaller models are too short to be shared."""


@dataclass(frozen=True)
class ThreadChoice:
    """What was found when the process started.

    own      the variable with which the user chose the number of threads; None: it is ours to choose
    passive  threads wait without a loop
    """

    own: str | None
    passive: bool


_choice: ThreadChoice | None = None
_added: frozenset[str] = frozenset()
_settled: int | None = None


def manage() -> None:
    """Let threads wait without a loop, and let `settle` choose their number from now on. To be called before torch is
    imported; later the policy cannot be changed any more, and `settle` takes fewer threads on a busy machine."""
    global _added, _choice
    if _choice is None:
        before = frozenset(os.environ)
        _choice = choose(os.environ, loaded="torch" in sys.modules)
        _added = frozenset(os.environ) - before


def choose(environment: MutableMapping[str, str], *, loaded: bool) -> ThreadChoice:
    """Set how threads wait, unless the user did or it is too late because torch is `loaded`."""
    if not loaded and not any(name in environment for name in POLICIES):
        environment.update(PASSIVE)
    own = next((name for name in NUMBERS if environment.get(name)), None)
    return ThreadChoice(own, environment.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE")


def found_environment() -> dict[str, str]:
    """The environment without what `manage` put there: for other programs that a command starts."""
    return {name: value for name, value in os.environ.items() if name not in _added}


def settle(parameters: int) -> None:
    """Compute with as many threads as a model of that many parameters can use here. Does nothing unless `manage` was
    called, and where the user chose the number."""
    global _settled
    if _choice is None or _choice.own is not None:
        return
    import torch

    count = threads_for(parameters, cores(), 0 if _choice.passive else others_running())
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    _settled = count


def threads_for(parameters: int, available: int, others: int = 0) -> int:
    """By size of the model and cores; of cores that `others` compute on, none is taken. At least 1."""
    return max(1, min(available - others, max(1, parameters // PER_THREAD)))


def said() -> str:
    """One line: threads, cores, how they wait, and who chose."""
    import torch

    count = torch.get_num_threads()
    if _choice is None:
        why = "chosen by the calling program"
    elif _choice.own is not None:
        why = f"by {_choice.own}"
    elif _settled is None:
        why = "chosen by torch"
    else:
        why = "chosen by the size of the model and the cores"
    waits = "" if count == 1 or _choice is None else ", waiting " + ("asleep" if _choice.passive else "in a loop")
    return f"threads: {count} on {cores()} core{'s' * (cores() != 1)}{waits}, {why}"


def cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its affinity, and the quota of its control group. At least 1."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        allowed = os.cpu_count() or 1
    limit = quota(root)
    return max(1, math.ceil(limit)) if limit < allowed else allowed


def quota(root: Path) -> float:
    """Cores that the control group of this process may use together; infinite without a limit."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = (root / "cpu.max").read_text().split()
        return math.inf if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        limit, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(limit) / int(period) if int(limit) > 0 else math.inf
    return math.inf


def others_running(statistics: Path = Path("/proc/stat")) -> int:
    """Tasks that compute or wait for a core right now, besides the one that asks; the load of the last minute where the
    system does not say. Of the last minute is also what an earlier command of ours left."""
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = statistics.read_text().splitlines()
        running = next(line for line in lines if line.startswith("procs_running")).split()[1]
        return max(0, int(running) - 1)
    with contextlib.suppress(OSError, AttributeError):
        return round(os.getloadavg()[0])
    return 0
