"""How long a process takes from a model in memory to steps at full speed: once with empty caches, once with full ones.

    python -m flarec.bench.serving.first_token --compile

prints seconds from the model to the lowered program, to a prompt's first token and to the first replayed step, which a
compiler has seen, each when it is reached. Weights are random; reading them from a disk is not in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from ..measure import NotMeasured
from .models import ServingSession
from .processes import printed

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLAREC_CACHE_DIR")
LIMIT = 150.0
"""Seconds of a process."""


def measured(session: ServingSession) -> dict[str, dict[str, float]]:
    """Of processes that do what this one would: "cold" with empty caches, "warm" with those of the first.

    Raises `NotMeasured` on a CPU, where no step is replayed.
    """
    if session.device.type != "cuda":
        raise NotMeasured("steps are replayed on a CUDA device alone")

    def measure() -> dict[str, dict[str, float]]:
        words = ["--shape", session.shape, "--device", str(session.device), "--block-size", str(session.block),
                 "--context", str(session.context), *(["--compile"] if session.compile else [])]
        with tempfile.TemporaryDirectory() as folder:
            places = {name: str(Path(folder) / name) for name in CACHES}
            return {name: printed(__name__, words, name, LIMIT, places) for name in ("cold", "warm")}

    return session.measured("first token", measure)


def once(session: ServingSession) -> None:
    _ = session.model
    session.wait()
    start = time.perf_counter()

    def say(name: str) -> None:
        print(json.dumps({name: time.perf_counter() - start}), flush=True)

    engine = session.engine(1)
    say("lowered")
    request = engine.add(session.prompts(1)[0], mode="ar-trust", max_new_tokens=256)
    while not request.tokens:
        engine.step()
    say("first_token")
    while not engine.stats.replays:
        if request.finished:
            raise SystemExit(f"{len(request.tokens)} tokens were made and no step was replayed")
        engine.step()
    say("replayed")


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
    once(session)


if __name__ == "__main__":
    main()
