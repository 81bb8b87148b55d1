"""lm-eval's tasks on ours. The witness: lm-eval's own class for transformers models, on the same source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from flarec.cli import main
from flarec.errors import UsageError
from flarec.evaluation.harness import FlarecLM
from tests.checkpoints import converted
from tests.models import FAMILIES

PAIRS = [
    ("What is 2 + 3?", " 5"), ("What is 2 + 3?", " five, or so"), ("", "No context"), ("ends with a space ", "word"),
    ("A longer context that says more than the others do. " * 3, " And an end."),
]
TEXTS = ["One sentence.", "Several sentences. They make a longer text, " * 4, "x"]
GREEDY = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 12}


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=item, idx=index, metadata=("task", index, 1))
        for index, item in enumerate(arguments)
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, checkpoint)"""
    return converted(tmp_path_factory.mktemp("harness"), request.param)


@pytest.fixture(scope="module")
def witness(paths: tuple[Path, Path]) -> HFLM:
    return HFLM(pretrained=str(paths[0]), device="cpu", dtype="float32", batch_size=2)


@pytest.fixture(scope="module")
def source(paths: tuple[Path, Path]) -> FlarecLM:
    return FlarecLM(path=paths[0], device="cpu", batch_size="2")


def test_log_likelihoods(source: FlarecLM, witness: HFLM) -> None:
    own = source.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    theirs = witness.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in theirs]
    assert [value for value, _ in own] == pytest.approx([value for value, _ in theirs], rel=1e-4)


@pytest.mark.parametrize("length", [None, 16])
def test_rolling_log_likelihoods(
    length: int | None, source: FlarecLM, witness: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    if length is not None:  # several windows
        monkeypatch.setattr(source, "max_length", length)
        monkeypatch.setattr(witness, "_max_length", length)
    asked = [(text,) for text in TEXTS]
    own = source.loglikelihood_rolling(requests("loglikelihood_rolling", asked), disable_tqdm=True)
    theirs = witness.loglikelihood_rolling(requests("loglikelihood_rolling", asked), disable_tqdm=True)
    assert own == pytest.approx(theirs, rel=1e-4)


def test_greedy_texts(source: FlarecLM, witness: HFLM) -> None:
    asked = [(context, GREEDY) for context, _ in PAIRS if context]
    own = source.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert own == witness.generate_until(requests("generate_until", asked), disable_tqdm=True)


@pytest.mark.parametrize("mode", ["ar-trust", "diffusion-trust"])
def test_modes(mode: str, paths: tuple[Path, Path]) -> None:
    """Scores are the clean stream's in every mode; AR-Trust's texts are those of causal decoding, also sampled."""
    causal, other = (FlarecLM(path=paths[1], device="cpu", mode=name, seed=3) for name in ("causal", mode))
    scored = requests("loglikelihood", PAIRS)
    assert causal.loglikelihood(scored, disable_tqdm=True) == other.loglikelihood(scored, disable_tqdm=True)
    for asked in (GREEDY, {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_tokens": 9}):
        contexts = [(context, asked) for context, _ in PAIRS if context]
        texts = [lm.generate_until(requests("generate_until", contexts)) for lm in (causal, other)]
        assert all(isinstance(text, str) for text in texts[1])
        assert mode != "ar-trust" or texts[0] == texts[1]
    assert other.get_model_info()["flarec_mode"] == mode and other.get_model_info()["new_tokens"] > 0


def test_repeats_differ_and_do_not_depend_on_their_neighbours(paths: tuple[Path, Path]) -> None:
    sampled = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    first, second = (FlarecLM(path=paths[1], device="cpu", seed=5) for _ in range(2))
    repeats = first.generate_until(requests("generate_until", [("Once", sampled)] * 4))
    assert len(set(repeats)) > 1
    beside = second.generate_until(requests("generate_until", [("Other", sampled), ("Once", sampled)]))
    assert beside[1] == repeats[0]


def test_special_tokens_that_stop(source: FlarecLM) -> None:
    token = source.tokenizer.convert_ids_to_tokens(source.tokenizer.all_special_ids)[0]
    _, options = source._generation("text", {"until": [token, "stop"], "do_sample": False})
    assert options.stop == ("stop",)
    assert options.eos_ids is not None and source.tokenizer.convert_tokens_to_ids(token) in options.eos_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "path=CHECKPOINT"), ({"mood": 1}, "unknown model argument mood"), ({"batch_size": "many"}, "batch_size"),
        ({"mode": "ar-trust"}, "not converted"), ({"max_length": 1}, "max_length"),
        ({"threshold": 0.5}, "threshold does nothing in mode causal"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, paths: tuple[Path, Path]) -> None:
    path = {} if not arguments else {"path": paths[0]}
    with pytest.raises(ValueError, match=message):
        FlarecLM(**path, device="cpu", **arguments)


def test_unknown_generation_arguments(source: FlarecLM) -> None:
    with pytest.raises(UsageError, match="num_beams"):
        source.generate_until(requests("generate_until", [("text", {"num_beams": 3})]))
    with pytest.raises(UsageError, match="leave no room"):
        source.generate_until(requests("generate_until", [("text", {"max_gen_toks": 10**6})]))


def test_the_command(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """Local task files, no network."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"q": f"What is {n}?", "c": [f" {n}", " no"]}) + "\n" for n in range(3)))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(data)}, "test_split": "train"}
    tasks: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}", "doc_to_target": 0,
        },
        "text": {
            "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{c[0]}}",
            "generation_kwargs": GREEDY, "metric_list": [{"metric": "exact_match"}],
        },
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task in tasks.items():  # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": f"local_{name}", **common, **task}))
    result = CliRunner().invoke(main, [
        "lm-eval", "--model", "flarec", "--model_args", f"path={paths[1]},mode=ar-trust", "--device", "cpu",
        "--include_path", str(folder), "--tasks", "local_choice,local_text", "--output_path", str(tmp_path / "out"),
    ])
    assert result.exit_code == 0, result.output
    written = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert set(written["results"]) == {"local_choice", "local_text"}
    assert written["config"]["flarec_mode"] == "ar-trust" and written["config"]["tokens_per_forward"] > 0
