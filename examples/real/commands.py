"""Commands that the scripts here run as processes, and what a record says of the machine and the files."""

from __future__ import annotations

import hashlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ran:
    """A process that has ended. code: its exit code, or None where it was ended because its time was over."""

    command: str
    code: int | None
    output: str
    seconds: float

    @property
    def error(self) -> str:
        """Empty where it did what it was to do; else its last words."""
        if self.code is None:
            return "no time left"
        if not self.code:
            return ""
        lines = self.output.strip().splitlines() or ["no output"]
        return f"exit code {self.code}: {' '.join(lines[-3:])}"[-600:]


def flarec(*words: object) -> list[str]:
    return [sys.executable, "-m", "flarec", *map(str, words)]


def script(name: str, *words: object) -> list[str]:
    """A script of this folder."""
    return [sys.executable, str(HERE / name), *map(str, words)]


def shown(command: Sequence[str]) -> str:
    """As one would type it."""
    words = list(command[1:])
    if words[:2] == ["-m", "flarec"]:
        return " ".join(["flarec", *words[2:]])
    return " ".join(["python", "examples/real/" + Path(words[0]).name, *words[1:]])


def run(command: Sequence[str], limit: float, *, device: str = "", show: bool = False) -> Ran:
    """Wait for a command, `limit` seconds at most; then it and what it started are killed.

    device: of CUDA_VISIBLE_DEVICES; show: its output goes to the terminal as well, when it has ended.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": device} if device else {})}
    start = time.monotonic()
    process = subprocess.Popen(
        list(command), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )
    code: int | None = None
    try:
        output, _ = process.communicate(timeout=max(1.0, limit))
        code = process.returncode
    except subprocess.TimeoutExpired:
        output = end(process)
    except BaseException:
        end(process)
        raise
    if show:
        print(output, flush=True)
    return Ran(shown(command), code, output, time.monotonic() - start)


def end(process: subprocess.Popen[str]) -> str:
    """Kill a process with its children; what it had said."""
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0] or ""


def machine() -> dict[str, Any]:
    """device and versions, for a record."""
    import torch
    import transformers

    import flarec

    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "flarec": flarec.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"device": device, "versions": versions}


def described(path: Path) -> dict[str, str]:
    """Name and sha256 of a file."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
