"""Bad input to `flarec convert`: one clear message, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM

from flarec.checkpoint.manifest import DecodeDefaults, Manifest, MaskToken, Source
from flarec.train.state import StateDirectory
from tests.cli.conversions import QUICK, flarec, write_data
from tests.models import tiny_checkpoint
from tests.train.test_resume import full_disk

Place = Path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sources"), "qwen3_5_text")


@pytest.fixture
def place(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a source `model` (a copy), `data.jsonl` with two records, nothing else."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source, tmp_path / "model")
    write_data(tmp_path / "data.jsonl", 4)
    return tmp_path


def tree(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def message(result: Result, code: int) -> str:
    """The one line of the error."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.strip().endswith(lines[0]), "the error comes last"
    return lines[0]


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def embed(rows: int) -> Callable[[Place], None]:
    """A source whose vocabulary has fewer rows, in its configuration and in its tensors."""

    def change(place: Place) -> None:
        edit(place / "model" / "config.json", vocab_size=rows)
        weights = place / "model" / "model.safetensors"
        tensors = {
            name: tensor[:rows].clone() if name.endswith(("embed_tokens.weight", "lm_head.weight")) else tensor
            for name, tensor in load_file(weights).items()
        }
        save_file(tensors, weights, {"format": "pt"})

    return change


