"""`flarec tune`: settings of Diffusion-Trust and elastic decoding by what they keep of causal decoding's accuracy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flarec.base.files import check_apart, check_name, write_file
from flarec.base.generation import RECHECKED, GenerationOptions
from flarec.errors import UsageError
from flarec.evaluation.choice import KEEP, RECHECKS, THRESHOLDS

from .loading import open_model
from .options import (
    FiniteRange,
    adapter_option,
    asking_options,
    check_data,
    data_option,
    foreign_options,
    generation_options,
    plugin_options,
    runtime_options,
)

if TYPE_CHECKING:
    from flarec.api import Model
    from flarec.tune import Halves, Tuning

OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
SHARE = FiniteRange(0, 1)
KIND, FORMAT_VERSION = "flarec tuning", 1


@click.command("tune")
@click.argument("checkpoint", metavar="CKPT")
@data_option
@click.option(
    "--mode", "modes", type=click.Choice(RECHECKED), multiple=True,
    help="Whose settings are chosen (repeatable). Default: each of them that the checkpoint has.",
)
@click.option(
    "--threshold", "thresholds", type=SHARE, multiple=True, default=THRESHOLDS, show_default=True, metavar="P",
    help="Tried with every --recheck (repeatable).",
)
@click.option(
    "--recheck", "rechecks", type=SHARE, multiple=True, default=RECHECKS, show_default=True, metavar="F",
    help="Tried with every --threshold (repeatable); 1 gives the text of causal decoding.",
)
@click.option(
    "--keep", type=SHARE, default=KEEP, show_default=True, metavar="SHARE",
    help="Of causal decoding's accuracy, that a setting has to keep on the half that chooses.",
)
@generation_options(*OPTIONS)
@asking_options
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write a JSON record of all numbers.")
@click.option(
    "--write", is_flag=True,
    help="Make the chosen settings the checkpoint's defaults, and put the curve into its model card. Of CKPT, or of "
    "the directory of --adapter, flarec.json and README.md are replaced, nothing else.",
)
@runtime_options
@foreign_options
@adapter_option
@plugin_options
@click.option("--json", "as_json", is_flag=True, help="Print the record on stdout.")
@click.pass_context
def command(
    ctx: click.Context, /, checkpoint: str, data: Path, modes: tuple[Any, ...], thresholds: tuple[float, ...],
    rechecks: tuple[float, ...], keep: float, limit: int | None, batch: int, samples: int, thinking: bool | None,
    execute: bool, out: Path | None, write: bool, mask_token_id: int | None, block_size: int | None,
    adapter: Path | None, plugins: tuple[str, ...], passes: tuple[str, ...], as_json: bool, **keywords: Any,
) -> None:
    """Choose the settings with which CKPT decodes: most tokens per forward at the accuracy of causal decoding.

    Every pair of --threshold and --recheck is measured on one half of the graded records. Of those that keep enough,
    the one with most tokens per forward is reported on the other half, which chose nothing.
    """
    check_data(data, out)
    if out is not None:
        check_name(out)
        check_apart([out], [data, Path(checkpoint), *([adapter] if adapter is not None else [])])
    options = GenerationOptions(**{name: keywords.pop(name) for name in OPTIONS})
    if write and passes:
        raise UsageError("--write is for the checkpoint as it is opened without --pass; leave one of them out")
    if write:
        _check_writable(checkpoint, adapter, mask_token_id, block_size)
    model = open_model(
        checkpoint, mask_token_id=mask_token_id, block_size=block_size, passes=passes, plugins=plugins,
        adapter=adapter, **keywords,
    )
    from flarec.evaluate import identity, read_examples  # slow to import, like everything below flarec.api
    from flarec.tune import Tuning, graded, modes_of, noted

    plan = Tuning(modes_of(model, modes), thresholds, rechecks, keep, options, batch, samples, execute)
    halves = graded(
        read_examples(data, model, limit=limit, thinking=thinking), model.engine.max_positions, execute=execute
    )
    made = identity(model, checkpoint, data)
    found = noted(_measure(model, halves, plan), made, plan)
    missed = [mode for mode, table in found.items() if table["chosen"] is None]
    record = {
        "record": KIND, "format_version": FORMAT_VERSION, **made,
        "options": {name: getattr(options, name) for name in OPTIONS},
        "settings": {"samples": samples, "limit": limit, "batch": batch, "execute": execute, "thinking": thinking},
        "modes": found,
    }
    if out is not None:
        write_file(out, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    if as_json:
        click.echo(json.dumps(record, ensure_ascii=False, indent=1))
    else:
        for mode, table in found.items():
            _show(mode, table)
    if missed:
        rest = "; nothing is written" if write else ""
        click.echo(f"{'; '.join(_why(mode, found[mode]) for mode in missed)}{rest}", err=True)
        ctx.exit(1)
    if write:
        _write(checkpoint, adapter, model, found)


def _check_writable(checkpoint: str, adapter: Path | None, mask_token_id: int | None, block_size: int | None) -> None:
    from flarec.checkpoint.directory import open_checkpoint
    from flarec.checkpoint.retune import check_retunable

    small = open_checkpoint(checkpoint, mask_token_id=mask_token_id, block_size=block_size, adapter=adapter)
    check_retunable(checkpoint, small)


def _measure(model: Model, halves: Halves, plan: Tuning) -> dict[Any, dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    from flarec.tune import answers_of, tune

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("generating", total=answers_of(plan, halves))
        return tune(model, halves, plan, lambda: progress.advance(task))


def _write(checkpoint: str, adapter: Path | None, model: Model, found: Mapping[str, Mapping[str, Any]]) -> None:
    from flarec.checkpoint.location import resolve
    from flarec.checkpoint.retune import retuned, rewrite

    assert model.manifest is not None
    home = resolve(checkpoint) if adapter is None else adapter
    rewrite(home, model.manifest, retuned(model.manifest, found), lambda text: click.echo(text, err=True))
    click.echo(f"written: {home / 'flarec.json'}", err=True)


def _show(mode: str, table: Mapping[str, Any]) -> None:
    """The curve of a mode, and what was chosen."""
    causal = table["causal"]
    click.echo(f"{mode}, {causal['choosing']['answers']} answers of the half that chooses")
    click.echo(f"{'threshold':>11}{'recheck':>9}{'accuracy':>10}{'tokens per forward':>20}{'as causal':>11}")
    _row("causal", "", causal["choosing"])
    for row in table["curve"]:
        chosen = {name: row[name] for name in ("threshold", "recheck")} == table["chosen"]
        _row(f"{row['threshold']:g}", f"{row['recheck']:g}", row, " chosen" if chosen else "")
    reported = table["reported"]
    if reported is None:
        return
    click.echo(f"on the other half, {reported['answers']} answers")
    _row("causal", "", causal["reporting"])
    _row(f"{table['chosen']['threshold']:g}", f"{table['chosen']['recheck']:g}", reported)
    paired, (low, high) = reported["to_causal"], reported["accuracy_interval"]
    click.echo(
        f"  its accuracy, 95 %: {low:.1%} to {high:.1%}; difference to causal decoding {paired['difference']:+.1%} "
        f"({paired['low']:+.1%} to {paired['high']:+.1%}; better on {paired['better']}, worse on {paired['worse']} "
        f"prompts, p = {paired['p_value']:.3g})"
    )
    if reported["accuracy"] < table["keep"] * causal["reporting"]["accuracy"]:
        click.echo(f"  that is less than {table['keep']:.0%} of causal decoding's accuracy there", err=True)


def _row(threshold: str, recheck: str, row: Mapping[str, Any], note: str = "") -> None:
    equal = f"{row['equal_texts']} of {row['answers']}" if "equal_texts" in row else ""
    click.echo(
        f"{threshold:>11}{recheck:>9}{row['accuracy']:>10.1%}{row['tokens_per_forward']:>20.2f}{equal:>11}{note}"
    )


def _why(mode: str, table: Mapping[str, Any]) -> str:
    """That no setting keeps enough, in a sentence."""
    row = max(table["curve"], key=lambda row: float(row["accuracy"]))
    exact = any(other["recheck"] == 1 for other in table["curve"])
    higher = "try a higher --recheck (1 gives the text of causal decoding)"
    cure = "near ties alone part a recheck of 1 from it: measure more tasks, or in --dtype float32" if exact else higher
    return (
        f"no setting of {mode} keeps {table['keep']:.0%} of causal decoding's accuracy of "
        f"{table['causal']['choosing']['accuracy']:.1%}: the most accurate one, threshold {row['threshold']:g} with "
        f"recheck {row['recheck']:g}, has {row['accuracy']:.1%}; {cure}"
    )
