"""`flarec eval`: held-out loss, exact-match accuracy and tokens per forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flarec.base.generation import GenerationOptions
from flarec.errors import UsageError

from .loading import open_model
from .options import adapter_option, foreign_options, generation_options, plugin_options, runtime_options

if TYPE_CHECKING:
    from flarec.api import Output


@click.command("eval")
@click.argument("checkpoint", metavar="CKPT")
@click.option(
    "--data", required=True, metavar="FILE", type=click.Path(path_type=Path),
    help='Records as for training. Those with "answer" and "pattern" (a regular expression with a group) count for '
    "accuracy.",
)
@generation_options("mode", "threshold", "denoising_steps", "drafts", "max_new_tokens")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use only the first N records.")
@click.option(
    "--batch", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Prompts at the same time.",
)
@runtime_options
@foreign_options
@adapter_option
@plugin_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(
    checkpoint: str, data: Path, limit: int | None, batch: int, device: str, dtype: str | None, kernels: str,
    graphs: str, mask_token_id: int | None, block_size: int | None, adapter: Path | None, plugins: tuple[str, ...],
    passes: tuple[str, ...], as_json: bool, **keywords: Any,
) -> None:
    """Evaluate CKPT (or a source model, causally) on held-out records.

    The loss is that of the clean stream per response token. Every record with a prompt is generated greedily.
    """
    if not data.exists():
        raise UsageError(f"--data {data} does not exist; give a JSONL or Parquet file")
    options = GenerationOptions(**keywords)
    from rich.console import Console
    from rich.progress import Progress

    model = open_model(
        checkpoint, dtype=dtype, device=device, kernels=kernels, mask_token_id=mask_token_id, block_size=block_size,
        passes=passes, plugins=plugins, graphs=graphs, adapter=adapter,
        mode=options.mode,
    )
    from flarec.evaluate import evaluate, read_examples  # slow to import, like everything below flarec.api

    examples = read_examples(data, model, limit=limit)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("generating", total=sum(bool(example.prompt) for example in examples))

        def advance(index: int, output: Output) -> None:
            progress.advance(task)

        result = evaluate(model, examples, options, on_output=advance, batch=batch)
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False, indent=1))
        return
    for name, value in _lines(result, model.kernels):
        click.echo(f"{name:<20}{value}")


def _lines(result: dict[str, Any], kernels: str) -> list[tuple[str, str]]:
    rows = [("mode", result["mode"]), ("kernels", kernels), ("records", f"{result['records']:,}")]
    if result["loss"] is not None:
        rows.append(("held-out loss", f"{result['loss']:.4f} nats per token ({result['response_tokens']:,} tokens)"))
    if result["accuracy"] is not None:
        rows.append(("exact match", f"{result['accuracy']:.1%} ({result['correct']} of {result['answers']})"))
    if result["tokens_per_forward"] is not None:
        counts = f"{result['new_tokens']:,} tokens, {result['forwards']:,} forwards, {result['seconds']:.1f} s"
        rows.append(("tokens per forward", f"{result['tokens_per_forward']:.2f} ({counts})"))
        rows.append(("stopped by", ", ".join(f"{name} {count}" for name, count in result["stop_reasons"].items())))
    if result["too_long"]:
        rows.append(("left out", f"{result['too_long']} prompts that fill the model's context"))
    return rows
