"""Opening a directory a second time: straight to its program, without transformers' modelling code.

Importing one model class of transformers takes several times as long as everything else that a short `flarec generate`
does (it brings torch's compiler, distributed tensors and sympy along), and the class is not needed once its graph is
known. So when transformers has opened a directory and the program cache (`flarec.frontend.cache`) holds the graph, a
note is kept beside it:

    openings/<key>.json    which stored graph it was, where each of its tensors came from, what code was read for it

The key covers all that decides what transformers makes of a directory: its JSON files, the headers of its weight files
(names, shapes, dtypes), the versions, and what in the process and its environment has a say. Weights are not in a note:
they were compared with the files when it was written, and a model whose tensors are not the files' own (converted or
merged by transformers) gets none. Whatever does not fit leads back to transformers, which then also says what is wrong.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..ir.json import Unstorable
from ..ir.program import Program
from .cache import Entry, cache_directory, entry_of, sha256, source_of, tensors_of, versions
from .export import layers_of, program_of
from .families import family_of
from .loading import is_wrapper, read_config

Json = Any
LARGEST = 4 << 30
"""Bytes of weights up to which a directory gets a note: reading more takes longer than the imports do."""
LARGEST_BUFFER = 1 << 16
"""Bytes of a computed buffer (rotary frequencies) that a note holds."""
_NO_SAY = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "flarec.json")
"""JSON files that a model does not depend on."""
_ENVIRONMENT = ("ACCELERATE_", "FSDP_", "TRANSFORMERS_", "USE_", "XLA_", "LOCAL_RANK", "RANK", "WORLD_SIZE")
"""Beginnings of the names of variables that transformers looks at when it builds a model..."""
_TALK = "TRANSFORMERS_VERBOSITY"
"""... but for this one."""


@dataclass(frozen=True)
class Opened:
    """What a note leads to.

    program  the captured program
    tensors  all tensors of the transformers model, the program's own among them, under all of their names
    rows     vocabulary rows of the input embedding
    """

    program: Program
    tensors: dict[str, Tensor]
    rows: int

    def give_to(self, model: nn.Module) -> None:
        """Put the tensors into the transformers model of the same directory, so that both compute with the same."""
        for name, tensor in self.tensors.items():
            path, _, last = name.rpartition(".")
            owner = model.get_submodule(path)
            held: dict[str, Any] = owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers
            assert last in held, f"the model has no tensor '{name}'"
            held[last] = tensor


@dataclass(frozen=True)
class Opening:
    """The place of the note about a directory that is opened on `device`."""

    entry: Entry
    directory: Path
    device: str

    def restore(self) -> Opened | None:
        """None if there is no note that fits."""
        try:
            note = self.entry.read()
            if note["sources"] != [source_of(source.partition(" ")[0]) for source in note["sources"]]:
                return None
            tensors = _read(note["tensors"], self.directory, self.device)
            graph = self._graph(note["program"]).restore_on(tensors)
            config = read_config(self.directory)
            config.dtype = getattr(torch, note["dtype"])
            return Opened(program_of(graph, config, config.dtype, note["layers"]), tensors, note["rows"])
        except Exception:  # missing, unreadable, or whatever a foreign file leads to: transformers opens the model
            return None

    def store(self, model: Any) -> None:
        """Write down how the model that transformers opened from here is had without it, if it can be."""
        graph, layers = entry_of(model, family_of(model.config).model_type), layers_of(model)
        if graph is None or not graph.path.is_file() or layers is None or is_wrapper(read_config(self.directory)):
            return
        try:
            tensors = _origins(tensors_of(model), self.directory)
        except Unstorable:
            return
        self.entry.write(
            {
                "program": graph.path.stem,
                "sources": sorted({source_of(type(module).__module__) for module in model.modules()}),
                "layers": len(layers),
                "dtype": _name(next(model.parameters()).dtype),
                "rows": int(model.get_input_embeddings().weight.shape[0]),
                "tensors": tensors,
            }
        )

    def _graph(self, key: str) -> Entry:
        return Entry(self.entry.path.parent.parent / "programs" / f"{key}.json")


def opening_of(directory: Path, dtype: torch.dtype | None, device: torch.device) -> Opening | None:
    """The place of the note about a local directory opened in `dtype` (None: as stored); None if there can be none."""
    kept = cache_directory()
    if kept is None or (directory / "adapter_config.json").exists():
        return None
    try:
        key = key_of(directory, dtype, device)
    except OSError:
        return None
    return Opening(Entry(kept.parent / "openings" / f"{key}.json"), directory, str(device)) if key else None


def modelling_code_untouched() -> bool:
    """Whether nobody imported transformers' modelling code into this process.

    Else there is nothing left to save, and somebody may have registered or changed classes, which no key covers.
    """
    return "transformers.modeling_utils" not in sys.modules


def key_of(directory: Path, dtype: torch.dtype | None, device: torch.device) -> str | None:
    """sha256 (hex) of what decides how transformers opens a directory; None if its weights are not safetensors."""
    weights = _weights(directory)
    if not weights or sum(file.stat().st_size for file in weights) > LARGEST:
        return None
    table = {
        "files": sorted(path.name for path in directory.iterdir()),
        "json": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in directory.glob("*.json")
            if path.name not in _NO_SAY
        },
        "weights": {file.name: _header_sha256(file) for file in weights},
        "dtype": [str(dtype), str(torch.get_default_dtype())],
        "device": [str(device), str(torch.get_default_device())],
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT) and name != _TALK
        },
        "versions": versions(),
    }
    return sha256(json.dumps(table, sort_keys=True))


def _weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("model*.safetensors"))


def _header_sha256(file: Path) -> str:
    """Hash of the names, shapes and dtypes in a safetensors file (its length, then that many bytes of JSON)."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return hashlib.sha256(opened.read(min(length, 100 << 20))).hexdigest()


