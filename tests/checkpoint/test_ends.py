"""Tokens that end a text: all that a source names stop, and what is written names them alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from flarec.checkpoint.directory import Checkpoint, open_checkpoint
from flarec.checkpoint.ends import state_ends, stated_ends
from flarec.checkpoint.write import write_checkpoint
from flarec.errors import CheckpointError
from flarec.train.data.files import SourceSpec
from flarec.train.data.sources import load_sources
from flarec.train.prepare import _ends
from flarec.train.progress import Reporter
from tests.checkpoints import manifest_for
from tests.models import tiny_checkpoint, tiny_config
from tests.train.small_tokenizer import CHATML, small_tokenizer


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def table(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text())
    return read


class Tokenizer:
    eos_token_id = 4


@pytest.mark.parametrize(("config", "generation", "tokenizer", "ends"), [
    ({"eos_token_id": 2}, {"eos_token_id": 2}, None, {2}),
    ({"eos_token_id": 2}, {"eos_token_id": [3, 5]}, Tokenizer, {2, 3, 4, 5}),
    ({"eos_token_id": [2, 3]}, None, Tokenizer, {2, 3, 4}),
    ({"text_config": {"eos_token_id": 2}}, {"eos_token_id": None}, None, {2}),
    ({"eos_token_id": 7, "text_config": {"eos_token_id": 2}}, {}, None, {2, 7}),
    ({}, None, None, {9}),
    ({}, {"eos_token_id": 3}, None, {3}),
    ({"eos_token_id": None}, {"eos_token_id": -1}, Tokenizer, {4, 9}),
])
def test_all_that_is_stated_ends_a_text(
    config: Any, generation: Any, tokenizer: Any, ends: set[int], tmp_path: Path
) -> None:
    """What the class of the configuration has for its default (9 here) counts where no file says anything."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stated_ends(tmp_path, tiny_config("bamba", eos_token_id=9), tokenizer) == ends


@pytest.mark.parametrize("text", ["[", "3", "\xff"])
def test_a_file_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read: .*copy the model again"):
        stated_ends(tmp_path, tiny_config("bamba"), None)


def test_what_is_written_names_them_alike(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "bamba")
    edit(source / "config.json", eos_token_id=7)
    GenerationConfig(eos_token_id=[2, 5], do_sample=True, top_k=9).save_pretrained(source)
    opened = open_checkpoint(source)
    tokenizer, model = opened.load_tokenizer(), opened.load_model()
    ends = sorted(opened.eos_ids(model.config, tokenizer) - {5})
    out = write_checkpoint(tmp_path / "out", model, tokenizer, manifest_for(source), ends=(5, *ends))
    stated = [kind.from_pretrained(out).eos_token_id for kind in (AutoConfig, GenerationConfig)]
    assert stated == [[5, *ends]] * 2
    assert GenerationConfig.from_pretrained(out).top_k == 9
    again = AutoTokenizer.from_pretrained(out)
    assert again.eos_token_id == 5 and again("What is 3?")["input_ids"] == tokenizer("What is 3?")["input_ids"]
    written = open_checkpoint(out, whole=True)
    assert written.eos_ids(written.load_config(), again) == {5, *ends}
    assert tokenizer.eos_token_id != 5, "the tokenizer in memory is not changed"


def test_a_text_model_inside_of_another_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 2, "x": 1}, "y": 2}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<b>", "lstrip": True}}))
    state_ends(tmp_path, [3, 2], "<b>")
    assert table(tmp_path / "config.json") == {"text_config": {"eos_token_id": [3, 2], "x": 1}, "y": 2}
    assert table(tmp_path / "generation_config.json") == {"eos_token_id": [3, 2]}
    assert table(tmp_path / "tokenizer_config.json")["eos_token"] == {"content": "<b>", "lstrip": True}


def test_files_that_agree_stay_as_they_are(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "bamba")
    opened = open_checkpoint(source)
    tokenizer = opened.load_tokenizer()
    (end,) = Checkpoint(source, None).eos_ids(opened.load_config(), tokenizer)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    state_ends(source, [end], tokenizer.eos_token)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_the_end_of_the_data_comes_first_and_stops_even_if_nobody_names_it(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(CHATML, eos_token="<|im_start|>", additional_special_tokens=["<|im_end|>"])
    end, eos = (tokenizer.convert_tokens_to_ids(f"<|im_{name}|>") for name in ("end", "start"))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"text": "a"}) + "\n"
                                      + json.dumps({"messages": messages}))
    sources = load_sources([SourceSpec(tmp_path / "a.jsonl")], tokenizer, max_length=99, end_ids=[eos, 9])
    assert dict(sources[0].stats.ends) == {end: 2, eos: 1} and not sources[0].stats.endless
    notes = Notes()
    assert _ends(sources, tokenizer, [eos, 9], notes) == (end, *sorted((eos, 9)))
    assert notes.lines == ["turns of the data end with <|im_end|>, which the source names nowhere as an end: it is one"]
    assert _ends(sources, tokenizer, [eos, end], notes) == (end, eos) and len(notes.lines) == 1
