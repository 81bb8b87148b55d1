"""Train the autoregressive source model from scratch on an endless stream of training tasks and some real text.

    python examples/tiny/train_source.py --minutes 7.5 --out examples/tiny/model

A small Qwen3.5-style hybrid (three Gated DeltaNet layers to one softmax layer). One document a row, rows of like length
together, padded on the right, so no document sees another. Float32 master weights under bfloat16 autocast; the weights
saved, and evaluated, are bfloat16. The learning rate follows the wall clock, so a run ends when its minutes are spent.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate_source
import fast_delta
import numpy as np
import tasks
import text
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig

HERE = Path(__file__).parent
VOCABULARY = 2048  # more than the tokenizer has: the rows above it stay spare
SHARD_BATCHES = 16
STREAM_SEED = 5_000


def build_config(tokenizer: Any) -> Qwen3_5TextConfig:
    """The architecture."""
    return Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=6,
        linear_num_value_heads=6,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2],
        },
        partial_rotary_factor=0.5,  # also as a plain key, which some versions write to the configuration
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


class Documents(IterableDataset):  # type: ignore[type-arg]
    """Batches (ids, prompt lengths, lengths) of one document a row: fresh tasks, windows of standard-library text."""

    def __init__(self, tokenizer: Any, args: argparse.Namespace) -> None:
        super().__init__()
        self.tokenizer, self.seed, self.rows = tokenizer, STREAM_SEED + 1000 * args.seed, args.rows
        self.max_length, self.text_share, self.text_window = args.max_length, args.text_share, args.window
        self.header = tokenizer("<|im_start|>assistant\n")["input_ids"]
        kept = [document for document in text.documents() if not text.is_held_out(document)]
        self.texts = [np.array([*ids, tokenizer.pad_token_id], np.int32) for ids in tokenizer(kept)["input_ids"]]

    def encode(self, records: list[dict[str, Any]]) -> list[tuple[np.ndarray, int]]:
        """Token ids and prompt length of task records, framed as the chat template frames them."""
        framed = [
            f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n{reply['content']}<|im_end|>\n"
            for user, reply in (record["messages"] for record in records)
        ]
        result = []
        for encoding in self.tokenizer.backend_tokenizer.encode_batch(framed):
            ids = np.array(encoding.ids, np.int32)
            second = int(np.flatnonzero(ids == self.header[0])[1])
            result.append((ids, second + len(self.header)))
        return result

    def shard(self, stream: Iterator[dict[str, Any]], rng: random.Random) -> list[tuple[torch.Tensor, ...]]:
        """Some batches' worth of documents, sorted by length, cut into padded batches, shuffled."""
        count = self.rows * SHARD_BATCHES
        texts = sum(rng.random() < self.text_share for _ in range(count))
        documents = self.encode([next(stream) for _ in range(count - texts)])
        for _ in range(texts):
            ids = rng.choice(self.texts)
            start = rng.randrange(max(1, len(ids) - self.text_window + 1))
            documents.append((ids[start : start + self.text_window], 0))
        documents.sort(key=lambda document: len(document[0]))
        batches: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, count, self.rows):
            rows = [(ids[: self.max_length], prompt) for ids, prompt in documents[start : start + self.rows]]
            width = -(-max(len(ids) for ids, _ in rows) // fast_delta.CHUNK) * fast_delta.CHUNK
            padded = np.full((len(rows), width + 1), self.tokenizer.pad_token_id, np.int32)
            for row, (ids, _) in zip(padded, rows, strict=True):
                row[: len(ids)] = ids
            prompts, sizes = np.array([prompt for _, prompt in rows]), np.array([len(ids) for ids, _ in rows])
            batches.append((torch.from_numpy(padded), torch.from_numpy(prompts), torch.from_numpy(sizes)))
        rng.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Endless batches, different ones in every worker."""
        info = get_worker_info()
        seed = self.seed + (info.id if info else 0)
        stream, rng = tasks.stream("train", seed), random.Random(seed)
        while True:
            yield from self.shard(stream, rng)


def batch_loss(model: Any, batch: list[torch.Tensor], device: torch.device, prompt_weight: float) -> torch.Tensor:
    """Weighted mean token loss; solution and text tokens count 1, prompt tokens `prompt_weight`, padding nothing."""
    ids, prompts, sizes = (part.to(device, non_blocking=True).long() for part in batch)
    place = torch.arange(1, ids.shape[1], device=device)
    weights = torch.where(place < prompts[:, None], prompt_weight, 1.0) * (place < sizes[:, None])
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def text_loss(model: Any, tokenizer: Any, device: torch.device, limit: int = 256) -> float:
    """Mean token loss on held-out standard-library documents, cut to 256 tokens."""
    held = [document for document in text.documents() if text.is_held_out(document)][:limit]
    total, count = 0.0, 0
    for document in held:
        ids = torch.tensor([tokenizer(document)["input_ids"][:256]], device=device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        total += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def train(args: argparse.Namespace, tokenizer: Any, model: Any, device: torch.device) -> dict[str, Any]:
    """Optimise until the minutes or steps are spent; gives the loss curve and totals."""
    dataset = Documents(tokenizer, args)
    frame = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "Answer: 1"}]}
    template = tokenizer.apply_chat_template(frame["messages"], return_dict=True)["input_ids"]
    assert dataset.encode([frame])[0][0].tolist() == template, "the frame differs from the chat template"
    loader = DataLoader(
        dataset, batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda",
        prefetch_factor=2 * SHARD_BATCHES if args.workers else None,
    )
    batches = iter(loader)
    first = next(batches)
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    began, budget = time.perf_counter(), args.minutes * 60
    step, tokens, documents = 0, 0, 0
    curve: list[dict[str, float]] = []
    recent = torch.zeros((), device=device)
    with fast_delta.installed() as calls:
        while True:
            spent = (time.perf_counter() - began) / budget
            if spent >= 1 or step == args.max_steps:
                break
            batch = first if step == 0 else next(batches)
            rate = args.lr * min(1.0, (step + 1) / args.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * spent)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = batch_loss(model, batch, device, args.prompt_weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == 0 and not (calls["delta"] == calls["conv"] == 6):
                raise RuntimeError(f"the training versions of the linear layers are not in use: {calls}")
            recent += loss.detach()
            step, tokens, documents = step + 1, tokens + int(batch[2].sum()), documents + len(batch[2])
            if step % args.log_every == 0:
                mean = recent.item() / args.log_every
                recent.zero_()
                seconds = time.perf_counter() - began
                curve.append({"step": step, "seconds": round(seconds, 1), "loss": round(mean, 5), "lr": round(rate, 7)})
                speed = tokens / seconds
                print(f"step {step} loss {mean:.4f} lr {rate:.2e} {seconds:.0f} s {speed:.0f} tokens/s", flush=True)
                if not math.isfinite(mean):
                    raise RuntimeError("the loss is not finite")
    seconds = time.perf_counter() - began
    return {"steps": step, "tokens": tokens, "documents": documents, "seconds": round(seconds, 1), "loss_curve": curve}


def main() -> None:
    """Train, save in bfloat16, evaluate what was saved, write the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--tokenizer", type=Path, default=HERE / "model")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--max-steps", type=int, default=None)
    parser.add_argument("--rows", type=int, default=256, help="documents in a batch")
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--prompt-weight", type=float, default=0.2)
    parser.add_argument("--text-share", type=float, default=0.12, help="share of documents that are real text")
    parser.add_argument("--window", type=int, default=224, help="longest piece of a text document in tokens")
    parser.add_argument("--workers", type=int, default=13)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--test-limit", type=int, default=None, help="evaluate only so many test records")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    model = Qwen3_5ForCausalLM(build_config(tokenizer))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters, {evaluate_source.device_name(device)}, {evaluate_source.versions()}", flush=True)
    totals = train(args, tokenizer, model, device)

    model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    saved = AutoModelForCausalLM.from_pretrained(args.out, trust_remote_code=False, dtype=torch.bfloat16)
    saved = saved.to(device).eval()
    records = evaluate_source.load_records(HERE / "data" / "test.jsonl", args.test_limit)
    texts = evaluate_source.answers(saved, tokenizer, records, batch=400 if device.type == "cuda" else 50)
    weights = (args.out / "model.safetensors").read_bytes()
    skipped = {"out", "tokenizer", "test_limit", "log_every", "workers"}
    log = {
        "device": evaluate_source.device_name(device),
        "versions": evaluate_source.versions(),
        "command": f"python examples/tiny/train_source.py --minutes {args.minutes:g} --seed {args.seed}",
        "hyperparameters": {name: value for name, value in vars(args).items() if name not in skipped},
        "parameters": parameters,
        "held_out": {
            "records": len(records),
            "solution_loss": round(evaluate_source.held_out_loss(saved, tokenizer, records), 5),
            "text_loss": round(text_loss(saved, tokenizer, device), 5),
            "accuracy": evaluate_source.accuracy(records, texts),
        },
        "sha256": hashlib.sha256(weights).hexdigest(),
        "bytes": len(weights),
        **totals,
    }
    (args.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    log.pop("loss_curve")
    print(json.dumps(log, indent=1))


if __name__ == "__main__":
    main()
