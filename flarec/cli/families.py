"""`flarec families`: which model families go through which stages."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flarec.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flarec.conformance import Row, SuiteRun, Trial


WIDTH = 150  # of what is not a terminal


@click.command()
@click.argument("families", nargs=-1, metavar="[FAMILY]...")
@click.option("--run", "live", is_flag=True, help="Try the families now, instead of showing what was recorded.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON, with seconds and reasons.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
@click.option(
    "--write", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="With --run: merge the results into FILE, in place of those with the same version of transformers.",
)
@click.option("--commit", metavar="ID", help="With --write: commit of the tree, kept in the results.")
def command(
    families: tuple[str, ...], live: bool, as_json: bool, as_markdown: bool, write: Path | None, commit: str | None
) -> None:
    """Show every model FAMILY with its mixers, semantic ops and the stages it passes: capture, passes, training,
    checkpoint, the three ways to decode, inspect, verify.

    Shown is the recorded run of all families on small models. `--run` tries those named, or all that the installed
    transformers has; exit code 1 if a stage fails.
    """
    from flarec.conformance import load_runs, markdown, merge_run, names, rows, save_runs

    if as_json and as_markdown:
        raise UsageError("--json and --markdown are two forms of one table; choose one")
    if (write or commit) and not live:
        raise UsageError("--write and --commit keep the results of a run; add --run")
    unknown = sorted(set(families) - set(names()))
    if unknown:
        raise UsageError(f"unknown family '{unknown[0]}'; known: {', '.join(names())}")
    known = load_runs(write) if write is not None and write.exists() else []  # before the work: the file may be another
    runs = [_run(families, commit)] if live else load_runs()
    if write is not None:
        save_runs(merge_run(known, runs[0]), write)
    table = [row for row in rows(runs) if row.versions or not live]
    table = [row for row in table if row.family in families or not families]
    if as_json:
        click.echo(json.dumps(_plain(table, runs), indent=2))
    elif as_markdown:
        click.echo(markdown(table))
    else:
        _print(table, runs, everything=not families and not live)
    if live and any(row.failed for row in table):
        sys.exit(1)


def _run(families: Sequence[str], commit: str | None) -> SuiteRun:
    """Try the families (all if none is named); a line on stderr for each."""
    import torch

    from flarec.checkpoint.write import versions
    from flarec.conformance import SuiteRun, names, try_family
    from flarec.conformance.record import device_text
    from flarec.frontend.tiny import available

    torch.set_num_threads(1)  # on models this small, threads wait for each other
    wanted = list(families) or names()
    absent = tuple(sorted(family for family in wanted if not available(family)))
    trials: dict[str, Trial] = {}
    for family in wanted:
        if family in absent:
            click.echo(f"{family:<20} not in this transformers", err=True)
            continue
        trials[family] = trial = try_family(family)
        failed = [f"{stage}: {outcome.detail}" for stage, outcome in trial.stages.items() if not outcome.passed]
        click.echo(f"{family:<20} {trial.seconds:6.1f} s  {failed[0] if failed else 'all stages pass'}", err=True)
    if not trials:
        raise UsageError(f"transformers {versions()['transformers']} has none of {', '.join(wanted)}; name others")
    commits = dict.fromkeys(trials, commit) if commit else {}
    return SuiteRun(versions(), device_text(), trials, absent, commits)


def _plain(table: Sequence[Row], runs: Sequence[SuiteRun]) -> dict[str, object]:
    from flarec.frontend.families import REFUSED

    shown = [row.family for row in table]
    return {
        "families": [asdict(row) for row in table],
        "refused": dict(REFUSED),
        "runs": [
            {
                "versions": dict(run.versions),
                "device": run.device,
                "trials": {name: asdict(trial) for name, trial in run.trials.items() if name in shown},
            }
            for run in runs
        ],
    }


def _print(table: Sequence[Row], runs: Sequence[SuiteRun], *, everything: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from flarec.conformance.table import TITLES
    from flarec.frontend.families import REFUSED

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    shown = Table(*TITLES, box=None, pad_edge=False)
    for row in table:
        shown.add_row(*row.cells())
    console.print(shown)
    for row in table:
        for stage, sentence in row.failed.items():
            console.print(f"{row.family}, {stage}: {sentence}", markup=False, soft_wrap=True)
    if everything:
        console.print("known, and refused:")
        for family, reason in REFUSED.items():
            console.print(f"  {family}: {reason}", markup=False, highlight=False, soft_wrap=True)
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        console.print(f"tried with {versions} on {run.device}", markup=False, highlight=False, soft_wrap=True)
