"""`flarec verify`: measure the invariants of docs/semantics.md section 5 on a real checkpoint."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import adapter_option, kernels_option, plugin_options

if TYPE_CHECKING:
    from flarec.verify import Result


@click.command()
@click.argument("checkpoint")
@kernels_option("auto")
@adapter_option
@click.option("--source", metavar="SOURCE", help="Of a checkpoint with an adapter: also compare with its source.")
@plugin_options
@click.option("--quick", is_flag=True, help="Every check on a text or two: what takes minutes takes a fraction of it.")
@click.option(
    "--dtype", metavar="NAME", help="bfloat16, float16: only AR-Trust against causal decoding there, near ties apart."
)
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="With --dtype: cpu, cuda ...")
@click.option(
    "--prompts", metavar="FILE", type=click.Path(path_type=Path),
    help="With --dtype: the first 200 of its prompts (as `flarec generate` reads them) instead of a text of flarec's.",
)
@click.option("--chat", is_flag=True, help="With --prompts: put them into the chat template.")
@click.option("--seed", default=0, show_default=True, help="Of the random layouts, tokens and sampling.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(
    checkpoint: str, kernels: str, adapter: Path | None, source: str | None, plugins: tuple[str, ...],
    passes: tuple[str, ...], quick: bool, dtype: str | None, device: str,
    prompts: Path | None, chat: bool, seed: int, as_json: bool,
) -> None:
    """Check a CHECKPOINT (or a model that was not converted) against the invariants of the method.

    Everything but --dtype runs in float32 on the CPU, on pieces of a small text; transformers, in float64 too, is the
    witness for invariants 1 and 6. With an adapter, checks 8 to 11 show that the model is its source (docs/semantics.md
    section 6); of what a checkpoint decodes with a recheck, check 12 shows that one of 1 gives causal decoding's text.

    Exit code 1 if one fails.
    """
    from flarec.verify import verify

    results = []
    given: dict[str, Any] = {"kernels": kernels, "seed": seed, "passes": passes, "plugins": plugins}
    given |= {"quick": quick, "dtype": dtype, "device": device, "prompts": prompts, "chat": chat}
    given |= {"say": lambda text: click.echo(text, err=True)}
    for result in verify(checkpoint, adapter=adapter, source=source, **given):
        results.append(result)
        if not as_json:
            _print(result, first=len(results) == 1)
    if as_json:
        click.echo(json.dumps([asdict(result) for result in results], indent=2))
    failed = sum(not result.passed for result in results)
    click.echo(f"{len(results) - failed} of {len(results)} invariants hold", err=as_json)
    if failed:
        sys.exit(1)


def _print(result: Result, first: bool) -> None:
    """One row of the table as soon as it is known: the larger the model, the longer the wait."""
    row = "{:<3}{:<32}{:<54}{:>11} {:>9}  {}"
    if first:
        click.echo(row.format("", "invariant", "compared", "difference", "bound", ""))
    verdict = "pass" if result.passed else "FAIL"
    difference, bound = f"{result.difference:.1e}", f"{result.bound:.1e}"
    click.echo(row.format(result.invariant, result.title, result.compared, difference, bound, verdict))
    for note in result.notes:
        click.echo(f"   {note}")
