"""What config.json says about the dual mode: for other engines, and for a directory without a manifest.

    "mask_token_id": 151669, "block_size": 4     as other programs state them: engines that draft with masks read these
    "dual_mode": {"mask": "row", "mask_token_id": 151669, "block_size": 4,
                  "readouts": {"ar-trust": "causal", "diffusion-trust": "causal"}}

The table says all that decoding needs. Of the two keys above it there is none for a mask vector, which is no row that
an engine could look up, and none that the model's own configuration has with another meaning (`block_size` of MiniMax).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from ..frontend.cache import is_field
from .manifest import DecodeDefaults, Manifest, MaskToken, Source
from .schema import problem
from .tables import CONFIG, read_table, write_table

TABLE = "dual_mode"
LOWEST = {"mask_token_id": 0, "block_size": 1}
MODES = ("ar-trust", "diffusion-trust")


def state(directory: Path, manifest: Manifest, config: Any) -> None:
    """Write the mask token, the block size and the readouts into the config.json of `directory`.

    config: the model's configuration, of transformers. Where config.json holds one for the text model, both get them.
    """
    path = directory / CONFIG
    table = read_table(path)
    mask, block_size = manifest.mask, manifest.decode.block_size
    flat = {"mask_token_id": mask.token_id if mask.kind == "row" else None, "block_size": block_size}
    own = [name for name in flat if is_field(config, name)]
    whole = {"mask": mask.kind, "mask_token_id": mask.token_id, "block_size": block_size,
             "readouts": manifest.decode.readouts}
    for target in (table, table.get("text_config")):
        if not isinstance(target, dict):
            continue
        target |= {name: value for name, value in flat.items() if name not in own}
        if flat["mask_token_id"] is None and "mask_token_id" not in own:
            del target["mask_token_id"]  # also one that the source had: no row stands for a mask here
        target[TABLE] = whole
    write_table(path, table)


def stated(directory: Path, mask_token_id: int | None = None, block_size: int | None = None) -> Manifest | None:
    """What stands in for the manifest of a dual-mode checkpoint that has none; None for other models.

    mask_token_id, block_size: what the user says; else what config.json says under these names. A table `dual_mode`
    says all, but for what the user says. Checkpoints of other programs hold the mask token in a vocabulary row and were
    trained with the published objective (recipe `flare`), so both modes read a block from its end. Raises `UsageError`
    for values that are out of range or incomplete, `CheckpointError` for a table that nobody wrote so.
    """
    given = {"mask_token_id": mask_token_id, "block_size": block_size}
    for name, value in given.items():
        if value is not None and value < LOWEST[name]:
            raise UsageError(f"{name} is {value}; give a whole number from {LOWEST[name]}")
    in_config = _values(directory)
    if TABLE in in_config:
        return _own(directory, in_config[TABLE], {name: value for name, value in given.items() if value is not None})
    values: dict[str, Any] = {name: in_config.get(name) if v is None else v for name, v in given.items()}
    unknown = [name for name, value in values.items() if not _is_number(value, LOWEST[name])]
    if unknown and all(value is None for value in given.values()):
        return None
    if unknown:
        raise UsageError(f"{directory / CONFIG} states no {unknown[0]}; give --{unknown[0].replace('_', '-')} too")
    readouts = dict.fromkeys(MODES, "block_end")
    mask = MaskToken("row", int(values["mask_token_id"]))
    return Manifest(Source(directory.resolve().name), mask, DecodeDefaults(int(values["block_size"]), readouts))


def states_all(directory: Path) -> bool:
    """Whether flarec wrote config.json: the directory is a checkpoint of its own, with or without a manifest."""
    return TABLE in _values(directory)


def _own(directory: Path, table: Any, given: Mapping[str, int]) -> Manifest:
    """The manifest that `state` was given, as far as decoding goes; with what the user says put over it."""
    held: dict[str, Any] = table if isinstance(table, dict) else {}
    mask = {"kind": held.get("mask"), "token_id": held.get("mask_token_id")}
    decode = {"block_size": held.get("block_size"), "readouts": held.get("readouts")}
    if wrong := problem({"mask": mask, "decode": decode}):
        raise CheckpointError(f"{directory / CONFIG} has a damaged table {TABLE} ({wrong}); copy the checkpoint again")
    token, size = given.get("mask_token_id", held["mask_token_id"]), given.get("block_size", held["block_size"])
    return Manifest(
        Source(directory.resolve().name), MaskToken(held["mask"], token), DecodeDefaults(size, dict(held["readouts"]))
    )


def _is_number(value: Any, low: int) -> bool:
    return type(value) is int and value >= low


def _values(directory: Path) -> dict[str, Any]:
    """config.json as it stands, the text model's values over those around them."""
    table = read_table(directory / CONFIG)
    text = table.get("text_config")
    return {**table, **(text if isinstance(text, dict) else {})}
