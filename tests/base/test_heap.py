"""Large blocks that are freed go back to the system, although small objects lie behind them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import ctypes, sys
from flarec.base.heap import LARGE, give_back_large_blocks

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def block(size):
    place = libc.malloc(size)
    ctypes.memset(place, 1, size)
    return place

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

chosen = "default" not in sys.argv and give_back_large_blocks()
libc.free(block(2 * LARGE))  # from now on the heap serves blocks of this size, by default
pairs = [(block(LARGE), block(100_000)) for _ in range(8)]
before = resident()
for large, _ in pairs:
    libc.free(large)
print(chosen, round((before - resident()) / LARGE))
"""
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
GLIBC = "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")


@pytest.mark.skipif(not GLIBC, reason="another C library")
@pytest.mark.parametrize(("argument", "own", "said"), [
    ("", {}, "True 8"),
    ("default", {}, "False 0"),
    ("", {"MALLOC_MMAP_THRESHOLD_": str(1 << 25)}, "False 0"),
    ("", {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={1 << 25}"}, "False 0"),
])
def test_large_blocks_are_given_back(argument: str, own: dict[str, str], said: str) -> None:
    command = [sys.executable, "-c", CODE, argument]
    run = subprocess.run(command, env=PLAIN | own, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == said
