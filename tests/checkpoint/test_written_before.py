"""A checkpoint that an earlier tree wrote (commit 75426b3, `flarec convert` of the tiny lfm2, recipe dual, 2 steps)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from flarec.api import load
from flarec.checkpoint.directory import open_checkpoint

WRITTEN = Path(__file__).parent / "written_at_75426b3"
PROMPT = "w3 w4"
# What that tree generated: 12 tokens, temperature 0.8, seed 5, float32.
TOKENS = {
    "causal": [195, 44, 397, 39, 123, 202, 493, 360, 102, 118, 309, 428],
    "ar-trust": [195, 44, 397, 39, 123, 202, 493, 360, 102, 118, 309, 428],
    "diffusion-trust": [195, 44, 397, 221, 123, 202, 355, 357, 102, 147, 309, 479],
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Apart from the repository, whose tools may touch files."""
    return Path(shutil.copytree(WRITTEN, tmp_path_factory.mktemp("before") / "checkpoint"))


def test_it_opens_and_generates_what_it_did(copied: Path) -> None:
    manifest = open_checkpoint(copied).manifest
    assert manifest is not None and manifest.pipelines["decode"].startswith("canonicalize()")
    model = load(copied)
    for mode, tokens in TOKENS.items():
        output = model.generate(PROMPT, mode=mode, max_new_tokens=12, temperature=0.8, seed=5)
        assert list(output.token_ids) == tokens, mode


def test_plain_transformers_opens_it(copied: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(copied, output_loading_info=True, trust_remote_code=False)
    assert not info["missing_keys"] and not info["unexpected_keys"] and type(model).__name__ == "Lfm2ForCausalLM"
