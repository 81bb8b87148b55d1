"""What a model can do: single answers to tasks, the loss of texts, tokens per forward. `table.py` compares such files.

    python examples/real/keeps.py MODEL --tasks out/tasks --prompts out/prompts/report.jsonl --out keeps.json

MODEL is a source or a checkpoint. Parts, in the order in which they are measured (and so the reverse of the order in
which they are dropped when --time-limit comes near):

choose    causal answers to the tasks that choose (tasks.py), greedy
report    the same on the tasks that are reported
texts     nats and tokens of every text that the prompts of `--prompts` are about, from the clean stream
drafts    tokens per forward of AR-Trust, T = 0 and T = 1, on these prompts (measure.py)
denoise   Diffusion-Trust on the tasks whose answer is a record, at thresholds, with the checkpoint's recheck
elastic   the same of elastic decoding, for a checkpoint with a horizon head

--out is written after every part, and parts that it holds already are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import measure, prompts_of

from flarec.base.generation import GenerationOptions
from flarec.evaluate import to_examples
from flarec.evaluation.scoring import score

PARTS = ("choose", "report", "texts", "drafts", "denoise", "elastic")
STRUCTURED = ("copy", "to JSON", "to CSV")
"""Kinds of tasks whose answer is a record."""
THRESHOLDS = (0.5, 0.8, 0.9, 0.97, 0.99)
ENOUGH = 2.0
"""Tokens per forward that a threshold is to reach."""


def tasks_of(path: Path, limit: int | None, kinds: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Those of some kinds among the first tasks of a file."""
    with path.open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return [task for task in found[:limit] if not kinds or task["kind"] in kinds]


def answer(model: Any, tasks: Sequence[dict[str, Any]], batch: int, **keywords: Any) -> dict[str, Any]:
    """Of every task in order: right (0 or 1), tokens, forwards, and a hash of the tokens."""
    examples = to_examples(tasks, model)
    start = time.monotonic()
    options = [GenerationOptions(max_new_tokens=task["tokens"], stop=tuple(task.get("stop", ())), **keywords)
               for task in tasks]
    outputs = model.generate_ids([example.prompt for example in examples], options, batch=batch)
    pairs = list(zip(examples, outputs, strict=True))
    with ThreadPoolExecutor(4) as pool:  # Python runs in processes
        right = pool.map(lambda pair: int(pair[0].question.grade(pair[1].text)), pairs)
    return {
        "right": list(right), "tokens": [len(output.token_ids) for output in outputs],
        "forwards": [output.forwards for output in outputs],
        "answers": [hashlib.sha256(str(list(output.token_ids)).encode()).hexdigest()[:8] for output in outputs],
        "seconds": round(time.monotonic() - start, 2),
    }


def texts_of(path: Path, limit: int) -> list[str]:
    """What prompts of a file are about: docstrings, code and pages of packages. Each text once."""
    with path.open(encoding="utf-8") as lines:
        found = [json.loads(line)["prompt"].partition("\n\n")[2] for line in lines]
    return sorted({text for text in found if text}, key=lambda text: hashlib.sha256(text.encode()).digest())[:limit]


def losses(model: Any, texts: Sequence[str], batch: int) -> dict[str, Any]:
    """nats and tokens of every text."""
    examples = to_examples([{"text": text} for text in texts], model)
    room = model.engine.max_positions
    documents = [(example.ids[:room], example.responses) for example in examples]
    scores = score(model.decode_program, documents, batch, suppress=model.engine.suppress)
    return {"nats": [round(-float(found.log_probs.sum()), 4) for found in scores],
            "tokens": [len(found.log_probs) for found in scores]}


def speed(found: dict[str, Any]) -> float:
    return sum(found["tokens"]) / sum(found["forwards"])


def accuracy(found: dict[str, Any]) -> float:
    return sum(found["right"]) / len(found["right"])


