"""The classes that vLLM loads, on stand-ins for what they are put before. `make test-vllm` runs them in vLLM."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flarec.errors import CheckpointError, UsageError
from flarec.serve.vllm.proposer import WORKER, Proposer
from flarec.serve.vllm.repair import expand, repair_sampling
from flarec.serve.vllm.runner import hide_mask, put_before
from tests.serve.vllm_checkpoints import written

MASK = 500


def config(path: Path, tokens: int = 8, worker: str = WORKER) -> Any:
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=tokens),
        model_config=SimpleNamespace(model=str(path)), parallel_config=SimpleNamespace(worker_cls=worker),
    )


class Runner:
    """What vLLM's runner does around the methods that are overridden."""

    def __init__(self, drafter: Any, names: list[str]) -> None:
        self.drafter, self.input_batch = drafter, SimpleNamespace(req_ids=names)

    def load_model(self) -> None:
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden)

    def _sample(self, logits: torch.Tensor, spec_decode_metadata: Any) -> Any:
        logits.zero_()  # vLLM may
        return spec_decode_metadata

    def propose_draft_token_ids(self, scheduler_output: Any, sampled: Any) -> Any:
        return self.drafter.propose(sampled, None, None, slot_mappings=None)


def test_rows_find_their_requests(tmp_path: Path) -> None:
    """Three requests: one that accepted both drafts, one within its prompt, one that only masked."""
    runner: Any = Runner(Proposer(config(written(tmp_path / "a"))), ["x", "y", "z"])
    put_before(runner)
    assert isinstance(runner, Runner) and type(runner).__name__ == "MaskedRunner"
    runner.load_model()
    scheduled = {"x": [11, 12, *[MASK] * 6], "z": [MASK] * 8}
    best = [11, 12, 13, 21, 22, 23, 24, 25, 26, 40, 50, 51, 52, 53, 54, 55, 56, 57, 58]
    logits = torch.nn.functional.one_hot(torch.tensor(best), 512).float()
    assert runner._sample(logits, "meta") == "meta"
    proposed = runner.propose_draft_token_ids(
        SimpleNamespace(scheduled_spec_decode_tokens=scheduled), [[11, 12, 13], [], [50]]
    )
    assert proposed == [[21, 22, 23, 24, *[MASK] * 4], [], [51, 52, 53, 54, *[MASK] * 4]]


def test_the_mask_has_no_logit() -> None:
    model = SimpleNamespace(compute_logits=lambda hidden: hidden)
    hide_mask(model, 2)
    assert model.compute_logits(torch.zeros(2, 4)).tolist() == [[0, 0, -torch.inf, 0]] * 2
    model = SimpleNamespace(compute_logits=lambda hidden: None)
    hide_mask(model, 2)
    assert model.compute_logits(None) is None


def test_a_proposer_in_the_wrong_place(tmp_path: Path) -> None:
    path = written(tmp_path / "a")
    assert Proposer(config(path, 6)).proposal.drafts == 2
    with pytest.raises(UsageError, match="needs --worker-cls"):
        Proposer(config(path, worker="vllm.v1.worker.gpu_worker.Worker"))
    for tokens in (4, 9):
        with pytest.raises(UsageError, match="give 1 to 4"):
            Proposer(config(path, tokens))
    with pytest.raises(CheckpointError, match="vector"):
        Proposer(config(written(tmp_path / "b", kind="vector")))


def test_values_of_requests_are_repeated() -> None:
    counts = torch.tensor([2, 2, 5], dtype=torch.int32)
    found = expand(torch.tensor([0.5, 9.0, 0.0]), counts, 5, replace_from=0, replace_to=1)
    assert found.tolist() == [0.5, 0.5, 1, 1, 1] and found.dtype == torch.float32
    assert expand(torch.tensor([7, 8, 9], dtype=torch.int32), counts, 5).tolist() == [7, 7, 9, 9, 9]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> ModuleType:
    """A module of vLLM, and the packages around it."""
    module, parts = ModuleType(name), name.split(".")
    for length in range(1, len(parts)):
        if ".".join(parts[:length]) not in sys.modules:
            monkeypatch.setitem(sys.modules, ".".join(parts[:length]), ModuleType(".".join(parts[:length])))
    vars(module).update(values)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], module, raising=False)
    return module


