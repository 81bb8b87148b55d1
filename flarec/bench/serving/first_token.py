"""How long a process takes from a model in memory to steps at full speed: once with empty caches, once with full ones.

    python -m flarec.bench.serving.first_token --shape tiny --device cpu --compile

prints seconds from the model to the lowered program, to a prompt's first token and to the first replayed step, which a
compiler has seen. Weights are random; reading them from a disk is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from flarec.errors import FlarecError

from .models import ServingSession

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLAREC_CACHE_DIR")


def measured(session: ServingSession) -> dict[str, dict[str, float]]:
    """Of processes like this session: "cold" with empty caches, "warm" with those of the first."""

    def measure() -> dict[str, dict[str, float]]:
        command = [sys.executable, "-m", __name__, "--shape", session.shape, "--device", str(session.device),
                   "--block-size", str(session.block), "--context", str(session.context)]
        with tempfile.TemporaryDirectory() as folder:
            places = {name: str(Path(folder) / name) for name in CACHES}
            found = {}
            for name in ("cold", "warm"):
                done = subprocess.run(
                    [*command, *(["--compile"] if session.compile else [])], env=os.environ | places, text=True,
                    capture_output=True,
                )
                if done.returncode:
                    raise FlarecError(f"the {name} process failed: {(done.stderr.strip().splitlines() or [''])[-1]}")
                found[name] = json.loads(done.stdout.splitlines()[-1])
        return found

    return session.measured("first token", measure)


def once(session: ServingSession) -> dict[str, float]:
    _ = session.model
    session.wait()
    start = time.perf_counter()
    engine = session.engine(1)
    lowered = time.perf_counter()
    request = engine.add(session.prompts(1)[0], mode="ar-trust", max_new_tokens=256)
    while not request.tokens:
        engine.step()
    first = time.perf_counter()
    while not engine.stats.replays:
        engine.step()
    times = {"lowered": lowered, "first_token": first, "replayed": time.perf_counter()}
    return {name: end - start for name, end in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--block-size", type=int, default=3)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    session = ServingSession(
        torch.device(given.device), given.shape, block=given.block_size, context=given.context, compile=given.compile
    )
    print(json.dumps(once(session)))


if __name__ == "__main__":
    main()
