"""Checkpoints as far as vLLM's part of the server reads them: JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flarec.checkpoint.manifest import AdapterInfo, DecodeDefaults, Manifest, MaskToken, Source

READOUTS = {"ar-trust": "causal", "diffusion-trust": "block_end"}


def written(
    folder: Path, model_type: str = "llama", *, kind: Any = "row", readouts: dict[str, str] = READOUTS,
    adapter: AdapterInfo | None = None, manifest: bool = True, **config: Any,
) -> Path:
    """A directory with config.json and, unless `manifest` says no, flarec.json: mask token 500, blocks of 4."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    if manifest:
        mask = MaskToken(kind, 500, ((0, 500),) if kind == "random" else ())
        found = Manifest(Source("origin"), mask, DecodeDefaults(4, dict(readouts)), adapter=adapter)
        (folder / "flarec.json").write_text(found.to_json())
    return folder
