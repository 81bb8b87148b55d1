"""Check and time the Triton kernels on a GPU: `flarec bench kernels`, for a tree that is not installed.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json --commit $(git rev-parse HEAD)
    python benchmarks/kernels.py --only linear-block --time-limit 120
    python benchmarks/kernels.py --list

The rows and their bars are in flarec/bench/rows.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flarec.bench.rows import select
from flarec.bench.run import TIME_LIMIT, run_kernels
from flarec.errors import UsageError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file, after every row")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this row, or rows that begin so")
    parser.add_argument("--quick", action="store_true", help="only rows with a bar, and shorter timings")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="begin no row after so many seconds")
    parser.add_argument("--commit", help="commit of the tree, where git cannot tell")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    options = parser.parse_args()
    try:
        if options.list:
            for row in select(options.only, quick=options.quick):
                print(f"{row.name:<26}{row.title}")
            return 0
        lines = run_kernels(
            only=options.only, quick=options.quick, out=options.out, commit=options.commit, device=options.device,
            time_limit=options.time_limit, command=" ".join(["python benchmarks/kernels.py", *sys.argv[1:]]),
            say=lambda text: print(text, flush=True),
        )
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    return int(any(line.status == "failed" or line.verdict == "missed" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
