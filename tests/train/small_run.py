"""A small training set-up around the models of `tests.models`: random documents, a short recipe, a trainer."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from flarec.frontend.export import capture
from flarec.ir.program import Program
from flarec.passes import lower
from flarec.recipe import Recipe, load_recipe
from flarec.train.adapter import adapter_of, start_adapter
from flarec.train.data.packing import RowStream
from flarec.train.data.sources import DataStats, TokenSource
from flarec.train.loop import Trainer
from flarec.train.mask_token import MaskToken, choose_mask_token, initialise_mask_token
from flarec.train.quantized_base import quantize_base
from flarec.train.ranks.group import Ranks
from tests.models import TOKENS, tiny_model, tiny_tokenizer

SMALL = [
    "optimizer.lr=3e-3", "optimizer.warmup_steps=0", "optimizer.batch_rows=2", "optimizer.micro_rows=1",
    "data.max_length=32", "diffusion.block_size=3",
]


def recipe(name: str = "dual", *overrides: str) -> Recipe:
    return load_recipe(name).override([*SMALL, *overrides])


def adapter_recipe(*overrides: str) -> Recipe:
    """All-masked causal blocks through an adapter of rank 4 over a frozen model."""
    return recipe("draft", "adapter.rank=4", "adapter.alpha=8", "objective.ar_weight=0", *overrides)


def source(documents: int = 4, seed: int = 0, lengths: range = range(10, 24)) -> TokenSource:
    """Documents of random tokens; all but the first four of each are its response."""
    generator = np.random.default_rng(seed)
    low, high = lengths.start, lengths.stop
    texts = [generator.integers(3, TOKENS, size=generator.integers(low, high)) for _ in range(documents)]
    starts = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    spans = np.array([[4, len(text)] for text in texts], dtype=np.int64)
    tokens = np.concatenate(texts).astype(np.int32)
    index = np.arange(documents + 1, dtype=np.int64)
    return TokenSource(DataStats("random"), 1.0, tokens, starts, spans, index, index[:-1])


class Small:
    """A model, its captured and its training program, and the parameters that it starts with. In bfloat16 the model is
    as transformers loads it: buffers stay as they are. chosen: a recipe whose adapter is in the program."""

    def __init__(
        self,
        family: str,
        choice: str = "auto",
        dtype: torch.dtype = torch.float32,
        chosen: Recipe | None = None,
        **overrides: Any,
    ) -> None:
        self.model = tiny_model(family, **overrides)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.captured = capture(self.model, cache=True)
        self.mask: MaskToken = choose_mask_token(choice, self.model.config, tiny_tokenizer())
        initialise_mask_token(self.mask, self.model, self.captured, tiny_tokenizer())
        adapter = adapter_of(chosen) if chosen is not None else None
        if chosen is not None:
            start_adapter(self.captured, chosen, 0, lambda text: None)
            quantize_base(self.captured, chosen, lambda text: None)
        vector = self.mask.kind == "vector"
        self.program: Program = lower(self.captured, "train", mask_vector=vector, adapter=adapter)
        self.data = source()
        self.start = {name: value.detach().clone() for name, value in self.program.parameters().items()}

    def trainer(
        self, chosen: Recipe, *, seed: int = 0, data: TokenSource | None = None, ranks: Ranks | None = None
    ) -> Trainer:
        """A fresh trainer; the parameters start again, in memory of their own (another trainer may have cut them)."""
        for name, value in self.program.parameters().items():
            value.data = self.start[name].clone()
            value.grad = None
        rows = RowStream([data or self.data], max_length=chosen.data.max_length, seed=seed, lookahead=4)
        return Trainer(self.program, chosen, self.mask, rows, seed, ranks=ranks)


@functools.cache
def small(
    family: str, choice: str = "auto", dtype: torch.dtype = torch.float32, chosen: Recipe | None = None
) -> Small:
    """Made once per session; `trainer` resets it."""
    return Small(family, choice, dtype, chosen)
