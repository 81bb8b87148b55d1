"""Converted checkpoints without the training: a tiny source's weights, written as `flarec convert` writes them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flarec.base.hashes import FileEntry
from flarec.checkpoint.directory import describe_source, open_checkpoint
from flarec.checkpoint.manifest import AdapterInfo, DecodeDefaults, Manifest, MaskToken, Source
from flarec.checkpoint.write import write_adapter_checkpoint, write_checkpoint
from flarec.frontend.export import capture
from flarec.ir.pipeline import pipeline_text
from flarec.passes import AdaptNoisyStream, pipeline
from flarec.passes.adapt_noisy_stream import new_adapter
from flarec.passes.embed_mask import PARAMETER
from tests.models import TOKENS, VOCABULARY, few_checkpoint

MASK_ROW = VOCABULARY - 1
READOUTS = {"ar-trust": "causal", "diffusion-trust": "block_end"}


def manifest_for(source: Path, kind: str = "row", block_size: int = 3) -> Manifest:
    token, ids = MASK_ROW if kind == "row" else VOCABULARY, ((3, 40), (44, TOKENS)) if kind == "random" else ()
    readouts = {name: readout for name, readout in READOUTS.items() if name == "ar-trust" or kind != "random"}
    return Manifest(
        describe_source(source),
        MaskToken(kind, token, ids),  # type: ignore[arg-type]
        DecodeDefaults(block_size, readouts),
        recipe={"name": "draft"},
        pipelines={
            target: pipeline_text(pipeline(target, mask_vector=kind == "vector")) for target in ("train", "decode")
        },
        data={"train.jsonl": {"documents": 3, "tokens": 120}},
        metrics={"ar_loss": 1.25},
    )


def mask_vector(width: int = 64) -> dict[str, nn.Parameter]:
    values = torch.randn(width, generator=torch.Generator().manual_seed(5))
    return {PARAMETER: nn.Parameter(values)}


def converted(directory: Path, family: str = "bamba", kind: str = "row", **options: Any) -> tuple[Path, Path]:
    """(source, checkpoint) below `directory`; `options` go to `write_checkpoint`."""
    source = few_checkpoint(directory / "source", family)
    opened = open_checkpoint(source)
    out = write_checkpoint(
        directory / f"{family}-{kind}",
        opened.load_model(torch.float32),
        opened.load_tokenizer(),
        manifest_for(source, kind),
        mask_vector() if kind == "vector" else None,
        **options,
    )
    return source, out


def adapted(
    directory: Path, family: str = "bamba", alone: bool = False, kind: str = "vector", **options: Any
) -> tuple[Path, Path]:
    """(source, checkpoint with an adapter that changes noisy rows); `options` go to `write_adapter_checkpoint`."""
    source = few_checkpoint(directory / "source", family)
    adapter = AdaptNoisyStream(rank=4, alpha=8.0)
    program = capture(open_checkpoint(source).load_model(torch.float32), cache=True)
    extra = new_adapter(program, adapter, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in extra.items():
        if name.endswith("lora_B.weight"):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    manifest = replace(
        manifest_for(source, kind),
        pipelines={
            target: pipeline_text(pipeline(target, mask_vector=kind == "vector", adapter=adapter))
            for target in ("train", "decode")
        },
        adapter=AdapterInfo(adapter.rank, adapter.alpha, adapter.modules, alone),
    )
    out = directory / f"{family}-adapter{'-alone' if alone else ''}"
    vector = mask_vector() if kind == "vector" else {}
    return source, write_adapter_checkpoint(out, source, manifest, {**extra, **vector}, **options)


def own_folder(path: Path, *names: str) -> Path:
    """A folder as `flarec convert` leaves it, as far as its record goes: a manifest, and the files that it lists."""
    path.mkdir(parents=True)
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"the old {name}")
    manifest = Manifest(
        Source("origin"), MaskToken("row", MASK_ROW), DecodeDefaults(3, dict(READOUTS)),
        files={name: FileEntry.of(path / name) for name in names},
    )
    (path / "flarec.json").write_text(manifest.to_json())
    return path


def tree(place: Path) -> dict[str, str]:
    """Everything below a folder: what a file holds, where a link leads; folders too."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found
