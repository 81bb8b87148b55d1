"""`flarec serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

from pathlib import Path

import click

from flarec.errors import UsageError

from .loading import open_model
from .options import adapter_option, foreign_options, plugin_options, prefix_option, runtime_options


@click.command("serve")
@click.argument("checkpoint", metavar="CKPT")
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
def command(
    checkpoint: str, host: str, port: int, name: str | None, api_key: str | None, max_queue: int, max_body: int,
    grace: int, device: str, dtype: str | None, kernels: str, graphs: str, compile: str, mask_token_id: int | None,
    block_size: int | None, adapter: Path | None, plugins: tuple[str, ...], passes: tuple[str, ...],
    prefix_cache: int,
) -> None:
    """Serve a converted checkpoint CKPT, or any supported model, with OpenAI's protocol.

    /v1/models, /v1/completions and /v1/chat/completions; beside OpenAI's fields a request may say mode, drafts,
    threshold, denoising_steps, top_k and chat_template_kwargs. /health, and /metrics for Prometheus. SIGTERM and Ctrl-C
    end it when open requests have ended.
    """
    try:
        from flarec.serve.app import Limits, Service
        from flarec.serve.run import is_loopback, listening, serve, url_of
    except ModuleNotFoundError as error:
        raise UsageError(f"flarec serve needs the package {error.name}: pip install 'flarec[serve]'") from None
    if api_key is not None and not (api_key := api_key.strip()):
        raise UsageError("the API key is empty; give one, or leave it out")
    if api_key is not None and not api_key.isascii():
        raise UsageError("the API key has other characters than ASCII, which HTTP does not carry; choose another one")
    bound = listening(host, port)
    if api_key is None and not is_loopback(bound):
        click.echo("Warning: other machines can use this server, and no --api-key is asked for", err=True)
    model = open_model(
        checkpoint, dtype=dtype, device=device, kernels=kernels, mask_token_id=mask_token_id, block_size=block_size,
        passes=passes, plugins=plugins, graphs=graphs, compile=compile, adapter=adapter,
    )
    model.engine.keep_prefixes(prefix_cache << 20)
    known = name or (Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint)
    service = Service(model, known, api_key=api_key, limits=Limits(max_queue, max_body))
    serve(service, bound, grace=grace, ready=lambda: click.echo(f"serving {known} on {url_of(bound)}", err=True))
