"""AR-Trust in float32 against the source in plain transformers and against causal decoding, token for token.

    flarec convert SOURCE --recipe adapter --data answers.jsonl --steps 10 --out out/adapter
    python examples/real/exact.py out/adapter --source SOURCE --prompts out/prompts/report.jsonl --out exact.json

Greedy: the texts of AR-Trust (a draft block per accepted length) and what transformers computes from the source with
its cache, a token at a time, one prompt at a time. Sampled at T = 1: AR-Trust and causal decoding of the checkpoint
with the same seeds. Where two texts part, the place and both tokens are written, how far the source's logit was ahead
of its next one (greedy), and whether logits within the measured rounding error lead to both tokens (as `flarec verify`
measures it). Exit code 1 if a text parts without such a tie.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from commands import machine

from flarec.base.generation import GenerationOptions
from flarec.base.prompts import read_prompts
from flarec.decode.tokenizing import encode_prompt
from flarec.verify import Subject, open_subject
from flarec.verify.decoding import Parting, engine_of, near_ties


def token_ids(options: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """The file's first prompts of at most `--longest` tokens."""
    found: list[list[int]] = []
    for _, prompt in read_prompts(options.prompts):
        ids = encode_prompt(tokenizer, prompt, chat=options.chat)
        found += [ids] if len(ids) <= options.longest else []
        if len(found) == options.limit:
            break
    return found


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """What transformers gives, and how far each token's logit is ahead of the next one's."""
    made, ahead, cache = list[int](), list[float](), None
    ids = torch.tensor([prompt], device=model.device)
    for _ in range(new_tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        first, second = output.logits[0, -1].topk(2).values.tolist()
        made.append(int(output.logits[0, -1].argmax()))
        ahead.append(first - second)
        cache, ids = output.past_key_values, torch.tensor([made[-1:]], device=model.device)
    return made, ahead


def partings(
    subject: Subject, prompts: Sequence[list[int]], settings: Sequence[GenerationOptions],
    left: Sequence[list[int]], right: Sequence[list[int]],
) -> list[dict[str, Any]]:
    """Each text that differs: where, and whether a tie explains it."""
    each = enumerate(zip(prompts, settings, left, right, strict=True))
    found = {place: Parting(prompt, setting, a, b) for place, (prompt, setting, a, b) in each if a != b}
    ties = near_ties(subject, list(found.values())) if found else []
    return [{"prompt": place, "token": parting.first, "ids": [parting.a[parting.first], parting.b[parting.first]],
             "near_tie": tie} for (place, parting), tie in zip(found.items(), ties, strict=True)]


def compare(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    subject = open_subject(options.checkpoint, dtype=torch.float32, device=torch.device(options.device), debug=False)
    assert subject.texts is not None
    prompts = token_ids(options, subject.texts.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        options.source, dtype=torch.float32, trust_remote_code=False
    ).to(options.device).eval()
    theirs = [greedy(model, prompt, options.new_tokens) for prompt in prompts]
    del model
    engine = engine_of(subject, subject.readouts[0])
    record: dict[str, Any] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        settings = [GenerationOptions(temperature=temperature, seed=place) for place in range(len(prompts))]
        start = time.monotonic()
        made = engine.generate(prompts, settings, mode="ar-trust", drafts="branches", batch=options.batch,
                               max_new_tokens=options.new_tokens)
        own = [list(answer.token_ids) for answer in made]
        if temperature:
            plain = engine.generate(prompts, settings, mode="causal", batch=options.batch,
                                    max_new_tokens=options.new_tokens)
            beside = [list(answer.token_ids) for answer in plain]
        else:
            beside = [tokens for tokens, _ in theirs]
        apart = partings(subject, prompts, settings, beside, own)
        if not temperature:
            for entry in apart:
                entry["source_ahead"] = theirs[entry["prompt"]][1][entry["token"]]
        record[name] = {
            "against": "causal decoding of the checkpoint" if temperature else "the source in transformers",
            "texts": len(own), "tokens": sum(map(len, own)),
            "tokens_per_forward": sum(map(len, own)) / sum(answer.forwards for answer in made),
            "equal": len(own) - len(apart), "parted": apart, "seconds": round(time.monotonic() - start, 1),
        }
    record["closest_source_choice"] = min(min(ahead) for _, ahead in theirs)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--longest", type=int, default=128, help="tokens of a prompt; longer ones are left out")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    found = compare(options)
    record = {**machine(), "computed_on": options.device, "commit": options.commit,
              "command": " ".join(["python examples/real/exact.py", *map(str, words)]), **found}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name in ("greedy", "sampled"):
        row = record[name]
        print(f"{name}: {row['equal']} of {row['texts']} texts equal {row['against']}'s, "
              f"{row['tokens_per_forward']:.2f} tokens per forward; parted: {row['parted']}")
    return int(any(not entry["near_tie"] for name in ("greedy", "sampled") for entry in record[name]["parted"]))


if __name__ == "__main__":
    sys.exit(main())
