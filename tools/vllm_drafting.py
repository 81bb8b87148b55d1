"""Does an unmodified vLLM draft with a converted checkpoint? Its own parallel drafting against plain vLLM, greedy.

    .venv/bin/python tools/vllm_drafting.py .venv-vllm

Writes a small softmax checkpoint (random weights, so drafts are wrong nearly always: what is compared are the texts),
and lets vLLM of another environment generate twice: as the plain model that the checkpoint is, and with the checkpoint
as its own drafter, by what its config.json states. Exit code 1 if the tokens differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from flarec.checkpoint.directory import open_checkpoint  # noqa: E402
from flarec.checkpoint.write import write_checkpoint  # noqa: E402
from tests.checkpoints import manifest_for  # noqa: E402
from tests.models import tiny_checkpoint  # noqa: E402

BLOCK = 4
RUN = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    path, out, drafting = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    llm = LLM(path, dtype="float32", max_model_len=512, enforce_eager=True, speculative_config=drafting, seed=0,
              max_num_seqs=8, kv_cache_memory_bytes=64 << 20)
    prompts = [{"prompt_token_ids": [5 + i, 7, 9 + i]} for i in range(8)]
    done = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    open(out, "w").write(json.dumps([list(one.outputs[0].token_ids) for one in done]))

if __name__ == "__main__":
    main()
"""
# Threads are not bound to cores that others use.
SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def checkpoint(folder: Path) -> Path:
    """A llama that vLLM's CPU attention takes: heads of 64."""
    source = tiny_checkpoint(
        folder / "source", "llama", hidden_size=128, num_attention_heads=2, num_key_value_heads=2, head_dim=64
    )
    opened = open_checkpoint(source)
    model, tokenizer = opened.load_model(torch.float32), opened.load_tokenizer()
    return write_checkpoint(folder / "converted", model, tokenizer, manifest_for(source, "row", BLOCK))


def generated(python: Path, path: Path, out: Path, drafting: dict[str, Any] | None) -> list[list[int]]:
    script = out.with_suffix(".py")  # vLLM starts processes that import it
    script.write_text(RUN)
    subprocess.run(
        [python, script, path, out, json.dumps(drafting)], check=True, env={**os.environ, **SETTINGS}, cwd=out.parent
    )
    tokens: list[list[int]] = json.loads(out.read_text())
    return tokens


def main() -> None:
    python = Path(sys.argv[1]).absolute() / "bin" / "python"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = checkpoint(folder)
        drafting = {
            "method": "draft_model", "model": str(path), "num_speculative_tokens": BLOCK + 1, "parallel_drafting": True
        }
        plain = generated(python, path, folder / "plain.json", None)
        drafted = generated(python, path, folder / "drafted.json", drafting)
    equal = sum(one == other for one, other in zip(plain, drafted, strict=True))
    print(f"{equal} of {len(plain)} texts are those of plain vLLM")
    sys.exit(equal != len(plain))


if __name__ == "__main__":
    main()
