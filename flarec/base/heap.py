"""The C library's heap: what it does with large blocks that are freed."""

from __future__ import annotations

import ctypes
import os

MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of malloc.h, mallopt(3)."""
LARGE = 4 << 20
"""Bytes from which on a block is given back. Smaller values take more time and hardly less memory, larger ones more
memory (`benchmarks/NOTES.md`)."""


def give_back_large_blocks() -> bool:
    """Let the C library give a freed block of `LARGE` bytes or more back to the system at once; whether it does.

    glibc takes blocks of up to 32 MiB from its heap as soon as one of that size was freed, and keeps what is freed
    there: small objects between freed tensors hold the place. A process in which layers are computed again then has up
    to a third more than its tensors. Giving back costs the system's time for clearing pages. Nothing changes where the
    user chose the threshold (MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES), and with a C library that has no `mallopt`.
    """
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(MMAP_THRESHOLD, LARGE) == 1
