"""The command line that starts vLLM's own server with the classes of this package."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from flarec.checkpoint.manifest import Manifest
from flarec.errors import CheckpointError, UsageError

from .adapter import RANKS, SLOTS
from .checks import is_hybrid, proposal_of
from .proposer import PROPOSER, SCHEDULER, WORKER

SERVER = "vllm.entrypoints.openai.api_server"
"""`vllm serve` is the same but for a build of vLLM for CPUs, where it does not start."""
OURS = ("--model", "--speculative-config", "--worker-cls", "--scheduler-cls", "--host", "--port", "--served-model-name",
        "--api-key", "--dtype")
"""Arguments of vLLM that are made from options of `flarec serve`."""
LORA = ("--enable-lora", "--no-enable-lora", "--lora-modules", "--max-loras", "--max-lora-rank")
"""Those that an adapter on noisy rows takes."""


def command(
    directory: Path, python: str, *, name: str, host: str, port: int, dtype: str | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """The words of the command. directory: a checkpoint. python: the interpreter of the environment that has vLLM.
    extra: arguments for vLLM, the last.

    Raises `CheckpointError` for a checkpoint that cannot draft there, `UsageError` for an argument that is set here.
    """
    adapter = _adapter_arguments(directory)
    for word in extra:
        given = word.split("=", 1)[0]
        if _is_ours(given, (*OURS, *(LORA if adapter else ()))):
            raise UsageError(f"{given} is set by flarec serve; leave it out behind --")
    proposal = proposal_of(directory)
    drafting = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": proposal.width}
    return [
        python, "-m", SERVER, "--model", str(directory), "--served-model-name", name, "--host", host, "--port",
        str(port), "--speculative-config", json.dumps(drafting, separators=(",", ":")), "--worker-cls", WORKER,
        "--scheduler-cls", SCHEDULER, *adapter, *(() if dtype is None else ("--dtype", dtype)),
        # of layers with a state vLLM keeps prefixes in a way that was not tried with drafts, and fails on CPUs
        *(("--no-enable-prefix-caching",) if is_hybrid(directory) else ()), *extra,
    ]


def _is_ours(word: str, ours: Sequence[str]) -> bool:
    """Whether an argument is one of these, or what its parser takes for one: the beginning of a name, or a value in a
    table of it."""
    if word.startswith("-sc"):
        return True
    name = word.partition(".")[0].replace("_", "-")
    return len(name) > 2 and name.startswith("--") and any(one.startswith(name) for one in ours)


def _adapter_arguments(directory: Path) -> tuple[str, ...]:
    """What lets vLLM hold the adapter of a checkpoint. Raises `CheckpointError` for a rank that it has no place for."""
    manifest = Manifest.read(directory)
    if manifest is None or manifest.adapter is None:
        return ()
    rank = next((rank for rank in RANKS if rank >= manifest.adapter.rank), None)
    if rank is None:
        raise CheckpointError(
            f"the adapter of {directory} has rank {manifest.adapter.rank}, and vLLM takes {RANKS[-1]} at most; serve "
            "it with --engine flarec"
        )
    return ("--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(SLOTS))


def check_environment(python: str, directory: Path) -> None:
    """Raise `UsageError` with the reason if another interpreter cannot draft with a checkpoint in vLLM."""
    try:
        done = subprocess.run(
            [python, "-m", "flarec.serve.vllm.checks", str(directory)], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UsageError(f"{python} cannot be run ({error.strerror}); give the Python of vLLM's environment") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        if not lines:
            raise UsageError(f"{python} ended with code {done.returncode}; give the Python of vLLM's environment")
        if "No module named" in lines[-1]:
            raise UsageError(f"{python} has no flarec ({lines[-1]}): install it beside vLLM with pip install flarec")
        raise UsageError(lines[-1])
