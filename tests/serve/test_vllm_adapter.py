"""An adapter on noisy rows inside vLLM, on stand-ins. `make test-vllm` runs it in vLLM, against flarec's own texts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from flarec.checkpoint.manifest import AdapterInfo
from flarec.cli import main
from flarec.errors import CheckpointError
from flarec.serve.vllm.adapter import MaskRowAdapter, place_vector
from flarec.serve.vllm.checks import adapter_of, proposal_of, spare_row
from flarec.serve.vllm.runner import put_before
from tests.serve.test_vllm_classes import Runner, stand_in
from tests.serve.vllm_checkpoints import written

WORDS = {"model": {"vocab": {"a": 0, "b": 1, "c": 5}}, "added_tokens": [{"id": 7, "content": "<x>"}]}


def adapted(folder: Path, words: Any = WORDS, rank: int = 5, **config: Any) -> Path:
    path = written(
        folder, kind="vector", adapter=AdapterInfo(rank, 8.0, "all-linear"), **{"vocab_size": 10, **config}
    )
    (path / "tokenizer.json").write_text(json.dumps(words))
    (path / "adapter").mkdir()
    save_file({"flarec_mask_vector": torch.arange(4.0)}, path / "adapter" / "flarec.safetensors")
    return path


def test_the_mask_takes_a_row_that_is_no_word(tmp_path: Path) -> None:
    path = adapted(tmp_path / "a", image_token_id=9, other={"pad": [8]}, text_config={"vocab_size": 10})
    assert spare_row(path) == 6 and proposal_of(path).mask == 6 and adapter_of(path) == path / "adapter"
    unigram = adapted(tmp_path / "b", {"model": {"vocab": [["a", 0.0]] * 9}})
    assert spare_row(unigram) == 9 and adapter_of(written(tmp_path / "c")) is None


@pytest.mark.parametrize("words", [{"model": {"vocab": {str(row): row for row in range(10)}}}, {"model": {}}, {}])
def test_a_vocabulary_without_such_a_row(tmp_path: Path, words: Any) -> None:
    with pytest.raises(CheckpointError, match="has no row to spare"):
        proposal_of(adapted(tmp_path / "a", words))


def test_the_command_holds_a_slot_empty(tmp_path: Path) -> None:
    path = adapted(tmp_path / "a")
    words = ["serve", str(path), "--engine", "vllm", "--dry-run"]
    done = CliRunner().invoke(main, words)
    assert shlex.split(done.stdout)[-5:] == ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
    for word in ("--max-loras=1", "--lora-modules"):
        done = CliRunner().invoke(main, [*words, "--", word])
        assert done.exit_code == 2 and f"{word.split('=')[0]} is set by flarec serve" in done.stderr
    done = CliRunner().invoke(main, ["serve", str(adapted(tmp_path / "b", rank=600)), "--engine", "vllm", "--dry-run"])
    assert done.exit_code == 2 and "rank 600" in done.stderr


class Embedding(nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids[..., None].double().expand(*ids.shape, 4)


class Head(Embedding):
    """vLLM's is an embedding too."""


class Wrapped(nn.Module):
    """Calls the one inside past its hooks, as vLLM's does."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = Embedding()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.base_layer.forward(ids)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        monkeypatch, "vllm.lora.layers", VocabParallelEmbeddingWithLoRA=Wrapped,
        LoRAMapping=lambda rows, logits, is_prefill: (rows, logits, is_prefill),
    )
    stand_in(monkeypatch, "vllm.model_executor.layers.vocab_parallel_embedding", ParallelLMHead=Head,
             VocabParallelEmbedding=Embedding)
    stand_in(monkeypatch, "vllm.lora.request", LoRARequest=lambda *values: values)


@pytest.mark.parametrize("kind", [Embedding, Wrapped])
def test_the_vector_stands_for_the_mask_alone(theirs: None, kind: type[nn.Module]) -> None:
    model = nn.ModuleDict({"embedding": kind(), "head": Head()})
    assert place_vector(model, 6, torch.arange(4.0)) == (1 if kind is Embedding else 2)
    found = model["embedding"](torch.tensor([[5, 6]]))
    assert found.tolist() == [[[5.0] * 4, [0.0, 1.0, 2.0, 3.0]]] and found.dtype == torch.float64
    assert model["head"](torch.tensor([6])).tolist() == [[6.0] * 4]


def test_rows_of_masks_are_adapted_and_no_others(theirs: None, tmp_path: Path) -> None:
    chosen: list[Any] = []
    manager = SimpleNamespace(set_active_adapters=lambda *values: chosen.append(values), add_adapter=chosen.append)
    path = adapted(tmp_path / "a")
    drafter = SimpleNamespace(proposal=proposal_of(path), adapter=MaskRowAdapter(path / "adapter", 6))
    runner: Any = Runner(drafter, [])
    put_before(runner)
    runner.lora_manager = manager
    runner.model = nn.ModuleDict({"embedding": Embedding()})
    drafter.adapter.attach(runner)
    request = ("flarec-noisy-rows", 1, str(path / "adapter"))
    assert chosen == [request]
    batch = SimpleNamespace(lora_id_to_lora_request={})
    runner.input_ids = SimpleNamespace(cpu=torch.tensor([3, 6, 6, 1, 2, 9, 6, 6]))
    runner.set_active_loras(batch, torch.tensor([3, 3]), torch.tensor([3, 1]))
    assert chosen[1:] == [({request}, ((0, 1, 1, 0, 0, 0), (0,) * 4, False))]
    assert batch.lora_id_to_lora_request == {1: request}
    runner.set_active_loras(batch, torch.tensor([1]))
    assert chosen[2:] == [({request}, ((0,), (0,), True))]


def test_a_model_without_an_embedding(theirs: None, tmp_path: Path) -> None:
    path = adapted(tmp_path / "a")
    with pytest.raises(CheckpointError, match="Identity of vLLM has no embedding"):
        MaskRowAdapter(path / "adapter", 6).attach(SimpleNamespace(model=nn.Identity()))
    (path / "adapter" / "flarec.safetensors").unlink()
    with pytest.raises(CheckpointError, match="0 mask vectors instead of one"):
        MaskRowAdapter(path / "adapter", 6)