def chosen_threshold(seen: dict[float, dict[str, Any]]) -> float:
    """The most accurate one with enough tokens per forward, of equals the faster; the fastest if none has enough."""
    fast = [threshold for threshold, found in seen.items() if speed(found) >= ENOUGH]
    if not fast:
        return max(seen, key=lambda threshold: speed(seen[threshold]))
    return max(fast, key=lambda threshold: (accuracy(seen[threshold]), speed(seen[threshold])))


def at_thresholds(model: Any, options: argparse.Namespace, mode: str) -> dict[str, Any]:
    """The curve on the tasks that choose, and on the reported ones the threshold that it chose, beside causal decoding
    of the same weights. The recheck is the checkpoint's; with one, 0 is a threshold too."""
    recheck = model.complete(GenerationOptions(mode=mode)).recheck or 0.0
    thresholds = (0.0, *THRESHOLDS) if recheck else THRESHOLDS
    choose, report = (tasks_of(options.tasks / f"{split}.jsonl", options.task_limit, STRUCTURED)
                      for split in ("choose", "report"))
    seen = {threshold: answer(model, choose, options.batch, mode=mode, threshold=threshold) for threshold in thresholds}
    threshold = chosen_threshold(seen)
    curve = {str(each): {"accuracy": accuracy(found), "tokens_per_forward": speed(found)}
             for each, found in seen.items()}
    return {"choose": curve, "causal, choose": accuracy(answer(model, choose, options.batch, mode="causal")),
            "threshold": threshold, "recheck": recheck,
            "report": answer(model, report, options.batch, mode=mode, threshold=threshold),
            "causal": answer(model, report, options.batch, mode="causal")}


def part(name: str, model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one."""
    if name in ("choose", "report"):
        tasks = tasks_of(options.tasks / f"{name}.jsonl", options.task_limit)
        return answer(model, tasks, options.batch, mode="causal")
    if name == "texts":
        return losses(model, texts_of(options.prompts, options.texts), options.batch)
    if name == "drafts":
        return measure(model, prompts_of(options.prompts, options.limit, options.seed), options)
    return at_thresholds(model, options, {"denoise": "diffusion-trust"}.get(name, name))


def measured(options: argparse.Namespace, opened: Callable[[], Any], until: float) -> dict[str, Any]:
    """All parts that are asked for, while there is time; `opened` gives the model if something is left to do."""
    found: dict[str, Any] = {}
    if options.out.exists():
        found = json.loads(options.out.read_text(encoding="utf-8"))
    left = [name for name in options.parts if "error" in found.get(name, {"error": ""})]
    if not left:
        return found
    start = time.monotonic()
    model = opened()
    found["loading_seconds"] = round(time.monotonic() - start, 1)
    for name in left:
        start = time.monotonic()
        if start > until:
            found[name] = {"error": "no time left"}
        else:
            try:
                found[name] = part(name, model, options)
                found[name]["seconds_of_part"] = round(time.monotonic() - start, 1)
            except Exception as error:  # a part that fails leaves the others
                found[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
        said = found[name].get("error") or f"{found[name]['seconds_of_part']} s"
        print(f"{name}: {said}", flush=True)
        options.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tasks", type=Path, required=True, help="directory that tasks.py wrote")
    parser.add_argument("--prompts", type=Path, required=True, help="of packages that nothing else is made of")
    parser.add_argument("--parts", action="append", choices=PARTS, default=[], help="repeatable; default: the first 4")
    parser.add_argument("--task-limit", type=int, help="use only the first tasks")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--limit", type=int, default=128, help="prompts of `drafts`")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of `drafts`")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time-limit", type=float, default=1e9, help="seconds after which no part begins")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.parts = sorted(options.parts or PARTS[:4], key=PARTS.index)

    import flarec

    until = time.monotonic() + options.time_limit
    found = measured(options, lambda: flarec.load(options.model, device=options.device), until)
    return int(any("error" in found[name] for name in options.parts))


if __name__ == "__main__":
    sys.exit(main())
