"""`flarec train-head`: from a checkpoint and texts to one that decodes elastically, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flarec as package
from flarec.base.hashes import FileEntry
from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.horizon import FILE
from flarec.checkpoint.manifest import Manifest
from flarec.checkpoint.write import write_checkpoint
from flarec.errors import CheckpointError
from tests.checkpoints import adapted, converted, manifest_for
from tests.cli.conversions import flarec
from tests.models import few_checkpoint, tiny_tokenizer

QUICK = ["--rows", "4", "--steps", "60", "--width", "8", "--max-length", "64", "--device", "cpu", "--held-out", "2",
         "--lr", "1e-2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint`, whose model says "z" whatever it read, and so do its drafts; `data.jsonl`, which it would write."""
    folder = tmp_path_factory.mktemp("head")
    source = few_checkpoint(folder, "bamba", tie_word_embeddings=False)
    opened = open_checkpoint(source)
    model = opened.load_model(torch.float32)
    says = tiny_tokenizer().convert_tokens_to_ids("z")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.get_input_embeddings().weight.fill_(1.0)
        model.lm_head.weight[says] = 1.0
    out = write_checkpoint(
        folder / "checkpoint", model, opened.load_tokenizer(), manifest_for(source), attachments={}
    )
    lines = [json.dumps({"text": "z" * (20 + number)}) for number in range(12)]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert out == folder / "checkpoint"
    return folder


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    result = flarec("train-head", place / "checkpoint", "--data", place / "data.jsonl", "--out", place / "out", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "of the places" in result.stderr and "checkpoint:" in result.stderr
    assert "looks at nothing" not in result.stderr, "every place is alike, and the head says so"
    return place / "out"


def test_the_checkpoint_decodes_elastically(made: Path, place: Path) -> None:
    model = package.load(made)
    result = model.generate("zz", mode="elastic", threshold=0.0, max_new_tokens=17)
    assert result.text == "z" * 17
    # the model always says what its drafts say: blocks of 3 are safe everywhere, and the head has learned that
    assert result.forwards == 5 and result.accepted == [0, 0, 0, 5]
    causal = model.generate("zz", mode="causal", max_new_tokens=17)
    assert causal.token_ids == result.token_ids
    assert model.generate("zz", mode="ar-trust", max_new_tokens=17).token_ids == result.token_ids
    said = flarec("generate", made, "zz", "--mode", "elastic", "--threshold", "0", "--max-new-tokens", "9", "--json")
    assert said.exit_code == 0 and json.loads(said.stdout)[0]["mode"] == "elastic"


def test_random_ids_are_the_noise_that_it_learns_from(place: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(place / "checkpoint")
    model, manifest = opened.load_model(torch.float32), manifest_for(place / "bamba", "random")
    out = write_checkpoint(tmp_path / "random", model, opened.load_tokenizer(), manifest, attachments={})
    result = flarec("train-head", out, "--data", place / "data.jsonl", "--out", tmp_path / "out", *QUICK)
    assert result.exit_code == 0, result.stderr
    found = package.load(tmp_path / "out").generate("zz", mode="elastic", threshold=0.0, max_new_tokens=17)
    assert (found.text, found.accepted) == ("z" * 17, [0, 0, 0, 5])


def test_what_was_written(made: Path, place: Path) -> None:
    before, after = Manifest.read(place / "checkpoint"), Manifest.read(made)
    assert before is not None and after is not None
    assert "predict-horizon(positions=3, width=8)" in after.pipelines["elastic"]
    assert {name: after.pipelines[name] for name in before.pipelines} == before.pipelines
    assert (after.decode, after.mask, after.source, after.recipe) == (
        before.decode, before.mask, before.source, before.recipe
    )
    assert after.format_version == before.format_version, "what reads the one reads the other"
    changed = {name for name in before.files if before.files[name] != after.files.get(name)}
    cards = [(folder / "README.md").read_text(encoding="utf-8") for folder in (made, place / "checkpoint")]
    assert [card.count("(`elastic`:") for card in cards] == [1, 0], "the card names the modes that the checkpoint has"
    assert changed <= {"README.md"} and set(after.files) - set(before.files) == {FILE}
    assert after.metrics["horizon"]["kl"] < 0.1 and after.data["horizon"]["places"] > 50
    assert {str(tensor.dtype) for tensor in load_file(made / FILE).values()} == {"torch.float32"}


def test_the_same_arguments_give_the_same_head(made: Path, place: Path, tmp_path: Path) -> None:
    result = flarec("train-head", place / "checkpoint", "--data", place / "data.jsonl", "--out", tmp_path / "again",
                    "--link", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "again" / FILE).read_bytes() == (made / FILE).read_bytes()
    assert (tmp_path / "again" / "model.safetensors").samefile(place / "checkpoint" / "model.safetensors")
    # a checkpoint with a head may get another one
    again = flarec("train-head", made, "--data", place / "data.jsonl", "--out", tmp_path / "other", "--seed", "1",
                   *QUICK, "--steps", "1")
    assert again.exit_code == 0, again.stderr
    assert "the head says less than one that looks at nothing" in " ".join(again.stderr.split())
    assert (tmp_path / "other" / FILE).read_bytes() != (made / FILE).read_bytes()


def refused(*arguments: object) -> str:
    result = flarec(*arguments)
    assert result.exit_code != 0 and result.stderr.count("Error: ") == 1, result.stderr
    error: str = result.stderr.partition("Error: ")[2]
    assert "Traceback" not in result.output
    return error


def test_one_sentence_for_what_cannot_be(place: Path, made: Path, tmp_path: Path) -> None:
    data = ["--data", str(place / "data.jsonl"), *QUICK]
    plain = place / "checkpoint"
    assert "no head that says how many drafts are safe" in refused("generate", plain, "z", "--mode", "elastic")
    assert "is not a checkpoint of flarec" in refused("train-head", place / "bamba", *data, "--out", tmp_path / "a")
    assert "lies in" in refused("train-head", plain, *data, "--out", plain / "inside")
    assert "is not empty" in refused("train-head", plain, *data, "--out", made)
    (tmp_path / "words.jsonl").write_text('{"text": "red green blue"}\n' * 9, encoding="utf-8")
    error = refused("train-head", plain, "--data", tmp_path / "words.jsonl", *QUICK, "--out", tmp_path / "b")
    assert "go on as the model itself would" in error and not (tmp_path / "b").exists()
    source, whole = converted(tmp_path)
    manifest = Manifest.read(whole)
    assert manifest is not None and source.is_dir()
    readouts = dict(manifest.decode.readouts) | {"ar-trust": "block_end"}
    (whole / "flarec.json").write_text(
        replace(manifest, decode=replace(manifest.decode, readouts=readouts)).to_json(), encoding="utf-8"
    )
    assert "read their whole block (block_end)" in refused("train-head", whole, *data, "--out", tmp_path / "c")


@pytest.mark.parametrize(("damage", "reason"), [
    ("missing", "is missing"), ("shapes", "does not hold the head"), ("size", "is for blocks of 3"),
    ("pass", "without predict-horizon"),
])
def test_a_damaged_head_is_refused(made: Path, tmp_path: Path, damage: str, reason: str) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in made.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(made)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(made)).write_bytes(path.read_bytes())
    manifest = Manifest.read(folder)
    assert manifest is not None
    if damage == "missing":
        (folder / FILE).unlink()
    elif damage == "shapes":
        tensors = load_file(folder / FILE)
        save_file({name: tensor[:2].contiguous() for name, tensor in tensors.items()}, folder / FILE)
        manifest = replace(manifest, files=manifest.files | {FILE: FileEntry.of(folder / FILE)})
    elif damage == "size":
        manifest = replace(manifest, decode=replace(manifest.decode, block_size=4))
    else:
        manifest = replace(manifest, pipelines=manifest.pipelines | {"elastic": "canonicalize"})
    (folder / "flarec.json").write_text(manifest.to_json(), encoding="utf-8")
    with pytest.raises(CheckpointError, match=reason):
        package.load(folder)


def test_an_adapter_gets_a_head_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of these models are random: what they say is nobody's text, so every place counts here."""
    from flarec.train.horizon import measure

    def everything(batch: object, choice: object) -> tuple:
        front, count, known = judged(batch, choice)  # type: ignore[arg-type]
        return front, count, torch.ones_like(known)

    judged = measure.judged
    monkeypatch.setattr(measure, "judged", everything)
    (tmp_path / "words.jsonl").write_text('{"text": "red green blue one two three"}\n' * 9, encoding="utf-8")
    source, out = adapted(tmp_path, alone=True)
    result = flarec("train-head", source, "--adapter", out, "--data", tmp_path / "words.jsonl", "--out",
                    tmp_path / "head", *QUICK)
    assert result.exit_code == 0, result.stderr
    model = package.load(source, adapter=tmp_path / "head")
    elastic, causal = (model.generate("red", mode=mode, max_new_tokens=8) for mode in ("elastic", "causal"))
    assert len(elastic.token_ids) == 8 and elastic.token_ids[0] == causal.token_ids[0]
    assert (tmp_path / "head" / FILE).is_file() and not (tmp_path / "head" / "config.json").exists()
