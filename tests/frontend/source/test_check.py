"""Sources that cannot be opened as they are: one sentence each, from headers and sizes, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.write import write_checkpoint
from flarec.cli import main
from flarec.errors import FlarecWarning, UsageError
from flarec.frontend.export import capture
from flarec.frontend.loading import judge_source, load_model
from tests.checkpoints import manifest_for
from tests.cli.conversions import QUICK, flarec
from tests.frontend.source.sources import (
    HIDDEN,
    ROWS,
    Tensors,
    added,
    configure,
    copied,
    in_fp8,
    original,
    packed,
    renamed,
    rewrite,
)

UP = "model.layers.0.mlp.up_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
SIDE = {"quantization": {"quant_algo": "NVFP4"}}
Change = Callable[[Path], Any]


def tensors(change: Callable[[Tensors], Tensors], **config: Any) -> Change:
    def apply(path: Path) -> None:
        rewrite(path, change)
        configure(path, **config)

    return apply


def config(**values: Any) -> Change:
    return lambda path: configure(path, **values)


def file(name: str, content: str | bytes) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: (path / name).write_bytes(data)


def moved(name: str | None) -> Change:
    def apply(path: Path) -> None:
        weights = path / "model.safetensors"
        weights.rename(path / name) if name else weights.unlink()

    return apply


def link(path: Path) -> None:
    (path / "model.safetensors").symlink_to("/nowhere/blob")


def both(*changes: Change) -> Change:
    return lambda path: [change(path) for change in changes]


def shards(change: Callable[[dict[str, Tensors], dict[str, str]], None]) -> Change:
    """Two shards and their index, after `change` had a say: tensors by file, file by tensor."""

    def apply(path: Path) -> None:
        every = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        files: dict[str, Tensors] = {name: {} for name in names}
        index = {}
        for place, (key, value) in enumerate(every.items()):
            files[names[place % 2]][key] = value
            index[key] = names[place % 2]
        change(files, index)
        for name, held in files.items():
            save_file(held, path / name, metadata={"format": "pt"})
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    return apply


def drop_shard(files: dict[str, Tensors], index: dict[str, str]) -> None:
    files.pop("model-00002-of-00002.safetensors")


def drop_tensor(files: dict[str, Tensors], index: dict[str, str]) -> None:
    files["model-00002-of-00002.safetensors"].popitem()


def overlap(files: dict[str, Tensors], index: dict[str, str]) -> None:
    name, value = next(iter(files["model-00001-of-00002.safetensors"].items()))
    files["model-00002-of-00002.safetensors"][name] = value


def outside(files: dict[str, Tensors], index: dict[str, str]) -> None:
    index["lm_head.weight"] = "../other/model.safetensors"


NO_HEAD = tensors(lambda every: {name: value for name, value in every.items() if name != "lm_head.weight"})
REFUSED: dict[str, tuple[Change, str]] = {
    "fp8 without a key": (tensors(in_fp8), r"quantised \(fp8: .*weight_scale_inv\)"),
    "fp8 without scales": (
        tensors(lambda every: {n: v.to(torch.float8_e4m3fn) if n == f"{UP}.weight" else v for n, v in every.items()}),
        rf"quantised \(fp8: {UP}.weight\)",
    ),
    "fp8 with its key": (tensors(in_fp8, quantization_config=FP8), r"quantised \(fp8: quantization_config of config"),
    "fp8 per tensor": (tensors(lambda t: in_fp8(t, 1 << 20, "_scale")), r"quantised \(fp8: .*weight_scale\)"),
    "gptq": (tensors(packed("qweight", "qzeros", "scales", "g_idx")), r"quantised \(gptq: .*g_idx\)"),
    "gptq, old": (
        both(tensors(packed("qweight", "qzeros", "scales", "g_idx")), file("quantize_config.json", '{"bits": 4}')),
        r"quantised \(gptq: quantize_config.json and .*g_idx\)",
    ),
    "awq": (tensors(packed("qweight", "qzeros", "scales")), r"quantised \(awq: .*qweight\)"),
    "awq with its key": (
        tensors(packed("qweight", "qzeros", "scales"), quantization_config={"quant_method": "awq", "bits": 4}),
        r"quantised \(awq: quantization_config of config.json\)",
    ),
    "bitsandbytes 4": (
        tensors(packed("weight.absmax", "weight.quant_map", dtype=torch.uint8, keep=True)),
        r"quantised \(bitsandbytes 4-bit: .*absmax\)",
    ),
    "bitsandbytes 8": (
        tensors(packed("SCB", "weight_format", dtype=torch.int8, keep=True)), r"quantised \(bitsandbytes 8-bit: .*SCB\)"
    ),
    "compressed-tensors": (
        tensors(packed("weight_packed", "weight_scale", "weight_shape")), r"quantised \(compressed-tensors: .*weight_"
    ),
    "NVFP4 with its key": (
        tensors(
            packed("weight_scale", "weight_scale_2", dtype=torch.uint8, keep=True),
            quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"},
        ),
        r"quantised \(modelopt NVFP4: quantization_config of config.json\)",
    ),
    "NVFP4": (
        both(
            tensors(packed("weight_scale", "weight_scale_2", dtype=torch.uint8, keep=True)),
            file("hf_quant_config.json", json.dumps(SIDE)),
        ),
        r"quantised \(modelopt NVFP4: hf_quant_config.json and .*weight_scale_2\)",
    ),
    "mxfp4": (tensors(packed("weight_blocks", "weight_scales")), r"quantised \(mxfp4: .*weight_blocks\)"),
    "hqq": (tensors(packed("W_q", "meta")), r"quantised \(hqq: .*W_q\)"),
    "mlx": (tensors(packed("scales", "biases", dtype=torch.int32, keep=True)), r"quantised \(mlx: .*biases\)"),
    "int8 alone": (tensors(packed(dtype=torch.int8, keep=True)), r"quantised \(packed I8: .*proj.weight\)"),
    "an fp8 cache": (
        tensors(added(model__layers__3__self_attn__k_scale=torch.ones(1))), r"quantised \(an fp8 cache: .*k_scale\)"
    ),
    "a key alone": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"says bitsandbytes, and no tensor is quantised; remove quantization_config from config.json",
    ),
    "an unmerged adapter": (
        tensors(added(model__layers__0__mlp__up_proj__lora_A__default__weight=torch.ones(4, HIDDEN))),
        r"an adapter that is not merged into its model \(.*lora_A.default.weight\)",
    ),
    "an adapter beside": (file("adapter_config.json", '{"peft_type": "LORA"}'), r"merge it with --merge-adapter"),
    "a dtype with its module": (config(dtype="torch.bfloat16"), r"dtype = 'torch.bfloat16' in config.json is no dtype"),
    "a number as text": (config(num_hidden_layers="4"), r"field 'num_hidden_layers': TypeError: .*expected int"),
    "a negative size": (config(vocab_size=-5), r"cannot be opened as a causal language model: .*negative dimension -5"),
    "an activation that is none": (config(hidden_act="swiglu2"), r"that transformers does not find \('swiglu2'\)"),
    "generation defaults against each other": (
        file("generation_config.json", '{"do_sample": false, "num_return_sequences": 3}'),
        r"generation_config.json cannot be used: Greedy methods .*; correct it, or remove it",
    ),
    "generation defaults that are none": (file("generation_config.json", "[1]"), r"generation_config.json cannot be "),
    "a link to nothing": (both(moved(None), link), r"model.safetensors is a link to /nowhere/blob, where nothing is"),
    "no dtype": (config(dtype="auto"), r"dtype = 'auto' in config.json is no dtype; write float32"),
    "a kind of positions with a typo": (
        config(rope_parameters={"rope_type": "yran", "rope_theta": 1e4, "factor": 2.0}),
        r"a value, or lacks a key, that transformers does not find \('yran'\)",
    ),
    "too many rows": (config(vocab_size=ROWS - 12), rf"has {ROWS} rows, and vocab_size in config.json is 500; set vo"),
    "other width": (config(hidden_size=32), r"is 512 x 64, and config.json describes 512 x 32; copy the config.json"),
    "a stored bias": (
        tensors(added(model__layers__0__mlp__up_proj__bias=torch.zeros(128))), rf"{UP}.bias is stored .* has no place"
    ),
    "a stored norm": (
        tensors(added(model__layers__3__self_attn__gate_norm__weight=torch.zeros(4))), r"gate_norm.weight is stored in"
    ),
    "no head": (NO_HEAD, r"no weights for lm_head.weight; if its head is the embedding, set tie_word_embeddings"),
    "an unknown prefix": (
        tensors(renamed(lambda name: f"thinker.{name}")), r"begin with 'thinker.', which transformers does not know"
    ),
    "a missing layer": (
        tensors(lambda every: {name: value for name, value in every.items() if "layers.2." not in name}),
        r"holds no weights for model.layers.2.* and \d+ more; copy the model again",
    ),
    "a pointer": (file("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), r"run `git lfs pull`"),
    "a web page": (file("model.safetensors", "<!DOCTYPE html>" * 99), r"is a web page, not the weights"),
    "an empty file": (file("model.safetensors", ""), r"model.safetensors is truncated \(0 bytes are there\)"),
    "a pickle renamed": (file("model.safetensors", b"PK\x03\x04" * 99), r"is damaged or no safetensors file"),
    "no weights": (moved(None), r"holds no weights \(no model.safetensors"),
    "another name": (moved("weights.safetensors"), r"if weights.safetensors has the weights, rename it to model.safet"),
    "Mistral's names": (moved("consolidated.safetensors"), r"in consolidated.safetensors: it has Mistral's own names"),
    "shards without an index": (moved("model-00001-of-00002.safetensors"), r"but no model.safetensors.index.json"),
    "a missing shard": (shards(drop_shard), r"model-00002-of-00002.safetensors is missing, and the model's weights"),
    "a shard of another copy": (shards(drop_tensor), r"index.json says that model-00002-of-00002.safetensors holds"),
    "overlapping shards": (shards(overlap), r"is stored twice, in model-00001-of-.* and in model-00002-of"),
    "weights elsewhere": (
        config(transformers_weights="../other/model.safetensors"),
        r"transformers_weights = '../other/model.safetensors' in",
    ),
    "a shard elsewhere": (shards(outside), r"names ../other/model.safetensors, which is not in its directory"),
    "Keras": (both(moved(None), file("tf_model.h5", "x")), r"in tf_model.h5: it is of another framework"),
    "ONNX": (both(moved(None), file("model.onnx", "x")), r"in model.onnx: it is a compiled model"),
    "FSDP": (both(moved(None), file("__0_0.distcp", "x")), r"in __0_0.distcp: it is a trainer's sharded state"),
    "GGUF": (both(moved(None), file("tiny.Q4_0.gguf", "GGUF")), r"in tiny.Q4_0.gguf: give it as --gguf tiny.Q4_0.gguf"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    path = copied(tmp_path)
    change(path)
    with pytest.raises(UsageError, match=words) as caught:
        judge_source(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["fp8 without a key", "awq with its key", "no head", "a missing shard", "a pointer"])
def test_the_doctor_says_the_same_before_any_capture(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    change, words = REFUSED[name]
    path = copied(tmp_path)
    change(path)
    monkeypatch.setattr("flarec.doctor.diagnosis.capture", None)
    done = CliRunner().invoke(main, ["doctor", str(path), "--quick"])
    assert done.exit_code == 1, done.output
    line = next(line for line in done.stdout.splitlines() if line.startswith("converts"))
    with pytest.raises(UsageError, match=words) as caught:
        judge_source(path)
    assert line.removeprefix("converts").strip() == f"no: {caught.value}"


@pytest.mark.parametrize("name", ["fp8 without a key", "NVFP4 with its key", "too many rows", "no weights"])
def test_a_conversion_stops_before_it_reads_data(name: str, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    path = copied(tmp_path)
    change(path)
    (tmp_path / "data.jsonl").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    result = flarec("convert", path, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out", *QUICK)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    with pytest.raises(UsageError, match=words) as caught:
        judge_source(path)
    assert last == f"Error: {caught.value}"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear", "zamba2"])
def test_a_whole_source_is_judged_whole(family: str) -> None:
    """One per expert or merged, tied in blocks or not: nothing is missing, nothing is left over."""
    facts = judge_source(original(family))
    assert facts.notes == () and not facts.mapping and facts.quantised is None and facts.config is None


PREFIXES = ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "language_model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_known_prefixes_are_taken_away(prefix: str, tmp_path: Path) -> None:
    path = copied(tmp_path, "kimi_linear")
    rewrite(path, renamed(lambda name: prefix + name))
    with pytest.warns(FlarecWarning, match=r"names of the tensors in .* begin with .*, which is taken away"):
        model = load_model(path, torch.float32, "cpu")
    expected = load_model(original("kimi_linear"), torch.float32, "cpu").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    names = load_file(original("kimi_linear") / "model.safetensors").keys()
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == names


def test_wrappings_inside_of_names(tmp_path: Path) -> None:
    path = copied(tmp_path)
    rewrite(path, renamed(lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module.")))
    assert list(judge_source(path).mapping) == [r"_checkpoint_wrapped_module\."]


def test_what_nothing_reads_is_named(tmp_path: Path) -> None:
    path = copied(tmp_path)
    rewrite(path, added(medusa__0__weight=torch.ones(3), value_head__bias=torch.ones(1)))
    (note,) = judge_source(path).notes
    assert "no place for 2 stored tensors" in note and "(medusa.0.weight, value_head.bias)" in note


# --- heads and ties


def with_a_head(every: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(7)
    return every | {"lm_head.weight": torch.randn(ROWS, HIDDEN, generator=generator) / 8}


def test_a_head_against_the_claim_is_trained_and_written_for_itself(tmp_path: Path) -> None:
    path = copied(tmp_path, tied=True)
    rewrite(path, with_a_head)
    checkpoint = open_checkpoint(path)
    with pytest.warns(FlarecWarning, match="holds a head that is not the embedding"):
        model = checkpoint.load_model(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = capture(model).parameters()
    assert trained["lm_head.weight"] is not trained["model.embed_tokens.weight"]
    with torch.no_grad():
        trained["lm_head.weight"].add_(1.0)
    out = write_checkpoint(tmp_path / "out", model, checkpoint.load_tokenizer(), manifest_for(path))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    ours, theirs = load_model(out, None, "cpu"), AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    for opened in (ours.state_dict(), theirs.state_dict()):
        assert torch.equal(opened["lm_head.weight"], before["lm_head.weight"] + 1.0)
        assert torch.equal(opened["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_a_stored_head_that_is_the_embedding_is_a_tie(tmp_path: Path) -> None:
    path = copied(tmp_path, tied=True)
    rewrite(path, lambda every: every | {"lm_head.weight": every["model.embed_tokens.weight"].clone()})
    facts = judge_source(path)
    assert not facts.untied and facts.notes == ()
    model = load_model(path, None, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tie_that_shared_blocks_need_is_not_given_up(tmp_path: Path) -> None:
    path = copied(tmp_path, "zamba2")
    rewrite(path, with_a_head)
    with pytest.raises(UsageError, match="this family needs for the blocks that its layers share"):
        judge_source(path)


def test_an_index_that_says_nothing(tmp_path: Path) -> None:
    path = copied(tmp_path)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(UsageError, match=r"model.safetensors.index.json cannot be read .*; copy the model again"):
        judge_source(path)
