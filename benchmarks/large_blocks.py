"""What it costs and saves that glibc gives freed blocks back to the system (`flarec/base/heap.py`).

    python benchmarks/large_blocks.py --out benchmarks/results/large-blocks-cpu.json

For each size from which blocks are given back (0: glibc as it is) a process takes three optimizer steps and says the
most that it had resident, and the processor time of the last two steps, by itself and by the system for it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from flarec.base.heap import MMAP_THRESHOLD
from flarec.device import resident

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.doctor_memory import BATCH, SHAPES, trainer_of

CASES = (("kimi_linear", "flare", "1024", "recompute"), ("qwen3_5_text", "draft", "1024", "recompute"))
MIB = (0, 1, 4, 16)


def measured(family: str, recipe: str, length: str, memory: str, mib: str) -> dict[str, float]:
    """Of this process: peak_bytes, and seconds of the last two of three steps."""
    trainer = trainer_of(family, recipe, int(length), memory, "512")
    if int(mib):
        assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, int(mib) << 20) == 1
    trainer.advance()
    before = resource.getrusage(resource.RUSAGE_SELF)
    trainer.advance()
    trainer.advance()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "peak_bytes": resident()[1], "own_seconds": after.ru_utime - before.ru_utime,
        "system_seconds": after.ru_stime - before.ru_stime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("case", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        print(json.dumps(measured(*options.case)))
        return
    rows = []
    for case in CASES:
        for mib in MIB:
            command = [sys.executable, str(Path(__file__).resolve()), *case, str(mib)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"case": " ".join(case), "mib": mib, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(_record(rows), indent=1) + "\n")


def _record(rows: list[dict[str, object]]) -> dict[str, object]:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "glibc": platform.libc_ver()[1]}
    return {
        "device": f"{platform.machine()} CPU, 1 thread, a busy machine", "commit": done.stdout.strip(),
        "versions": versions,
        "command": "python benchmarks/large_blocks.py", "shape": SHAPES["512"], "rows_at_a_time": BATCH, "rows": rows,
    }


if __name__ == "__main__":
    main()
