"""What a trial needs beside a model: a tokenizer, two documents that can be memorised, prompts."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from flarec.frontend.tiny import END_ID, PAD_ID
from flarec.recipe import Recipe, load_recipe
from flarec.train.data.packing import RowStream
from flarec.train.data.sources import DataStats, TokenSource

TOKENS = 300
"""Words of the tokenizer: fewer than a small model has rows, so that the mask token finds a spare one."""
BLOCK_SIZE = 3
STEPS = 10
_RECIPE = [
    "name=memorise", "optimizer.lr=3e-3", "optimizer.warmup_steps=0", f"optimizer.steps={STEPS}",
    "optimizer.batch_rows=2", "optimizer.micro_rows=1", "data.max_length=32", f"diffusion.block_size={BLOCK_SIZE}",
    # every block is all masked: its loss does not depend on a draw of mask rates, and steps can be compared
    "diffusion.mask=all", "diffusion.views=1", "diffusion.second.probability=0.5", "diffusion.second.loss=ce",
]


def recipe() -> Recipe:
    """Both readouts, all masked, cross entropy."""
    return load_recipe("flare").override(_RECIPE)


def tokenizer() -> Any:
    """One word per id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(TOKENS)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="w3", pad_token=f"w{PAD_ID}", eos_token=f"w{END_ID}", model_max_length=1024
    )


def rows(chosen: Recipe, seed: int = 0) -> RowStream:
    """Two documents of 24 random tokens, 20 of them the response: one step's batch, again and again."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(3, TOKENS, size=48).astype(np.int32)
    source = TokenSource(
        DataStats("random"), 1.0, tokens, np.array([0, 24, 48]), np.array([[4, 24], [4, 24]]), np.arange(3),
        np.arange(2),
    )
    return RowStream([source], max_length=chosen.data.max_length, seed=seed, lookahead=2)


def prompts(seed: int = 0) -> list[list[int]]:
    """Three prompts of different lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(3, TOKENS) for _ in range(length)] for length in (5, 9, 2)]
