"""bfloat16 training on a GPU: rounding as on the CPU, the head in chunks, and steps that never wait for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flarec.frontend.export import capture
from flarec.kernels.row_losses import implementation
from flarec.passes import lower
from flarec.train.data.packing import RowStream
from flarec.train.loop import Trainer
from flarec.train.mask_token import choose_mask_token, initialise_mask_token
from flarec.train.objective.batch import build_batch, build_batches
from flarec.train.objective.head_loss import head_loss
from flarec.train.objective.head_plan import plan_head
from flarec.train.objective.loss import Scales, loss
from flarec.train.objective.noise import step_generator
from tests.models import tiny_model, tiny_tokenizer
from tests.train.documents import MASK
from tests.train.objective.test_loss import ROWS, diffusion_of
from tests.train.small_run import recipe, source

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
PLAIN = ("qwen3_5_text", "bamba")
"""Without experts: a near tie between two of them is no rounding, and grouping them waits for the device."""


def trainer(family: str, device: str, dtype: torch.dtype, *overrides: str) -> Trainer:
    """On that device with its usual kernels; the weights are those of a bfloat16 model."""
    chosen = recipe("dual", "optimizer.batch_rows=4", "optimizer.micro_rows=2", "optimizer.steps=20", *overrides)
    model = tiny_model(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16).to(dtype)
    captured, tokenizer = capture(model.to(device)), tiny_tokenizer()
    mask = choose_mask_token("auto", model.config, tokenizer)
    initialise_mask_token(mask, model, captured, tokenizer)
    program = lower(captured, "train", kernels="triton" if device == "cuda" else "torch")
    rows = RowStream([source(8)], max_length=chosen.data.max_length, seed=0, lookahead=4)
    return Trainer(program, chosen, mask, rows, seed=0)


def gradients(made: Trainer) -> Tensor:
    batches = build_batches(
        made.rows.rows(4), made.recipe.diffusion, made.mask.token_id, step_generator(0, 0), micro_rows=2
    )
    made.accumulate(batches)
    masters = made.weights.masters
    return torch.cat([masters[name].grad.double().cpu().flatten() for name in sorted(masters)])  # type: ignore[union-attr]


@pytest.mark.parametrize("family", PLAIN)
def test_gradients_are_as_near_to_float32_as_on_the_cpu(family: str) -> None:
    exact = gradients(trainer(family, "cpu", torch.float32))
    here, there = (gradients(trainer(family, device, BF16)) for device in ("cuda", "cpu"))
    assert float((here - exact).norm()) <= 1.5 * float((there - exact).norm())


@pytest.mark.parametrize("family", PLAIN)
def test_steps_stay_near_those_of_the_cpu(family: str) -> None:
    runs = [trainer(family, device, BF16) for device in ("cuda", "cpu")]
    for _ in range(3):
        got, wanted = (run.advance().read(tiny_tokenizer()) for run in runs)
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-2)


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("name", ["flare", "draft"])
def test_a_step_never_waits_for_the_device(family: str, name: str) -> None:
    """Neither the step nor the thread that makes the next one; the first steps compile and fill caches."""
    made = trainer(family, "cuda", BF16, f"diffusion.mask={'random' if name == 'flare' else 'all'}",
                   *(["diffusion.views=1", "diffusion.loss=kl"] if name == "draft" else []))
    for _ in range(3):
        made.advance().read(tiny_tokenizer())
    assert made.feed.next is not None
    made.feed.next[1].result()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    steps = [made.advance() for _ in range(3)]
    assert made.feed.next is not None
    made.feed.next[1].result()
    torch.cuda.set_sync_debug_mode("default")
    assert [step.read(tiny_tokenizer())["step"] for step in steps] == [4, 5, 6]
    assert all(step.losses.device.type == "cpu" for step in steps)


def test_waiting_would_be_seen() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(2, device="cuda").sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", ["triton", "torch"])
@pytest.mark.parametrize("name", ["flare", "draft", "dual", "el", "dual, tv until fail"])
@pytest.mark.parametrize("chunk", [16, 4096])
def test_the_head_in_chunks(form: str, name: str, chunk: int) -> None:
    """bfloat16 hidden rows and head against float64 on the same numbers; one chunk, and several added up in float32.

    The budget is what bfloat16 logits cost anyway: the error of the losses on whole logits."""
    vocab, width = 5000, 64
    batch = build_batch(ROWS * 4, diffusion_of(name), MASK, step_generator(0, 0))
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, width, generator=generator).to("cuda", BF16).requires_grad_()
        for n in (len(batch.head_rows), vocab)
    )
    scales = Scales(0.01, 0.02)
    plan = plan_head(batch, scales, chunk).to("cuda")
    found = head_loss(hidden, weight, None, None, batch.to("cuda"), plan, suppress=MASK, rows=implementation(form))
    exact, plain = [x.detach().double().requires_grad_() for x in (hidden, weight)], [hidden, weight]
    wanted, whole = (loss(F.linear(*x), batch.to("cuda"), suppress=MASK, scales=scales) for x in (exact, plain))
    assert found.total.item() == pytest.approx(wanted.total.item(), rel=5e-3)
    gradients = zip(
        torch.autograd.grad(found.total, plain),
        torch.autograd.grad(whole.total, plain),
        torch.autograd.grad(wanted.total, exact),
        strict=True,
    )
    for ours, unchunked, right in gradients:
        budget = (unchunked.double() - right).norm()
        assert 0 < budget <= 3e-2 * right.norm()
        assert (ours.double() - right).norm() <= 1.1 * budget


def test_products_add_up_in_float32() -> None:
    """What a GPU adds to a float32 total is not rounded to bfloat16 first."""
    from flarec.train.objective.head_loss import _plus_product

    left, right = (torch.randn(64, 64, device="cuda").to(BF16) for _ in range(2))
    total = None
    for _ in range(8):
        total = _plus_product(total, left.t(), right, torch.float32)
    assert total is not None and total.dtype == torch.float32
    exact = 8 * (left.double().t() @ right.double())
    assert float((total.double() - exact).norm()) <= 1e-5 * float(exact.norm())


def test_prefetched_steps_continue_where_a_save_was_made() -> None:
    whole = trainer("qwen3_5_text", "cuda", BF16)
    expected = [whole.advance().read(tiny_tokenizer())["loss"] for _ in range(5)]
    first = trainer("qwen3_5_text", "cuda", BF16)
    for _ in range(3):
        first.advance()
    second = trainer("qwen3_5_text", "cuda", BF16)
    second.advance()
    second.load(first.state())
    assert second.state().values["rows"] == first.state().values["rows"]
    got = [second.advance().read(tiny_tokenizer())["loss"] for _ in range(2)]
    assert got == pytest.approx(expected[3:], rel=1e-3)
