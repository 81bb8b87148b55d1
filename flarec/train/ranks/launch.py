"""Which rank this process is: what torchrun, accelerate launch and their like put into the environment.

    RANK, WORLD_SIZE             number of this process, from 0, and how many there are
    LOCAL_RANK                   its number on this machine: the GPU that it takes
    MASTER_ADDR, MASTER_PORT     where the ranks meet
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...errors import UsageError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LARGEST_PORT = 65535


@dataclass(frozen=True)
class Launch:
    """One of `size` processes that train together."""

    rank: int
    size: int
    local: int
    host: str
    port: int

    @staticmethod
    def of_environment(environment: Mapping[str, str] | None = None) -> Launch | None:
        """None for a process that was started alone: neither RANK nor WORLD_SIZE is set.

        Raises `UsageError` for a variable that is missing or no such number.
        """
        given = os.environ if environment is None else environment
        if not given.get("RANK") and not given.get("WORLD_SIZE"):
            return None
        size = _number(given, "WORLD_SIZE", 1)
        if size == 1:
            return Launch(0, 1, _number(given, "LOCAL_RANK", 0) if given.get("LOCAL_RANK") else 0, "", 0)
        rank = _number(given, "RANK", 0, size - 1)
        local = _number(given, "LOCAL_RANK", 0, rank)
        return Launch(rank, size, local, _text(given, "MASTER_ADDR"), _number(given, "MASTER_PORT", 1, LARGEST_PORT))

    def device(self, choice: str) -> str:
        """The device of this rank for a choice of the user's. Raises `UsageError` if it has none of its own."""
        if choice == "auto":
            choice = "cuda" if torch.cuda.is_available() else "cpu"
        if not choice.startswith("cuda"):
            return choice
        if self.size > 1 and choice != "cuda":
            raise UsageError(
                f"--device {choice} is one GPU, and each of {self.size} ranks takes the one of its LOCAL_RANK; use "
                "--device cuda"
            )
        visible = torch.cuda.device_count()
        if choice == "cuda" and self.local >= visible:
            raise UsageError(
                f"rank {self.rank} has no GPU: its LOCAL_RANK is {self.local} and {visible} "
                f"{'is' if visible == 1 else 'are'} visible; start one process per GPU, or use --device cpu"
            )
        return f"cuda:{self.local}" if choice == "cuda" else choice


def _text(given: Mapping[str, str], name: str) -> str:
    value = given.get(name, "")
    if not value:
        there = next(other for other in ("RANK", "WORLD_SIZE") if given.get(other))
        raise UsageError(
            f"{there} is set and {name} is not: start with torchrun or accelerate launch, or set {', '.join(NAMES)} "
            "for every process"
        )
    return value


def _number(given: Mapping[str, str], name: str, low: int, high: int | None = None) -> int:
    text = _text(given, name)
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if number < low or (high is not None and number > high):
        allowed = f"{low} to {high}" if high is not None else f"a number from {low}"
        raise UsageError(f"{name} is '{text}' in the environment; it has to be {allowed}")
    return number
