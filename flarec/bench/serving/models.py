"""Models with random weights in the shapes that are measured, and the program that decodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flarec.decode import Engine
from flarec.decode.graphs import CudaReplays, PlainReplays
from flarec.decode.stores import Shelf, Static
from flarec.errors import UsageError
from flarec.frontend.export import capture
from flarec.ir.compiled import compiled_by_region, reading_codes, step_codes
from flarec.ir.program import Program
from flarec.passes import lower

from ..baselines import check_library, release
from ..session import Session
from ..shapes import SHAPES, build

TURNS = 2
"""Medians of a step, of which the lowest counts: what else runs on the host makes steps slower, never faster."""


class ServingSession(Session):
    """A run over one model. block = noisy positions per block, context = tokens of a prompt, steps = timed ones;
    compile = whether steps are compiled by region; library = a folder with flash-linear-attention, for the stock model
    alone, which then runs in a process of its own."""

    def __init__(
        self, device: torch.device, shape: str, *, block: int = 3, context: int = 512, steps: int = 200,
        budget_ms: float = 100, compile: bool = False, library: Path | None = None,
    ) -> None:
        super().__init__(device, budget_ms=budget_ms)
        check_library(library)
        self.library = library
        if shape not in SHAPES:
            raise UsageError(f"unknown shape {shape}; choose {', '.join(SHAPES)}")
        self.shape = shape
        self.block = block
        self.context = context
        self.steps = steps
        self.compile = compile
        self.on_gpu = device.type == "cuda"

    @property
    def settings(self) -> dict[str, Any]:
        return {"shape": self.shape, "block": self.block, "context": self.context, "steps": self.steps,
                "compile": self.compile, "library": release(self.library)}

    @property
    def model(self) -> Any:
        """The transformers model: bfloat16 on a GPU, float32 elsewhere."""
        return self.measured("model", self._build)

    def _build(self) -> Any:
        return build(self.shape, self.device, torch.bfloat16 if self.on_gpu else torch.float32)

    @property
    def program(self) -> Program:
        kernels = "triton" if self.on_gpu else "torch"
        return self.measured("program", lambda: lower(
            capture(self.model, cache=True), "decode", kernels=kernels, fast=self.compile, regions=self.compile
        ))

    @property
    def vocabulary(self) -> int:
        return SHAPES[self.shape]["vocab_size"]

    def engine(
        self, slots: int, *, graphs: str = "auto", kind: type[Engine] = Engine, dynamic: bool = False
    ) -> Engine:
        """dynamic: steps are compiled once for any size, as what reads prompts is, and not for the first ones by
        themselves: kinds of steps then take no compilation of their own."""
        mask, make = self.vocabulary - 1, self.reader if dynamic else self._compiled
        return kind(
            self.program, mask_token_id=mask, block_size=self.block, eos_ids=(), max_positions=1 << 20, slots=slots,
            readouts={"ar-trust": "causal", "diffusion-trust": "block_end"}, suppress=(mask,), graphs=graphs,
            static=Static(make, read=self.reader) if self.compile and graphs == "auto" else None,
        )

    def reading_engine(self, slots: int, *, early: bool) -> Engine:
        """Reads prompts as an engine reads its first ones, or as it does after many, which is compiled if steps are.
        Its own steps are graphs that are not compiled."""
        engine = self.engine(slots)
        static = None if early or not self.compile else Static(lambda program: program, read=self.reader, read_after=0)
        if self.on_gpu:
            engine.shelf = Shelf(lambda: CudaReplays(self.device), static)
        elif static is not None:
            engine.shelf = Shelf(PlainReplays, static)
        return engine

    def _compiled(self, program: Any) -> Program:
        """One for all engines: what was compiled is not compiled again."""
        return self.measured("compiled", lambda: compiled_by_region(program, step_codes()))

    def reader(self, program: Any) -> Program:
        """What reads prompts once there were many."""
        if not self.compile:
            return self.program
        return self.measured("reader", lambda: compiled_by_region(program, reading_codes()))

    def prompts(self, requests: int, tokens: int | None = None) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        size = (requests, self.context if tokens is None else tokens)
        ids: list[list[int]] = torch.randint(0, self.vocabulary - 8, size, generator=generator).tolist()
        return ids

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
