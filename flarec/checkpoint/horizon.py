"""The horizon head of a checkpoint: how many drafts are safe, for elastic decoding.

    flarec.json          pipelines.elastic: the decode pipeline with `predict-horizon(positions=..., width=...)`
    horizon.safetensors  the parameters of that pass, float32

The manifest's pipeline text says all that decides anything, and the file is listed and hashed as every other one is: a
flarec that knows no elastic decoding opens such a checkpoint as it opens others.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, first_line
from ..ir.pipeline import Pass, parse_pass, pipeline_text
from ..passes import PASSES, PredictHorizon
from ..passes.narrow_head import NarrowHead
from .adapter import linked
from .curve import without_settings
from .manifest import NAME as MANIFEST
from .manifest import RUN_KEY, Manifest
from .weights import weight_files

FILE = "horizon.safetensors"
TARGET = "elastic"
"""Key of the manifest's `pipelines`."""
_MADE_ANEW = ("README.md", MANIFEST)


def horizon_of(manifest: Manifest | None) -> PredictHorizon | None:
    """The pass of a checkpoint with a horizon head, None for one without. Raises `CheckpointError` for one that cannot
    be what it says."""
    text = manifest.pipelines.get(TARGET) if manifest is not None else None
    if manifest is None or text is None:
        return None
    lines = [line for line in text.splitlines() if line.startswith(PredictHorizon.name)]
    step = parse_pass(lines[0], PASSES) if lines else None
    if not isinstance(step, PredictHorizon):
        raise CheckpointError(f"{MANIFEST} has a pipeline '{TARGET}' without {PredictHorizon.name}; copy it again")
    if step.positions != manifest.decode.block_size:
        raise CheckpointError(
            f"the horizon head of {MANIFEST} is for blocks of {step.positions}, and the checkpoint has blocks of "
            f"{manifest.decode.block_size}; train it again (flarec train-head)"
        )
    return step


def read_horizon(
    home: Path, manifest: Manifest | None, dtype: torch.dtype | None, device: torch.device | str
) -> dict[str, Tensor]:
    """The parameters in the directory of the manifest, by name; empty without a horizon head. Raises `CheckpointError`
    for a file that is missing, damaged or of another head."""
    step = horizon_of(manifest)
    if step is None:
        return {}
    path = home / FILE
    try:
        tensors = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}; copy the checkpoint again") from error
    first = tensors.get("horizon.0.weight")
    wanted = step.shapes(first.shape[1]) if first is not None and first.dim() == 2 else {}
    if not wanted or {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
        raise CheckpointError(
            f"{path} does not hold the head that {MANIFEST} names ({step.text()}); copy the checkpoint again"
        )
    return {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}


def with_horizon(steps: list[Pass], horizon: PredictHorizon) -> str:
    """The text of the pipeline `elastic`: that of decoding, and the pass behind `narrow-head`."""
    rest = [step for step in steps if not isinstance(step, PredictHorizon)]
    place = next(number for number, step in enumerate(rest, 1) if isinstance(step, NarrowHead))
    return pipeline_text([*rest[:place], horizon, *rest[place:]])


def manifest_with(
    manifest: Manifest, steps: list[Pass], horizon: PredictHorizon, data: Mapping[str, Any], metrics: Mapping[str, Any]
) -> Manifest:
    """That of the checkpoint with the head. It is no run's result any more, and what `flarec tune` chose for another
    head is gone. steps: of the pipeline `decode`."""
    kept = {name: value for name, value in manifest.data.items() if name != RUN_KEY}
    manifest = without_settings(manifest, TARGET)
    return replace(
        manifest,
        pipelines={**manifest.pipelines, TARGET: with_horizon(steps, horizon)},
        data={**kept, "horizon": dict(data)},
        metrics={**manifest.metrics, "horizon": dict(metrics)},
    )


def place_checkpoint(
    home: Path, manifest: Manifest, parameters: Mapping[str, Tensor], partial: Path, *, link: bool,
    note: Callable[[str], None],
) -> None:
    """Put the files of a checkpoint, byte for byte, and the head's file into `partial`; link: weights as hard links."""
    weights = {path.name for path in weight_files(home)}
    for name in manifest.files:
        if name in _MADE_ANEW or name.startswith("custom_generate/") or name == FILE:
            continue
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (link and name in weights and linked(home / name, target, note)):
            shutil.copyfile(home / name, target)
    state = {name: value.detach().float().cpu().contiguous() for name, value in parameters.items()}
    save_file(state, partial / FILE)
