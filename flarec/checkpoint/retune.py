"""New settings of decoding for a checkpoint that is there: `flarec.json` and the model card, and no other file.

The card is replaced first and the manifest last, each in one piece: after a kill the checkpoint is the old one or the
new one, and opens either way (nothing is decided by a card). What a kill left of a file in writing is removed the next
time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base.files import replace_file, unused
from ..base.hashes import FileEntry
from ..base.lock import held
from ..errors import CheckpointError, UsageError
from .card import retold
from .curve import KEY
from .directory import Checkpoint
from .manifest import NAME as MANIFEST
from .manifest import Manifest

CARD = "README.md"
_PURPOSE = "writing"
_LEFT = re.compile(rf"\.({re.escape(CARD)}|{re.escape(MANIFEST)})\.{_PURPOSE}-[0-9a-f]{{8}}")


def check_retunable(given: str, checkpoint: Checkpoint) -> None:
    """Raise `UsageError` for a checkpoint whose defaults cannot be written. given: what the user called it."""
    manifest = checkpoint.manifest
    if manifest is None or checkpoint.foreign or not manifest.files:
        raise UsageError(f"{given} is not a checkpoint of flarec: there is no {MANIFEST} to --write; leave it out")
    if checkpoint.path == checkpoint.home and not os.path.isdir(given):
        raise UsageError(f"{given} is of the hub, and its copy here is not changed; give a directory to --write")
    for path in (checkpoint.home, checkpoint.home / MANIFEST):
        if not os.access(path, os.W_OK):
            raise UsageError(f"{path} cannot be written to, which --write needs; copy the checkpoint")


def retuned(manifest: Manifest, found: Mapping[str, Mapping[str, Any]]) -> Manifest:
    """With the settings that `flarec tune` found for some modes, and their curves; other modes keep theirs.

    found: mode -> what `flarec.checkpoint.curve` describes, with "chosen".
    """
    chosen = {mode: {name: float(value) for name, value in table["chosen"].items()} for mode, table in found.items()}
    known = manifest.metrics.get(KEY)
    curves = {**(known if isinstance(known, Mapping) else {}), **{mode: dict(table) for mode, table in found.items()}}
    return replace(
        manifest, decode=replace(manifest.decode, chosen={**manifest.decode.chosen, **chosen}),
        metrics={**manifest.metrics, KEY: curves},
    )


def rewrite(
    home: Path, before: Manifest, after: Manifest, note: Callable[[str], None] = lambda text: None
) -> None:
    """Put `after` in the place of the manifest `before` in a checkpoint's directory, and what it says into the card.

    Raises `UsageError` if another process writes the checkpoint, `CheckpointError` if it has another manifest than
    `before` by now, and for files that cannot be written.
    """
    home = Path(os.path.realpath(home))
    try:
        with held(home, None):
            if Manifest.read(home) != before:
                raise CheckpointError(f"{home / MANIFEST} was changed meanwhile, so that nothing is written; run again")
            for path in home.iterdir():
                if _LEFT.fullmatch(path.name):
                    path.unlink()
            if (card := _card(home, after, note)) is not None:
                replace_file(home / CARD, card, unused(home / CARD, _PURPOSE))
                if CARD in after.files:
                    after = replace(after, files={**after.files, CARD: FileEntry.of(home / CARD)})
            replace_file(home / MANIFEST, after.to_json(), unused(home / MANIFEST, _PURPOSE))
    except OSError as error:
        raise CheckpointError(f"{home} cannot be written ({error.strerror}); its settings are as before") from error


def _card(home: Path, manifest: Manifest, note: Callable[[str], None]) -> str | None:
    """The new text of the card; None for none that could be changed."""
    try:
        text = (home / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        note(f"{home} has no {CARD} that can be read; the curve is in {MANIFEST} alone")
        return None
    return retold(text, manifest)
