"""`flarec serve`: an OpenAI-compatible server for one model, flarec's own or vLLM's."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from flarec.errors import UsageError
from flarec.threads import found_environment

from .loading import open_model
from .options import adapter_option, foreign_options, given, plugin_options, prefix_option, runtime_options

BOTH = ("checkpoint", "engine", "engine_args", "host", "port", "name", "api_key", "dtype", "debug")
"""Parameters that mean the same to both engines."""
VLLM_ONLY = ("python", "dry_run")


@click.command("serve")
@click.argument("checkpoint", metavar="CKPT")
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ENGINE ARGS...]")
@click.option("--engine", type=click.Choice(("auto", "flarec", "vllm")), default="auto", show_default=True,
              help="auto: flarec. vllm: vLLM's own server, which drafts with the checkpoint by classes of flarec.")
@click.option("--python", metavar="PATH", help="vllm: the Python of the environment that has it. Default: this one.")
@click.option("--dry-run", is_flag=True, help="vllm: print the command and end.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
              help="0.0.0.0 or :: to be reached from other machines.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="N", help="0: any.")
@click.option("--served-model-name", "name", metavar="NAME", help="What clients call the model. Default: CKPT's name.")
@click.option("--api-key", envvar="FLAREC_API_KEY", metavar="KEY",
              help="Clients must send it; else no key is asked for. Default: $FLAREC_API_KEY.")
@click.option("--max-queue", type=click.IntRange(min=1), default=1024, show_default=True, metavar="N",
              help="Generations that run or wait; more are refused (429).")
@click.option("--max-body", type=click.IntRange(min=1), default=4 << 20, show_default=True, metavar="BYTES",
              help="Largest request (413).")
@click.option("--grace", type=click.IntRange(min=0), default=30, show_default=True, metavar="S",
              help="After SIGTERM open requests get S seconds to end.")
@prefix_option
@runtime_options
@foreign_options
@adapter_option
@plugin_options
@click.pass_context
def command(
    ctx: click.Context, /, checkpoint: str, engine: str, engine_args: tuple[str, ...], host: str, port: int,
    name: str | None, api_key: str | None, **options: Any,
) -> None:
    """Serve a converted checkpoint CKPT, or any supported model, with OpenAI's protocol.

    /v1/models, /v1/completions and /v1/chat/completions; beside OpenAI's fields a request may say mode, drafts,
    threshold, denoising_steps, recheck, top_k and chat_template_kwargs. /health, and /metrics for Prometheus. SIGTERM
    and Ctrl-C end it when open requests have ended.

    With --engine vllm the command line of vLLM's server is printed and run; what follows -- goes to it.
    """
    if api_key is not None and not (api_key := api_key.strip()):
        raise UsageError("the API key is empty; give one, or leave it out")
    if api_key is not None and not api_key.isascii():
        raise UsageError("the API key has other characters than ASCII, which HTTP does not carry; choose another one")
    known = name or (Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint)
    said = given(ctx)
    if engine == "vllm":
        if strange := [parameter for parameter in said if parameter.name not in (*BOTH, *VLLM_ONLY)]:
            raise UsageError(f"{strange[0].opts[0]} is for flarec's own engine; leave it out with --engine vllm")
        _run_vllm(checkpoint, engine_args, known, host, port, api_key, options)
        return
    if engine_args:
        raise UsageError(f"{engine_args[0]} behind the checkpoint is for --engine vllm; leave it out, or give that too")
    if strange := [parameter for parameter in said if parameter.name in VLLM_ONLY]:
        raise UsageError(f"{strange[0].opts[0]} is for --engine vllm; leave it out, or give that too")
    _run_own(checkpoint, known, host, port, api_key, **options)


def _run_vllm(
    checkpoint: str, engine_args: tuple[str, ...], name: str, host: str, port: int, api_key: str | None,
    options: dict[str, Any],
) -> None:
    """Become vLLM's server. Its own key is a variable of the environment, so that no list of processes shows it."""
    from flarec.checkpoint.location import resolve
    from flarec.serve.vllm.command import check_environment, command

    python = options["python"] or sys.executable
    directory = resolve(checkpoint)
    words = command(
        directory, python, name=name, host=host, port=port, dtype=options["dtype"], extra=engine_args
    )
    if not options["dry_run"]:
        check_environment(python, directory)
    click.echo(shlex.join(words), err=not options["dry_run"])
    if options["dry_run"]:
        if api_key is not None:
            click.echo("Note: the API key is not among these words; give it to vLLM as VLLM_API_KEY", err=True)
        return
    sys.stdout.flush()
    key = {"VLLM_API_KEY": api_key} if api_key is not None else {}
    os.execvpe(words[0], words, {**found_environment(), **key})


def _run_own(
    checkpoint: str, name: str, host: str, port: int, api_key: str | None, *, max_queue: int, max_body: int, grace: int,
    prefix_cache: int, python: str | None, dry_run: bool, **model: Any,
) -> None:
    """Flarec's own server, until somebody ends it."""
    try:
        from flarec.serve.app import Limits, Service
        from flarec.serve.run import is_loopback, listening, serve, url_of
    except ModuleNotFoundError as error:
        raise UsageError(f"flarec serve needs the package {error.name}: pip install 'flarec[serve]'") from None
    bound = listening(host, port)
    if api_key is None and not is_loopback(bound):
        click.echo("Warning: other machines can use this server, and no --api-key is asked for", err=True)
    loaded = open_model(checkpoint, **model)
    loaded.engine.keep_prefixes(prefix_cache << 20)
    service = Service(loaded, name, api_key=api_key, limits=Limits(max_queue, max_body))
    serve(service, bound, grace=grace, ready=lambda: click.echo(f"serving {name} on {url_of(bound)}", err=True))
