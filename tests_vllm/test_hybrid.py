"""A model with the gated delta rule in bfloat16. vLLM rounds elsewhere than transformers: gaps are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests_vllm.conftest import MODELS, Answers, answers, in_groups, record, texts

ENGINE = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 8, "enable_prefix_caching": False}
GAP = 0.1


def run(folder: Any, drafting: bool) -> tuple[Answers, dict[str, Any]]:
    each = [{"prompt": prompt, "temperature": 0, "max_tokens": 96} for prompt in record("qwen3_5")["prompts"]]
    rounds = {"alone": in_groups(each, 1), "eight": in_groups(each, 8)}
    return answers(folder, "qwen3_5", drafting, rounds, **ENGINE)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, dict[str, Any]]:
    return run(tmp_path_factory.mktemp("plain"), False)


@pytest.fixture(scope="session")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, dict[str, Any]]:
    return run(tmp_path_factory.mktemp("drafted"), True)


def gaps(written: list[list[int]]) -> list[float]:
    """By how much each token of some texts misses the largest logit of transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODELS / "qwen3_5", dtype=torch.float32).eval()
    mask, found = model.config.mask_token_id, []
    for prompt, text in zip(record("qwen3_5")["prompts"], written, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text[:-1]]])).logits[0, len(prompt) - 1 :]
        logits[:, mask] = -torch.inf
        found += (logits.amax(-1) - logits.gather(-1, torch.tensor(text)[:, None])[:, 0]).tolist()
    return found


@pytest.mark.parametrize("name", ["alone", "eight"])
def test_every_token_is_the_likeliest_up_to_rounding(
    plain: tuple[Answers, dict[str, Any]], drafted: tuple[Answers, dict[str, Any]], note: Callable[..., None], name: str
) -> None:
    for kind, found in (("plain", plain), ("drafted", drafted)):
        written = texts(found[0][name])
        missed = gaps(written)
        note("qwen3_5, bfloat16", **{f"{kind}_{name}": {
            "tokens": len(missed), "likeliest": sum(gap == 0 for gap in missed), "largest_gap": max(missed)
        }})
        assert len(missed) > 3000 and max(missed) <= GAP, (kind, max(missed))


def test_tokens_per_forward(drafted: tuple[Answers, dict[str, Any]], note: Callable[..., None]) -> None:
    own, counts = record("qwen3_5"), drafted[1]["alone"]
    tokens = len([token for text in texts(drafted[0]["alone"]) for token in text])
    ours = tokens / (50 + counts["num_drafts"])
    theirs = sum(map(len, own["tokens"])) / sum(own["forwards"])
    note("qwen3_5, bfloat16", tokens_per_forward=ours, tokens_per_forward_flarec_single=theirs, ratio=ours / theirs)
    assert ours / theirs >= 0.95
