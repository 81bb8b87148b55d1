"""Python answers are graded by running them: a process of its own per answer, with limits.

The process has no environment variables, an empty working folder, the standard library alone, and limits on time,
memory, file size and open files. That holds mistakes, not malice: it runs with the user's rights and sees the user's
files and network. Commands run answers only when told to (`--execute`).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
SENTINEL = "flarec-answer-passed"
SECONDS, MEGABYTES, FILE_MEGABYTES, OPEN_FILES = 10.0, 1024, 16, 64
START = """\
import resource, sys
seconds, memory, size, files = map(int, sys.argv[2:6])
for name, value in (("CPU", seconds), ("AS", memory), ("FSIZE", size), ("NOFILE", files), ("CORE", 0)):
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
with open(sys.argv[1], encoding="utf-8") as file:
    source = file.read()
token = sys.argv.pop()
del sys.argv[1:]
exec(compile(source, "answer.py", "exec"), {"__name__": "__main__"})
sys.__stdout__.write("\\n" + token)
sys.__stdout__.flush()
"""
"""What the process runs: limits, the answer with its tests, and then the word that it came to the end."""


@dataclass(frozen=True)
class Verdict:
    """passed: the answer and its tests ran to their end. reason: else "time", "memory", or the exception's class."""

    passed: bool
    reason: str


def code_of(text: str) -> str:
    """The last fenced block of an answer, or all of it where nothing is fenced. An open fence ends with the text."""
    blocks = FENCED.findall(text)
    return str(blocks[-1]) if blocks else text


def run_answer(
    code: str, tests: str, *, seconds: float = SECONDS, megabytes: int = MEGABYTES, token: str | None = None
) -> Verdict:
    """Run an answer's code and then its tests.

    seconds    of wall time, and of CPU time (rounded up), until it counts as wrong
    megabytes  of address space
    token      the word printed at the end; by default a random one, which the answer cannot know

    An answer that leaves the process (`sys.exit`, `os._exit`) before its tests have run does not pass.
    """
    token = token or f"{SENTINEL}-{os.urandom(16).hex()}"
    with tempfile.TemporaryDirectory(prefix="flarec-answer-") as folder:
        path = Path(folder) / "answer.py"
        path.write_text(f"{code}\n\n{tests}\n", encoding="utf-8", errors="backslashreplace")
        limits = (int(seconds) + 1, megabytes << 20, FILE_MEGABYTES << 20, OPEN_FILES)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", START, str(path), *map(str, limits), token],
            cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            printed, notices = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return Verdict(False, "time")
        finally:
            _end(process)
    if process.returncode == 0 and printed.rsplit(b"\n", 1)[-1] == token.encode():
        return Verdict(True, "")
    return Verdict(False, _reason(process.returncode, notices.decode(errors="replace")))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the answer and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _reason(status: int, notices: str) -> str:
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return "time"
    last = next((line for line in reversed(notices.splitlines()) if line and not line.startswith(" ")), "")
    name = last.split(":", 1)[0].strip()
    if name == "MemoryError":
        return "memory"
    return name.rsplit(".", 1)[-1] if re.fullmatch(r"[\w.]+", name) else "ended early"
