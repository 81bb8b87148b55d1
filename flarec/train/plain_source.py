"""The first step of a conversion whose source is no plain directory: `--gguf`, `--merge-adapter`, `--dequantize`.

A plain copy of it is made in the system's temporary folder, converted, and removed. It comes out the same each time, so
a run that continues makes it again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..checkpoint.location import resolve
from ..checkpoint.plain import write_plain, write_plain_gguf
from ..errors import UsageError
from ..frontend.source.gguf import gguf_file
from .options import Options
from .progress import Reporter


@contextmanager
def plain_source(options: Options, reporter: Reporter) -> Iterator[Options]:
    """The options with a plain copy of their source to open; as they are if it is opened itself.

    Raises `UsageError` and its kin for a source that cannot be read, before anything is written beside it.
    """
    file = gguf_file(options.source, options.gguf)
    adapter = Path(options.merge_adapter) if options.merge_adapter is not None else None
    in_memory = options.dequantize and adapter is None and options.load_recipe().adapter.rank > 0
    if options.prompts is not None and in_memory:
        raise UsageError("--prompts asks the source for answers, and a quantised one gives none; leave out one of them")
    if file is None and adapter is None and (in_memory or not options.dequantize):
        yield options
        return
    if options.adapter_only:
        raise UsageError(
            "--adapter-only is for a model that others have too, and this one is made from --gguf, --merge-adapter or "
            "--dequantize; leave it out"
        )
    if file is not None and (adapter is not None or options.dequantize):
        raise UsageError(f"{file} is dequantised anyway, and an adapter is merged into safetensors; give --gguf alone")
    home = file if file is not None else resolve(options.source)
    options.check_output(home)
    with tempfile.TemporaryDirectory(prefix="flarec-") as folder:
        plain = Path(folder) / (home.stem if file is not None else home.resolve().name)
        reporter.note(f"reading {home} as a plain model, in {folder}")
        if file is not None:
            write_plain_gguf(plain, file)
        else:
            write_plain(plain, options.source, dequantize=options.dequantize, adapter=adapter)
        yield replace(options, out=options.output, plain=plain)
