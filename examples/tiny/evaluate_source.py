"""Greedy accuracy by kind of task, and held-out loss, of the source model with the stock `transformers` code.

    python examples/tiny/evaluate_source.py --limit 100

Prompts are batched with padding on the left. That is exact for this architecture up to rounding: padded positions are
masked in the attention layers, and they enter the linear layers as zeros, which leave an empty state empty.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import tasks
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent


def load_records(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read JSON lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:limit]


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the CPU with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, records: list[dict[str, Any]], batch: int = 50, max_new_tokens: int = 384
) -> list[str]:
    """The greedy answer text of every record, in the records' order."""
    prompts = [
        tokenizer.apply_chat_template(record["messages"][:1], add_generation_prompt=True, tokenize=False)
        for record in records
    ]
    order = sorted(range(len(records)), key=lambda index: len(prompts[index]))
    texts = [""] * len(records)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left")
        ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        decoded = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, decoded, strict=True):
            texts[index] = text
    return texts


def accuracy(records: list[dict[str, Any]], texts: list[str]) -> dict[str, Any]:
    """Share of right answers: in all, by family and by kind (with counts)."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for record, text in zip(records, texts, strict=True):
        right = tasks.is_correct(record, text)
        for name in ("all", f"family/{tasks.FAMILY_OF[record['kind']]}", f"kind/{record['kind']}"):
            groups[name].append(right)
    return {
        name: {"right": sum(group), "of": len(group), "accuracy": round(sum(group) / len(group), 4)}
        for name, group in sorted(groups.items())
    }


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any, records: list[dict[str, Any]], batch: int = 50) -> float:
    """Mean negative log-likelihood per token of the reference solutions, their end token included."""
    total, count = 0.0, 0
    for start in range(0, len(records), batch):
        rows = [
            tokenizer.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
            for record in records[start : start + batch]
        ]
        pad = tokenizer.pad_token_id
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True, pad).to(model.device)
        mask = pad_sequence([torch.tensor(row["assistant_masks"]) for row in rows], True, 0).to(model.device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        total += (losses * mask[:, 1:]).sum().item()
        count += int(mask[:, 1:].sum())
    return total / count


def lengths(tokenizer: Any, records: list[dict[str, Any]]) -> dict[str, float]:
    """Mean number of tokens of the prompts (with the chat frame) and of the solutions."""
    sums = [0, 0]
    for record in records:
        row = tokenizer.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
        inside = sum(row["assistant_masks"])
        sums[0] += row["assistant_masks"].index(1)
        sums[1] += inside
    return {"prompt_tokens": round(sums[0] / len(records), 1), "response_tokens": round(sums[1] / len(records), 1)}


def main() -> None:
    """Evaluate a saved model and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "test.jsonl")
    parser.add_argument("--limit", type=int, default=None, help="take only the first records")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--show-wrong", type=int, default=0, help="print so many wrong answers")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=False, dtype=torch.bfloat16)
    model = model.to(args.device).eval()
    records = load_records(args.data, args.limit)
    began = time.perf_counter()
    texts = answers(model, tokenizer, records, args.batch)
    seconds = time.perf_counter() - began
    wrong = [(r, t) for r, t in zip(records, texts, strict=True) if not tasks.is_correct(r, t)]
    for record, text in wrong[: args.show_wrong]:
        print(f"{record['kind']}: {record['messages'][0]['content']}\n{text}\nexpected {record['answer']}\n")
    report = {
        "device": device_name(model.device),
        "versions": versions(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "records": len(records),
        "seconds": round(seconds, 1),
        "held_out_loss": round(held_out_loss(model, tokenizer, records, args.batch), 5),
        **lengths(tokenizer, records),
        "accuracy": accuracy(records, texts),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
