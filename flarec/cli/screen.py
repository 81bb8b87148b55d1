"""`flarec screen`."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from ..screen.arguments import ScreenArguments
from .options import field_options

if TYPE_CHECKING:
    from ..screen.screen import MixScore, Screening

OPTIONS = [item.name for item in fields(ScreenArguments) if item.name != "source"]


@click.command("screen")
@click.argument("source")
@field_options(ScreenArguments, *OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(as_json: bool, **arguments: Any) -> None:
    """Compare mixes of training data for SOURCE (directory or hub id): a short run of plain fine-tuning on each.

    All start from the same weights and are measured on one split that none is trained on. The best comes first; with
    --convert OUT the model is converted with it. Nothing else is written.
    """
    # imported here so that `flarec screen --help` stays quick
    from ..screen.screen import screen
    from ..train.progress import ConsoleReporter

    screening = screen(ScreenArguments(**arguments), ConsoleReporter())
    if as_json:
        click.echo(json.dumps(screening.to_dict(), ensure_ascii=False, indent=1))
        return
    for line in _table(screening):
        click.echo(line)


def _table(screening: Screening) -> list[str]:
    rows = [(str(number), measured) for number, measured in enumerate(screening.ranked, 1)]
    rows.append(("", screening.source))
    width = max(4, *(len(measured.name) for _, measured in rows))
    lines = [f"{'':>2}  {'mix':<{width}}  {'loss':>8}  {'accuracy':>16}  {'documents':>9}  {'tokens':>11}  {'s':>6}"]
    lines += [f"{number:>2}  {measured.name:<{width}}  {_numbers(measured)}" for number, measured in rows]
    mean, error = screening.lead
    what = "held-out loss" if screening.by == "loss" else "accuracy, then held-out loss"
    noise = "" if error is None else f" +- {error:.4f}"
    lines += [
        "",
        f"chosen by {what} on one split: {screening.split}; {screening.steps} steps each, lr {screening.lr:g}, seed "
        f"{screening.seed}",
        f"{screening.best} against {screening.ranked[1].name}: loss per token lower by {mean:.4f}{noise} (mean "
        "over documents, standard error)",
    ]
    if error is None or abs(mean) < 2 * error:
        larger = "a larger --held-out" if screening.whole else "more documents to measure on (--eval-data)"
        lines.append(f"that is within the noise of this split: more --steps or {larger} would tell them apart")
    if screening.checkpoint is not None:
        lines.append(f"checkpoint: {screening.checkpoint}")
    return lines


def _numbers(measured: MixScore) -> str:
    right = "-" if measured.accuracy is None else f"{measured.accuracy:.1%} of {measured.tasks}"
    counts = f"{measured.documents:>9,}  {measured.trained:>11,}  {measured.seconds:>6.1f}"
    return f"{measured.loss:>8.4f}  {right:>16}  {counts}"
