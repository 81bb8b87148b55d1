"""Look for a fault of ptxas in compiled Triton kernels: `python tools/compiled_code.py [DIRECTORY...]`.

ptxas 12.8 (Triton 3.6), where it runs out of uniform registers for the addresses of tensor core operands, takes R1, the
stack pointer, for one of them: the kernel reads shared memory out of bounds (benchmarks/NOTES.md, "A compiler trap").
Compiled code shows it: R1 is a number there, not just the base of a memory access. Needs the nvdisasm that comes with
Triton. DIRECTORY: Triton caches, by default the user's.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(.*?)\s*;")
ADDRESS = re.compile(r"\[[^\]]*\]")
SETS_UP_THE_STACK = re.compile(r"(LDC|MOV|IMAD\.MOV\.U32) R1, |(IADD3|VIADD) R1, R1, ")


def nvdisasm() -> Path:
    found = find_spec("triton")
    if found is None or not found.submodule_search_locations:
        sys.exit("Triton is not installed; run this where kernels were compiled")
    return Path(found.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "nvdisasm"


def stack_pointer_as_number(assembly: str) -> Iterator[str]:
    """Instructions of `nvdisasm -c` output that compute with R1."""
    for line in assembly.splitlines():
        found = INSTRUCTION.search(line)
        if found is None:
            continue
        operands = ADDRESS.sub("[]", found[1])
        if re.search(r"\bR1\b", operands) and not SETS_UP_THE_STACK.match(operands):
            yield found[1]


def faults(cubin: Path, tool: Path) -> list[str]:
    done = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True)
    return list(stack_pointer_as_number(done.stdout))


def scan(directories: Iterable[Path]) -> int:
    """How many compiled kernels are faulty; prints them."""
    cubins = sorted(path for directory in directories for path in directory.rglob("*.cubin"))
    tool = nvdisasm()
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda cubin: faults(cubin, tool), cubins))
    faulty = [(cubin, lines) for cubin, lines in zip(cubins, found, strict=True) if lines]
    for cubin, lines in faulty:
        print(f"{cubin}: {len(lines)} instructions, the first: {lines[0]}")
    print(f"{len(cubins)} compiled kernels, {len(faulty)} faulty")
    return len(faulty)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path, default=[Path.home() / ".triton" / "cache"])
    return int(scan(parser.parse_args().directories) > 0)


if __name__ == "__main__":
    sys.exit(main())
