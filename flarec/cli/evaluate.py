"""`flarec eval`: held-out loss, accuracy and tokens per forward, alone or beside another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from flarec.base.files import write_file
from flarec.base.generation import GenerationOptions
from flarec.errors import UsageError

from .loading import open_model, say_unread
from .options import (
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
    from flarec.api import Model, Output
    from flarec.evaluate import Example
    from flarec.evaluation.summary import Attempt

OPTIONS = (
    "mode", "threshold", "denoising_steps", "recheck", "drafts", "max_new_tokens", "temperature", "top_k", "top_p",
    "seed",
)
OF_A_RECORD = (*OPTIONS, "samples", "limit", "batch", "execute", "thinking")
"""What --repeat takes from the record."""


@click.command("eval")
@click.argument("checkpoint", metavar="CKPT")
@data_option
@generation_options(*OPTIONS)
@asking_options
@click.option(
    "--against", metavar="MODEL", help="Another model, such as the source, compared on the same prompts and seeds.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE",
    help="Write a JSON record: numbers, answers, and what is needed to repeat them.",
)
@click.option(
    "--repeat", type=click.Path(path_type=Path), metavar="FILE",
    help="Take the settings from a record of --out, and say whether the numbers are the same.",
)
@runtime_options
@foreign_options
@adapter_option
@plugin_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def command(
    ctx: click.Context, /, checkpoint: str, data: Path, limit: int | None, batch: int, samples: int, execute: bool,
    thinking: bool | None, against: str | None, out: Path | None, repeat: Path | None, mask_token_id: int | None,
    block_size: int | None, adapter: Path | None, plugins: tuple[str, ...], passes: tuple[str, ...], as_json: bool,
    **keywords: Any,
) -> None:
    """Evaluate CKPT (or a source model, causally) on held-out records.

    The loss is that of the clean stream per response token. Every record with a prompt is generated, greedily unless
    a temperature is given.
    """
    check_data(data, out)
    options = GenerationOptions(**{name: keywords.pop(name) for name in OPTIONS})
    settings: dict[str, Any] = {
        "samples": samples, "limit": limit, "batch": batch, "execute": execute, "thinking": thinking,
    }
    record = None
    if repeat is not None:
        record, options, settings = _settings(ctx, repeat, data)
    model = open_model(
        checkpoint, mask_token_id=mask_token_id, block_size=block_size, passes=passes, plugins=plugins,
        adapter=adapter, mode=options.mode, **keywords,
    )
    if record is None:  # a record holds every option, those that its mode does not read among them
        say_unread(options, str(model.complete(options).mode))
    elif record.get("against") and against is None:
        click.echo("the comparison in the record is not repeated; give --against for it", err=True)
    from flarec.evaluate import identity, read_examples  # slow to import, like everything below flarec.api
    from flarec.evaluation.record import differences, to_record
    from flarec.evaluation.summary import compare

    taken = {name: settings[name] for name in ("limit", "thinking")}
    examples = read_examples(data, model, **taken)
    options = model.complete(options)
    found = identity(model, checkpoint, data)
    if record is not None and found["model"] != record["model"]:
        raise UsageError(f"{checkpoint} is not the model of --repeat {repeat}; give {record['model'].get('name')}")
    result, attempts = _measure(model, examples, options, settings)
    kernels = model.kernels
    beside = None
    if against is not None:
        del model
        other = open_model(against, mask_token_id=None, block_size=None, **keywords)
        others = read_examples(data, other, **taken)
        plain = GenerationOptions(**{name: getattr(options, name) for name in OPTIONS if name != "mode"})
        second, answers = _measure(other, others, plain, settings)
        beside = {**identity(other, against, data)["model"], **compare(attempts, answers), "mode": second["mode"]}
    if out is not None:
        table = to_record(found, options, settings, result, beside, attempts)
        write_file(out, json.dumps(table, ensure_ascii=False, indent=1) + "\n")
    if as_json:
        shown = result if beside is None else {**result, "against": beside}
        click.echo(json.dumps(shown, ensure_ascii=False, indent=1))
    else:
        for name, value in (*_lines(result, kernels), *_beside(beside, result["samples"])):
            click.echo(f"{name:<20}{value}")
    if record is not None:
        changed = differences(record["result"], result)
        click.echo("; ".join(changed) or "the same numbers as in the record", err=True)
        if changed:
            ctx.exit(1)


def _settings(
    ctx: click.Context, path: Path, data: Path
) -> tuple[dict[str, Any], GenerationOptions, dict[str, Any]]:
    """The record of --repeat, and the options and settings in it; given beside it they are refused."""
    from flarec.evaluation.record import hash_of_data, options_of, read_record, settings_of

    given = [name for name in OF_A_RECORD if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT]
    if given:
        off = ctx.params[given[0]] is False  # of a switch, which has a name of its own
        name = f"--{'no-' if off else ''}{given[0].replace('_', '-')}"
        raise UsageError(f"{name} is in the record of --repeat; leave it out")
    record = read_record(path)
    options, settings = options_of(record, path), settings_of(record, path)
    if hash_of_data(data) != record["data"].get("sha256"):
        raise UsageError(f"--data {data} is not the data of --repeat {path}; give {record['data'].get('name')}")
    return record, options, settings


def _measure(
    model: Model, examples: list[Example], options: GenerationOptions, settings: dict[str, Any]
) -> tuple[dict[str, Any], list[Attempt]]:
    from rich.console import Console
    from rich.progress import Progress

    from flarec.evaluate import assess

    with Progress(console=Console(stderr=True), transient=True) as progress:
        asked = sum(bool(example.prompt) for example in examples)
        task = progress.add_task("generating", total=asked * settings["samples"])

        def advance(index: int, output: Output) -> None:
            progress.advance(task)

        return assess(
            model, examples, options, on_output=advance, batch=settings["batch"], samples=settings["samples"],
            execute=settings["execute"],
        )


def _lines(result: dict[str, Any], kernels: str) -> list[tuple[str, str]]:
    rows = [("mode", result["mode"]), ("kernels", kernels), ("records", f"{result['records']:,}")]
    if result["loss"] is not None:
        rows.append(("held-out loss", f"{result['loss']:.4f} nats per token ({result['response_tokens']:,} tokens)"))
    if result["accuracy"] is not None:
        low, high = result["accuracy_interval"]
        counts = f"{result['correct']} of {result['answers']}; 95 %: {low:.1%} to {high:.1%}"
        rows.append(("accuracy", f"{result['accuracy']:.1%} ({counts})"))
    if result["samples"] > 1 and result["pass_at"]:
        rows.append(("pass@k", ", ".join(f"{k}: {value:.1%}" for k, value in result["pass_at"].items())))
    if result["tokens_per_forward"] is not None:
        counts = f"{result['new_tokens']:,} tokens, {result['forwards']:,} forwards, {result['seconds']:.1f} s"
        rows.append(("tokens per forward", f"{result['tokens_per_forward']:.2f} ({counts})"))
        free = result["loop_free"]
        if free["generated"] < result["generated"] and free["tokens_per_forward"] is not None:
            rows.append(("without loops", f"{free['tokens_per_forward']:.2f} ({free['generated']} answers)"))
        rows.append(("stopped by", ", ".join(f"{name} {count}" for name, count in result["stop_reasons"].items())))
    if result["too_long"]:
        rows.append(("left out", f"{result['too_long']} prompts that fill the model's context"))
    return rows


def _beside(found: dict[str, Any] | None, samples: int) -> list[tuple[str, str]]:
    """The rows of --against."""
    if found is None:
        return []
    rows = [("against", f"{found['name']}, {found['mode']}")]
    rows.append(("equal texts", f"{found['equal_texts']} of {found['answers']}"))
    paired = found["paired"]
    if paired is not None:
        span = f"95 %: {paired['low']:+.1%} to {paired['high']:+.1%}"
        rows.append(("its accuracy", f"{found['other_accuracy']:.1%}"))
        rows.append(("difference", f"{paired['difference']:+.1%} ({span})"))
        counts = f"better on {paired['better']}, worse on {paired['worse']} prompts"
        rows.append(("McNemar's test" if samples == 1 else "sign test", f"p = {paired['p_value']:.3g} ({counts})"))
    if found["loop_free"]["tokens_per_forward"] is not None:
        rows.append(("where it loops not", f"{found['loop_free']['tokens_per_forward']:.2f} tokens per forward"))
    return rows
