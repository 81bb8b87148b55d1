"""Damage to a checkpoint, and what is missing, is noticed when it is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.manifest import NAME, Manifest
from flarec.errors import CheckpointError
from tests.models import tiny_checkpoint, tiny_model

FILES = ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "custom_generate/generate.py"]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(copy: Path, name: str) -> None:
    path = copy / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{name}.* is truncated"):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", FILES)
def test_an_edited_file_is_named(copy: Path, name: str) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name}.* changed"):
        open_checkpoint(copy)


def test_a_flipped_byte_or_a_truncation_anywhere_is_noticed(copy: Path) -> None:
    """Of every file: its ends, and places all over it. The card alone is free to edit."""
    manifest = Manifest.read(copy)
    assert manifest is not None
    noticed = set()
    for name in manifest.files:
        path = copy / name
        data = path.read_bytes()
        for place in sorted({0, len(data) - 1, *range(0, len(data), len(data) // 9 + 1)}):
            flipped = bytearray(data)
            flipped[place] ^= 1 << place % 8
            for damaged in (bytes(flipped), data[:place]):
                path.write_bytes(damaged)
                if name == "README.md":
                    assert open_checkpoint(copy, whole=True).manifest is not None
                    continue
                with pytest.raises(CheckpointError, match=f"{name} (was changed|is truncated)"):
                    open_checkpoint(copy)
                noticed.add(name)
        path.write_bytes(data)
    assert noticed == {*manifest.files} - {"README.md"}


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        open_checkpoint(copy)


def test_a_manifest_without_the_script(copy: Path) -> None:
    """As an older or another program's may be: the script is then a further file, which flarec never runs."""
    manifest = Manifest.read(copy)
    assert manifest is not None and manifest.files.pop("custom_generate/generate.py").sha256
    (copy / NAME).write_text(manifest.to_json())
    assert open_checkpoint(copy).manifest is not None
    (copy / "custom_generate" / "generate.py").write_text("raise SystemExit")
    assert open_checkpoint(copy).load_tokenizer() is not None


def test_large_files_are_checked_by_size(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr("flarec.checkpoint.manifest.HASHED_AT_OPEN", len(data) - 1)
    assert open_checkpoint(copy).manifest is not None
    with pytest.raises(CheckpointError, match=r"model.safetensors was changed after it was written"):
        open_checkpoint(copy, whole=True)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match=r"model.safetensors is changed"):
        open_checkpoint(copy)


def test_further_files_are_nobodys_business(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert open_checkpoint(copy).manifest is not None


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(tmp_path / "file")


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a model directory \(no config.json\)"):
        open_checkpoint(tmp_path)


def test_a_hub_id_that_cannot_be_fetched() -> None:
    with pytest.raises(CheckpointError, match="nobody/nothing is no local directory and could not be fetched"):
        open_checkpoint("nobody/nothing")


def test_no_tokenizer(tmp_path: Path) -> None:
    tiny_model("bamba").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        open_checkpoint(tmp_path).load_tokenizer()


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "bamba")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read"):
        open_checkpoint(source).load_tokenizer()


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "bamba")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated \(1,000 bytes are there\)"):
        open_checkpoint(source).load_model()
