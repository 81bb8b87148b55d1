"""Where flarec keeps what it found out once on a machine: $FLAREC_CACHE_DIR, else $XDG_CACHE_HOME/flarec, else
~/.cache/flarec. FLAREC_CACHE_DIR= or "off": nowhere."""

from __future__ import annotations

import os
import stat
from pathlib import Path

VARIABLE = "FLAREC_CACHE_DIR"


def user_cache() -> Path | None:
    """The directory, which need not exist; None if that is switched off."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return None if chosen.strip().lower() in ("", "off") else Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "flarec"


def is_own(status: os.stat_result) -> bool:
    """Whether only this user can have written a file."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
