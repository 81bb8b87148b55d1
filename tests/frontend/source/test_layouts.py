"""What published configurations and files of hybrid models look like beside what transformers itself writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import flarec
from flarec.checkpoint.directory import context_of, open_checkpoint
from flarec.checkpoint.weights import stored_dtypes
from flarec.checkpoint.write import write_checkpoint
from flarec.errors import FlarecWarning, UsageError
from flarec.frontend.cache import entry_of
from flarec.frontend.export import capture
from flarec.frontend.families import FAMILIES, REFUSED, family_of
from flarec.frontend.loading import judge_source, load_model, meta_model, read_config
from tests.checkpoints import manifest_for
from tests.frontend.source.sources import Tensors, configure, copied, original, rewrite
from tests.models import tiny_checkpoint, tiny_model

IDS = torch.randint(3, 290, (2, 19), generator=torch.Generator().manual_seed(4))
POSITIONS = torch.arange(19).expand(2, -1).contiguous()


def rewritten(path: Path, out: Path) -> Path:
    """The checkpoint of a conversion that trained nothing."""
    checkpoint = open_checkpoint(path)
    model = checkpoint.load_model(torch.float32)
    dtypes = stored_dtypes(checkpoint.path, model)
    return write_checkpoint(out, model, checkpoint.load_tokenizer(), manifest_for(path), dtype=dtypes)


def mixers(model: Any) -> dict[str, int]:
    counts = capture(model).op_counts()
    return {name.removeprefix("flarec."): n for name, n in counts.items() if name.startswith("flarec.")}


def as_eager(model: Any) -> None:
    program = capture(model)
    with torch.no_grad():
        expected: Tensor = model(IDS, position_ids=POSITIONS).logits
        found = program(IDS, position_ids=POSITIONS)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


# --- words and keys of configurations


def test_a_pattern_with_dashes(tmp_path: Path) -> None:
    """nemotron_h: M mamba, - MLP, * attention, E experts."""
    path = copied(tmp_path, "nemotron_h")
    words = json.loads((path / "config.json").read_text())["layers_block_type"]
    letter = {"linear_attention": "M", "mamba": "M", "moe": "E", "full_attention": "*", "attention": "*", "mlp": "-"}
    pattern = "".join(letter[word] for word in words)
    configure(path, layers_block_type=..., layer_types=..., hybrid_override_pattern=pattern)
    assert "-" in json.loads((path / "config.json").read_text())["hybrid_override_pattern"]
    assert judge_source(path).notes == ()
    assert read_config(path).to_dict()["layers_block_type"] == words


OLD_WORDS = {"linear_attention": "mamba", "full_attention": "attention"}


@pytest.mark.parametrize("family", ["bamba", "granitemoehybrid", "nemotron_h", "zamba2"])
def test_layer_types_in_the_old_words(family: str, tmp_path: Path) -> None:
    """The same model, and the same entry of the program cache."""
    path = copied(tmp_path, family)
    table = json.loads((path / "config.json").read_text())
    key = next((name for name in ("layers_block_type", "layer_types") if name in table), None)
    if key is None:
        pytest.skip("this version of transformers states no types in this family's configuration")
    configure(path, **{key: [OLD_WORDS.get(word, word) for word in table[key]]})
    new, old = (load_model(where, torch.float32, "cpu") for where in (original(family), path))
    assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in new.state_dict().items())
    entries = [entry_of(model, family) for model in (new, old)]
    assert entries[0] is not None and entries[1] is not None and entries[0].path == entries[1].path


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (YARN, 4096),
        (YARN | {"original_max_position_embeddings": 128}, 1024),  # what is stated is longer
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 256, "rope_theta": 10_000.0}, 1024),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}, 1024),
    ],
)
def test_the_context_of_scaled_positions(rope: dict[str, Any], context: int, tmp_path: Path) -> None:
    path = copied(tmp_path, "llama")
    configure(path, rope_parameters=rope)
    assert context_of(read_config(path), None) == context


@pytest.mark.slow
def test_yarn_is_captured_as_it_computes() -> None:
    as_eager(tiny_model("llama", rope_parameters=YARN))


def test_lfm2_says_its_width_in_blocks(tmp_path: Path) -> None:
    """`block_ff_dim` is adjusted by the other keys when a model is made: what is written must not be adjusted twice."""
    path = tiny_checkpoint(tmp_path, "lfm2", intermediate_size=192, block_auto_adjust_ff_dim=True, block_multiple_of=32)
    table = json.loads((path / "config.json").read_text())
    configure(path, intermediate_size=..., block_ff_dim=table["intermediate_size"])
    assert judge_source(path).notes == ()
    out = rewritten(path, tmp_path / "out")
    before, after = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    assert judge_source(out).notes == ()


def test_keys_that_only_other_programs_read_stay(tmp_path: Path) -> None:
    path = copied(tmp_path)
    configure(path, mamba_ssm_dtype="float32", use_mamba_kernels=True)
    assert judge_source(path).notes == ()
    table = json.loads((rewritten(path, tmp_path / "out") / "config.json").read_text())
    assert (table["mamba_ssm_dtype"], table["use_mamba_kernels"]) == ("float32", True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "ops"),
    [
        ({"layer_types": ["full_attention"] * 2, "num_local_experts": 0}, {"softmax_attention": 2}),
        ({"num_local_experts": 0}, {"short_conv": 1, "linear_attention": 1, "softmax_attention": 1}),
        ({"layer_types": ["full_attention"] * 2}, {"softmax_attention": 2, "moe_experts": 2}),
    ],
    ids=["dense", "no experts", "no mamba"],
)
def test_granitemoehybrid_without_parts(overrides: dict[str, Any], ops: dict[str, int], tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "granitemoehybrid", **overrides)
    assert judge_source(path).notes == ()
    assert mixers(load_model(path, torch.float32, "cpu").eval()) == ops


# --- files


def test_decay_rates_stay_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    path = copied(tmp_path)
    wide = ("A_log", "dt_bias")
    rewrite(path, lambda every: {n: value if n.endswith(wide) else value.bfloat16() for n, value in every.items()})
    configure(path, dtype="bfloat16")
    before = load_file(path / "model.safetensors")
    after = load_file(rewritten(path, tmp_path / "out") / "model.safetensors")
    assert {value.dtype for value in after.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


def fused(every: Tensors) -> Tensors:
    """Experts in one tensor per layer, as newer exports have them."""
    result = {name: value for name, value in every.items() if ".experts." not in name}
    layers = {name.partition(".experts.")[0] for name in every if ".experts." in name}
    for layer in layers:
        count = sum(name.startswith(f"{layer}.experts.") and name.endswith("up_proj.weight") for name in every)
        parts = {
            part: torch.stack([every[f"{layer}.experts.{expert}.{part}_proj.weight"] for expert in range(count)])
            for part in ("gate", "up", "down")
        }
        result[f"{layer}.experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        result[f"{layer}.experts.down_proj"] = parts["down"]
    return result


def test_experts_one_by_one_or_fused(tmp_path: Path) -> None:
    path = copied(tmp_path, "qwen3_moe")
    rewrite(path, fused)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(path / "model.safetensors"))
    assert judge_source(path).notes == ()
    one, other = (load_model(where, torch.float32, "cpu").state_dict() for where in (original("qwen3_moe"), path))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_experts_of_different_sizes_are_refused(tmp_path: Path) -> None:
    path = copied(tmp_path, "qwen3_moe")
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    rewrite(path, lambda every: every | {name: every[name][:16].clone()})
    with pytest.raises(UsageError, match=r"model.layers.0.mlp.experts.gate_up_proj of .* cannot be put together"):
        judge_source(path)


@pytest.mark.slow
def test_float16_with_a_convolution_state(tmp_path: Path) -> None:
    """States are kept in the dtype of the run; a step reads what the step before left."""
    path = copied(tmp_path, "lfm2")
    rewrite(path, lambda every: {name: value.half() for name, value in every.items()})
    configure(path, dtype="float16")
    model = flarec.load(path, dtype="float16")
    assert {parameter.dtype for parameter in model.program.parameters().values()} == {torch.float16}
    output = model.generate("one two", max_new_tokens=6)
    text = torch.tensor([[*model.encode("one two"), *output.token_ids]])
    with torch.no_grad():
        logits = model.hf_model(text).logits[0, -output.new_tokens - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
    assert bool((logits.max(dim=1).values - chosen <= 1e-2 * logits.abs().max()).all()), "but for near ties"


# --- families that do not convert


def test_families_that_are_refused_say_why() -> None:
    from transformers import AutoConfig

    assert not set(REFUSED) & set(FAMILIES)
    from transformers import CONFIG_MAPPING

    known = [family for family in REFUSED if family in CONFIG_MAPPING]
    assert {"rwkv", "xlstm"} <= set(known)
    for family in known:
        with pytest.raises(Exception, match=f"family '{family}' cannot be converted: ") as caught:
            family_of(AutoConfig.for_model(family))
        assert caught.type.__name__ == "CaptureError"


def test_the_dtype_is_the_files_where_no_configuration_states_one(tmp_path: Path) -> None:
    """Also where the configuration is given to transformers, because the files hold a head against its tie."""
    path = copied(tmp_path, "llama", tied=True)
    other = load_file(path / "model.safetensors")["model.embed_tokens.weight"] + 1
    rewrite(path, lambda every: {name: value.bfloat16() for name, value in {**every, "lm_head.weight": other}.items()})
    configure(path, dtype=..., torch_dtype=...)
    config = judge_source(path).text
    assert config.dtype is None
    assert meta_model(config, torch.float16).dtype == torch.float16 and config.dtype is None
    with pytest.warns(FlarecWarning, match="a head that is not the embedding"):
        assert load_model(path, None, "cpu").dtype == torch.bfloat16
