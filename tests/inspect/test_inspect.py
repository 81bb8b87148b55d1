"""`flarec inspect`: what it says is what the program is, folded, without weights, as text, JSON and SVG."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from flarec.cli import main
from flarec.inspect import as_svg, as_text, example_layout, open_program, summarize
from flarec.inspect.drawing import start_of
from flarec.inspect.summary import mixer_kind
from flarec.inspect.text import ranges
from flarec.ir.program import Program
from flarec.kernels.linear_attention.panels.schedule import StateSchedule
from flarec.kernels.softmax_attention.mask import visibility
from flarec.passes import lower, pipeline
from tests.checkpoints import adapted
from tests.models import FAMILIES, captured, shared_model, tiny_config

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of 24 layers without any weights."""
    path = tmp_path_factory.mktemp("deep")
    config = tiny_config("qwen3_5_text", num_hidden_layers=24)
    config.architectures = ["Qwen3_5ForCausalLM"]
    config.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    shared_model("bamba").config.save_pretrained(path)
    return path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["inspect", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def programs(family: str) -> list[Program]:
    source = captured(family)
    return [source, lower(source, "train", mask_vector=True), lower(source, "decode")]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixer_of_every_layer_is_listed_once(family: str) -> None:
    for program in programs(family):
        summary = summarize(program)
        listed = sorted(layer for group in summary.groups for layer in group.layers)
        assert listed == list(range(4))
        nodes = [node for node in program.graph.nodes if mixer_kind(node)]
        assert sum(len(group.layers) * len(group.mixers) for group in summary.groups) == len(nodes)
        assert sum(count for _, count in summary.ops) == sum(n.op == "call_function" for n in program.graph.nodes)
        assert sum(slot[3] for slot in summary.caches) == len(program.cache_slots)
        assert summary.parameters == sum(p.numel() for p in program.module.parameters())


def test_layers_are_folded_by_structure() -> None:
    groups = {family: [group.layers for group in summarize(captured(family)).groups] for family in FAMILIES}
    assert groups == {
        "qwen3_5_text": [(0, 1, 2), (3,)],
        "kimi_linear": [(0,), (1, 3), (2,)],  # layer 0 has a dense feed-forward network
        "bamba": [(0, 2), (1, 3)],
    }


def test_layers_with_different_sizes_are_not_folded() -> None:
    """Equal classes do not make equal layers: change one layer's mixer option."""
    program = captured("bamba").clone()
    node = next(n for n in program.graph.nodes if mixer_kind(n) == "linear_attention")
    node.kwargs = node.kwargs | {"scale": 0.5}
    assert [group.layers for group in summarize(program).groups] == [(0,), (1, 3), (2,)]


def test_mixers_are_described() -> None:
    summary = summarize(lower(captured("kimi_linear"), "decode"))
    first = {mixer.kind: mixer for mixer in summary.groups[0].mixers}
    linear = first["linear_attention"]
    assert linear.options[:3] == ("channel gate", "delta rule", "q, k normalised")
    assert dict(linear.operands)["g"] == "[rows, T, 4, 16]"
    assert linear.streams == "clean | noisy"
    assert linear.inputs == ("accepted", "state_schedule", "layout")
    assert linear.caches == ("state", "pending_k", "pending_d", "pending_g")
    assert linear.call == "lowered.linear_attention_step"
    assert linear.module == "self_attn"
    assert linear.source.startswith("modeling_kimi_linear.py:")
    assert first["short_conv"].options == ("width 4", "activation silu")
    experts = next(mixer for mixer in summary.groups[1].mixers if mixer.kind == "moe_experts")
    assert dict(experts.operands)["x"] == "[rows*T, 64]"
    assert experts.reads == "token by token"


def test_before_the_streams_a_row_is_one_document() -> None:
    for group in summarize(captured("qwen3_5_text")).groups:
        assert {mixer.streams for mixer in group.mixers} == {"one document per row"}


def test_head_embedding_and_mask_vector() -> None:
    plain, train, _ = (summarize(program) for program in programs("bamba"))
    assert plain.embedding == "model.embed_tokens.weight [512, 64]"
    assert plain.head == "lm_head.weight [rows, T, 64] -> [rows, T, 512]"
    assert train.head == "lm_head.weight [N, 64] -> [N, 512], beside the graph"
    assert train.extra == (("flarec_mask_vector", "[64]"),)
    assert "mask vector [64]" in as_text(train)


def test_ranges() -> None:
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
    assert ranges([5]) == "5"


def test_a_model_of_24_layers_fits_on_a_screen(deep: Path) -> None:
    """No weights are there, so none are read."""
    text = run(str(deep), "--target", "decode")
    lines = text.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120
    assert "layers 0-2, 4-6, 8-10, 12-14, 16-18, 20-22 (18x): Qwen3_5DecoderLayer" in text
    assert "layers 3, 7, 11, 15, 19, 23 (6x): Qwen3_5DecoderLayer" in text
    assert "18 x state" in text


def test_after_shows_the_program_behind_a_pass(small: Path) -> None:
    names = [step.name for step in pipeline("train")]
    before = run(str(small), "--after", "capture")
    assert "flarec.linear_attention" in before
    assert "canonicalize" not in before
    text = run(str(small), "--after", "schedule-states")
    assert "stream_ops.two_stream_linear_attention" in text
    assert f"passes     capture -> {' -> '.join(names[: names.index('schedule-states') + 1])}" in text


def test_diff_names_sites_and_ops(small: Path) -> None:
    text = run(str(small), "--diff")
    assert "sites: 2 x two_stream_short_conv, 2 x two_stream_linear_attention" in text
    assert "stream_ops.two_stream_softmax_attention +2" in text


def test_ops_lists_one_layer_of_each_group() -> None:
    program = captured("bamba")
    text = as_text(summarize(program), program, ops=True)
    assert "nodes of layer 0" in text
    assert "nodes of layer 1" in text
    assert "nodes of layer 2" not in text
    assert text.count("= flarec.linear_attention(") == 1


def test_json_is_the_summary(small: Path) -> None:
    data = json.loads(run(str(small), "--format", "json", "--after", "capture"))
    expected = json.loads(json.dumps(asdict(summarize(open_program(small, after="capture")))))
    for item in (data, expected):
        for step in item["steps"]:
            step.pop("seconds")
    assert data == expected
    assert data["layers"] == 4
    assert [group["layers"] for group in data["groups"]] == [[0, 2], [1, 3]]


def test_the_meta_program_is_the_real_one(small: Path) -> None:
    """What is shown from a configuration is what the weights run: equal summaries, names and sites included."""
    shown, real = summarize(open_program(small, "decode")), summarize(lower(captured("bamba"), "decode"))
    assert shown.groups == real.groups
    assert shown.caches == real.caches
    assert shown.ops == real.ops
    assert shown.parameters == real.parameters


def test_svg_draws_every_layer_and_every_pair(tmp_path: Path, small: Path) -> None:
    out = tmp_path / "program.svg"
    run(str(small), "--format", "svg", "--out", str(out))
    root = ElementTree.parse(out).getroot()
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert sum(title.startswith("layer ") for title in titles) == 4
    assert sum(" reads " in title for title in titles) == int(visibility(example_layout()).sum())
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.get("x", 0)) + float(rect.attrib["width"]) <= width
        assert float(rect.get("y", 0)) + float(rect.attrib["height"]) <= height


