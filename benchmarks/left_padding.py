"""What pads at the left of a prompt change, family by family: in transformers, and through flarec's `hf_generate`.

    python benchmarks/left_padding.py --markdown --out benchmarks/results/left-padding.json --commit ID

For the smallest model of each family, in float32: logits of the last token of a prompt behind three pads with a
mask, as transformers' `generate` calls the model, alone ("one") and beside a longer prompt ("two"), against the
logits without pads, relative to the largest (the worst of four prompts); for how many of eight prompts `generate`
gives the greedy tokens that it gives without pads, and for how many flarec's does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("FLAREC_CACHE_DIR", "off")

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from flarec import hf_generate
from flarec.conformance.inputs import tokenizer
from flarec.frontend.families import FAMILIES, PLAIN
from flarec.frontend.tiny import END_ID, available, build_tiny

PADS, NEW = 3, 8
LENGTH, CASES = 9, 4
Cases = list[tuple[list[int], list[int]]]
ROUNDING = 1e-4
"""Of the largest logit: batches of other sizes differ by less."""


def prompts() -> Cases:
    """(a prompt of LENGTH - PADS tokens, one of LENGTH), several times."""
    longs = [[((7 + 2 * case) * place + 11 * case) % 290 + 5 for place in range(LENGTH)] for case in range(CASES)]
    return [(long[PADS:], long) for long in longs]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of prompts of up to LENGTH tokens, pads at the left."""
    ids = torch.tensor([[0] * (LENGTH - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (LENGTH - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def measure(family: str, folder: Path) -> dict[str, Any]:
    source = folder / family
    build_tiny(family).save_pretrained(source)
    tokenizer().save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False).eval()
    found: dict[str, Any] = {"one": 0.0, "two": 0.0, "transformers": 0, "flarec": 0}
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": END_ID, "pad_token_id": 0}
    for short, long in prompts():
        plain = model(input_ids=torch.tensor([short])).logits[0, -1]
        for name, rows in (("one", [short]), ("two", [short, long])):
            ids, mask = padded(rows)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, -1]
            found[name] = max(found[name], float((logits - plain).abs().max() / plain.abs().max()))
        alone = [model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **options)
                 for row in (short, long)]
        expected = [new(made, len(row))[0] for made, row in zip(alone, (short, long), strict=True)]
        ids, mask = padded([short, long])
        theirs = model.generate(ids, attention_mask=mask, **options)
        ours = hf_generate.generate(model, ids, attention_mask=mask, mode="causal", **options)
        for name, made in (("transformers", theirs), ("flarec", ours)):
            found[name] += sum(a == b for a, b in zip(new(made, LENGTH), expected, strict=True))
    return found


def new(sequences: Tensor, prompt: int) -> list[list[int]]:
    """The tokens behind the prompts, without pads behind the end."""
    rows = []
    for row in sequences[:, prompt:].tolist():
        while row and row[-1] == 0:
            row.pop()
        rows.append(row)
    return rows


def markdown(results: dict[str, dict[str, Any]]) -> str:
    head = ["family", "pads, one prompt", "pads, batch of two", "greedy, transformers", "greedy, flarec"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|"]
    for family, row in results.items():
        numbers = [f"{row[name]:.0e}" if row[name] <= ROUNDING else f"**{row[name]:.0e}**" for name in ("one", "two")]
        counts = [f"{row[name]} of {2 * CASES}" for name in ("transformers", "flarec")]
        counts = [text if text.startswith(str(2 * CASES)) else f"**{text}**" for text in counts]
        lines.append(f"| `{family}` | {' | '.join([*numbers, *counts])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/padding.md")
    parser.add_argument("families", nargs="*", default=[name for name in (*FAMILIES, *PLAIN) if available(name)])
    given = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in given.families:
            results[family] = measure(family, Path(folder))
            print(family, results[family], file=sys.stderr, flush=True)
    if given.markdown:
        print(markdown(results))
    if given.out:
        run = {"torch": torch.__version__, "transformers": transformers.__version__, "device": "cpu"}
        run |= {"command": " ".join(sys.argv), "commit": given.commit, "families": results}
        given.out.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
