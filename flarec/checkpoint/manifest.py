"""The manifest `flarec.json` of a converted checkpoint: where it comes from, how it decodes, and what files it has.

A checkpoint is a plain Hugging Face directory; the manifest holds everything that transformers has no place for. Every
other file is listed with size and hash, so that a truncated or edited directory is noticed when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..base.files import why_no_file
from ..base.hashes import FileEntry
from ..errors import CheckpointError
from .schema import problem

NAME = "flarec.json"
FORMAT_VERSION = 2
"""Version 1 had no hash of its own."""
SELF = "sha256"
"""Key of the hash of all other keys and values."""
FREE = ("README.md", "metrics.jsonl")
"""Files that anybody may edit or remove: the model card and the log. Nothing is decided by them."""
RUN_KEY = "run"
"""In `data`: a hash of all that decided the result of the conversion, so that the run is recognised."""
HASHED_AT_OPEN = 256 << 20
"""Bytes up to which a file's hash is checked whenever a checkpoint is opened; larger ones are checked by size."""


@dataclass(frozen=True)
class Source:
    """The converted model: its name (no path), the hash of its weight files, and its licence if it states one."""

    name: str
    sha256: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class MaskToken:
    """Which input id stands for a masked token (docs/semantics.md section 3).

    kind  "row": a spare vocabulary row; "vector": the id one past the vocabulary, its embedding is stored apart;
          "random": the same id stands for ids that are drawn before anything reads it
    ids   of the last kind: the ranges [first, end) of ids that are drawn, ascending
    """

    kind: Literal["row", "vector", "random"]
    token_id: int
    ids: tuple[tuple[int, int], ...] = ()

    @property
    def suppress(self) -> int | None:
        """The id whose logit counts as minus infinity; a vector has no logit, and random ids are tokens."""
        return self.token_id if self.kind == "row" else None


@dataclass(frozen=True)
class DecodeDefaults:
    """How the checkpoint decodes unless told otherwise.

    block_size            noisy positions per block
    readouts              "ar-trust" and "diffusion-trust" -> "block_end" or "causal"
    confidence_threshold  Diffusion-Trust commits positions that are this confident
    denoising_steps       Diffusion-Trust: most steps per block; 0 for the block size
    recheck               Diffusion-Trust and elastic: what is less likely than this share of the clean stream's choice
                          is taken back; 0 for no recheck
    drafts                AR-Trust: "branches" or "single"
    chosen                "diffusion-trust" and "elastic" -> "threshold" and "recheck" that `flarec tune` chose for that
                          mode, in the place of the two above
    """

    block_size: int
    readouts: dict[str, str]
    confidence_threshold: float = 0.9
    denoising_steps: int = 0
    recheck: float = 0.0
    drafts: str = "branches"
    chosen: dict[str, dict[str, float]] = field(default_factory=dict)

    def settings(self, mode: str) -> dict[str, float]:
        """Threshold and recheck of a mode."""
        shared = {"threshold": self.confidence_threshold, "recheck": self.recheck}
        return dict(self.chosen.get(mode, shared))


@dataclass(frozen=True)
class AdapterInfo:
    """A low-rank adapter on noisy rows (docs/semantics.md section 6), whose files are in `adapter/`.

    rank, alpha, modules   as in the pass `adapt-noisy-stream`
    alone                  the directory holds no model: the adapter is opened together with its source
    """

    rank: int
    alpha: float
    modules: str
    alone: bool = False


