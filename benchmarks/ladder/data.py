"""Texts and tasks of the ladder, split by package, and the tokenizer.

    DIR/text-arms.jsonl.gz   tasks-arms.jsonl.gz    the first sixth of the split `train`, for the arms
    DIR/text-train.jsonl.gz  text-choose.jsonl.gz  text-report.jsonl.gz   pieces of the packages' Python files and pages
    DIR/tasks-train.jsonl.gz  tasks-choose.jsonl.gz  tasks-report.jsonl.gz
    DIR/tokenizer/           BPE of 4096 tokens, trained on the split `train`
    DIR/data.json            what is in them: packages by split, bytes, hashes
"""

from __future__ import annotations

import gzip
import json
import platform
import random
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.ladder.tasks import draw_tasks
from examples.real.prompts import packages, split_of
from flarec.base.hashes import sha256_of

SPLITS = ("train", "choose", "report")
VOCABULARY = 4096
PIECE = 1500
"""Characters of a piece, at most: about 500 tokens."""
ARMS = 6
"""Arms are trained on this part of the split `train`: what a short run can see."""
PER_PACKAGE = 2_500_000
"""Characters of a package, at most: the largest ones would be most of the corpus."""
END = "<|end|>"


def build(out: Path, characters: int, tasks: int) -> dict[str, Any]:
    """Write everything. characters: of the split `train`; the others have a tenth of it each; tasks: likewise."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[str]] = {name: [] for name in SPLITS}
    owners: dict[str, list[str]] = {name: [] for name in SPLITS}
    for name, files, page in packages(metadata.distributions()):
        pieces = list(_pieces(files, page))
        if pieces:
            found[split_of(name)] += pieces
            owners[split_of(name)].append(name)
    report: dict[str, Any] = {"python": platform.python_version()}
    for name, pieces in found.items():
        random.Random(0).shuffle(pieces)
        kept = _first(pieces, characters if name == "train" else characters // 10)
        _write(out / f"text-{name}.jsonl.gz", [{"text": piece} for piece in kept])
        count = tasks if name == "train" else tasks // 10
        drawn = draw_tasks(name, count)
        _write(out / f"tasks-{name}.jsonl.gz", drawn)
        if name == "train":
            _write(out / "text-arms.jsonl.gz", [{"text": piece} for piece in kept[: len(kept) // ARMS]])
            _write(out / "tasks-arms.jsonl.gz", drawn[: len(drawn) // ARMS])
        report[name] = {
            "packages": owners[name], "pieces": len(kept), "characters": sum(map(len, kept)), "tasks": count,
            "sha256": sha256_of(out / f"text-{name}.jsonl.gz", out / f"tasks-{name}.jsonl.gz"),
        }
        found[name] = kept
    lines = [task["prompt"] + task["response"] for task in draw_tasks("train", min(tasks, 6000))]
    _tokenizer([*found["train"], *lines]).save_pretrained(out / "tokenizer")
    (out / "data.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def records(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first records of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(limit or 1 << 60), lines, strict=False)]


def _pieces(files: Sequence[Path], page: str) -> Iterator[str]:
    left = PER_PACKAGE
    for text in (page, *_texts(files)):
        piece: list[str] = []
        for line in text.splitlines(keepends=True):
            if piece and sum(map(len, piece)) + len(line) > PIECE:
                yield "".join(piece)
                piece = []
            piece.append(line[:PIECE])
        if piece and sum(map(len, piece)) > PIECE // 8:
            yield "".join(piece)
        left -= len(text)
        if left < 0:
            return


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue


def _first(pieces: Sequence[str], characters: int) -> list[str]:
    kept, total = [], 0
    for piece in pieces:
        if total >= characters:
            break
        kept.append(piece)
        total += len(piece)
    return kept


def _write(path: Path, found: Sequence[dict[str, str]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found)
    path.write_bytes(gzip.compress(text.encode("utf-8", "surrogatepass"), mtime=0))


def _tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
