"""`flarec doctor`: what it says of models that convert and of those that do not; weights are never read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result

from flarec import doctor, ops
from flarec.cli import main
from flarec.cli.doctor import size_text
from flarec.doctor import diagnosis, estimates, steps
from flarec.doctor.kernels import REFUSED, sites
from flarec.doctor.report import Rates
from flarec.doctor.simulate import ATTENTION, BATCHED, GATHER, MATMUL, MEMORY
from flarec.errors import CaptureError, PassError, PropertyError, UsageError
from flarec.frontend.export import capture
from flarec.frontend.loading import judge_source
from flarec.inspect.summary import mixer_kind
from flarec.ir.program import Program
from flarec.passes import lower
from flarec.recipe import load_recipe
from tests.checkpoints import converted
from tests.models import FAMILIES, shared_model, tiny_config


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration without weights."""
    path = tmp_path_factory.mktemp("small")
    tiny_config("bamba").save_pretrained(path)
    return path


_CAPTURES: dict[tuple[object, ...], tuple[Program | CaptureError, str]] = {}
"""What came of each capture, and the graph's text."""
OWN = ("_name_or_path", "architectures", "transformers_version", "dtype")
"""What a configuration says of its file, not of the model."""


def capture_once(model: Any, cache: bool = False) -> Program:
    """`capture` of a model without numbers, once for equal ones: capture is what takes time here."""
    settings = {name: value for name, value in model.config.to_dict().items() if name not in OWN}
    key = type(model), model.dtype, json.dumps(settings, sort_keys=True, default=str)
    if key not in _CAPTURES:
        assert all(parameter.is_meta for parameter in model.parameters())
        try:
            program = capture(model)
            _CAPTURES[key] = program, str(program.graph)
        except CaptureError as error:
            _CAPTURES[key] = error, ""
    found, text = _CAPTURES[key]
    if isinstance(found, CaptureError):
        raise found
    assert str(found.graph) == text and found.properties == {"captured"}, "the doctor changes no program"
    return found


RATES = Rates("cpu", "", 3, dict.fromkeys((MATMUL, BATCHED, ATTENTION), 1e9), {MEMORY: 4e9, GATHER: 2e9},
              {MEMORY: 2e9, GATHER: 1e9}, 5e-6)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, int]]:
    """Captures are shared, and the device has known rates: tests/doctor measures a machine of known speed.

    Returns what was measured: (dtype, width).
    """
    asked: list[tuple[torch.dtype, int]] = []

    def measure(device: torch.device, dtype: torch.dtype, width: int) -> Rates:
        asked.append((dtype, width))
        return replace(RATES, device=device.type, dtype=str(dtype).removeprefix("torch."))

    monkeypatch.setattr(diagnosis, "capture", capture_once)
    monkeypatch.setattr(estimates, "measure", measure)
    return asked


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def report(*arguments: object) -> Any:
    done = run(*arguments, "--json", "--device", "cpu")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_model_that_converts(small: Path) -> None:
    found = report(small, "--length", 16, "--batch", 2, "--kernels")
    assert found["converts"] and found["reason"] is None and not found["estimate_note"]
    assert found["anatomy"]["parameters"] == sum(p.numel() for p in shared_model("bamba").parameters())
    assert found["anatomy"]["family"] == "bamba" and found["anatomy"]["known_family"]
    assert [count for _, count in found["anatomy"]["layers"]] == [2, 2]
    assert "linear_attention (scalar gate, no delta rule)" in found["anatomy"]["layers"][0][0]
    for name in ("convert", "serve"):
        assert found[name]["total"] == sum(found[name]["parts"].values()) > 0
        assert all(size > 0 for size in found[name]["parts"].values())
    steps = [speed["step"] for speed in found["speed"]]
    assert steps[0] == "training step (8 rows, 2 at a time)"
    assert all(speed["seconds"] > 0 and speed["flops"] > 0 for speed in found["speed"])
    assert (found["length"], found["batch"], found["serve_dtype"]) == (16, 2, "float32")
    assert {site["target"] for site in found["sites"]} == {"train", "decode"}


