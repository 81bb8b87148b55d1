"""What pads at the left of a prompt change, family by family: in transformers, and through flarec's `hf_generate`.

    python benchmarks/left_padding.py --markdown --out benchmarks/results/left-padding.json --commit ID

For the smallest model of each family, in float32: logits of the last token of a prompt behind three pads with a
mask, as transformers' `generate` calls the model, alone ("one") and beside a longer prompt ("two"), against the
logits without pads, relative to the largest; whether greedy `generate` gives the same 8 tokens; whether flarec's does.
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
from flarec.frontend.families import FAMILIES
from flarec.frontend.tiny import END_ID, available, build_tiny

PADS, NEW = 3, 8
LONG = [(7 * place + 11) % 290 + 5 for place in range(9)]
SHORT = LONG[: len(LONG) - PADS]
ROUNDING = 1e-4
"""Of the largest logit: batches of other sizes differ by less."""


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of prompts of len(LONG) tokens, pads at the left."""
    ids = torch.tensor([[0] * (len(LONG) - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (len(LONG) - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def measure(family: str, folder: Path) -> dict[str, Any]:
    source = folder / family
    build_tiny(family).save_pretrained(source)
    tokenizer().save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    plain = model(input_ids=torch.tensor([SHORT])).logits[0, -1]
    found: dict[str, Any] = {}
    for name, rows in (("one", [SHORT]), ("two", [SHORT, LONG])):
        ids, mask = padded(rows)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, -1]
        found[name] = float((logits - plain).abs().max() / plain.abs().max())
    ids, mask = padded([SHORT, LONG])
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": END_ID, "pad_token_id": 0}
    alone = [
        model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.int64), **options)
        for row in (SHORT, LONG)
    ]
    expected = [new(made, len(row))[0] for made, row in zip(alone, (SHORT, LONG), strict=True)]
    found["transformers"] = new(model.generate(ids, attention_mask=mask, **options), len(LONG)) == expected
    ours = hf_generate.generate(model, ids, attention_mask=mask, mode="causal", **options)
    found["flarec"] = new(ours, len(LONG)) == expected
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
    words = {True: "the same", False: "**other tokens**"}
    for family, row in results.items():
        numbers = [f"{row[name]:.0e}" if row[name] <= ROUNDING else f"**{row[name]:.0e}**" for name in ("one", "two")]
        lines.append(f"| `{family}` | {' | '.join(numbers)} | {words[row['transformers']]} | {words[row['flarec']]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/padding.md")
    parser.add_argument("families", nargs="*", default=[family for family in FAMILIES if available(family)])
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
