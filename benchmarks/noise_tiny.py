"""What should masked positions show? The recipe `adapter` on the bundled tiny model with each kind of noise.

    OMP_NUM_THREADS=1 python benchmarks/noise_tiny.py --out benchmarks/results/noise-tiny-cpu.json

"vector": the learned mask vector of the recipe. "random": `mask_token = random`. "row": a spare row of the vocabulary
as the source left it, untrained, because the recipe changes no row; `flarec convert` does not offer that. Same data
order, steps and rows; a seed is one of order, adapter and noise. Tokens per forward are of AR-Trust on held-out tasks.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import flarec
from flarec.checkpoint.directory import open_checkpoint
from flarec.device import resolve_kernels
from flarec.frontend.export import capture
from flarec.passes import lower
from flarec.recipe import Recipe, load_recipe
from flarec.train.adapter import adapter_of, start_adapter
from flarec.train.data.packing import RowStream
from flarec.train.data.sources import load_sources, parse_source
from flarec.train.heldout import HeldOut, prompt_of
from flarec.train.loop import Trainer
from flarec.train.mask_token import MaskToken, choose_mask_token, initialise_mask_token

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny"
KINDS = ("vector", "row", "random")
SETTINGS = ("optimizer.warmup_steps=10", "data.max_length=512", "evaluation.every=0")
LAST = 10


def run(recipe: Recipe, kind: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """A training and its measurement, as `flarec convert` makes them."""
    start = time.process_time()
    device = torch.device(options.device)
    source = open_checkpoint(TINY / "model")
    tokenizer, model = source.load_tokenizer(), source.load_model(torch.float32, device)
    config = source.load_config()
    ends = source.eos_ids(config, tokenizer)
    captured = capture(model, cache=True)
    mask: MaskToken = choose_mask_token(kind, config, tokenizer)
    if kind != "row":
        initialise_mask_token(mask, model, captured, tokenizer)
    start_adapter(captured, recipe, seed, lambda line: None)
    vector, adapter = mask.kind == "vector", adapter_of(recipe)
    train, decode = (
        lower(captured, target, mask_vector=vector, adapter=adapter, kernels=resolve_kernels("auto", device))
        for target in ("train", "decode")
    )

    def load(name: str, most: int | None = None) -> Any:
        path = parse_source(str(TINY / "data" / name))
        (made,) = load_sources([path], tokenizer, max_length=recipe.data.max_length, end_ids=ends)
        return made if most is None else [made.document(index) for index in range(most)]

    rows = RowStream([load("train.jsonl")], max_length=recipe.data.max_length, seed=seed,
                     lookahead=recipe.data.lookahead)
    trainer = Trainer(train, recipe, mask, rows, seed)
    steps = [trainer.advance().read(tokenizer) for _ in range(recipe.optimizer.steps)]
    trained = time.process_time()
    held = HeldOut(load("test.jsonl", options.tasks), train, decode, recipe, mask, ends, 4096)
    engine, prompts = held.engine(), [prompt_of(document) for document in held.documents]
    found: dict[str, Any] = {
        "kind": kind, "seed": seed, "trained_numbers": sum(p.numel() for p in trainer.parameters.values()),
        "expected_accepted": statistics.mean(step["expected_accepted"] for step in steps[-LAST:]),
    }
    for temperature in (0.0, 1.0):
        made = engine.generate(
            prompts, mode="ar-trust", max_new_tokens=options.new_tokens, temperature=temperature, seed=seed
        )
        total = sum(one.new_tokens for one in made)
        found[f"T={temperature:.0f}"] = {
            "tokens_per_forward": total / sum(one.forwards for one in made), "new_tokens": total,
        }
    return {**found, "train_cpu_seconds": trained - start, "decode_cpu_seconds": time.process_time() - trained}


def device_text(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"


def summary(runs: list[dict[str, Any]], key: str = "kind", kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """Per kind, which runs have under `key`, the mean over seeds, and the differences to the first, seed by seed."""
    table: dict[str, Any] = {}
    first = kinds[0]
    for name in ("T=0", "T=1"):
        values = {kind: {one["seed"]: one[name]["tokens_per_forward"] for one in runs if one[key] == kind}
                  for kind in kinds}
        table[name] = {
            kind: {"mean": statistics.mean(seeds.values()),
                   f"to_{first}": [seeds[seed] - values[first][seed] for seed in seeds if seed in values[first]]}
            for kind, seeds in values.items() if seeds
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--time-limit", type=float, default=1e9, metavar="S", help="begin no run after S seconds")
    parser.add_argument("--commit", help="of the tree, where git cannot tell")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options, start = parser.parse_args(), time.monotonic()
    recipe = load_recipe("adapter").override([
        *SETTINGS, f"optimizer.steps={options.steps}", f"optimizer.batch_rows={options.rows}",
        f"optimizer.micro_rows={options.rows}", *options.set,
    ])
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TINY, capture_output=True, text=True, check=False)
    table: dict[str, Any] = {
        "command": "python benchmarks/noise_tiny.py " + " ".join(sys.argv[1:]),
        "commit": options.commit or found.stdout.strip() or None,
        "device": device_text(options.device),
        "versions": {"flarec": flarec.__version__, "torch": torch.__version__,
                     "transformers": transformers.__version__, "python": platform.python_version()},
        "recipe": recipe.to_dict(), "runs": [],
    }
    for seed in range(options.seeds):
        for kind in KINDS:
            if time.monotonic() - start > options.time_limit:
                continue
            table["runs"].append(run(recipe, kind, seed, options))
            print(json.dumps(table["runs"][-1]), flush=True)
            table["summary"] = summary(table["runs"])
            options.out.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table["summary"], indent=1))


if __name__ == "__main__":
    main()
