"""GGUF files as sources: the numbers that the file holds, its tokenizer and its template; the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.manifest import Manifest
from flarec.checkpoint.plain import write_plain_gguf
from flarec.cli import main
from flarec.errors import UsageError
from flarec.frontend.source.gguf import gguf_config, gguf_file, gguf_model, without_gguf
from tests.cli.conversions import QUICK, flarec, write_data
from tests.frontend.source.gguf_files import Kind, source_model, write_gguf
from tests.models import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"}]


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Kind.Q8_0, torch.bfloat16), (Kind.Q4_0, torch.bfloat16), (Kind.F16, torch.float16)]
)
def test_the_weights_are_the_files_own(kind: Kind, dtype: torch.dtype, tmp_path: Path) -> None:
    """The oracle is the gguf package; transformers computes the same in other steps."""
    held = write_gguf(tmp_path / "tiny.gguf", kind)
    model = gguf_model(tmp_path / "tiny.gguf")
    state = model.state_dict()
    assert state.keys() == held.keys() and {tensor.dtype for tensor in state.values()} == {dtype}
    for name, values in held.items():
        expected = torch.from_numpy(np.array(values, dtype=np.float32))
        rounding = 2 * torch.finfo(dtype).eps
        assert (state[name].float() - expected).abs().max() <= rounding * expected.abs().max(), name


def test_the_configuration_is_the_models(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    config, expected = gguf_config(tmp_path / "tiny.gguf"), source_model().config
    assert config.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size", "rope_parameters",
                 "tie_word_embeddings", "eos_token_id", "max_position_embeddings"):
        assert getattr(config, name) == getattr(expected, name), name
    with without_gguf(str(tmp_path), "tiny.gguf") as location:
        assert json.loads((Path(location) / "config.json").read_text())["model_type"] == "llama"
    assert not Path(location).exists()


def test_a_plain_copy_speaks_as_the_tokenizer_did(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    write_plain_gguf(tmp_path / "plain", tmp_path / "tiny.gguf")
    tokenizer, expected = open_checkpoint(tmp_path / "plain").load_tokenizer(), tiny_tokenizer()
    assert len(tokenizer) == 512, "no token without a row"
    assert tokenizer("say red, é 日本").input_ids == expected("say red, é 日本").input_ids
    ours, theirs = (one.apply_chat_template(MESSAGES, tokenize=False) for one in (tokenizer, expected))
    assert ours == theirs
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (expected.eos_token_id, expected.pad_token_id)


def test_a_tokenizer_that_does_not_reach_its_words_is_refused(tmp_path: Path) -> None:
    """Before anything is written."""
    write_gguf(tmp_path / "tiny.gguf", words=["Ġyellow", "Ġgreen"])
    with pytest.raises(UsageError, match=r"the tokenizer of .*tiny\.gguf: 2 of 2 words .* pip install -U transformers"):
        write_plain_gguf(tmp_path / "plain", tmp_path / "tiny.gguf")
    assert not (tmp_path / "plain").exists()


def test_a_conversion(tmp_path: Path) -> None:
    """SOURCE is the directory or the file itself; the plain copy is gone."""
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "tiny.gguf"
    write_gguf(file)
    data, out = write_data(tmp_path / "data.jsonl"), tmp_path / "out"
    quick = [*QUICK, "--steps", 2, "--set", "evaluation.every=0"]
    before = {path.name for path in tmp_path.iterdir()}
    result = flarec("convert", file.parent, "--gguf", "tiny.gguf", "--data", data, "--out", out, *quick)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} - before <= {"out", ".out.lock"}
    manifest = Manifest.read(out)
    assert manifest is not None and manifest.source.name == "tiny" and manifest.source.sha256
    assert open_checkpoint(out).load_model().dtype == torch.bfloat16
    again = flarec("convert", file, "--data", data, "--out", out, *quick, "--resume")
    assert again.exit_code == 0 and "is complete" in again.stderr, "the plain copy has the same hash each time"


def test_an_adapter_alone_has_nothing_to_open_with(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    data, out = write_data(tmp_path / "data.jsonl"), tmp_path / "out"
    result = flarec(
        "convert", tmp_path / "tiny.gguf", "--data", data, "--out", out, *QUICK, "--recipe", "adapter", "--adapter-only"
    )
    assert result.exit_code == 2 and "--adapter-only is for a model that others have too" in result.output
    assert not out.exists()


def test_the_doctor_reads_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")

    def captured(model: object, *, cache: bool) -> None:
        raise UsageError("captured")

    monkeypatch.setattr("flarec.doctor.diagnosis.capture", captured)
    for words in (["doctor", str(tmp_path), "--gguf", "tiny.gguf"], ["doctor", str(tmp_path / "tiny.gguf")]):
        assert "captured" in CliRunner().invoke(main, [*words, "--quick"]).output


BROKEN = {
    "nothing": (lambda file: None, "does not exist; give the GGUF file"),
    "something else": (lambda file: file.write_bytes(b"GGML" * 9), "is no GGUF file; copy it again"),
    "half of it": (lambda file: (write_gguf(file), file.write_bytes(file.read_bytes()[:9000])), "cannot be read by"),
    "scaled frequencies": (
        lambda file: write_gguf(file, more={"rope_freqs.weight": np.ones(8, np.float32)}),
        "holds rope_freqs.weight, scaled",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    make, words = BROKEN[name]
    file = tmp_path / "tiny.gguf"
    make(file)
    data = str(write_data(tmp_path / "data.jsonl"))
    for command in (["doctor", str(tmp_path), "--gguf", "tiny.gguf", "--quick"],
                    ["convert", str(tmp_path), "--gguf", "tiny.gguf", "--data", data, "--out", str(tmp_path) + "-out"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.output
        assert words in result.output.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} <= {"tiny.gguf", "data.jsonl"}


def test_parts_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / "big-00001-of-00003.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="is one of several parts; put them together with llama-gguf-split"):
        gguf_file(part, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install gguf accelerate"):
        gguf_file(part, None)


def test_another_source_is_none(tmp_path: Path) -> None:
    assert gguf_file(tmp_path, None) is None and gguf_file("owner/name", None) is None
