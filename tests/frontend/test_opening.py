"""Opening a directory a second time: the same program and the same bits, or transformers opens it as before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from flarec.cli import main
from flarec.frontend import cache as program_cache
from flarec.frontend import opening
from flarec.frontend.cache import Entry, entry_of, tensors_of
from flarec.frontend.loading import load_model
from flarec.frontend.opening import Opening, opening_of
from tests.checkpoints import converted
from tests.frontend.test_cache import nodes
from tests.models import captured, tiny_checkpoint

CPU = torch.device("cpu")
HEAVY = (
    "datasets", "matplotlib", "networkx", "pandas", "pyarrow", "sympy", "torch._dynamo", "transformers.modeling_utils",
    "triton",
)
"""What a second `flarec generate` has no use for."""


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv(program_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def place(path: Path, dtype: torch.dtype | None = torch.float32) -> Opening:
    found = opening_of(path, dtype, CPU)
    assert found is not None
    return found


def noted(path: Path, family: str) -> Any:
    """The model that transformers opens from `path`, after a note was made if one can be."""
    model = load_model(path, torch.float32, "cpu").eval()
    entry = entry_of(model, family)
    stored(entry, family)
    place(path).store(model)
    return model


def stored(entry: Entry | None, family: str) -> None:
    """The family's capture as the graph of a model of the same shape."""
    assert entry is not None
    entry.store(captured(family).module, captured(family).module)


def notes(kept: Path) -> list[Path]:
    return sorted((kept / "openings").glob("*.json"))


@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba"])
def test_the_program_and_every_tensor_are_those_that_transformers_gives(tmp_path: Path, family: str) -> None:
    path = tiny_checkpoint(tmp_path, family)
    model = noted(path, family)
    found = place(path).restore()
    assert found is not None
    program, fresh = found.program, captured(family)
    assert nodes(program.module) == nodes(fresh.module)
    assert (program.properties, program.family, program.dtype) == (fresh.properties, family, torch.float32)
    assert program.config.to_dict() == model.config.to_dict()
    assert found.rows == model.get_input_embeddings().weight.shape[0]
    expected = tensors_of(model)
    assert list(found.tensors) == list(expected)
    for name, tensor in found.tensors.items():
        other = expected[name]
        assert type(tensor) is type(other), name
        assert (tensor.dtype, tensor.device, tensor.requires_grad) == (other.dtype, other.device, other.requires_grad)
        assert torch.equal(tensor, other), name
    ties = [[a for a in expected if expected[a] is t] for t in expected.values()]
    assert [[a for a in found.tensors if found.tensors[a] is t] for t in found.tensors.values()] == ties
    found.give_to(model)
    assert all(tensors_of(model)[name] is tensor for name, tensor in found.tensors.items())


def _header(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    save_file({**weights, "more": torch.zeros(3)}, path / "model.safetensors", {"format": "pt"})


def _config(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))


CHANGES = {
    "weights of other names": _header,
    "configuration": _config,
    "generation config": lambda path: (path / "generation_config.json").unlink(),
    "another file": lambda path: (path / "model-00002.safetensors").write_bytes(b""),
    "weights": lambda path: (path / "model.safetensors").unlink(),
    "adapter": lambda path: (path / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_directory_with_another_say_in_its_model_is_another_one(tmp_path: Path, change: str) -> None:
    path = tiny_checkpoint(tmp_path, "bamba")
    before = place(path)
    CHANGES[change](path)
    after = opening_of(path, torch.float32, CPU)
    assert after is None or after.entry.path != before.entry.path


def test_so_is_one_opened_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_checkpoint(tmp_path, "bamba")
    keys = [place(path).entry, place(path, None).entry, place(path, torch.bfloat16).entry]
    meta = opening_of(path, torch.float32, torch.device("meta"))
    assert meta is not None
    keys.append(meta.entry)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    assert place(path).entry == keys[0]
    monkeypatch.setenv("USE_HUB_KERNELS", "0")
    keys.append(place(path).entry)
    for name, version in program_cache.versions().items():
        changed = program_cache.versions() | {name: f"{version} changed"}
        with monkeypatch.context() as context:
            context.setattr(opening, "versions", lambda changed=changed: changed)
            keys.append(place(path).entry)
    assert len({entry.path for entry in keys}) == len(keys)


def test_other_weights_of_the_same_shapes_are_read_from_their_own_files(tmp_path: Path) -> None:
    first, second = (tiny_checkpoint(tmp_path / str(seed), "bamba", seed) for seed in (0, 1))
    noted(first, "bamba")
    found = place(second).restore()
    assert found is not None
    expected = load_file(second / "model.safetensors")
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


def test_a_model_whose_tensors_are_not_the_files_own_gets_no_note(tmp_path: Path, kept: Path) -> None:
    noted(tiny_checkpoint(tmp_path, "kimi_linear"), "kimi_linear")
    assert notes(kept) == [], "its files hold the experts one by one"
    path = tiny_checkpoint(tmp_path, "bamba")
    model = load_model(path, torch.float32, "cpu").eval()
    place(path).store(model)
    assert notes(kept) == [], "its program is not stored"
    stored(entry_of(model, "bamba"), "bamba")
    *_, last = model.parameters()
    own = last.detach().clone()
    with torch.no_grad():
        last.flatten()[-1] += 1
    place(path).store(model)
    assert notes(kept) == [], "its last parameter is another one"
    with torch.no_grad():
        last.copy_(own)
    place(path).store(model)
    assert len(notes(kept)) == 1


def test_whatever_does_not_fit_is_no_note(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_checkpoint(tmp_path, "bamba")
    assert place(path).restore() is None
    noted(path, "bamba")
    (note,) = notes(kept)
    (graph,) = (kept / "programs").glob("*.json")
    assert place(path).restore() is not None
    with monkeypatch.context() as context:
        context.setattr(opening, "source_of", lambda module: f"{module} changed")
        assert place(path).restore() is None
    for file in (note, graph):
        text = file.read_text()
        file.write_text(text[:-40] + "0" + text[-39:])
        assert place(path).restore() is None
        file.write_text(text)
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    assert place(path).restore() is None
    weights.write_bytes(content)
    assert place(path).restore() is not None
    table = json.loads(note.read_text().partition("\n")[2])
    place(path).entry.write(table | {"layers": table["layers"] + 1})
    assert place(path).restore() is None, "a layer without a mixer"
    graph.unlink()
    assert place(path).restore() is None


def test_a_second_generate_imports_little_and_says_the_same(tmp_path: Path) -> None:
    """In a process of its own: transformers' modelling code is imported here, where the note is made."""
    _, path = converted(tmp_path, "bamba")
    noted(path, "bamba")
    command = ["generate", str(path), "one two", "--max-new-tokens", "4", "--json"]
    first = CliRunner().invoke(main, command)
    assert first.exit_code == 0 and "transformers.modeling_utils" in sys.modules, first.output
    code = f"""
import sys
from flarec.cli import main
try:
    main({command})
except SystemExit as end:
    assert not end.code
print([name for name in {HEAVY} if name in sys.modules])
import flarec
model = flarec.load({str(path)!r})
assert "transformers.modeling_utils" not in sys.modules
theirs = dict(model.hf_model.named_parameters())
assert all(theirs[name] is p for name, p in model.program.parameters().items())
assert "transformers.modeling_utils" in sys.modules, "it has this name still"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *second, imported = done.stdout.splitlines()
    assert json.loads(first.stdout)[0]["token_ids"] == json.loads("\n".join(second))[0]["token_ids"]
    assert imported == "[]"