@pytest.mark.parametrize(("device", "wrong", "repaired"), [
    ("cpu", True, True), ("cpu", False, False), ("cuda", True, False)
])
def test_only_what_is_wrong_is_repaired(
    monkeypatch: pytest.MonkeyPatch, device: str, wrong: bool, repaired: bool
) -> None:
    def theirs(x: torch.Tensor, counts: torch.Tensor, tokens: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        right = expand(x, counts, tokens, replace_from, replace_to)
        return torch.full_like(right, -7) if wrong else right

    stand_in(monkeypatch, "vllm.platforms", current_platform=SimpleNamespace(device_type=device))
    module = stand_in(monkeypatch, "vllm.v1.sample.rejection_sampler", expand_batch_to_tokens=theirs)
    assert repair_sampling() is repaired
    assert module.expand_batch_to_tokens is (expand if repaired else theirs)


class TheirScheduler:
    """vLLM's numbers of a step: drafts of a request, and how many were accepted, in total and by position."""

    def __init__(self, path: Path) -> None:
        self.vllm_config = config(path)
        self.stats = SimpleNamespace(num_drafts=0, num_draft_tokens=0, num_accepted_tokens=0,
                                     num_draft_tokens_per_pos=[0] * 8)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        for name, accepted in model_runner_output.items():
            count = len(scheduler_output.scheduled_spec_decode_tokens[name])
            self.make_spec_decoding_stats(self.stats, count, accepted, None, request_id=name)  # type: ignore[attr-defined]
        return self.stats


def make_spec_decoding_stats(
    self: Any, stats: Any, num_draft_tokens: int, num_accepted_tokens: int, invalid: Any, request_id: str
) -> Any:
    stats.num_drafts += 1
    stats.num_draft_tokens += num_draft_tokens
    stats.num_accepted_tokens += num_accepted_tokens
    for position in range(num_draft_tokens):
        stats.num_draft_tokens_per_pos[position] += 1
    return stats


def test_masks_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = type("Scheduler", (TheirScheduler,), {"make_spec_decoding_stats": make_spec_decoding_stats})
    stand_in(monkeypatch, "vllm.v1.core.sched.scheduler", Scheduler=base)
    monkeypatch.delitem(sys.modules, "flarec.serve.vllm.scheduler", raising=False)
    scheduler = importlib.import_module("flarec.serve.vllm.scheduler").CountingScheduler(written(tmp_path / "a"))
    monkeypatch.delitem(sys.modules, "flarec.serve.vllm.scheduler")  # it holds the stand-in
    scheduled = {"x": [1, 2, 3, 4, *[MASK] * 4], "y": [MASK] * 8, "z": [5, 6, *[MASK] * 6]}
    stats = scheduler.update_from_output(
        SimpleNamespace(scheduled_spec_decode_tokens=scheduled), {"x": 3, "y": 0, "z": 2}
    )
    assert vars(stats) == {"num_drafts": 3, "num_draft_tokens": 6, "num_accepted_tokens": 5,
                           "num_draft_tokens_per_pos": [2, 2, 1, 1, 0, 0, 0, 0]}


def test_a_worker_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "vllm.platforms", current_platform=SimpleNamespace(device_type="xpu"))
    stand_in(monkeypatch, "vllm.utils.import_utils", resolve_obj_by_qualname=None)
    monkeypatch.delitem(sys.modules, "flarec.serve.vllm.worker", raising=False)
    with pytest.raises(ImportError, match="cpu and cuda, and this machine is xpu"):
        importlib.import_module("flarec.serve.vllm.worker")


def test_a_worker_gives_its_runner_the_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs:
        def init_device(self) -> None:
            self.model_runner: Any = Runner(None, [])

    stand_in(monkeypatch, "vllm.platforms", current_platform=SimpleNamespace(device_type="cuda"))
    stand_in(monkeypatch, "vllm.v1.sample.rejection_sampler")
    stand_in(monkeypatch, "vllm.utils.import_utils", resolve_obj_by_qualname=lambda name: Theirs)
    monkeypatch.delitem(sys.modules, "flarec.serve.vllm.worker", raising=False)
    module = importlib.import_module("flarec.serve.vllm.worker")
    monkeypatch.delitem(sys.modules, "flarec.serve.vllm.worker")
    monkeypatch.setattr(module, "installed", lambda: "0.31.0")
    with pytest.raises(UsageError, match=r"vLLM 0\.31\.0 was not tested"):
        module.Worker().init_device()
    monkeypatch.setattr(module, "installed", lambda: "0.32.0")
    worker = module.Worker()
    worker.init_device()
    assert type(worker.model_runner).__name__ == "MaskedRunner"
