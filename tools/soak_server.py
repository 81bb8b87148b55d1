"""Soak a server of flarec: many requests at once, of random lengths, modes, seeds and stops; some clients go away.

    .venv/bin/python tools/soak_server.py [CKPT] --requests 1000 --open 256

Starts `flarec serve` on CKPT (a tiny Qwen3.5 with random weights if none is given), keeps `--open` requests going until
`--requests` were sent, and then compares: every text that ended is that of the same request alone (in this process),
none is lost, nothing waits or runs in the server, and its memory after the second half is that after the first. Exit
code 1 if anything differs. The server and this process share the machine: the numbers are counts, no speeds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flarec import api  # noqa: E402
from flarec.base.generation import GenerationOptions  # noqa: E402
from flarec.bench.serve.client import Server, ServerError  # noqa: E402
from flarec.bench.serve.results import counters  # noqa: E402
from tests.checkpoints import converted  # noqa: E402

WAYS: list[dict[str, Any]] = [
    {"mode": "causal"}, {"mode": "ar-trust", "drafts": "single"}, {"mode": "ar-trust", "drafts": "branches"},
    {"mode": "diffusion-trust", "threshold": 0.6},
]
STOPS = ("e", " a", "the", "\n", "1", "o", "Step", "��")
WORDS = ["apples", "buys", "Zoe", "how", "many", "does", "é", "你好", "12", "x", "=", "3", "(", ")", "print", "the"]
GROWTH = 1.05
"""Memory of the server after all requests, by that after half of them."""


@dataclass
class Sent:
    """One request and what came of it. leaves: after so many events its client goes away; None: it stays."""

    fields: dict[str, Any]
    leaves: int | None
    text: str = ""
    finish: str | None = None
    tokens: int = 0
    error: str | None = None
    gone: bool = field(default=False)


def draw(rng: random.Random, words: list[str], longest: int) -> Sent:
    """A random request."""
    fields: dict[str, Any] = {
        "prompt": " ".join(rng.choices(words, k=rng.randint(1, 60))), "max_tokens": rng.randint(1, longest),
        "temperature": rng.choice([0.0, 0.0, 0.7, 1.0, 1.5]), "top_p": rng.choice([1.0, 0.9]),
        "top_k": rng.choice([0, 0, 20]), "seed": rng.randrange(2**63), **rng.choice(WAYS),
    }
    if rng.random() < 0.4:
        fields["stop"] = rng.sample(STOPS, rng.randint(1, 3))
    return Sent(fields, rng.randint(0, 6) if rng.random() < 0.12 else None)


async def send(server: Server, model: str, sent: Sent) -> None:
    events = server.stream(
        "/completions", {"model": model, **sent.fields, "stream_options": {"include_usage": True}}
    )
    seen = 0
    try:
        async for event in events:
            if seen == sent.leaves:
                sent.gone = True
                return
            seen += 1
            for choice in event["choices"]:
                sent.text += choice["text"]
                sent.finish = choice["finish_reason"] or sent.finish
            sent.tokens = (event.get("usage") or {"completion_tokens": sent.tokens})["completion_tokens"]
    except ServerError as error:
        sent.error = str(error)
    finally:
        await events.aclose()


async def soak(server: Server, model: str, requests: list[Sent], together: int, pid: int) -> dict[str, Any]:
    """Send everything; memory of the server in KiB in between, and its counters in the end."""
    memory, running, most = [], asyncio.Semaphore(together), 0
    live = 0

    async def one(sent: Sent) -> None:
        nonlocal live, most
        async with running:
            live += 1
            most = max(most, live)
            await send(server, model, sent)
            live -= 1

    for half in (requests[: len(requests) // 2], requests[len(requests) // 2 :]):
        await asyncio.gather(*(one(sent) for sent in half))
        while True:
            found = counters((await server.get("/metrics")).decode())
            if not found["flarec_requests_waiting"] + found["flarec_requests_running"]:
                break
            await asyncio.sleep(0.2)
        memory.append(resident(pid))
        print(f"{len(half)} requests, {memory[-1]} KiB", flush=True)
    return {"resident_kib": memory, "most_at_once": most, "counters": found}


def resident(pid: int) -> int:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1])


def compare(model: api.Model, requests: list[Sent]) -> list[dict[str, Any]]:
    """What differs from the solo runs."""
    wrong = []
    for sent in requests:
        if sent.gone:
            continue
        fields = dict(sent.fields)
        prompt, stop = fields.pop("prompt"), tuple(fields.pop("stop", ()))
        options = GenerationOptions(max_new_tokens=fields.pop("max_tokens"), stop=stop, **fields)
        alone = model.generate_ids([model.encode(prompt)], options)[0]
        finish = "length" if alone.stop_reason == "length" else "stop"
        if (sent.error, sent.text, sent.finish, sent.tokens) != (None, alone.text, finish, alone.new_tokens):
            wrong.append({**asdict(sent), "alone": [alone.text, finish, alone.new_tokens]})
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--open", type=int, default=256)
    parser.add_argument("--longest", type=int, default=60, help="most new tokens of a request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(args, args.checkpoint or str(converted(Path(folder), "qwen3_5_text")[1]))


def run(args: argparse.Namespace, checkpoint: str) -> None:
    rng = random.Random(args.seed)
    requests = [draw(rng, WORDS, args.longest) for _ in range(args.requests)]
    command = [sys.executable, "-m", "flarec", "serve", checkpoint, "--port", "0", "--device", "cpu",
               "--served-model-name", "model", "--prefix-cache", "16"]  # soon full: memory is compared
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        match = re.fullmatch(r"serving model on (\S+)\n", process.stderr.readline())
        assert match is not None, process.stderr.read()
        told = asyncio.run(soak(Server.at(match[1]), "model", requests, args.open, process.pid))
        process.terminate()
        status, noise = process.wait(), process.stderr.read()
    wrong = compare(api.load(checkpoint), requests)
    gone = sum(sent.gone for sent in requests)
    ended = Counter(sent.finish or sent.error or "gone" for sent in requests)
    first, last = told["resident_kib"]
    table = {
        "checkpoint": Path(checkpoint).name, "commit": args.commit, "requests": len(requests), "open": args.open,
        "clients_that_left": gone, "ended": dict(ended), "differ_from_the_solo_run": len(wrong), "exit_code": status,
        "written_to_stderr": noise, "growth": last / first, **told,
    }
    print(json.dumps({name: value for name, value in table.items() if name != "counters"}, indent=1))
    for item in wrong[:3]:
        print(json.dumps(item, indent=1))
    if args.out:
        args.out.write_text(json.dumps(table, indent=1) + "\n")
    sys.exit(bool(wrong or status or noise or last > GROWTH * first))


if __name__ == "__main__":
    main()
