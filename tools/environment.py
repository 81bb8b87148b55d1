"""Make an environment that shares the packages of the running one and holds others on top of them.

    .venv/bin/python tools/environment.py .venv-5.17.0 -c constraints-5.17.0.txt torch==2.13.0 transformers==5.17.0

Only what differs is downloaded: pip sees the shared packages as installed, resolves against them, and puts a different
version beside them, where Python finds it first. Everything after the folder is passed to `pip install`.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

SHARED = "shared.pth"


def interpreter(folder: Path) -> Path:
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def make(folder: Path, arguments: list[str]) -> Path:
    """Create or complete the environment in `folder`; returns its interpreter."""
    python = interpreter(folder)
    if not python.exists():
        venv.EnvBuilder(with_pip=False, symlinks=sys.platform != "win32").create(folder)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()
    assert Path(own).resolve().is_relative_to(folder.resolve()), f"{own} is not in {folder}"
    # addsitedir, not a plain path: editable installs of the shared environment are .pth files themselves
    (Path(own) / SHARED).write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "-q"]
    subprocess.run([*pip, *arguments], check=True)
    return python


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} FOLDER PIP-INSTALL-ARGUMENT...")
    make(Path(sys.argv[1]), sys.argv[2:])