@dataclass(frozen=True)
class Manifest:
    """The contents of `flarec.json`.

    recipe     `Recipe.to_dict()`
    pipelines  "train", "decode", and "elastic" of a checkpoint with a horizon head (`checkpoint.horizon`) -> one pass
               per line
    data       documents, tokens and targets per source, and how many tokens were trained on
    metrics    last training metrics and measurements
    versions   of flarec, torch, transformers and Python
    plugins    passes of others in the pipelines -> where they come from (a package and its version, or a file's name)
    adapter    of a checkpoint whose weights are the source's own; None for one that was trained itself
    files      every other file of the directory, filled in when the checkpoint is written
    """

    source: Source
    mask: MaskToken
    decode: DecodeDefaults
    recipe: dict[str, Any] = field(default_factory=dict)
    pipelines: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=dict)
    adapter: AdapterInfo | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        table = _finite(asdict(self))
        order = ["format_version", *(item.name for item in fields(self) if item.name != "format_version")]
        for name in ("plugins", "adapter"):  # versions that do not know the key open a checkpoint without it
            if not table[name]:
                order.remove(name)
        for section, key in (("mask", "ids"), ("decode", "chosen")):
            if not table[section][key]:
                del table[section][key]
        values = {name: table[name] for name in order}
        if self.format_version >= 2:
            values[SELF] = _hash_of(values)
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str = NAME) -> Manifest:
        """The inverse of `to_json`. Raises `CheckpointError` for text that is not a manifest this version can read."""
        try:
            table = json.loads(text)
        except (ValueError, RecursionError) as error:  # also a number with too many digits
            raise CheckpointError(f"{where} is not JSON ({error}); the checkpoint is damaged, copy it again") from None
        if not isinstance(table, dict) or type(table.get("format_version")) is not int or table["format_version"] < 1:
            raise CheckpointError(f"{where} is not a manifest of flarec (no format_version); give another directory")
        version = table["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{where} has format version {version}, made by a newer flarec: upgrade flarec "
                f"(this one reads up to version {FORMAT_VERSION})"
            )
        wrong = problem(table)
        try:
            stated = table.pop(SELF, None)
            manifest = _read(table)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            wrong = wrong or _reason(error)
        if wrong:
            raise CheckpointError(f"{where} is not a manifest of flarec ({wrong}); copy it again")
        if version >= 2 and stated != _hash_of(table):
            raise CheckpointError(
                f"{where} was changed after it was written (its hash differs); copy it again, or put format_version 1 "
                f'and take "{SELF}" out to use it as it is'
            )
        return manifest

    @staticmethod
    def read(directory: Path) -> Manifest | None:
        """The manifest of a directory, None if it has none (a model that was not converted)."""
        path = directory / NAME
        if reason := why_no_file(path):
            raise CheckpointError(f"{path} {reason}; copy the checkpoint again")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); copy the checkpoint again") from None
        return Manifest.from_json(text, str(path))

    def check_files(self, directory: Path, *, whole: bool = False) -> None:
        """Compare the directory with what was written. Raises `CheckpointError` naming the first file that differs.

        whole: read files of every size, not only those up to `HASHED_AT_OPEN`. The card and the log are free to edit.
        """
        for name, entry in self.files.items():
            if name in FREE:
                continue
            path = directory / name
            try:
                wrong = entry.difference(path, hashed=whole or entry.bytes <= HASHED_AT_OPEN)
            except OSError as error:
                wrong = f"cannot be read ({error.strerror})"
            if wrong:
                raise CheckpointError(f"{path} {wrong}; the checkpoint is damaged, copy it again")


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: a metric that is not a number becomes null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(table: Mapping[str, Any]) -> Manifest:
    """Unknown keys are errors: within one format version nobody adds any."""
    values = dict(table)
    values["source"] = Source(**values["source"])
    mask = dict(values["mask"])
    if "ids" in mask:
        mask["ids"] = tuple((first, end) for first, end in mask["ids"])
    values["mask"] = MaskToken(**mask)
    values["decode"] = DecodeDefaults(**values["decode"])
    if values.get("adapter") is not None:
        values["adapter"] = AdapterInfo(**values["adapter"])
    values["files"] = {str(name): FileEntry(**entry) for name, entry in values["files"].items()}
    return Manifest(**values)


def _hash_of(table: Mapping[str, Any]) -> str:
    """Of keys and values, however they are laid out."""
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    text = str(error)
    return f"no key {text}" if isinstance(error, KeyError) else text