def test_the_text_says_what_the_json_says(small: Path, measured: list[tuple[torch.dtype, int]]) -> None:
    done = run(small, "--length", 8, "--device", "cpu", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    for words in (
        "converts    yes", "BambaForCausalLM (bamba; in the adapter table)", "249,584", "memory to convert: float32",
        "memory to serve: bfloat16", "at the worst moment", "extrapolated", "measured on cpu, bfloat16, 3 threads",
        "GB/s, small to large: memory 4 to 2.0, gather 2 to 1.0; 5.0 us per operation",
        "decoding: AR-Trust", "2 x BambaDecoderLayer: softmax_attention",
    ):
        assert words in done.stdout, words
    assert measured == [(torch.float32, 64), (torch.bfloat16, 64)]


def test_quick_tells_no_memory(small: Path) -> None:
    found = report(small, "--quick")
    assert found["converts"] and found["capture_seconds"] > 0
    assert found["convert"] is None and found["speed"] == [] and found["rates"] == [] and found["sites"] == []


@pytest.mark.parametrize(("key", "option"), [
    ("data.max_length=64", "--length"), ("max_length=64", "--length"), ("optimizer.micro_rows=2", "--batch"),
])
def test_rows_are_sized_by_options(small: Path, key: str, option: str) -> None:
    result = CliRunner().invoke(main, ["doctor", str(small), "--quick", "--set", key])
    assert result.exit_code == 2 and f"--set {key}: " in result.stderr and f"give {option} N" in result.stderr


def test_a_configuration_file_is_enough(small: Path, tmp_path: Path) -> None:
    other = tmp_path / "model-3b.json"
    other.write_text((small / "config.json").read_text())
    found = [report(path, "--quick")["anatomy"] for path in (small, small / "config.json", other)]
    assert found[0] == found[1] == found[2]


def test_the_text_model_of_a_wrapper(tmp_path: Path) -> None:
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    text = tiny_config("qwen3_5_text").to_dict()
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    done = run(tmp_path, "--quick")
    assert done.exit_code == 0, done.output
    assert "text model of Qwen3_5ForConditionalGeneration; the rest of it is carried over untouched" in done.stdout
    assert f"{sum(p.numel() for p in shared_model('qwen3_5_text').parameters()):,}" in done.stdout


NO_POSITIONS = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512}


@pytest.mark.parametrize(
    ("config", "words", "layers"),
    [
        (NO_POSITIONS, "takes no position_ids", [["BloomBlock: LayerNorm, BloomAttention, LayerNorm, BloomMLP", 2]]),
        ({"model_type": "nonsense"}, "model type `nonsense`", None),
    ],
    ids=["no positions", "unknown to transformers"],
)
def test_a_model_that_does_not_convert(tmp_path: Path, config: dict[str, Any], words: str, layers: object) -> None:
    """Exit code 1, and one sentence; what is known of the model is told all the same."""
    path = tmp_path / "model.json"
    path.write_text(json.dumps(config))
    done = run(path)
    assert done.exit_code == 1, done.output
    line = next(line for line in done.stdout.splitlines() if line.startswith("converts"))
    assert line.startswith("converts    no: ") and words in line
    assert "/tmp/tmp" not in line
    found = json.loads(run(path, "--json").stdout)
    assert found["converts"] is False and words in found["reason"]
    assert (found["anatomy"] or {"layers": None})["layers"] == layers
    assert found["convert"] is None and found["speed"] == []


def test_a_converted_checkpoint_is_no_source(tmp_path: Path) -> None:
    """Said as `flarec convert` says it."""
    _, out = converted(tmp_path, "lfm2")
    done = run(out, "--quick")
    assert done.exit_code == 1, done.output
    assert f"converts    no: {out} is a converted checkpoint already; convert its source model (" in done.stdout


@pytest.mark.parametrize("error", [PassError, PropertyError])
def test_a_pass_that_refuses_is_told(error: type[Exception], small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(program: Program, target: str, **options: object) -> Program:
        assert target == "train"
        raise error("a noisy token could reach a clean one")

    monkeypatch.setattr(steps, "lower", refuses)
    done = run(small, "--json")
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert (found["converts"], found["reason"]) == (False, "a noisy token could reach a clean one")
    assert found["anatomy"]["layers"][0][0].startswith("BambaDecoderLayer: BambaMLP, BambaRMSNorm, ")
    assert found["capture_seconds"] > 0 and found["convert"] is None and found["speed"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere does not exist; give a model directory"),
        (["--length", "1"], "length 1 and batch 1 cannot be used"),
        (["--batch", "0"], "batch 0 cannot be used"),
        (["--recipe", "nonsense"], "neither a built-in recipe nor a TOML file"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["--dtype", "int8"], "dtype 'int8' is unknown"),
    ],
)
def test_wrong_usage(small: Path, arguments: list[str], words: str) -> None:
    source = [] if arguments[0] == "nowhere" else [str(small)]
    done = run(*source, *arguments)
    assert done.exit_code == 2
    assert words in done.stderr and done.stdout == ""


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.exit_code == 2 and "holds no config.json" in done.stderr