def test_svg_escapes_text() -> None:
    summary = summarize(captured("bamba"))
    odd = type(summary)(**{**{name: getattr(summary, name) for name in asdict(summary)}, "model": 'A<b>&"c"'})
    texts = [element.text for element in ElementTree.fromstring(as_svg(odd)).iter(f"{SVG}text")]
    assert any(text and text.startswith('A<b>&"c"') for text in texts)


def test_the_drawn_schedule_starts_every_block_at_its_anchor() -> None:
    layout = example_layout()
    for chunk_size in (1, 2, 4, 64):
        schedule = StateSchedule.from_layout(layout, chunk_size=chunk_size)
        for block in range(layout.blocks):
            chunk, inside = start_of(layout, schedule, block)
            assert chunk * schedule.chunk_size + inside == int(layout.block_anchor[0, block])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--after", "lower"], "has no pass 'lower'; choose one of capture, canonicalize"),
        (["--after", "thread-cache"], "the pipeline 'train' has no pass 'thread-cache'"),
        (["--kernels", "cuda"], "unknown kernels 'cuda'"),
        (["--format", "svg", "--diff"], "belong to --format text"),
    ],
)
def test_wrong_usage(small: Path, arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(main, ["inspect", str(small), *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


def test_a_path_without_a_model(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        result = CliRunner().invoke(main, ["inspect", str(path)])
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")


def test_an_output_that_cannot_be_written(small: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(small), "--out", str(tmp_path / "no" / "where.txt")])
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


def test_a_family_that_cannot_be_captured_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "n_layer": 2}')
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "BloomForCausalLM (family 'bloom') takes no position_ids" in result.stderr


def test_nothing_is_run() -> None:
    """A summary of a program on the meta device needs no values."""
    program = captured("bamba").clone()
    with torch.device("meta"):
        assert summarize(program).layers == 4


def test_columns_do_not_touch() -> None:
    """However long a name is, two spaces lie behind it."""
    summary = summarize(lower(captured("bamba"), "decode"))
    long = "an_input_whose_name_is_longer_than_any_other"
    group = summary.groups[0]
    part = replace(group.parts[0], module="a_module_whose_name_is_longer_than_any")
    mixer = replace(group.mixers[0], call="lowered.a_mixer_whose_name_is_longer_than_all")
    odd = replace(
        summary, inputs=((long, "token ids"),), caches=(("a_kind_of_cache", "[1]", "float32", 2),),
        groups=(replace(group, parts=(part, *group.parts), mixers=(mixer, *group.mixers)),),
    )
    text = as_text(odd)
    for name in (long, part.module, "a_kind_of_cache"):
        assert re.search(rf"{name}  +\S", text), name
    assert re.search(rf"{mixer.call}( *$|  +\S)", text, flags=re.M)


def test_a_tied_embedding_has_its_own_name(tmp_path: Path) -> None:
    tiny_config("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    for target in ("train", "decode"):
        lines = run(str(tmp_path), "--target", target).splitlines()
        (embedding,) = (line for line in lines if line.startswith("embedding"))
        assert "model.embed_tokens.weight [512, 64], the head's own (tied)" in embedding
        assert any(line.startswith("head ") and "lm_head.weight" in line for line in lines)


def test_the_drawing_has_what_the_model_has() -> None:
    """MLPs of every group; the state schedule only where there is a state."""
    with_states, without = (as_svg(summarize(lower(captured(family), "train"))) for family in ("bamba", "llama"))
    assert "State schedule" in with_states and "State schedule" not in without
    assert "Attention mask" in with_states and "Attention mask" in without
    for svg, name in ((with_states, "BambaMLP"), (without, "LlamaMLP")):
        texts = [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
        assert any(name in text and "linear 64-&gt;" in text.replace(">", "&gt;") for text in texts)


def test_an_adapter_beside_its_model(tmp_path: Path) -> None:
    source, out = adapted(tmp_path, "lfm2", alone=True)
    assert "adapt-noisy-stream" in run(str(source), "--adapter", str(out))
    assert "adapt-noisy-stream" not in run(str(source))
    assert "adapt-noisy-stream" in run(str(source), "--adapter", str(out), "--pipeline")
