"""flarec: a compiler from hybrid-attention language models to dual-mode diffusion language models."""

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> module: imported on first use, so that `import flarec` and `flarec --help` stay cheap
_LAZY = {
    "GenerationOptions": "flarec.base.generation",
    "capture": "flarec.frontend.export",
    "convert": "flarec.train.convert",
    "finish": "flarec.train.convert",
    "load": "flarec.api",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'flarec' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
