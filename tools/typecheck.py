"""Type check the packages as they are installed: `mypy --strict -p flarec`, and plain mypy on everything around them.

mypy does not know setuptools' `package-dir`, so this builds a throw-away tree of links in build/typecheck in which the
folders lie as they are imported (`flarec/kernels` -> `kernels`), and prints the paths of the repository.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "typecheck"
AROUND = ("tests", "tools", "benchmarks")  # relaxed in pyproject.toml: [[tool.mypy.overrides]]


def link_packages(folder_of: dict[str, str]) -> None:
    """Lay out build/typecheck from `package-dir` ({"flarec": "flarec", "flarec.passes": "passes", ...})."""
    shutil.rmtree(TREE, ignore_errors=True)
    for package, folder in folder_of.items():
        if "." in package:
            continue
        (TREE / package).mkdir(parents=True)
        for entry in (ROOT / folder).iterdir():
            if entry.name != "__pycache__":
                (TREE / package / entry.name).symlink_to(entry)
    for package, folder in folder_of.items():
        if "." in package:
            (TREE / package.replace(".", "/")).symlink_to(ROOT / folder)
    for folder in AROUND:
        if any((ROOT / folder).rglob("*.py")):
            (TREE / folder).symlink_to(ROOT / folder)


def main() -> int:
    with open(ROOT / "pyproject.toml", "rb") as file:
        folder_of: dict[str, str] = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    link_packages(folder_of)
    packages = ["flarec", *(folder for folder in AROUND if (TREE / folder).exists())]
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--num-workers", str(min(2, os.cpu_count() or 1))]  # a cold check takes half a minute of one core
    command += ["--cache-dir", str(ROOT / "build" / ".mypy_cache")]
    for package in packages:
        command += ["-p", package]
    done = subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, text=True)
    output = done.stdout
    for package, folder in sorted(folder_of.items(), key=lambda item: -len(item[0])):
        output = re.sub(rf"^{re.escape(package.replace('.', '/'))}/", f"{folder}/", output, flags=re.MULTILINE)
    print(output, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
