"""An adapter on noisy rows, by vLLM's own LoRA: the text stays that of the model, and its drafts are accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests_vllm.conftest import Answers, answers, in_groups, record, texts


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, dict[str, Any]]:
    each = [{"prompt": prompt, "temperature": 0, "max_tokens": 96} for prompt in record("llama-adapter")["prompts"]]
    folder: Path = tmp_path_factory.mktemp("adapter")
    return answers(
        folder, "llama-adapter", True, {"alone": in_groups(each, 1), "eight": in_groups(each, 8)}, dtype="float32",
        max_model_len=512, max_num_seqs=8, enable_lora=True, max_lora_rank=16, max_loras=2,
    )


def test_texts_are_those_of_the_model(drafted: tuple[Answers, dict[str, Any]], note: Callable[..., None]) -> None:
    own, source = record("llama-adapter")["tokens"], record("llama")["tokens"]
    assert own == source  # flarec's own, with and without the adapter
    for name in ("alone", "eight"):
        equal = sum(one == other for one, other in zip(texts(drafted[0][name]), source, strict=True))
        note("llama with an adapter on noisy rows, float32", **{f"equal_{name}": equal})
        assert equal == 50


def test_tokens_per_forward(drafted: tuple[Answers, dict[str, Any]], note: Callable[..., None]) -> None:
    """An adapter that is not applied, or to other rows, would draft what nobody accepts."""
    own, counts = record("llama-adapter"), drafted[1]["alone"]
    tokens = sum(map(len, own["tokens"]))
    ours, theirs = tokens / (50 + counts["num_drafts"]), tokens / sum(own["forwards"])
    note("llama with an adapter on noisy rows, float32", tokens_per_forward=ours,
         tokens_per_forward_flarec_single=theirs, ratio=ours / theirs)
    assert theirs > 1.5 and ours / theirs >= 0.95
