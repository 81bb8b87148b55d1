"""Run the tests of the families under several versions of transformers, each in an environment of its own.

    .venv/bin/python tools/matrix.py 5.17.0 newest [--write flarec/conformance/results.json]

`.venv-VERSION` shares every package with `.venv` but transformers and what that asks for (`tools/environment.py`),
pinned by `constraints-VERSION.txt` if there is one; `newest` is the newest release that the index has. At the end: the
families that a version lacks, and those whose tests fail. `--write` also merges a run of `flarec families` into a file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.environment import make  # noqa: E402

TORCH = "torch==2.13.0"  # an exact request is met by the build that is there; a looser one can fetch another
TESTS = ("tests/conformance", "tests/frontend/test_export.py")
NEWEST = "newest"
_FACTS = """
import json, transformers
from flarec.frontend import families, tiny
rows = [*families.FAMILIES, *families.PLAIN]
lacks = [row for row in rows if not tiny.available(row)]
print(json.dumps({"version": transformers.__version__, "families": rows, "lacks": lacks}))
"""


@dataclass(frozen=True)
class Result:
    """What one version of transformers gave; `failed`: families (or names of tests) with failing tests."""

    version: str
    lacks: tuple[str, ...]
    failed: tuple[str, ...]
    tests: int
    seconds: float
    passed: bool


def environment(version: str) -> Path:
    """The interpreter of `.venv-VERSION`, made or completed."""
    constraints = ROOT / f"constraints-{version}.txt"
    pinned = ["-c", str(constraints)] if constraints.exists() else []
    wanted = ["--upgrade", "transformers"] if version == NEWEST else [f"transformers=={version}"]
    return make(ROOT / f".venv-{version}", [*pinned, TORCH, *wanted])


def run(version: str, workers: str, tests: list[str]) -> Result:
    python = environment(version)
    found, known, missing = _facts(python)
    print(f"\ntransformers {found}; families it lacks: {', '.join(missing) or 'none'}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # the tests of one family share a process, and with it what they capture
        spread = ["-n", workers, "--dist", "loadgroup", f"--junitxml={report}"]
        command = [python, "-m", "pytest", "-q", *spread, *(tests or TESTS)]
        every = os.environ | {"FLAREC_EVERY_FAMILY": "1"}
        code = subprocess.run(command, cwd=ROOT, check=False, env=every).returncode
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    seconds = sum(float(case.get("time", "0")) for case in cases)
    return Result(found, missing, tuple(sorted({_family(case, known) for case in bad})), len(cases), seconds, code == 0)


def _facts(python: Path) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Version of transformers, all families, those that this version lacks."""
    text = subprocess.run([python, "-c", _FACTS], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    facts = json.loads(text.splitlines()[-1])
    return facts["version"], tuple(facts["families"]), tuple(facts["lacks"])


def _family(case: ElementTree.Element, families: tuple[str, ...]) -> str:
    """The family in a test's name, as in `test_forward[bamba-shape0]`; the whole name if there is none."""
    name = case.get("name", "")
    parts = name.rstrip("]").partition("[")[2].split("-")
    return next((part for part in parts if part in families), name)


def record(version: str, file: Path) -> None:
    """Merge what `flarec families --run` finds under a version into a file of results."""
    command = "import sys; from flarec.cli import main; sys.exit(main())"
    python = environment(version)
    subprocess.run([python, "-c", command, "families", "--run", "--write", str(file)], cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="The tests of the families under several versions of transformers.")
    parser.add_argument("versions", nargs="+", metavar="VERSION", help=f"a release, or '{NEWEST}'")
    parser.add_argument("--write", type=Path, metavar="FILE", help="merge `flarec families --run` of each into FILE")
    parser.add_argument("--workers", default=os.environ.get("WORKERS", "2"), help="processes of pytest (default: 2)")
    parser.add_argument("--tests", action="append", default=[], metavar="PATH", help=f"default: {' '.join(TESTS)}")
    options = parser.parse_args()
    results = [run(version, options.workers, options.tests) for version in options.versions]
    if options.write is not None:
        for version in options.versions:
            record(version, options.write)
    print()
    for result in results:
        outcome = "passed" if result.passed else f"FAILED: {', '.join(result.failed) or 'no test ran through'}"
        lacks = f"; lacks {', '.join(result.lacks)}" if result.lacks else ""
        print(f"transformers {result.version}: {result.tests} tests, {result.seconds:.0f} s of work, {outcome}{lacks}")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
