"""Tests inside vLLM (`make test-vllm`), on checkpoints that `tools/vllm_models.py` made. Each engine has a process.

    .venv-vllm/bin/python -m pytest -q tests_vllm [--record FILE.json]      # FILE: the numbers that were measured
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tests_vllm.site.sitecustomize  # noqa: F401  for this process, and by SETTINGS for those that it starts

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "build" / "vllm"
SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",  # no thread is bound to a core that others use
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join((str(ROOT / "tests_vllm" / "site"), str(ROOT))),
}
Rounds = dict[str, list[list[dict[str, Any]]]]
Answers = dict[str, list[list[dict[str, Any]]]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write what was measured into this file")


@pytest.fixture(scope="session")
def note(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Keeps numbers: note("llama", equal=50)."""
    found: dict[str, Any] = {}
    yield lambda key, **values: found.setdefault(key, {}).update(values)
    if (path := request.config.getoption("--record")) is not None:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        head = {"device": "cpu", "commit": git.stdout.strip(), "command": "make test-vllm RECORD=FILE"}
        path.write_text(json.dumps(head | found, indent=1) + "\n")


def answers(
    folder: Path, model: str, drafting: bool | dict[str, Any], rounds: Rounds, **engine: Any
) -> tuple[Answers, dict[str, Any]]:
    """(answers, by the names of `rounds`; counts of drafts by the same names, with the versions).

    drafting: with flarec's classes or not; or what vLLM itself calls its speculative configuration.
    """
    flat = [(name, part) for name, parts in rounds.items() for part in parts]
    job = {"model": str(MODELS / model), "drafting": drafting, "engine": engine, "rounds": [part for _, part in flat]}
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-m", "tests_vllm.engine", folder / "job.json", folder / "out.json"], cwd=folder,
        env={**os.environ, **SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    out = json.loads((folder / "out.json").read_text())
    found: Answers = {name: [] for name in rounds}
    counts: dict[str, Any] = {"versions": out["versions"]}
    for (name, _), answer, count in zip(flat, out["answers"], out["counts"], strict=True):
        found[name].append(answer)
        counts[name] = count
    return found, counts


def texts(rounds: list[list[dict[str, Any]]]) -> list[list[int]]:
    """The tokens of every answer of some rounds, one behind the other."""
    return [tokens for answered in rounds for answer in answered for tokens in answer["tokens"]]


def record(model: str) -> dict[str, Any]:
    """What flarec itself did with a model, and on which prompts."""
    table: dict[str, Any] = json.loads((MODELS / f"{model}.json").read_text())
    return table


def in_groups(requests: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    return [requests[start : start + size] for start in range(0, len(requests), size)]
