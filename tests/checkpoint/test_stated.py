"""config.json states the mask token, the block size and the readouts: for other engines, and without a manifest."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import flarec as package
from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.manifest import DecodeDefaults, MaskToken
from flarec.checkpoint.stated import state
from flarec.errors import CheckpointError, FlarecWarning
from flarec.train.prepare import _open_source
from tests.checkpoints import MASK_ROW, READOUTS, converted, manifest_for
from tests.models import VOCABULARY, tiny_checkpoint, tiny_config

LOST = r"was converted by flarec but has no flarec.json: it decodes as its config.json says, and nobody checks"


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def test_without_its_manifest_it_decodes_as_before(tmp_path: Path) -> None:
    _, out = converted(tmp_path, kind="vector")

    def texts() -> list[list[int]]:
        model = package.load(out)
        return [model.generate("red", mode=mode, max_new_tokens=9, seed=4, temperature=0.9).token_ids
                for mode in ("causal", "ar-trust", "diffusion-trust")]

    before = texts()
    (out / "flarec.json").unlink()
    with pytest.warns(FlarecWarning, match=LOST):
        assert texts() == before


@pytest.mark.parametrize("kind", ["row", "vector"])
def test_what_is_stated_is_what_was_lost(kind: str, tmp_path: Path) -> None:
    _, out = converted(tmp_path, kind=kind)
    whole = open_checkpoint(out).manifest
    (out / "flarec.json").unlink()
    with pytest.warns(FlarecWarning, match=LOST):
        checkpoint = open_checkpoint(out)
    assert checkpoint.manifest is not None and whole is not None and not checkpoint.foreign
    assert (checkpoint.manifest.mask, checkpoint.manifest.decode) == (whole.mask, DecodeDefaults(3, READOUTS))
    with pytest.warns(FlarecWarning, match=LOST), pytest.raises(CheckpointError, match="converted checkpoint already"):
        _open_source(str(out))
    with pytest.warns(FlarecWarning, match=LOST):
        other = open_checkpoint(out, block_size=2).manifest
    assert other is not None and other.decode == DecodeDefaults(2, READOUTS)


def test_other_engines_find_a_row_and_no_vector(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(converted(tmp_path)[1])
    assert (config.mask_token_id, config.block_size) == (MASK_ROW, 3)
    assert config.dual_mode == {"mask": "row", "mask_token_id": MASK_ROW, "block_size": 3, "readouts": READOUTS}
    vector = config_of(converted(tmp_path / "other", kind="vector")[1])
    assert "mask_token_id" not in vector and vector["block_size"] == 3
    assert vector["dual_mode"]["mask_token_id"] == VOCABULARY


def test_a_value_of_the_models_own_stays(tmp_path: Path) -> None:
    """MiniMax has a block size of another meaning."""
    path = tiny_checkpoint(tmp_path, "minimax")
    before = config_of(path)
    manifest = manifest_for(path)
    state(path, manifest, tiny_config("minimax"))
    after = config_of(path)
    assert after == {**before, "mask_token_id": MASK_ROW, "dual_mode": after["dual_mode"]}
    with pytest.warns(FlarecWarning, match=LOST):
        stated = open_checkpoint(path).manifest
    assert stated is not None and stated.decode.block_size == 3


def test_a_text_model_inside_gets_them_too(tmp_path: Path) -> None:
    stale = {"model_type": "qwen3_5", "mask_token_id": 4, "text_config": {"mask_token_id": 5, "hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(stale))
    manifest = manifest_for(tmp_path, "vector")
    state(tmp_path, manifest, tiny_config("qwen3_5_text"))
    found = config_of(tmp_path)
    assert found["dual_mode"] == found["text_config"]["dual_mode"]
    assert "mask_token_id" not in found and found["text_config"].keys() == {"hidden_size", "block_size", "dual_mode"}


def test_a_checkpoint_written_before_states_nothing(tmp_path: Path) -> None:
    out = shutil.copytree(Path(__file__).parent / "written_at_75426b3", tmp_path / "out")
    (out / "flarec.json").unlink()
    with pytest.warns(FlarecWarning, match="has no flarec.json: it decodes causally only; copy it again"):
        assert open_checkpoint(out).manifest is None


@pytest.mark.parametrize("change", [
    {"mask": "word"}, {"mask_token_id": -1}, {"mask_token_id": True}, {"block_size": 0}, {"block_size": None},
    {"mask_token_id": 1 << 40}, {"block_size": 1 << 40}, {"readouts": {"ar-trust": ["causal"]}},
    {"readouts": {"ar-trust": "left"}}, {"readouts": []}, {"readouts": {"fast": "causal"}}, None,
], ids=str)
def test_a_damaged_table(change: dict[str, Any] | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    manifest = replace(manifest_for(tmp_path), mask=MaskToken("row", 7))
    state(tmp_path, manifest, tiny_config("llama"))
    config = config_of(tmp_path)
    config["dual_mode"] = {**config["dual_mode"], **change} if change is not None else 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = "mask.kind" if change is None else f"{'mask' if 'mask' in str(change) else 'decode'}."
    reason = rf"config\.json has a damaged table dual_mode \({name}.*\); copy the checkpoint again"
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path)
