"""What a conversion drafts: tokens per forward of AR-Trust on prompts that it was not trained on.

    python examples/real/measure.py CKPT --prompts out/prompts/report.jsonl --out report.json [--batch 64 --limit 256]

Every prompt is answered at temperature 0 and 1, by AR-Trust and by causal decoding of the same checkpoint with the same
seeds. "equal" counts answers that are the same token for token (in float32 all of them; in bfloat16 near ties go either
way, and say nothing about drafting). Answers that run in circles are easy to draft: "loop-free" leaves out those in
which some run of 8 tokens stands three times. Intervals are those of the mean over prompts, 95 %, from a bootstrap.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import machine

from flarec.evaluation.loops import loops

RESAMPLES = 1000


def summary(pairs: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    """Of (tokens, forwards) by prompt: tokens per forward over all, with its interval."""
    if not pairs:
        return None
    draw = random.Random(0)
    ratios = []
    for _ in range(RESAMPLES):
        chosen = draw.choices(pairs, k=len(pairs))
        ratios.append(sum(tokens for tokens, _ in chosen) / sum(forwards for _, forwards in chosen))
    ratios.sort()
    total = [sum(column) for column in zip(*pairs, strict=True)]
    return {
        "prompts": len(pairs), "tokens": total[0], "forwards": total[1], "tokens_per_forward": total[0] / total[1],
        "interval": [ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES) - 1]],
    }


def prompts_of(path: Path, limit: int, seed: int) -> list[str]:
    """`limit` of the file's prompts, shuffled: its packages follow each other."""
    with path.open() as lines:
        found = [json.loads(line)["prompt"] for line in lines]
    random.Random(seed).shuffle(found)
    return found[:limit]


def measure(model: Any, prompts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for temperature in (0.0, 1.0):
        answers: dict[str, list[Any]] = {}
        seconds = {}
        for mode in ("causal", "ar-trust"):
            start = time.monotonic()
            answers[mode] = model.generate(
                prompts, chat=options.chat, mode=mode, temperature=temperature, seed=options.seed,
                max_new_tokens=options.max_new_tokens, batch=options.batch,
            )
            seconds[mode] = time.monotonic() - start
        pairs = list(zip(answers["causal"], answers["ar-trust"], strict=True))
        counts = [(len(trust.token_ids), trust.forwards) for _, trust in pairs]
        free = [count for count, (_, trust) in zip(counts, pairs, strict=True) if not loops(trust.token_ids)]
        result[f"T={temperature:g}"] = {
            "all": summary(counts), "loop-free": summary(free), "seconds": seconds,
            "equal": sum(causal.token_ids == trust.token_ids for causal, trust in pairs),
            "tokens_per_second": {
                mode: sum(len(answer.token_ids) for answer in found) / seconds[mode] for mode, found in answers.items()
            },
            "median_length": statistics.median(len(trust.token_ids) for _, trust in pairs),
        }
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype")
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)

    import flarec

    start = time.monotonic()
    model = flarec.load(options.checkpoint, device="auto", **({"dtype": options.dtype} if options.dtype else {}))
    found = measure(model, prompts_of(options.prompts, options.limit, options.seed), options)
    words = sys.argv[1:] if arguments is None else arguments
    record = {
        **machine(), "command": " ".join(["python examples/real/measure.py", *words]), "commit": options.commit,
        "seconds": round(time.monotonic() - start, 1), **found,
    }
    for name, row in found.items():
        for subset in ("all", "loop-free"):
            values = row[subset]
            if values:
                low, high = values["interval"]
                print(f"{name} {subset:<10} {values['tokens_per_forward']:.3f} tokens per forward "
                      f"[{low:.3f}, {high:.3f}], {values['prompts']} prompts")
        print(f"{name} equal to causal: {row['equal']}")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
