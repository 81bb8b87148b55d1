"""vLLM's own parallel drafting, with nothing of flarec: what config.json of a converted checkpoint states is enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests_vllm.conftest import MODELS, answers, record, texts


def test_a_checkpoint_is_its_own_drafter(tmp_path: Path, note: Callable[..., None]) -> None:
    own = record("llama")
    drafting = {
        "method": "draft_model", "model": str(MODELS / "llama"), "num_speculative_tokens": 5, "parallel_drafting": True
    }
    requests = [{"prompt": prompt, "temperature": 0, "max_tokens": 96} for prompt in own["prompts"][:8]]
    found, counts = answers(
        tmp_path, "llama", drafting, {"eight": [requests]}, dtype="float32", max_model_len=512, max_num_seqs=8
    )
    equal = sum(one == other for one, other in zip(texts(found["eight"]), own["tokens"], strict=False))
    note("llama, float32, vLLM's own parallel drafting", prompts=8, equal=equal, **counts["eight"])
    assert equal == 8 and counts["eight"]["num_accepted_tokens"] > 0