def _origins(tensors: dict[str, Tensor], directory: Path) -> Json:
    """[name, "parameter" or "buffer", requires_grad, dtype, where from] of every tensor; raises `Unstorable`."""
    stored = {name: file for file in _weights(directory) for name in _names(file)}
    first: dict[int, str] = {}
    found = []
    for name, tensor in tensors.items():
        if id(tensor) in first:
            origin: Json = {"same": first[id(tensor)]}
        elif name in stored:
            with safe_open(stored[name], framework="pt") as opened:
                if not torch.equal(opened.get_tensor(name).to(tensor.dtype), tensor.detach().cpu()):
                    raise Unstorable(f"'{name}' is not what the file holds")
            origin = {"file": stored[name].name}
        elif isinstance(tensor, nn.Parameter) or tensor.nbytes > LARGEST_BUFFER:
            raise Unstorable(f"'{name}' is in no file")
        else:
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            origin = {"bytes": base64.b64encode(content).decode(), "shape": list(tensor.shape)}
        first.setdefault(id(tensor), name)
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        found.append([name, kind, tensor.requires_grad, _name(tensor.dtype), origin])
    return found


def _read(table: Json, directory: Path, device: str) -> dict[str, Tensor]:
    """The inverse of `_origins`."""
    tensors: dict[str, Tensor] = {}
    files = {file.name: safe_open(file, framework="pt") for file in _weights(directory)}
    for name, kind, learned, dtype, origin in table:
        if "same" in origin:
            tensors[name] = tensors[origin["same"]]
            continue
        wanted = getattr(torch, dtype)
        if "file" in origin:
            opened: Any = files[origin["file"]]
            value = opened.get_tensor(name)
        else:
            content = bytearray(base64.b64decode(origin["bytes"]))
            value = torch.frombuffer(content, dtype=wanted).reshape(origin["shape"])
        value = value.to(device=device, dtype=wanted)
        tensors[name] = nn.Parameter(value, requires_grad=learned) if kind == "parameter" else value
    return tensors


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
