"""8-bit moments on a GPU: the CPU's step, no wait for the device, and the bits of a run that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flarec.train.moments import MOMENTS, AdamW8bit
from flarec.train.saves import SavedState
from flarec.train.state import StateDirectory
from tests.models import tiny_tokenizer
from tests.train.test_gpu_bf16 import BF16, trainer
from tests.train.test_gpu_bf16 import waiting_is_an_error as waiting_is_an_error
from tests.train.test_resume import everything

pytestmark = pytest.mark.gpu
CHOSEN = ("optimizer.moments=8bit",)


@pytest.mark.parametrize("size", [256, 4096 + 77, 3 * 256 * 1000])
def test_an_update_is_that_of_the_cpu(size: int) -> None:
    """Codes of the same numbers but for ties, over ten steps of the same gradients."""
    generator = torch.Generator().manual_seed(size)
    start = torch.randn(size, generator=generator)
    values = [torch.nn.Parameter(start.clone().to(device)) for device in ("cpu", "cuda")]
    optimizers = [AdamW8bit([v], [v], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1) for v in values]
    for _ in range(10):
        gradient = torch.randn(size, generator=generator) * torch.rand(size, generator=generator) ** 4
        for value, optimizer in zip(values, optimizers, strict=True):
            value.grad = gradient.to(value.device)
            optimizer.step()
    states = [optimizer.state[value] for value, optimizer in zip(values, optimizers, strict=True)]
    for moment in MOMENTS:
        cpu, cuda = (state[moment].cpu().int() for state in states)
        assert int((cpu - cuda).abs().max()) <= 1 and float((cpu != cuda).float().mean()) < 1e-3
    torch.testing.assert_close(values[1].detach().cpu(), values[0].detach(), rtol=1e-4, atol=2e-4)


def test_steps_stay_near_those_of_the_cpu() -> None:
    runs = [trainer("qwen3_5_text", device, BF16, *CHOSEN) for device in ("cuda", "cpu")]
    for _ in range(3):
        got, wanted = (run.advance().read(tiny_tokenizer()) for run in runs)
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-2)


@pytest.mark.usefixtures("waiting_is_an_error")
def test_a_step_never_waits_for_the_device() -> None:
    made = trainer("qwen3_5_text", "cuda", BF16, *CHOSEN)
    for _ in range(3):
        made.advance().read(tiny_tokenizer())
    assert made.feed.next is not None
    made.feed.next[1].result()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    steps = [made.advance() for _ in range(3)]
    torch.cuda.set_sync_debug_mode("default")
    assert [step.read(tiny_tokenizer())["step"] for step in steps] == [4, 5, 6]
    kept = {value.dtype for state in made.optimizer.state.values() for value in state.values()}
    assert kept == {torch.uint8, torch.float32}


def test_what_the_trainer_states_is_what_the_device_has() -> None:
    made = trainer("qwen3_5_text", "cuda", BF16, *CHOSEN)
    made.advance().read(tiny_tokenizer())
    states = [value for state in made.optimizer.state.values() for value in state.values() if value.dim()]
    assert made.weights.moment_bytes == sum(value.nbytes for value in states)
    whole = 8 * sum(master.numel() for master in made.weights.masters.values())
    assert 2.03 / 8 <= made.weights.moment_bytes / whole < 0.4, "what is small stays in float32"


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(moments: str, tmp_path: Path) -> None:
    """From a save on disk, in a trainer that starts with other numbers; routing and experts apart."""
    chosen = f"optimizer.moments={moments}"
    whole = trainer("qwen3_5_text", "cuda", BF16, chosen)
    log = [whole.advance().read(tiny_tokenizer()) for _ in range(2)]
    directory = StateDirectory(tmp_path / "out.partial")
    directory.create({})
    directory.save(2, SavedState(*whole.weights.saved(whole.optimizer), whole.state().values))
    log += [whole.advance().read(tiny_tokenizer()) for _ in range(3)]
    again = trainer("qwen3_5_text", "cuda", BF16, chosen)
    with torch.no_grad():
        for value in (*again.parameters.values(), *again.weights.masters.values()):
            value.fill_(7.0)
    again.load(directory.latest())
    assert [again.advance().read(tiny_tokenizer()) for _ in range(3)] == log[2:]
    expected, found = everything(whole), everything(again)
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []
