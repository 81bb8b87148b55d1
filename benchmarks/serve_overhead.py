"""What `flarec serve` costs beside the engine: CPU time per token of the same requests, with and without the server.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/serve_overhead.py examples/tiny/model --out FILE.json

One process has model, engine and server. Rounds alternate: the requests on an engine alone (`add`, `step` until all
have ended), and the same requests as streams through the server, from a client in a process of its own, whose time does
not count. CPU time of the process (all threads) by its new tokens; the median over the rounds. On a machine that others
use, wall time says little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import platform
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch

from flarec import api
from flarec.base.generation import GenerationOptions
from flarec.bench.serve.client import Server
from flarec.bench.serve.load import ask, closed_loop
from flarec.serve.app import Service
from flarec.serve.run import HttpServer, listening, url_of

PROMPT = "Zoe has 12 apples. She buys 7 more apples. How many apples does Zoe have?"


def client(url: str, bodies: list[dict[str, Any]], pipe: Any) -> None:
    """In a process of its own: sends all bodies at once whenever it is told to, returns the number of tokens."""
    server = Server.at(url)

    async def send(number: int) -> Any:
        return await ask(server, "/completions", bodies[number])

    while pipe.recv():
        answers = asyncio.run(closed_loop(send, len(bodies), len(bodies)))
        assert not any(answer.error for answer in answers), answers
        pipe.send((sum(answer.tokens for answer in answers), sum(len(answer.arrivals) for answer in answers)))


def alone(model: api.Model, prompt: list[int], options: list[GenerationOptions]) -> int:
    """The requests on an engine alone; returns the number of tokens."""
    engine = model._engine("auto")
    requests = [engine.add(prompt, item) for item in options]
    while engine.busy:
        engine.step()
    return sum(len(request.tokens) for request in requests)


def cpu() -> float:
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--modes", nargs="+", default=["causal"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = api.load(args.checkpoint)
    prompt = model.encode(PROMPT, chat=True)
    bound, ready = listening("127.0.0.1", 0), threading.Event()
    server = HttpServer(Service(model, "model"), ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    ready.wait()
    rows = []
    for mode in args.modes:
        fields = {"max_tokens": args.tokens, "temperature": 1.0, "mode": mode}
        bodies = [{**fields, "model": "model", "prompt": prompt, "seed": seed} for seed in range(args.clients)]
        options = [
            model.complete(GenerationOptions(mode=mode, max_new_tokens=args.tokens, temperature=1.0, seed=seed))
            for seed in range(args.clients)
        ]
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=client, args=(url_of(bound), bodies, theirs))
        process.start()
        with_server, without, events = [], [], 0
        for turn in range(args.rounds + 1):
            start = cpu()
            tokens = alone(model, prompt, options)
            engine_ms = 1e3 * (cpu() - start) / tokens
            start = cpu()
            ours.send(True)
            served, events = ours.recv()
            assert served == tokens, (served, tokens)
            if turn:  # the first round warms up
                without.append(engine_ms)
                with_server.append(1e3 * (cpu() - start) / tokens)
            print(f"{mode}: {tokens} tokens, {engine_ms:.3f} ms, {1e3 * (cpu() - start) / tokens:.3f} ms per token")
        ours.send(False)
        process.join()
        ratios = [one / other for one, other in zip(with_server, without, strict=True)]
        rows.append({
            "mode": mode, "clients": args.clients, "tokens": tokens, "events": events,
            "engine_cpu_ms_per_token": without, "server_cpu_ms_per_token": with_server,
            "overhead": statistics.median(ratios) - 1, "ratios": ratios,
        })
        print(f"{mode}: overhead {100 * rows[-1]['overhead']:.1f} % (bar 10 %)")
    server.should_exit = True
    thread.join()
    if args.out:
        table = {"checkpoint": args.checkpoint, "machine": f"{platform.machine()}, one thread", "commit": args.commit,
                 "torch": str(torch.__version__), "rounds": args.rounds, "rows": rows}
        args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
