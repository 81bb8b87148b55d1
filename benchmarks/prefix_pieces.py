"""Reading prompts with a prefix cache: forwards and time of a prompt that is not known, and what is read again of
prompts that share beginnings.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/prefix_pieces.py examples/tiny/model --out FILE.json

Pieces of a page (256 tokens) are what every prompt was read in before pieces were those of an engine without a prefix
cache: they keep states behind each page. The others are those of a CPU, and on a GPU those beside running requests and
alone. Rounds alternate between all of them; medians. Tokens that are read, and forwards, are counts, the same on every
machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flarec import api
from flarec.decode import Engine
from flarec.decode.prefix import PAGE

PIECES = (PAGE, 512, 2048, 8192)
LIMIT = 1 << 30
TURNS = 8


def text(count: int, seed: int, vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, vocabulary, (count,), generator=generator).tolist()
    return ids


def opening(vocabulary: int) -> Iterator[list[int]]:
    """Requests with one system prompt."""
    for turn in range(TURNS):
        yield text(1500, 1, vocabulary) + text(60, 10 + turn, vocabulary)


def chat(vocabulary: int) -> Iterator[list[int]]:
    """A chat: every prompt is the one before it, its answer, and a question."""
    for turn in range(TURNS):
        yield text(700 + 300 * turn, 2, vocabulary)


def changed(vocabulary: int) -> Iterator[list[int]]:
    """The same with five tokens at the end of each prompt that the next one does not repeat."""
    for prompt in chat(vocabulary):
        yield prompt + text(5, len(prompt), vocabulary)


def shared(engine: Engine, vocabulary: int) -> list[dict[str, Any]]:
    """Tokens that are read of prompts, and forwards, by pieces."""
    rows = []
    for prompts in (opening, chat, changed):
        each = list(prompts(vocabulary))
        for piece in PIECES:
            engine.keep_prefixes(LIMIT)
            assert engine.prefixes is not None
            known, forwards = engine.stats.known_tokens, engine.stats.prefills
            for prompt in each:
                engine.generate([prompt], mode="causal", max_new_tokens=2, eos_ids=(), prefill_chunk=piece)
            total = sum(map(len, each))
            rows.append({
                "prompts": prompts.__name__, "piece": piece, "tokens": total,
                "read": total - (engine.stats.known_tokens - known), "forwards": engine.stats.prefills - forwards,
                "kept_mib": engine.prefixes.bytes / 2**20,
            })
    return rows


def reading(engine: Engine, prompt: list[int], rounds: int) -> list[dict[str, Any]]:
    """Seconds from a prompt to its second token, and forwards, with a prefix cache and without one, by pieces."""
    ways = [(piece, limit) for piece in PIECES for limit in (LIMIT, 0)]
    wall: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    cpu: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    forwards = {}
    for _ in range(rounds + 1):  # the first one warms up
        for way in ways:
            engine.keep_prefixes(way[1])
            before, start, used = engine.stats.prefills, time.perf_counter(), time.process_time()
            engine.generate([prompt], mode="causal", max_new_tokens=2, eos_ids=(), prefill_chunk=way[0])
            wall[way].append(time.perf_counter() - start)
            cpu[way].append(time.process_time() - used)
            forwards[way] = engine.stats.prefills - before
    return [
        {"piece": piece, "prefix_cache": bool(limit), "forwards": forwards[piece, limit],
         "seconds": statistics.median(wall[piece, limit][1:]), "cpu_seconds": statistics.median(cpu[piece, limit][1:])}
        for piece, limit in ways
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = api.load(args.checkpoint)
    engine, vocabulary = model.engine, model.engine.program.vocab_size
    engine.max_positions = max(engine.max_positions, args.tokens, 4096) + 2  # weights do not matter here
    rows = reading(engine, text(args.tokens, 0, vocabulary), args.rounds)
    for row in rows:
        print(f"pieces of {row['piece']:5}, prefix cache {'on ' if row['prefix_cache'] else 'off'}: "
              f"{row['forwards']:2} forwards, {row['seconds']:.3f} s, {row['cpu_seconds']:.3f} CPU s")
    counts = shared(engine, vocabulary)
    for row in counts:
        print(f"{row['prompts']:8} pieces of {row['piece']:5}: {row['read']} of {row['tokens']} tokens read in "
              f"{row['forwards']} forwards, {row['kept_mib']:.1f} MiB kept")
    if args.out is not None:
        about = {
            "command": f"OMP_NUM_THREADS=1 benchmarks/prefix_pieces.py {args.checkpoint} --tokens {args.tokens} "
                       f"--rounds {args.rounds}",
            "commit": args.commit, "device": platform.machine(), "threads": 1, "python": platform.python_version(),
            "torch": torch.__version__, "dtype": str(next(iter(model.program.parameters().values())).dtype),
        }
        args.out.write_text(json.dumps({**about, "reading": rows, "shared": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
