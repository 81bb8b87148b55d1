"""AR-Trust against causal decoding of a real model in bfloat16, near ties apart, on real prompts.

    python examples/real/fetch.py smollm2 out/smollm2
    python examples/real/prompts.py --out out/prompts
    P=out/prompts
    python examples/real/ties.py out/smollm2 --prompts $P/report.jsonl --train $P/train.jsonl --out ties.json

An adapter learns to draft in a few steps on the model's own answers, which is enough to have drafts accepted; then
`flarec verify --dtype bfloat16` continues 200 prompts, greedy and sampled. MODEL may be a GGUF file: it is dequantised.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fetch import dequantise

LIMIT = 300.0
"""Seconds of one command, at most."""


def run(words: Sequence[str]) -> tuple[str, float]:
    """stdout and seconds of a flarec command; its stderr is shown."""
    print("flarec", *words, flush=True)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flarec", *words], stdout=subprocess.PIPE, text=True, check=False, timeout=LIMIT
    )
    if done.returncode not in (0, 1):  # 1: a check failed, which is a result
        raise SystemExit(f"flarec {words[0]} ended with {done.returncode}")
    return done.stdout, time.monotonic() - start


def adapter_of(model: Path, folder: Path, options: argparse.Namespace) -> tuple[Path, float]:
    """An adapter of a few steps, trained on the model's own answers, and the seconds that it took."""
    prompts, out = folder / "train.jsonl", folder / "adapter"
    with options.train.open() as lines:
        prompts.write_text("".join(line for _, line in zip(range(options.answers), lines, strict=False)))
    words = ["convert", str(model), "--prompts", str(prompts), "--recipe", "adapter", "--adapter-only"]
    words += ["--out", str(out), "--steps", str(options.steps), "--device", options.device]
    words += ["--max-length", "512", "--answer-tokens", "192"]
    words += ["--set", "evaluation.every=0", "--set", "optimizer.warmup_steps=2", *(["--chat"] if options.chat else [])]
    _, seconds = run(words)
    return out, seconds


def compare(model: Path, adapter: Path, options: argparse.Namespace) -> dict[str, Any]:
    words = ["verify", str(model), "--adapter", str(adapter), "--dtype", options.dtype, "--device", options.device]
    words += ["--prompts", str(options.prompts), "--json", *(["--chat"] if options.chat else [])]
    output, seconds = run([*words, *(["--quick"] if options.quick else [])])
    (result,) = json.loads(output)
    return {**result, "seconds": round(seconds, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="that are continued")
    parser.add_argument("--train", type=Path, required=True, help="prompts whose answers the adapter learns from")
    parser.add_argument("--answers", type=int, default=64, help="how many of them")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quick", action="store_true", help="20 prompts")
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    import torch
    import transformers

    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), options.model
        if model.suffix == ".gguf":
            model = folder / "model"
            dequantise(options.model, model)
        adapter, seconds = adapter_of(model, folder, options)
        result = compare(model, adapter, options)
    record = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": " ".join(["python examples/real/ties.py", *sys.argv[1:]]), "commit": options.commit,
        "conversion_seconds": round(seconds, 1), "result": result,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
