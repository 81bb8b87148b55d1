"""The program cache: captured graphs on the user's disk, so that the second run of a model need not trace it.

    $FLAREC_CACHE_DIR, else $XDG_CACHE_HOME/flarec, else ~/.cache/flarec    (FLAREC_CACHE_DIR= or "off": no cache)
        programs/<key>.json    sha256 of key and graph, newline, the graph as JSON (`flarec.ir.json`); no weights
        openings/<key>.json    which program a directory leads to (`flarec.frontend.opening`)

The key is a hash of everything that decides a capture: the model's configuration, its modules with their settings,
names, shapes and dtypes of its tensors, the source of the modelling code and of our own, and the versions of what they
use. A model whose code is not transformers' or torch's own is not cached. A file that is not exactly what was written
is as good as none: caching never is an error and never gives another result.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import __version__
from ..base.user_cache import VARIABLE as VARIABLE
from ..base.user_cache import is_own, user_cache
from ..ir.json import Unstorable, graph_from_json, graph_to_json

KEPT = 64
"""Graphs that are kept; beyond that, the ones written first go."""
_OWN_SOURCES = ("frontend", "ir", "ops")
"""Folders of flarec that decide what a capture is."""
_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "causal-conv1d",
    "fla-core",
    "flash-linear-attention",
    "kernels",
    "mamba-ssm",
)
"""What the modelling code looks at when it chooses its path."""
CPU, META = "cpu", "meta"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HASH = re.compile(r"[0-9a-f]{64}")
_SCALARS = (bool, int, float, str, type(None))
_NO_SETTINGS = ("training", "name_or_path", "_is_hf_initialized")
"""Attributes without a say: capture switches to eval mode, a copy elsewhere is the same model, and so is one whose
weights were not read."""
STATED = ("dual_mode", "mask_token_id", "block_size")
"""What a conversion states in config.json for others (`flarec.checkpoint.stated`): no model reads it."""
_UNSET = ("_use_kernels", "_weight_conversions")
"""Attributes that only reading weights sets: nothing and an empty value are the same."""


def cache_directory() -> Path | None:
    """Where graphs are kept; None if that is switched off."""
    home = user_cache()
    return None if home is None else home / "programs"


@dataclass(frozen=True)
class Entry:
    """The place of one model's graph."""

    path: Path

    def restore(self, model: nn.Module) -> fx.GraphModule | None:
        """The stored graph on the model's own parameters and buffers; None if there is none that can be used."""
        try:
            return graph_from_json(_moved(self.read(), CPU, _device_of(model)), tensors_of(model))
        except Exception:  # missing, unreadable, or whatever a foreign file leads to: the model is captured afresh
            return None

    def store(self, module: fx.GraphModule, model: nn.Module) -> None:
        """Write the graph if it can be written; it appears complete, also beside other writers."""
        with contextlib.suppress(Unstorable):
            self.write(_moved(graph_to_json(module, tensors_of(model)), _device_of(model), CPU))

    def restore_on(self, tensors: dict[str, Tensor]) -> fx.GraphModule:
        """The stored graph on tensors by name. Raises whatever a missing or foreign file leads to."""
        return graph_from_json(self.read(), tensors)

    def read(self) -> Any:
        """What `write` was given. Raises whatever a missing or foreign file leads to."""
        handle = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe is not waited for
        with os.fdopen(handle, encoding="utf-8") as file:
            if not is_own(os.fstat(handle)):
                raise Unstorable(f"{self.path.name} may be somebody else's")
            digest, _, text = file.read().partition("\n")
        if digest != self._digest(text):
            raise Unstorable(f"{self.path.name} is not as it was written")
        return json.loads(text)

    def write(self, table: Any) -> None:
        """Write a table of plain values, if the directory can be written."""
        text = json.dumps(table, separators=(",", ":"))
        directory = self.path.parent
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=directory, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(f"{self._digest(text)}\n{text}")
                os.replace(temporary, self.path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            _drop_oldest(directory)

    def _digest(self, text: str) -> str:
        """Covers the key too: a file under another name is foreign."""
        return sha256(f"{self.path.stem}\n{text}")


def entry_of(model: nn.Module, family: str) -> Entry | None:
    """The place of a model's graph; None if the cache is off or the model cannot be known by its key."""
    directory = cache_directory()
    key = key_of(model, family) if directory is not None else None
    return Entry(directory / f"{key}.json") if directory is not None and key is not None else None


def key_of(model: nn.Module, family: str) -> str | None:
    """sha256 (hex) of what decides the capture of a model; None for a model with code or hooks of its own."""
    modules = dict(model.named_modules())
    classes = {type(module) for module in modules.values()}
    if not all(_is_libraries_own(cls.__module__) for cls in classes):
        return None
    if any(getattr(module, name) for module in modules.values() for name in _HOOKS):
        return None
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    for name in ("_name_or_path", "architectures", *(name for name in STATED if not is_field(model.config, name))):
        config.pop(name, None)
    config["dtype"] = config.get("dtype") or _name(next(model.parameters()).dtype)
    settings = [[name, _class(module), _settings(module)] for name, module in modules.items()]
    if any(known is None for _, _, known in settings):
        return None
    table = {
        "family": family,
        "config": config,
        "modules": settings,
        "tensors": [
            [name, list(tensor.shape), str(tensor.dtype), _kept_device(tensor)]
            for name, tensor in tensors_of(model).items()
        ],
        "default dtype": str(torch.get_default_dtype()),
        "modelling code": sorted({source_of(cls.__module__) for cls in classes if cls.__module__ in sys.modules}),
        "versions": versions(),
    }
    return sha256(json.dumps(table, sort_keys=True))


def is_field(config: Any, name: str) -> bool:
    """Whether a class of configurations has a value of this name (MiniMax has a `block_size` of its own)."""
    kind = type(config)
    return hasattr(kind, name) or name in inspect.signature(kind.__init__).parameters


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names."""
    named: Iterable[tuple[str, Tensor]] = (
        *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
    )
    return dict(named)


def _kept_device(tensor: Tensor) -> str:
    """A model without numbers is traced like one on the CPU, so both have one key and one graph."""
    return CPU if tensor.device.type == META else str(tensor.device)


def _device_of(model: nn.Module) -> str:
    return str(next(model.parameters()).device)


def _moved(table: Any, old: str, new: str) -> Any:
    """A stored graph with another device in its nodes, between the CPU and no device at all."""
    if old == new or META not in (old, new):
        return table
    if isinstance(table, dict):
        return {"device": new} if table == {"device": old} else {name: _moved(v, old, new) for name, v in table.items()}
    return [_moved(value, old, new) for value in table] if isinstance(table, list) else table


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _settings(module: nn.Module) -> dict[str, Any] | None:
    """Plain attributes of a module, which tracing may bake into the graph; None if its code was replaced."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name in _NO_SETTINGS or value == {} or (name in _UNSET and not value):
            continue
        if _is_plain(value):
            found[name] = value
        elif callable(value):
            given: tuple[Any, ...] = ()
            if isinstance(value, functools.partial):  # Gemma's activation
                given, value = (value.args, value.keywords), value.func
            origin = getattr(value, "__module__", None) or "torch"  # torch's builtins name no module
            qualified = getattr(value, "__qualname__", None)
            if name == "forward" or qualified is None or not (_is_libraries_own(origin) and _is_plain(given)):
                return None
            found[name] = f"{origin}.{qualified}{given or ''}"
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return all(map(_is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, _SCALARS)


def _is_libraries_own(module: str) -> bool:
    return module.split(".")[0] in ("torch", "transformers")


def versions() -> dict[str, str | None]:
    """Of what decides a capture; of our own code the hash."""
    own = Path(__file__).parent.parent
    return {
        "python": platform.python_version(),
        "flarec": __version__,
        **{f"flarec/{name}": _sources_sha256(own / name) for name in _OWN_SOURCES},
        **{name: _version(name) for name in _PACKAGES},
    }


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def source_of(module: str) -> str:
    """Name and hash of a module's file; the module itself is not imported for that."""
    loaded = sys.modules.get(module)
    spec = None if loaded is not None else importlib.util.find_spec(module)
    path = getattr(loaded, "__file__", None) if spec is None else spec.origin
    return f"{module} {_file_sha256(Path(path)) if path else ''}"


@cache
def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _sources_sha256(place: Path) -> str:
    """Hash of a file, or of all Python files below a folder with their names."""
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    return sha256("\n".join(f"{file.relative_to(place.parent)} {_file_sha256(file)}" for file in files))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_graph(path: Path) -> bool:
    """By its name, a key, and its first line, a digest."""
    if not _HASH.fullmatch(path.stem) or path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return _HASH.fullmatch(file.readline(65).decode("latin-1").removesuffix("\n")) is not None


def _drop_oldest(directory: Path) -> None:
    """Of graphs that were stored here; other files are left alone."""
    files = sorted(filter(_is_graph, directory.glob("*.json")), key=lambda path: path.stat().st_mtime)
    for path in files[:-KEPT]:
        path.unlink(missing_ok=True)
