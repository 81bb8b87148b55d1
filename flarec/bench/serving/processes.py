"""Parts of a run in processes of their own, which print what they found as JSON, a line at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from ..measure import NotMeasured


def printed(
    module: str, words: Sequence[str], name: str, limit: float, environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    """What `python -m module words...` prints, with some variables of the environment changed.

    Raises `NotMeasured` for one that fails or takes more than `limit` seconds, with how far it came.
    """
    command = [sys.executable, "-P", "-m", module, *words]  # not with what lies in the working directory
    try:
        done = subprocess.run(
            command, env={**os.environ, **(environment or {})}, text=True, capture_output=True, timeout=limit
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        reached = ", ".join((said.decode() if isinstance(said, bytes) else said).splitlines()) or "nothing"
        raise NotMeasured(f"the {name} process took more than {limit:g} s; it came to {reached}") from late
    if done.returncode:
        raise NotMeasured(f"the {name} process failed: {(done.stderr.strip().splitlines() or [''])[-1]}")
    found: dict[str, float] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found