def on_meta(family: str) -> Program:
    cls = type(shared_model(family))
    with torch.device("meta"):
        return capture_once(cls(tiny_config(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_listed_and_refused_where_the_pass_refuses(family: str) -> None:
    program = on_meta(family)
    found = sites(program)
    for target in ("train", "decode"):
        mine = [site for site in found if site.target == target]
        plain = lower(program, target)
        assert sum(site.count for site in mine) == sum(mixer_kind(node) is not None for node in plain.graph.nodes)
        refused = [site.why for site in mine if site.choice == REFUSED]
        if refused:
            with pytest.raises(PassError) as caught:
                lower(program, target, kernels="triton")
            assert any(why in str(caught.value) for why in refused)
            continue
        calls = lower(program, target, kernels="triton").op_counts()
        triton = sum(count for name, count in calls.items() if name.startswith("lowered_triton."))
        assert sum(site.count for site in mine if site.choice == "triton") == triton > 0


def test_a_refused_site_is_told(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    form = replace(ops.SHORT_CONV.forms["triton"], refuses=lambda site: "width 99")
    monkeypatch.setitem(ops.SHORT_CONV.forms, "triton", form)
    done = run(small, "--quick", "--kernels", "--device", "cpu")
    lines = [line.split() for line in done.stdout.splitlines() if "two_stream" in line or "cached" in line]
    assert {line[1]: line[3] for line in lines} == {
        "two_stream_short_conv": "refused", "two_stream_linear_attention": "triton",
        "two_stream_softmax_attention": "triton", "cached_short_conv": "refused",
        "cached_linear_attention": "triton", "cached_softmax_attention": "triton",
    }
    assert "width 99" in done.stdout


def test_what_cannot_be_estimated_is_said(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **options: object) -> object:
        raise RuntimeError("no fake kernel\nand a trace")

    monkeypatch.setattr(estimates, "simulate_training", fails)
    options = {"length": 16, "batch": 1, "device": torch.device("cpu")}
    found = doctor.diagnose(str(small), load_recipe("flare"), **options)  # type: ignore[arg-type]
    assert found.converts and found.convert is None
    assert found.estimate_note == "memory and time are not told: no fake kernel"


def test_a_hub_id_that_cannot_be_fetched() -> None:
    with pytest.raises(UsageError, match="cannot be opened"):
        doctor.diagnose("nobody/nothing", load_recipe("flare"), length=16, batch=1, device=torch.device("cpu"))


def test_of_a_hub_id_the_configuration_alone_is_judged(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    judge = judge_source
    monkeypatch.setattr(diagnosis, "judge_source", lambda path, **more: judge(str(small), **more))
    for location in ("owner/name", str(small)):
        diagnosis._opened("owner/name", location, torch.float32, False, said.append)
    assert said == ["of owner/name the configuration alone was judged: its weights are once they are downloaded"]


def test_sizes() -> None:
    assert size_text(99_000_000) == "99.0 MB"
    assert size_text(1_230_000_000) == "1.23 GB"


@pytest.mark.parametrize(("family", "words"), [("bamba", "in the adapter table"), ("llama", "; listed as a plain")])
def test_families_that_the_readme_lists_are_listed(tmp_path: Path, family: str, words: str) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    done = run(tmp_path / "config.json", "--quick", "--device", "cpu")
    assert words in done.stdout, done.output


def test_memory_of_the_whole_process_and_what_pays(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's memory is compared with the need; a smaller one gets a length that fits."""
    options = ("--length", "32", "--device", "cpu", "--json")
    monkeypatch.setattr(estimates, "resident", lambda: (500_000_000, 500_000_000))  # of libraries: the same each time
    monkeypatch.setattr(estimates, "memory_of", lambda device: 1 << 60)
    table = json.loads(run(small, *options).stdout)
    assert table["convert"]["parts"]["Python and libraries"] == 500_000_000 and table["memory"] == 1 << 60
    assert table["advice"] == [] and "tokens per forward" in table["pays"]
    monkeypatch.setattr(estimates, "memory_of", lambda device: table["convert"]["total"] - 1)
    again = json.loads(run(small, *options).stdout)
    assert again["advice"] == [] and "train.memory = auto" in again["memory_note"]
    assert again["convert"]["total"] < table["convert"]["total"]
    monkeypatch.setattr(estimates, "memory_of", lambda device: again["convert"]["total"] - 1_000_000)
    advice = json.loads(run(small, *options, "--set", "train.memory=recompute").stdout)["advice"]
    assert advice[0].startswith("this machine is too small: ") and len(advice) == 2
