"""`flarec serve --engine vllm`: the command line that it prints and becomes. Nothing here needs vLLM."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flarec import threads
from flarec.cli import main
from flarec.serve.vllm import command
from flarec.serve.vllm.proposer import PROPOSER, SCHEDULER, WORKER
from tests.serve.vllm_checkpoints import written


def served(*words: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(main, ["serve", *map(str, words)], env=environment)


def test_the_command(tmp_path: Path) -> None:
    path = written(tmp_path / "mine")
    done = served(path, "--engine", "vllm", "--dry-run", "--python", "py thon", "--port", "8123", "--dtype", "float32",
                  "--", "--max-model-len", "512")
    assert done.exit_code == 0, done.output
    drafting = json.dumps({"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 8},
                          separators=(",", ":"))
    assert shlex.split(done.stdout) == [
        "py thon", "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--served-model-name", "mine",
        "--host", "127.0.0.1", "--port", "8123", "--speculative-config", drafting, "--worker-cls", WORKER,
        "--scheduler-cls", SCHEDULER, "--dtype", "float32", "--max-model-len", "512",
    ]


def test_a_key_is_not_in_the_command_and_that_is_said(tmp_path: Path) -> None:
    done = served(written(tmp_path / "mine"), "--engine", "vllm", "--dry-run", "--api-key", "secret")
    assert done.exit_code == 0 and "secret" not in done.output and "VLLM_API_KEY" in done.stderr


def test_a_hybrid_keeps_no_prefixes(tmp_path: Path) -> None:
    path = written(tmp_path / "mine", "qwen3_5_text")
    words = shlex.split(served(path, "--engine", "vllm", "--dry-run", "--served-model-name", "x").stdout)
    assert words[-1] == "--no-enable-prefix-caching" and words[0] == sys.executable


@pytest.mark.parametrize(("words", "said"), [
    (["--engine", "vllm", "--max-queue", "1024"], "--max-queue is for flarec's own engine"),
    (["--engine", "vllm", "--prefix-cache", "3"], "--prefix-cache is for"),
    (["--engine", "vllm", "--device", "cpu"], "--device is for"),
    (["--engine", "vllm", "--adapter", "there"], "--adapter is for"),
    (["--engine", "vllm", "--block-size", "4"], "--block-size is for"),
    (["--engine", "vllm", "--dry-run", "--", "--speculative-config", "{}"], "--speculative-config is set by flarec"),
    (["--engine", "vllm", "--dry-run", "--", "--worker_cls=a.B"], "--worker_cls is set by flarec"),
    (["--engine", "vllm", "--dry-run", "--", "--speculative-config.method=x"], "is set by flarec"),
    (["--engine", "vllm", "--dry-run", "--", "--po", "3"], "--po is set by flarec"),  # its parser takes beginnings
    (["--engine", "vllm", "--dry-run", "--", "--served_model=x"], "--served_model is set by flarec"),
    (["--engine", "vllm", "--python", "false"], "false ended with code 1; give"),
    (["--engine", "vllm", "--python", "no-such-python"], "no-such-python cannot be run"),
    (["--engine", "vllm"], "vLLM is not installed beside"),
    (["--", "--max-model-len", "512"], "--max-model-len behind the checkpoint"),
    (["more"], "more behind the checkpoint"),
    (["--dry-run"], "--dry-run is for --engine vllm"),
    (["--engine", "flarec", "--python", "p"], "--python is for --engine vllm"),
])
def test_refused_by_name(tmp_path: Path, words: list[str], said: str) -> None:
    done = served(written(tmp_path / "mine"), *words)
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.output


def test_a_python_without_flarec(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"python: No module named 'flarec'\" >&2\nexit 1\n")
    python.chmod(0o755)
    done = served(written(tmp_path / "mine"), "--engine", "vllm", "--python", python)
    assert done.exit_code == 2 and "has no flarec" in done.stderr


def test_it_becomes_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is in the environment, where no list of processes shows it; what flarec put there for itself is not."""
    became: list[Any] = []
    monkeypatch.setattr(command, "check_environment", lambda python, directory: became.append(directory))
    monkeypatch.setattr(os, "execvpe", lambda *arguments: became.append(arguments))
    monkeypatch.setattr(threads, "_added", frozenset({"OMP_WAIT_POLICY"}))
    path = written(tmp_path / "mine")
    done = served(path, "--engine", "vllm", FLAREC_API_KEY="secret", OMP_WAIT_POLICY="PASSIVE")
    assert done.exit_code == 0, done.output
    checked, (file, words, environment) = became
    assert (checked, file) == (path, sys.executable) and words[:3] == [file, "-m", command.SERVER]
    assert environment["VLLM_API_KEY"] == "secret" and "OMP_WAIT_POLICY" not in environment
    assert "secret" not in done.output and shlex.split(done.stderr.strip()) == words
