"""What parameters in parts do to speed and memory of two GPUs beside one: runs of `benchmarks/ranks.py`, in one file.

    python -m benchmarks.ranks_rows --out results.json --commit $(git rev-parse HEAD) [--time-limit 500]

Each run is a launch of its own, in the order of `RUNS`; one that fails, or has no time left, is recorded and the
others go on. On a machine without GPUs: `--shape tiny --length 64`, to see whether the script runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

AGAIN, CUT = ("--memory", "recompute"), ("--shard", "parameters")
RUNS: dict[str, tuple[int, tuple[str, ...], str]] = {
    "flare, one": (1, ("--part", "flare", "--rows", "8", *AGAIN), ""),
    "flare, two, parameters": (2, ("--part", "flare", "--rows", "16", *AGAIN, *CUT), "flare, one"),
    "flare, two, optimizer": (2, ("--part", "flare", "--rows", "16", *AGAIN), "flare, one"),
    "flare, two, the same rows": (2, ("--part", "flare", "--rows", "8", *AGAIN, *CUT), "flare, one"),
    "flare kept, one": (1, ("--part", "flare", "--rows", "8"), ""),
    "flare kept, two, parameters": (2, ("--part", "flare", "--rows", "16", *CUT), "flare kept, one"),
    "adapter, one": (1, ("--part", "adapter", "--rows", "8"), ""),
    "adapter, two, parameters": (2, ("--part", "adapter", "--rows", "16", *CUT), "adapter, one"),
}
"""By name: ranks, arguments, and the run that it is compared with."""
BARS = {"speed": (1.9, True), "peak": (0.75, False), "weights_gradients_moments_gib": (0.55, False)}
"""Of two to one, for full fine-tuning with parameters in parts; True: at least."""


def launched(name: str, folder: Path, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    ranks, words, base = RUNS[name]
    out, known = folder / f"{name}.json", folder / f"{base}.json"
    if base and not known.exists():
        return {"error": f"'{base}' was not measured"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "-m", "benchmarks.ranks", *words, "--shape", options.shape, "--length",
        str(options.length), "--repeats", str(options.repeats), "--out", str(out),
        *(("--against", str(known)) if base else ()),
    ]
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", "FLAREC_CACHE_DIR": "off"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=max(1.0, limit))
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its ranks
        process.communicate()
        return {"error": f"it took more than {limit:.0f} s"}
    if process.returncode or not out.exists():
        lines = [line for line in errors.strip().splitlines() if "Error" in line] or ["no message"]
        return {"error": lines[0][:300]}
    found: dict[str, Any] = json.loads(out.read_text())
    return {key: value for key, value in found.items() if key != "norms"}


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {
        key: f"{value:.3f}, " + ("met" if (value >= bar if more else value <= bar) else "missed")
        for key, (bar, more) in BARS.items() if (value := found.get("against", {}).get(key)) is not None
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--only", action="append", choices=RUNS, default=[])
    parser.add_argument("--shape", default="2B")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run-limit", type=float, default=150.0, help="seconds of one run")
    parser.add_argument("--time-limit", type=float, default=500.0)
    options = parser.parse_args()
    start, results = time.monotonic(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or RUNS:
            left = options.time_limit - (time.monotonic() - start)
            limit = min(options.run_limit, left)
            results[name] = launched(name, Path(folder), options, limit) if left > 0 else {"error": "no time left"}
            told = {"apart": results[name].get("against"), "verdicts": verdicts(results[name])}
            kept = {key: results[name].get(key) for key in ("tokens_per_second", "peak_gib", "shares", "error",
                                                            "weights_gradients_moments_gib")}
            print(f"{time.monotonic() - start:.0f} s: {name}: {json.dumps({**kept, **told})}", flush=True)
            if options.out:
                record = {"what": __doc__.splitlines()[0] if __doc__ else "", "commit": options.commit,
                          "command": shlex.join(["python", "-m", "benchmarks.ranks_rows", *sys.argv[1:]]),
                          "bars": {key: bar for key, (bar, _) in BARS.items()}, "runs": results}
                options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(any("error" in found for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
