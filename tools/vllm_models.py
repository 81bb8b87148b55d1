"""Small trained checkpoints that vLLM on a CPU takes: made once, kept in build/vllm, which git ignores.

    .venv/bin/python tools/vllm_models.py [build/vllm]      # nothing is done twice

vLLM's CPU attention wants heads of 64, its gated delta rule keys and values of 128, so the bundled model does not run
there. These two are trained from random weights on the bundled data with the recipe `draft`, long enough that drafts
are accepted: a llama (0.75 M, converted in float32) and a Qwen3.5 (three layers with the delta rule, one with
attention, 0.97 M, stored in bfloat16). Six minutes on an idle core. Beside each lies `NAME.json`: prompts, what flarec
writes for them with `drafts = "single"`, in how many forwards, and in which version.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny"
MODELS = ROOT / "build" / "vllm"
BLOCK, PROMPTS, NEW_TOKENS = 4, 50, 96
_BASE: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 2, "tie_word_embeddings": True,
}
SETTINGS: dict[str, tuple[str, dict[str, Any], torch.dtype, int]] = {
    "llama": ("Llama", {"num_hidden_layers": 3}, torch.float32, 400),
    "qwen3_5": ("Qwen3_5", {
        "num_hidden_layers": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    }, torch.bfloat16, 260),
}
"""Name -> classes of transformers, what differs from `_BASE`, dtype of the weights, training steps."""


def source(folder: Path, name: str) -> Path:
    """A source model with random weights and the bundled tokenizer; made once."""
    import transformers

    if (folder / "model.safetensors").is_file():
        return folder

    kind, values, dtype, _ = SETTINGS[name]
    config_class = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config_class(**_BASE | values))
    model.to(dtype).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / "model" / file, folder / file)
    return folder


def make(name: str, models: Path = MODELS) -> Path:
    """The converted checkpoint `name`, trained if it is not there yet."""
    return _converted(models / name, source(models / f"{name}-source", name), SETTINGS[name][3])


def make_adapter(models: Path = MODELS) -> Path:
    """An adapter over the model that `llama` became, taken for a source."""
    plain = models / "llama-plain"
    shutil.copytree(models / "llama", plain, dirs_exist_ok=True, ignore=shutil.ignore_patterns(
        "flarec.json", "custom_generate", "README.md", "metrics.jsonl"
    ))
    table = json.loads((plain / "config.json").read_text())
    for key in ("mask_token_id", "block_size", "dual_mode"):
        table.pop(key, None)
    (plain / "config.json").write_text(json.dumps(table))
    return _converted(models / "llama-adapter", plain, 200, "adapter", "adapter.rank=16", "adapter.alpha=16")


def _converted(out: Path, source: Path, steps: int, recipe: str = "draft", *settings: str) -> Path:
    if (out / "flarec.json").is_file():
        return out
    settings += (
        f"diffusion.block_size={BLOCK}", "optimizer.lr=3e-3", "optimizer.batch_rows=4", "optimizer.micro_rows=4"
    )
    command = [
        sys.executable, "-m", "flarec", "convert", source, "--out", out, "--overwrite", "--data",
        TINY / "data" / "train.jsonl", "--recipe", recipe, "--steps", steps, "--max-length", 320,
        *(word for setting in settings for word in ("--set", setting)),
    ]
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT)
    return out


def record(name: str, models: Path = MODELS) -> Path:
    """What flarec itself does with the checkpoint `name`."""
    sys.path.insert(0, str(ROOT))
    import flarec

    path = models / f"{name}.json"
    if path.is_file():
        return path
    model = flarec.load(models / name)
    lines = (TINY / "data" / "test.jsonl").read_text().splitlines()[:PROMPTS]
    prompts = [model.encode(json.loads(line)["messages"][0]["content"], chat=True) for line in lines]
    done = model.generate_ids(prompts, mode="ar-trust", drafts="single", temperature=0, max_new_tokens=NEW_TOKENS)
    path.write_text(json.dumps({
        "prompts": [list(map(int, prompt)) for prompt in prompts], "tokens": [list(one.token_ids) for one in done],
        "forwards": [one.forwards for one in done], "new_tokens": NEW_TOKENS,
    }))
    return path


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else MODELS
    for each in SETTINGS:
        make(each, place)
    make_adapter(place)
    for each in (*SETTINGS, "llama-adapter"):
        record(each, place)
