"""Passes of others: from packages with the entry-point group `flarec.plugins`, and from files that a user names.

A plugin is a Python module that imports what it needs from `flarec.plugin`. Its passes are the subclasses of `Pass`
that it defines, or those that its attribute `PASSES` lists. Loading one runs its code: only what is installed, or what
the user named on the command line or in Python, is loaded. No model, checkpoint or recipe can name a file.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from flarec.errors import UsageError, first_line
from flarec.ir.pipeline import Pass
from flarec.ops import Mixer

GROUP = "flarec.plugins"
BUILT_IN = "flarec"
_FILES: dict[Path, ModuleType] = {}
"""Loaded files of this process: a module that registers ops can run only once."""


@dataclass(frozen=True)
class Known:
    """A pass that can be named, and where it comes from: "flarec", a package with its version, or a file's name."""

    cls: type[Pass]
    origin: str


def known_passes(built_in: Mapping[str, type[Pass]], files: Sequence[str | Path] = ()) -> dict[str, Known]:
    """Every pass by name: the package's own, those of installed plugins, those of `files`.

    Raises `UsageError` for a plugin that cannot be loaded, that holds no pass, or that takes a name which is in use.
    """
    known = {name: Known(cls, BUILT_IN) for name, cls in built_in.items()}
    for module, origin in (*_installed(), *((load_file(file), Path(file).name) for file in files)):
        found = list(_passes_of(module, origin))
        if not found and not any(isinstance(value, Mixer) for value in vars(module).values()):
            raise UsageError(
                f"plugin {origin} defines no pass (a frozen dataclass that derives from flarec.plugin.Pass)"
            )
        for cls in found:
            other = known.setdefault(cls.name, Known(cls, origin))
            if other.cls is not cls:
                raise UsageError(
                    f"plugin {origin} defines a pass '{cls.name}', a name that {other.origin} uses already; rename it"
                )
    return known


def load_plugins(files: Sequence[str | Path]) -> None:
    """Run plugin files before a model is captured: what they register is then known."""
    for file in files:
        load_file(file)


def load_file(file: str | Path) -> ModuleType:
    """Run a plugin file, once per process. Raises `UsageError` that says why it cannot be loaded."""
    path = Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise UsageError(f"plugin {path} is no Python file; give the path of a .py file")
    path = path.resolve()
    if path not in _FILES:
        name = f"flarec_plugin_{len(_FILES)}_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look up the module of a class
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the file raises
            del sys.modules[name]
            raise _cannot_load(file, error) from error
        _FILES[path] = module
    return _FILES[path]


def _installed() -> Iterator[tuple[ModuleType, str]]:
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.name
        try:
            module = entry.load()
        except Exception as error:  # whatever the package raises
            raise _cannot_load(origin, error) from error
        if not isinstance(module, ModuleType):
            raise UsageError(f"plugin {origin}: the entry point '{entry.name}' is no module; name the module alone")
        yield module, origin


def _passes_of(module: ModuleType, origin: str) -> Iterator[type[Pass]]:
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Pass) and value.__module__ == module.__name__
    ]
    for cls in getattr(module, "PASSES", own):
        if not (isinstance(cls, type) and issubclass(cls, Pass)) or inspect.isabstract(cls):
            if cls in own:
                continue  # a base class of the plugin's own
            raise UsageError(f"plugin {origin}: {cls!r} in PASSES is no pass; list classes that derive from Pass")
        parameters = vars(cls).get("__dataclass_params__")  # its own, not those of Pass
        if parameters is None or not parameters.frozen or not isinstance(getattr(cls, "name", None), str):
            raise UsageError(
                f"plugin {origin}: pass {cls.__name__} is no frozen dataclass with a name; write "
                "@dataclass(frozen=True) and name: ClassVar[str]"
            )
        yield cls


def _cannot_load(what: str | Path, error: Exception) -> UsageError:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    line = f" (line {trace.tb_lineno} of {Path(trace.tb_frame.f_code.co_filename).name})" if trace is not None else ""
    return UsageError(f"plugin {what} cannot be loaded: {type(error).__name__}: {first_line(error)}{line}; correct it")
