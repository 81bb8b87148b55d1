"""Devices and dtypes by the names that users give."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import torch

from .errors import UsageError


def torch_device(device: torch.device | str) -> torch.device:
    """The device of that name, "auto" resolved. Raises `UsageError` for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"device '{device}' cannot be used ({first}); choose cpu, or auto") from None
    return place


def resolve_kernels(kernels: str, device: torch.device) -> str:
    """The implementation of the token mixers that "auto" stands for: triton on a CUDA device, torch elsewhere."""
    if kernels != "auto":
        return kernels
    return "triton" if device.type == "cuda" else "torch"


COMPILE = ("auto", "on", "off")


def resolve_compile(choice: str, device: torch.device) -> bool:
    """Whether what lies between mixers is compiled; "auto": on a CUDA device where Triton is installed. Raises
    `UsageError` for an unknown choice."""
    if choice not in COMPILE:
        raise UsageError(f"unknown compile '{choice}'; choose {', '.join(COMPILE[:-1])} or {COMPILE[-1]}")
    if choice != "auto":
        return choice == "on"
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating dtype of that name. Raises `UsageError` for an unknown one."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype '{dtype}' is unknown; choose float32, bfloat16, float16 or float64")
    return found


def memory_of(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that a process may use on a device: a GPU's own; of a machine its memory, or what its control group may
    use. None where nothing says it. root: of /proc and /sys."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [*_stated(root / "proc" / "meminfo", "MemTotal").values()]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            limits.append(int((root / "sys" / "fs" / "cgroup" / name).read_text()))
    return min(limits) if limits else None


def resident(status: Path = Path("/proc/self/status")) -> tuple[int, int]:
    """Bytes of main memory that this process has now, and the most that it had; (0, 0) where nothing says it."""
    found = _stated(status, "VmRSS", "VmHWM")
    return found.get("VmRSS", 0), found.get("VmHWM", 0)


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that a process may take now in addition: of a GPU what is free or cached by torch; of a machine what is
    available, or what is left to its control group. None where nothing says it. root: of /proc and /sys."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    left = [*_stated(root / "proc" / "meminfo", "MemAvailable").values()]
    group = root / "sys" / "fs" / "cgroup"
    for limit, used, files in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            most, now = (int((group / name).read_text()) for name in (limit, used))
            lines = (group / limit).with_name("memory.stat").read_text().splitlines()
            given_way = [int(line.split()[1]) for line in lines if line.split()[:1] == [files]]
            left.append(max(0, most - now + sum(given_way)))  # files in the cache give way
    return min(left) if left else None


def _stated(path: Path, *names: str) -> dict[str, int]:
    """Bytes of the lines `NAME: 12 kB` of a file, by name; those that it does not have are left out."""
    found = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in names:
                found[name] = 1024 * int(value.split()[0])
    return found