def write(text: str | bytes) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        (place / "data.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def remove(*names: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        for name in names:
            (place / name).unlink()

    return change


def folder(name: str, *, holding: str | None = None) -> Callable[[Place], None]:
    """Make a directory; a file of the place is moved into it."""

    def change(place: Place) -> None:
        (place / name).mkdir()
        if holding:
            shutil.move(place / holding, place / name)

    return change


def nothing(place: Place) -> None:
    pass


MANIFEST = Path("manifest.json")
CONVERT = ["convert", "model", "--data", "data.jsonl"]
RECORD = '{"prompt": "red ", "response": "green"}\n'
CASES: list[tuple[str, Callable[[Place], Any], list[str], str]] = [
    # name, what is changed in the place, arguments, what the message says
    ("no such source", nothing, ["convert", "nowhere", "--data", "data.jsonl"], "nowhere does not exist"),
    ("source is a file", nothing, ["convert", "data.jsonl", "--data", "data.jsonl"], "data.jsonl is a file"),
    ("not a model", folder("empty"), ["convert", "empty", "--data", "data.jsonl"],
     "empty is not a model directory (no config.json)"),
    ("no tokenizer", remove("model/tokenizer.json", "model/tokenizer_config.json"), CONVERT,
     "model has no tokenizer"),
    ("unreadable tokenizer", lambda p: (p / "model" / "tokenizer.json").write_text("{"), CONVERT,
     "the tokenizer in model cannot be read"),
    ("no weights", remove("model/model.safetensors"), [*CONVERT, "--max-length", "64"],
     "model holds no weights (no model.safetensors and no index of shards); copy the model again"),
    ("converted already", lambda p: shutil.copyfile(MANIFEST, p / "model" / "flarec.json"), CONVERT,
     "model is a converted checkpoint already; convert its source model (origin)"),
    ("rows of another vocabulary", lambda p: edit(p / "model" / "config.json", vocab_size=300),
     [*CONVERT, "--max-length", "64"], "has 512 rows, and vocab_size in config.json is 300"),
    ("vocabulary too small", embed(299),
     [*CONVERT, "--max-length", "64"], "the tokenizer has 300 tokens, but the model embeds only 299"),
    ("unknown recipe", nothing, [*CONVERT, "--recipe", "flair"], "did you mean flare?"),
    ("recipe file missing", nothing, [*CONVERT, "--recipe", "mine.toml"], '"mine.toml" is neither'),
    ("unknown recipe key", nothing, [*CONVERT, "--set", "diffusion.blocksize=4"],
     "unknown recipe key diffusion.blocksize; did you mean diffusion.block_size?"),
    ("bad recipe value", nothing, [*CONVERT, "--set", "optimizer.lr=fast"], "optimizer.lr = 'fast' is not allowed"),
    ("no equals sign", nothing, [*CONVERT, "--set", "optimizer.lr"], "write key=value"),
    ("block size 0", nothing, [*CONVERT, "--set", "diffusion.block_size=0"], "diffusion.block_size = 0 is not allowed"),
    ("block larger than a row", nothing, [*CONVERT, "--max-length", "16", "--set", "diffusion.block_size=17"],
     "diffusion.block_size = 17 is larger than data.max_length = 16"),
    ("earlier block larger than a row", nothing, [*CONVERT, "--max-length", "16", "--set",
     "diffusion.earlier_block_sizes=17:0.5"], "diffusion.earlier_block_sizes = 17 is larger than data.max_length = 16"),
    ("no steps", nothing, [*CONVERT, "--steps", "0"], "optimizer.steps = 0 is not allowed"),
    ("rows longer than the context", nothing, [*CONVERT, "--max-length", "1025"],
     "longer than the model's context of 1024 positions"),
    ("row without a spare row", embed(300),
     [*CONVERT, "--recipe", "flare", "--set", "mask_token=row", "--max-length", "64"],
     "all 300 rows of the vocabulary are used"),
    ("unknown device", nothing, [*CONVERT, "--device", "abacus"], "device 'abacus' cannot be used"),
    ("unknown kernels", nothing, [*CONVERT, "--kernels", "fast"], "unknown kernels 'fast'"),
    ("negative seed", nothing, [*CONVERT, "--seed", "-1"], "seed is -1; give a whole number, at least 0"),
    ("no data", nothing, ["convert", "model", "--max-length", "64"], "no data; give at least one --data PATH"),
    ("missing data", nothing, ["convert", "model", "--data", "more.jsonl"], "more.jsonl does not exist"),
    ("bad weight", nothing, ["convert", "model", "--data", "data.jsonl:0"], "the weight 0 is not a number above 0"),
    ("unknown kind of file", lambda p: (p / "data.csv").write_text("a,b"),
     ["convert", "model", "--data", "data.csv", "--max-length", "64"], "data.csv: unknown kind of data file"),
    ("empty data", write(""), [*CONVERT, "--max-length", "64"], "data.jsonl: no records"),
    ("data without a target", write('{"messages": [{"role": "user", "content": "red"}]}\n'),
     [*CONVERT, "--max-length", "64"], "none of 1 records has anything to learn"),
    ("not JSON", write(RECORD + "{red}\n"), [*CONVERT, "--max-length", "64"], "data.jsonl, line 2: not JSON"),
    ("not UTF-8", write(RECORD.encode() + b"\xff\xfe\n"), [*CONVERT, "--max-length", "64"],
     "data.jsonl, line 2: not "),
    ("no known keys", write('{"question": "red"}\n'), [*CONVERT, "--max-length", "64"],
     "data.jsonl, line 1: has none of the keys"),
    ("only bad lines", write("{red}\n"), [*CONVERT, "--skip-bad-lines", "--max-length", "64"],
     "none of 1 records has anything to learn"),
    ("output not empty", folder("out", holding="manifest.json"), [*CONVERT, "--out", "out"],
     "out is not empty"),
    ("output is a file", lambda p: (p / "out").touch(), [*CONVERT, "--out", "out", "--overwrite"],
     "out exists and is not a directory"),
    ("output is the source", nothing, [*CONVERT, "--out", "model", "--overwrite"],
     "model lies in the output directory model"),
    ("data in the output", folder("out", holding="data.jsonl"),
     ["convert", "model", "--data", "out/data.jsonl", "--out", "out", "--overwrite"],
     "data.jsonl lies in the output directory out"),
    ("nothing to resume", nothing, [*CONVERT, "--out", "out", "--resume"], "there is nothing to resume"),
    ("interrupted run", lambda p: StateDirectory(p / "out.partial").create({}), [*CONVERT, "--out", "out"],
     "out.partial holds an interrupted run: continue it with --resume"),
]


@pytest.mark.parametrize(("change", "arguments", "expected"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_usage_errors(place: Path, change: Callable[[Place], Any], arguments: list[str], expected: str) -> None:
    """Exit code 2, and the directory is as it was."""
    manifest = Manifest(Source("origin"), MaskToken("row", 300), DecodeDefaults(4, {"ar-trust": "causal"}))
    MANIFEST.write_text(manifest.to_json())
    change(place)
    before = tree(place)
    assert expected in message(flarec(*arguments), 2)
    assert tree(place) == before


def test_unknown_mixer(place: Path) -> None:
    """A model that cannot be converted is a failure to capture, before anything is written."""
    config = BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=2)
    BloomForCausalLM(config).save_pretrained(place / "model")
    before = tree(place)
    text = message(flarec(*CONVERT, "--max-length", "64"), 1)
    assert "'bloom'" in text
    assert tree(place) == before


def test_debug_shows_the_traceback(place: Path) -> None:
    result = flarec(*CONVERT, "--steps", "0", "--debug")
    assert result.exception is not None
    assert type(result.exception).__name__ == "RecipeError"


def test_bad_lines_can_be_skipped_and_are_counted(place: Path) -> None:
    write(RECORD * 3 + "{red}\n")(place)
    result = flarec(*CONVERT, "--skip-bad-lines", "--dry-run", "--max-length", "64", "--set", "optimizer.batch_rows=1")
    assert result.exit_code == 0, result.output
    assert "1 bad lines skipped (first: data.jsonl, line 4: not JSON" in result.stdout


SAVING = [*CONVERT, "--out", "out", *QUICK, "--set", "save.every=1", "--set", "evaluation.every=0"]


def test_a_loss_that_is_not_finite_keeps_the_last_good_save(place: Path) -> None:
    """The learning rate is so large that the first step ruins the weights."""
    text = message(flarec(*SAVING, "--set", "optimizer.lr=1e38"), 1)
    assert "step 2 is not finite (row 0 of 2" in text
    assert "say " in text, "documents of the batch are quoted"
    assert "the save of step 1 is kept in out.partial" in text
    assert (place / "out.partial" / "latest").read_text() == "state-00000001"
    assert not (place / "out").exists()


def test_weights_that_are_not_finite(place: Path) -> None:
    path = place / "model" / "model.safetensors"
    state = load_file(path)
    state["model.embed_tokens.weight"][:] = torch.nan
    save_file(state, path, metadata={"format": "pt"})
    text = message(flarec(*SAVING), 1)
    assert "step 1 is not finite (row 0 of 2" in text
    assert "no step was saved yet in out.partial" in text


def test_resume_needs_the_same_run(place: Path) -> None:
    assert flarec(*SAVING, "--set", "optimizer.lr=1e38").exit_code == 1
    again = [*SAVING, "--set", "optimizer.lr=1e38", "--resume"]
    before = tree(place)
    text = message(flarec(*SAVING, "--resume", "--seed", "3"), 2)
    assert "recipe.optimizer.lr was 1e+38 and is now 0.001; seed was 0 and is now 3" in text
    write_data(place / "data.jsonl", 5)
    text = message(flarec(*again), 2)
    assert "out.partial belongs to another run: data.1: data.jsonl was" in text
    assert "--overwrite" in text
    write_data(place / "data.jsonl", 4)
    assert tree(place) == before


def test_a_full_disk_while_saving_and_while_writing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with full_disk(300_000):
        text = message(flarec(*SAVING), 1)
    assert "cannot write out.partial" in text
    assert "--resume" in text
    assert not (place / "out").exists()

    copyfile = shutil.copyfile

    def full(source: Path, target: Path) -> None:
        if "metrics" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    text = message(flarec(*SAVING, "--resume"), 1)
    assert "the disk is full" in text
    assert "training is complete and kept, write it with --resume" in text
    assert sorted(path.name for path in place.iterdir()) == ["data.jsonl", "model", "out.partial"]

    monkeypatch.undo()
    monkeypatch.chdir(place)
    result = flarec(*SAVING, "--resume")
    assert result.exit_code == 0, result.output
    assert "continuing after step 6 of 6" in result.stderr
    assert (place / "out" / "flarec.json").exists()
