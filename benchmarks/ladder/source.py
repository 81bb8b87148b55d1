"""The source model of the ladder: a hybrid in the style of Qwen3.5, trained from scratch on texts and tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig

import flarec
from flarec.train.progress import ConsoleReporter

SHAPES: dict[str, dict[str, int]] = {
    "30M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64, "linear_num_key_heads": 8, "linear_num_value_heads": 8,
            "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "toy": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
SPARE = 64
"""Rows of the embedding beyond the tokenizer's: one becomes the mask token."""
TASKS_SHARE = 0.35
"""Of the trained tokens, those of tasks."""


AGAIN = 30.0
"""Seconds that beginning anew takes: texts are read again."""


class TooSlow(Exception):
    """So many steps take longer than there is time for; `steps` would not."""

    def __init__(self, steps: int) -> None:
        super().__init__(f"{steps} steps fit into the time")
        self.steps = steps


class Watched(ConsoleReporter):
    """Raises `TooSlow` after `LOOK` steps if all of them would not end in time. seconds: from now on."""

    LOOK = 60

    def __init__(self, steps: int, seconds: float) -> None:
        super().__init__()
        self.steps, self.latest, self.looked = steps, time.monotonic() + seconds, False

    def step(self, values: Mapping[str, Any]) -> None:
        """As `Reporter.step`."""
        super().step(values)
        left, rest = values.get("seconds_left"), self.steps - values["step"]
        if self.looked or left is None or values["step"] < self.LOOK or rest < 1:
            return
        self.looked = True
        until = self.latest - time.monotonic()
        if left > until:
            raise TooSlow(max(self.LOOK, int((until - AGAIN) * rest / left)))


def train_source(
    data: Path, out: Path, *, shape: str, steps: int, rows: int, length: int, device: str, seed: int,
    part: str = "train", seconds: float,
) -> dict[str, Any]:
    """Train `out/source`, a plain directory of transformers in bfloat16. Autoregressive training is a conversion
    without diffusion loss: the same kernels, optimizer and packing as those of the arms. In fewer steps if these take
    longer than `seconds`: the schedule has to end."""
    watched = Watched(steps, seconds)
    try:
        return _train(data, out, shape, steps, rows, length, device, seed, part, watched)
    except TooSlow as slow:
        print(f"{slow} instead of {steps}", flush=True)
        return _train(data, out, shape, slow.steps, rows, length, device, seed, part, ConsoleReporter())


def _train(
    data: Path, out: Path, shape: str, steps: int, rows: int, length: int, device: str, seed: int, part: str,
    reporter: ConsoleReporter,
) -> dict[str, Any]:
    start = time.perf_counter()
    blank = out / "blank"
    model = _blank(data, blank, shape, seed)
    built = time.perf_counter()
    trained = flarec.convert(
        blank, mix(data, part), recipe="draft", out=out / "trained", device=device, seed=seed, overwrite=True,
        reporter=reporter,
        overrides=[
            "objective.diffusion_weight=0", f"optimizer.steps={steps}", f"optimizer.batch_rows={rows}",
            f"optimizer.micro_rows={rows}", "optimizer.lr=2e-3", "optimizer.schedule=cosine",
            f"optimizer.warmup_steps={max(1, steps // 20)}", "optimizer.weight_decay=0.05",
            "optimizer.betas=[0.9,0.95]",
            f"data.max_length={length}", "evaluation.every=0", f"save.every={steps + 1}", "train.compile=off",
            "train.memory=keep",
        ],
    )
    finished = time.perf_counter()
    # the configuration of the untrained model: that of a conversion says that it is one
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(trained, trust_remote_code=False).state_dict())
    model.to(torch.bfloat16).save_pretrained(out / "source")
    AutoTokenizer.from_pretrained(data / "tokenizer", trust_remote_code=False).save_pretrained(out / "source")
    return {
        "shape": shape, "parameters": sum(value.numel() for value in model.parameters()), "steps": steps, "rows": rows,
        "length": length, "data": part, "tasks_share": TASKS_SHARE, "seed": seed,
        "build_seconds": round(built - start, 1),
        "train_seconds": round(finished - built, 1), "seconds": round(time.perf_counter() - start, 1),
    }


def mix(data: Path, part: str) -> list[str]:
    """Texts and tasks that are trained on, with their shares. part: "train", or "arms"."""
    files = [data / f"{kind}-{part}.jsonl.gz" for kind in ("text", "tasks")]
    return [f"{file}:{share:g}" for file, share in zip(files, (1 - TASKS_SHARE, TASKS_SHARE), strict=True)]


def _blank(data: Path, folder: Path, shape: str, seed: int) -> Any:
    """Random weights on disk, with the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer", trust_remote_code=False)
    sizes = SHAPES[shape]
    quarter = sizes["head_dim"] // 4
    config = Qwen3_5TextConfig(
        vocab_size=len(tokenizer) + SPARE, tie_word_embeddings=True, max_position_embeddings=4096,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * (sizes["num_hidden_layers"] // 4),
        linear_conv_kernel_dim=4, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, partial_rotary_factor=0.5,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            "mrope_section": [quarter - 2 * (quarter // 3), quarter // 3, quarter // 3],
        },
        **sizes,
    )
    torch.manual_seed(seed)
    model = Qwen3_5ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
