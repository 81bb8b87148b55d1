"""Time the capture of every family's smallest model, and of Qwen3.5 shapes on the meta device.

    python benchmarks/capture_times.py [--out results.json] [--repeats 3] [--threads 2]

The targets are 3 s for a small model and 15 s for the 9B shape, wall time, without the program cache. The first
export of a process imports much; it is timed apart (`first`). The fastest of the repeats is reported, and all are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

os.environ["FLAREC_CACHE_DIR"] = "off"

import torch
import transformers
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from flarec.frontend.export import capture
from flarec.frontend.families import FAMILIES, PLAIN
from flarec.frontend.tiny import available, build_tiny

TARGET_SMALL, TARGET_9B = 3.0, 15.0
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_5 2B": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 8,
        "num_key_value_heads": 2, "linear_num_value_heads": 16, "tie_word_embeddings": True,
    },
    "qwen3_5 9B": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 16,
        "num_key_value_heads": 4, "linear_num_value_heads": 32, "tie_word_embeddings": False,
    },
}  # fmt: skip


def timed(model: Any) -> float:
    start = time.perf_counter()
    capture(model)
    return time.perf_counter() - start


def on_meta(name: str) -> Any:
    config = Qwen3_5TextConfig(
        head_dim=256, linear_num_key_heads=16, linear_key_head_dim=128, linear_value_head_dim=128, vocab_size=248320,
        **SHAPES[name],
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen3_5ForCausalLM._from_config(config, dtype=torch.bfloat16)


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the capture of every family.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "device": f"CPU, {options.threads} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "command": f"python benchmarks/capture_times.py --repeats {options.repeats} --threads {options.threads}",
        "commit": commit(),
        "first": timed(build_tiny("qwen3_5_text")),
        "seconds": {},
    }  # fmt: skip
    print(f"first capture of the process: {results['first']:.1f} s")
    small = [name for name in (*FAMILIES, *PLAIN) if available(name)]
    for name in (*small, *SHAPES):
        model = on_meta(name) if name in SHAPES else build_tiny(name)
        times = [timed(model) for _ in range(1 if name in SHAPES else options.repeats)]
        results["seconds"][name] = times
        target = {"qwen3_5 9B": TARGET_9B, "qwen3_5 2B": None}.get(name, TARGET_SMALL)
        verdict = "" if target is None else "  met" if min(times) <= target else f"  MISSED ({target:.0f} s)"
        print(f"{name:<20} {min(times):6.2f} s{verdict}", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
