"""The training state: a resumed run equals an uninterrupted one bit for bit; no interruption loses the last save."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flarec.errors import CheckpointError, TrainingError, UsageError
from flarec.recipe import Recipe
from flarec.train.loop import Trainer
from flarec.train.metrics import MetricsLog, read_metrics
from flarec.train.saves import SavedState
from flarec.train.state import StateDirectory
from tests.models import tiny_tokenizer
from tests.train.small_run import Small, adapter_recipe, recipe, small, source


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `limit` bytes: writes fail in the system, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, as they are saved and as they are computed with, and optimizer tensors, copied."""
    state = trainer.state()
    return {
        **{f"computed {name}": value.detach().clone() for name, value in trainer.parameters.items()},
        **{f"model {name}": value.clone() for name, value in state.model.items()},
        **{f"optimizer {name}": value.clone() for name, value in state.optimizer.items()},
    }


def run(trainer: Trainer, steps: int) -> list[dict[str, object]]:
    return [trainer.advance().read(tiny_tokenizer()) for _ in range(steps)]


@pytest.mark.parametrize(
    ("choice", "dtype"), [("auto", torch.float32), ("vector", torch.float32), ("auto", torch.bfloat16)]
)
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(choice: str, dtype: torch.dtype, stop: int, tmp_path: Path) -> None:
    resumed_equals_uninterrupted(
        small("qwen3_5_text", choice, dtype), recipe("dual", "optimizer.warmup_steps=5"), stop, tmp_path
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_with_8_bit_moments_equals_an_uninterrupted_one(dtype: torch.dtype, tmp_path: Path) -> None:
    chosen, set_up = recipe("dual", "optimizer.moments=8bit"), small("qwen3_5_text", dtype=dtype)
    resumed_equals_uninterrupted(set_up, chosen, 3, tmp_path)
    trainer = set_up.trainer(chosen)
    directory = StateDirectory(tmp_path / "out.partial")
    state = directory.latest()
    assert state is not None
    whole = sum(value.numel() for value in state.model.values())
    codes = [value for value in state.optimizer.values() if value.dtype == torch.uint8]
    assert 0.9 < sum(value.numel() for value in codes) / (2 * whole) < 1
    assert 2.03 * whole < sum(value.nbytes for value in state.optimizer.values()) < 2.6 * whole, "of 8 bytes"
    with pytest.raises(CheckpointError, match="belongs to another model"):
        set_up.trainer(recipe("dual")).load(state)
    trainer.load(state)


@pytest.mark.parametrize(("dtype", "base"), [(torch.float32, "stored"), (torch.bfloat16, "int8")])
def test_a_resumed_adapter_equals_an_uninterrupted_one(dtype: torch.dtype, base: str, tmp_path: Path) -> None:
    chosen = adapter_recipe("optimizer.warmup_steps=5", f"adapter.base={base}")
    resumed_equals_uninterrupted(small("qwen3_5_text", "vector", dtype, chosen), chosen, 4, tmp_path)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_of_spans_equals_an_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    """Spans by the clean stream's entropy, whose budget cuts some of them, and wrong tokens, over phases of lengths."""
    keys = ["adapter.rank=4", "adapter.alpha=8", "optimizer.steps=7", "diffusion.span_entropy=12"]
    chosen = recipe("fluid", *keys, "diffusion.block_size=6")
    resumed_equals_uninterrupted(small("qwen3_5_text", "vector", chosen=chosen), chosen, stop, tmp_path)
    full = recipe("draft", "adapter.rank=4", "adapter.alpha=8", "objective.ar_weight=0", *keys[2:])
    set_up = small("qwen3_5_text", "vector", chosen=chosen)
    blocks = [set_up.trainer(full).feed.take(step).batches for step in range(2)]
    lengths = {int(n) for batches in blocks for b in batches for n in b.layout.noisy_block[b.layout.noisy_block >= 0]
               .bincount()}
    assert len(lengths) > 1, "spans of several lengths"


def resumed_equals_uninterrupted(set_up: Small, chosen: Recipe, stop: int, tmp_path: Path) -> None:
    """Weights, moments, data order and noise; steps 5 to 7 start the second epoch of the data."""
    steps = 7
    whole = set_up.trainer(chosen)
    log = run(whole, steps)
    expected = everything(whole)

    first = set_up.trainer(chosen)
    assert run(first, stop) == log[:stop]
    directory = StateDirectory(tmp_path / "out.partial")
    directory.create({})
    directory.save(stop, first.state(evaluations={"0": {"ar_loss": 1.5}}))

    second = set_up.trainer(chosen)
    with torch.no_grad():
        for value in (*second.parameters.values(), *second.weights.masters.values()):
            value.fill_(7.0)
    state = directory.latest()
    assert state is not None
    assert state.values["evaluations"] == {"0": {"ar_loss": 1.5}}
    second.load(state)
    assert second.step == stop
    assert run(second, steps - stop) == log[stop:]
    result = everything(second)
    assert result.keys() == expected.keys()
    assert [name for name, value in result.items() if not torch.equal(value, expected[name])] == []


def test_another_model_or_other_data_cannot_continue() -> None:
    set_up, chosen = small("qwen3_5_text"), recipe("dual")
    trainer = set_up.trainer(chosen)
    run(trainer, 1)
    state = trainer.state()
    with pytest.raises(CheckpointError, match=r"the data, its weights, its tokenisation or the seed changed"):
        set_up.trainer(chosen, data=source(5)).load(state)
    with pytest.raises(CheckpointError, match=r"the data, its weights, its tokenisation or the seed changed"):
        set_up.trainer(chosen, seed=1).load(state)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        small("qwen3_5_text", "vector").trainer(chosen).load(state)


def values(step: int) -> SavedState:
    return SavedState({"w": torch.full((4000,), float(step))}, {"w.step": torch.tensor(float(step))}, {"step": step})


def step_of(directory: StateDirectory) -> int:
    state = directory.latest()
    assert state is not None
    assert state.values["step"] == int(state.model["w"][0]) == int(state.optimizer["w.step"])
    return int(state.values["step"])


@pytest.fixture
def directory(tmp_path: Path) -> StateDirectory:
    made = StateDirectory(tmp_path / "deep" / "out.partial")
    made.create({"recipe": {"optimizer": {"lr": 0.1, "steps": 5}}, "seed": 0})
    return made


def test_two_saves_are_kept(directory: StateDirectory) -> None:
    assert directory.latest() is None
    for step in (3, 6, 9):
        directory.save(step, values(step))
        assert step_of(directory) == step
    kept = ["latest", "run.json", "state-00000006", "state-00000009"]
    assert sorted(path.name for path in directory.path.iterdir()) == kept


def test_more_saves_can_be_kept(directory: StateDirectory) -> None:
    """The newest; a damaged one that a run was resumed before goes."""
    for step in range(1, 7):
        directory.save(step, values(step), keep=4)
    assert sorted(path.name for path in directory.path.glob("state-*")) == [f"state-0000000{n}" for n in (3, 4, 5, 6)]
    (directory.path / "state-00000006" / "model.safetensors").write_bytes(b"")
    (directory.path / "state-00000005" / "model.safetensors").write_bytes(b"")
    again = StateDirectory(directory.path)
    assert step_of(again) == 4
    again.save(7, values(7), keep=3)
    assert sorted(path.name for path in directory.path.glob("state-*")) == [f"state-0000000{n}" for n in (3, 4, 7)]


@pytest.mark.parametrize("limit", [0, 100, 10_000])
def test_a_full_disk_keeps_the_last_good_save(directory: StateDirectory, limit: int) -> None:
    with full_disk(limit), pytest.raises(TrainingError, match=r"and start again with --resume \(there is no save yet"):
        directory.save(3, values(3))
    directory.save(3, values(3))
    with full_disk(limit), pytest.raises(TrainingError, match=r"and continue with --resume from the save of step 3$"):
        directory.save(6, values(6))
    assert step_of(directory) == 3
    assert not list(directory.path.glob("*06*")), "nothing half-written stays"
    directory.save(6, values(6))
    assert step_of(directory) == 6


@pytest.mark.parametrize("left", ["state-00000006.writing", "state-00000006"])
def test_a_kill_while_saving_leaves_the_last_save(directory: StateDirectory, left: str) -> None:
    """Between writing and renaming the directory, and between that and moving the pointer."""
    directory.save(3, values(3))
    (directory.path / left).mkdir()
    (directory.path / left / "model.safetensors").write_bytes(b"half")
    assert step_of(directory) == 3
    directory.save(6, values(6))
    assert step_of(directory) == 6
    assert sorted(path.name for path in directory.path.glob("state-*")) == ["state-00000003", "state-00000006"]


def test_identity_names_what_differs(directory: StateDirectory) -> None:
    same = {"recipe": {"optimizer": {"lr": 0.1, "steps": 5}}, "seed": 0}
    directory.check_identity(same)
    with pytest.raises(CheckpointError, match=r"recipe.optimizer.lr was 0.1 and is now 0.2; seed was 0 and is now 1"):
        directory.check_identity({"recipe": {"optimizer": {"lr": 0.2, "steps": 5}}, "seed": 1})
    (directory.path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"no record of a run of flarec that this version can read \(run.json\)"):
        directory.check_identity(same)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot make .*choose another --out"):
        StateDirectory(tmp_path / "file" / "out.partial").create({})
    with full_disk(0), pytest.raises(TrainingError, match=r"cannot write .* and start again$"):
        StateDirectory(tmp_path / "out.partial").create({})
    assert not (tmp_path / "out.partial").exists()


def test_metrics_continue_at_the_save(tmp_path: Path) -> None:
    """Lines after the save would come twice; a kill can cut the last line."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.write({"step": step, "ar_loss": 1 / step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "ar_l')
    log = MetricsLog(path, resume_at=3)
    log.write({"step": 4, "ar_loss": 0.0})
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 4, "ar_loss": 0.0}
