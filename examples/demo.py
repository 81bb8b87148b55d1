"""Convert the bundled tiny model on the CPU, measure the checkpoint in every mode, and show what came out.

    python examples/demo.py            # what `make demo` runs; writes out/demo/

Source and checkpoint solve the same held-out tasks by greedy decoding; the checkpoint is measured as reloaded from
disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flarec.threads import manage

manage()  # before torch is imported: threads must not wait in a loop for a core that others use

import torch
import transformers
from demo_picture import draw
from rich.console import Console
from rich.table import Table

import flarec
from flarec.api import Model
from flarec.evaluate import Example, evaluate, read_examples
from flarec.train.metrics import read_metrics
from flarec.train.progress import ConsoleReporter

TINY = Path(__file__).parent / "tiny"
MODES = ("causal", "ar-trust", "diffusion-trust")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="directory for everything that is written")
    parser.add_argument("--tasks", type=int, default=200, help="held-out tasks to solve in every mode")
    parser.add_argument("--recipe", default=str(TINY / "recipe.toml"), help="recipe name or file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order and noise")
    options = parser.parse_args(arguments)
    transformers.logging.disable_progress_bar()
    console = Console()
    start = time.perf_counter()

    console.rule("source model")
    source = flarec.load(TINY / "model", device=options.device)
    tasks = read_examples(TINY / "data" / "test.jsonl", source, limit=options.tasks)
    results = {"source": measure(console, source, tasks, "causal", "source")}

    console.rule("conversion")
    checkpoint = flarec.convert(
        TINY / "model",
        [TINY / "data" / "train.jsonl"],
        recipe=options.recipe,
        out=options.out / "checkpoint",
        overrides=options.set,
        steps=options.steps,
        device=options.device,
        seed=options.seed,
        overwrite=True,
        reporter=ConsoleReporter(),
        eval_data=[TINY / "data" / "test.jsonl"],
    )
    converted = time.perf_counter()

    console.rule("the checkpoint, reloaded")
    model = flarec.load(checkpoint, device=options.device)
    for mode in modes_of(model):
        results[mode] = measure(console, model, tasks, mode, mode)

    report: dict[str, Any] = {
        **results,
        "run": environment(options, start, converted),
        "recipe": json.loads((checkpoint / "flarec.json").read_text())["recipe"],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, list(read_metrics(checkpoint / "metrics.jsonl")), options.out / "report.png")
    console.print(table(results, len(tasks)))
    samples(console, model, tasks[0])
    console.print(f"report {options.out / 'report.json'}, picture {options.out / 'report.png'}")
    console.print(f"checkpoint {checkpoint}")
    console.print(f"{report['run']['seconds']:.0f} s in all")


def measure(console: Console, model: Model, tasks: Sequence[Example], mode: str, name: str) -> dict[str, Any]:
    """accuracy, loss, tokens_per_forward and seconds of greedy decoding in one mode."""
    result = evaluate(model, tasks, mode=mode, batch=len(tasks))
    kept = {key: result[key] for key in ("accuracy", "loss", "tokens_per_forward", "seconds")}
    console.print(f"{name}: {kept}")
    return kept


def modes_of(model: Model) -> list[str]:
    """Those that the checkpoint has: random ids as noise leave no Diffusion-Trust."""
    return [mode for mode in MODES if mode == "causal" or mode in model.engine.readouts]


def table(results: dict[str, dict[str, Any]], tasks: int) -> Table:
    shown = Table(title=f"{tasks} held-out tasks, greedy")
    for column in ("", "accuracy", "of the source's", "loss", "tokens per forward", "seconds"):
        shown.add_column(column, justify="right" if column else "left")
    base = results["source"]["accuracy"]
    for name, row in results.items():
        share = f"{row['accuracy'] / base:.1%}" if base else "-"
        shown.add_row(
            name, f"{row['accuracy']:.1%}", share, f"{row['loss']:.4f}", f"{row['tokens_per_forward']:.2f}",
            f"{row['seconds']:.1f}",
        )
    return shown


def samples(console: Console, model: Model, task: Example) -> None:
    """One task, solved in each mode."""
    console.rule("a sample")
    console.print(model.tokenizer.decode(task.prompt), markup=False, highlight=False)
    for mode in modes_of(model):
        output = model.generate_ids([task.prompt], mode=mode)[0]
        console.print(f"[bold]{mode}[/bold]: {output.new_tokens} tokens in {output.forwards} forwards")
        console.print(output.text, markup=False, highlight=False)


def environment(options: argparse.Namespace, start: float, converted: float) -> dict[str, Any]:
    """Device, versions, commit, command and times of this run."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TINY, capture_output=True, text=True, check=False)
    cuda = options.device.startswith("cuda")
    now = time.perf_counter()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "flarec": flarec.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "commit": found.stdout.strip() or None,
        "command": " ".join(["python", "examples/demo.py", *sys.argv[1:]]),
        "tasks": options.tasks,
        "seconds": now - start,
        "conversion_seconds": converted - start,
    }


if __name__ == "__main__":
    main()
