"""Write the bundled data: data/train.jsonl, data/test.jsonl (tasks) and data/text.jsonl (standard-library text).

The tasks depend on nothing but their seeds; the text also depends on the version of the running Python.

    python examples/tiny/build_data.py
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tasks
import text

TRAIN_SEED, TEST_SEED = 1001, 1002  # train_source.py draws from other seeds
TEXT_BYTES = 390_000


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    print(f"{path}: {path.stat().st_size} bytes")


def some_text(limit: int) -> list[dict[str, Any]]:
    """Training documents of standard-library text, up to `limit` bytes of JSON lines."""
    records, size = [], 0
    for document in text.documents():
        record = {"text": document}
        size += len(json.dumps(record)) + 1
        if size > limit:
            break
        if text.is_held_out(document):
            continue
        records.append(record)
    return records


def main() -> None:
    """Generate, verify and write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--test", type=int, default=400)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = tasks.unique("train", TRAIN_SEED, args.train), tasks.unique("test", TEST_SEED, args.test)
    for record in train + test:
        tasks.verify(record)
    tasks.check_disjoint(train, test)
    write(args.out / "train.jsonl", train)
    write(args.out / "test.jsonl", test)
    write(args.out / "text.jsonl", some_text(TEXT_BYTES))
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.exists():
        (args.out / "text.LICENSE.txt").write_bytes(licence.read_bytes())


if __name__ == "__main__":
    main()
