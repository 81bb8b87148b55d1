"""Losses from hidden rows against the losses from logits, and what is never made on the way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flarec.passes import lower, pipeline
from flarec.passes.split_head import SplitHead
from flarec.recipe import load_recipe
from flarec.recipe.sections import Objective
from flarec.train.data.document import PackedRow
from flarec.train.objective import head_loss as module
from flarec.train.objective.batch import Batch, build_batch
from flarec.train.objective.head_loss import Tail, chunk_rows, head_loss, losses_of, plan_for
from flarec.train.objective.head_plan import plan_head
from flarec.train.objective.loss import Losses, Scales, loss
from flarec.train.objective.noise import step_generator
from tests.models import captured_float64
from tests.train.documents import MASK, make_document, packed_rows
from tests.train.objective.test_loss import CHOICES, ROWS
from tests.train.small_run import adapter_recipe, recipe, small

V, D = 64, 16
TAILS: dict[str, Tail | None] = {
    "none": None,
    "scale": lambda x: x / 1.7,
    "softcap": lambda x: torch.tanh(x / 5.0) * 5.0,
}
RECIPES = {
    **CHOICES,
    "grids": ("draft", ["diffusion.grids=3"]),
    "random offset": ("draft", ["diffusion.grid_offset=random", "diffusion.slot_weights=accept-until-fail"]),
    "grids, el": ("draft", ["diffusion.grids=4", "diffusion.loss=el"]),
    "two views, KL": ("flare", ["diffusion.loss=kl", "diffusion.supervise=masked-target"]),
}


def batch_of(rows: list[PackedRow], name: str, seed: int) -> Batch:
    base, overrides = RECIPES[name]
    return build_batch(rows, load_recipe(base).override(overrides).diffusion, MASK, step_generator(seed, 0))


def inputs(batch: Batch, seed: int, bias: bool) -> list[Tensor | None]:
    """Hidden rows, weight and bias in float64; logits of about 2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [normal(len(batch.head_rows), D), (normal(V, D).detach() / 2).requires_grad_(), normal(V) if bias else None]


def gradients(found: Losses, leaves: list[Tensor | None]) -> list[Tensor]:
    return list(torch.autograd.grad(3.0 * found.total, [x for x in leaves if x is not None]))


@settings(max_examples=40)
@given(
    packed_rows(), st.sampled_from(sorted(RECIPES)), st.sampled_from(sorted(TAILS)), st.sampled_from([None, MASK]),
    st.booleans(), st.integers(1, 40), st.integers(0, 99),
)
def test_values_gradients_and_metrics_are_those_of_the_logits(
    rows: list[PackedRow], name: str, tail_name: str, suppress: int | None, bias: bool, chunk: int, seed: int
) -> None:
    batch, tail, scales = batch_of(rows, name, seed), TAILS[tail_name], Scales(0.3, 0.2)
    leaves = inputs(batch, seed, bias)
    hidden, weight, offset = leaves
    assert hidden is not None and weight is not None
    logits = F.linear(hidden, weight, offset)
    expected = loss(logits if tail is None else tail(logits), batch, suppress=suppress, scales=scales)
    found = head_loss(hidden, weight, offset, tail, batch, plan_head(batch, scales, chunk), suppress=suppress)
    torch.testing.assert_close(found.total, expected.total)
    got = gradients(found, leaves)
    for ours, theirs in zip(got, gradients(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert suppress is None or not any(ours[suppress].any() for ours in got[1:])
    wanted = expected.metrics.summary()
    for key, value in found.metrics.summary().items():
        assert value == pytest.approx(wanted[key], abs=1e-12), key
    with torch.no_grad():
        measured = head_loss(hidden, weight, offset, tail, batch, plan_head(batch, scales, chunk), suppress=suppress)
    assert not measured.total.requires_grad
    assert measured.metrics.summary() == found.metrics.summary()


@settings(max_examples=40)
@given(packed_rows(), st.sampled_from(sorted(RECIPES)), st.integers(1, 40), st.integers(0, 99))
def test_the_plan_computes_every_row_and_puts_teachers_beside_their_students(
    rows: list[PackedRow], name: str, chunk: int, seed: int
) -> None:
    batch = batch_of(rows, name, seed)
    plan = plan_head(batch, Scales(1.0, 1.0), chunk)
    assert plan.order[plan.place].tolist() == list(range(len(batch.head_rows)))
    own = torch.zeros(len(plan.order), dtype=torch.bool)
    own[plan.place] = True
    assert not plan.ce[~own].any(), "a repeated teacher counts once"
    most = max(chunk, 2 * batch.block_size if batch.chained else 2)
    students, start, first, blocks = [], 0, 0, []
    for part in plan.chunks:
        assert (part.start, part.first) == (start, first) and part.stop - part.start <= most
        assert part.learning == part.stop - part.start
        start, first = part.stop, part.first + part.pairs
        for pair in range(part.pairs):
            signal = int(plan.signal[part.first + pair])
            student, row = int(plan.order[part.start + pair]), int(plan.teacher[part.first + pair])
            teacher = int(plan.order[part.start + row])
            assert part.shared or part.start + row == part.stop - part.pairs + pair
            assert student == int(batch.noisy_index[signal]) and teacher == int(batch.teacher_index[signal])
            students.append(signal)
        chain = plan.weights(part).chain
        for block in [] if chain is None else chain.blocks.tolist():
            assert all(-1 <= pair < part.pairs for pair in block)
            blocks.append([int(plan.signal[part.first + pair]) for pair in block if pair >= 0])
    assert (start, first) == (len(plan.order), len(plan.signal))
    needed = set((batch.noisy_loss > 0).nonzero().flatten().tolist()) | set(batch.all_masked_index.tolist())
    assert sorted(students) == sorted(needed)
    wanted = [[signal for signal in block if signal >= 0] for block in batch.blocks.tolist()]
    assert sorted(blocks) == (wanted if batch.chained else [])


def test_a_teacher_of_several_grids_is_computed_once() -> None:
    rows = [PackedRow((make_document([(3, 400)]),))]
    batch = batch_of(rows, "grids, el", 0)
    plan = plan_head(batch, Scales(1.0, 1.0), 100)
    assert len(batch.head_rows) == 400 + 399 + 398 + 397 + 396, "the clean rows, and four grids"
    assert all(part.shared for part in plan.chunks[:-1]) and len(plan.chunks) > 15
    repeated = len(plan.order) - len(batch.head_rows)
    assert repeated <= batch.block_size * len(plan.chunks), "only at the borders of chunks"


class Products(TorchDispatchMode):
    """Shapes of the results of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "mm" in str(func):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("name", ["draft", "flare", "el", "dual, tv until fail"])
@pytest.mark.parametrize("tail", sorted(TAILS))
def test_a_frozen_head_and_clean_rows_without_a_loss_cost_nothing(name: str, tail: str) -> None:
    """The same gradients as with a head that learns, from fewer products: none for the head, and one row for each
    noisy signal."""
    batch, scales = batch_of(ROWS, name, 0), Scales(0.0, 0.2)
    hidden, weight, bias = inputs(batch, 0, True)
    assert hidden is not None and weight is not None and bias is not None
    plan = plan_head(batch, scales, 12)
    learned = head_loss(hidden, weight, bias, TAILS[tail], batch, plan, suppress=MASK)
    (expected,) = torch.autograd.grad(learned.total, hidden)
    with Products() as seen:
        found = head_loss(hidden, weight.detach(), bias.detach(), TAILS[tail], batch, plan, suppress=MASK)
    assert torch.equal(found.total, learned.total)
    (got,) = torch.autograd.grad(found.total, hidden)
    assert torch.equal(got, expected)
    noisy = torch.zeros(len(got), dtype=torch.bool)
    noisy[batch.noisy_index] = True
    assert bool(got[noisy].any(1).all()) and not got[~noisy].any()
    backward = [shape[0] for shape in seen.shapes if shape[1] == D]
    assert V not in backward and sum(backward) == len(batch.noisy_index)


class Largest(TorchDispatchMode):
    """The most elements of a tensor with as many columns as the vocabulary has entries, by dtype."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.rows: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dim() == 2 and leaf.shape[1] == self.columns:
                self.rows[leaf.dtype] = max(self.rows.get(leaf.dtype, 0), leaf.shape[0])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["flare", "draft"])
def test_logits_exist_for_one_chunk_at_a_time(name: str, dtype: torch.dtype) -> None:
    columns, width, chunk = 97, 4, 6
    batch = batch_of(ROWS * 3, name, 0)
    leaves = [torch.randn(n, width).to(dtype).requires_grad_() for n in (len(batch.head_rows), columns)]
    assert len(batch.head_rows) > 4 * chunk
    with Largest(columns) as seen:
        plan = plan_head(batch, Scales(1.0, 1.0), chunk)
        head_loss(leaves[0], leaves[1], None, None, batch, plan, suppress=MASK).total.backward()
    assert max(seen.rows.values()) <= chunk
    assert {dtype, torch.float32} == set(seen.rows)
    with Largest(columns) as seen:  # what the test would see
        loss(F.linear(*leaves), batch, suppress=MASK, scales=Scales(1.0, 1.0)).total.backward()
    assert max(seen.rows.values()) == len(batch.head_rows)


@pytest.mark.parametrize("family", ["gemma2", "granitemoehybrid"])
def test_a_split_program_trains_as_a_whole_one(family: str) -> None:
    """A tied head behind a soft cap, and a scaled one: loss and gradients of every parameter, in float64."""
    captured = captured_float64(family)
    kept = [step for step in pipeline("train") if not isinstance(step, SplitHead)]
    split, whole = lower(captured, "train"), lower(captured, "train", steps=kept)
    assert split.head is not None and whole.head is None
    run = small("qwen3_5_text").trainer(recipe())
    batch = build_batch(run.rows.rows(2), load_recipe("dual").diffusion, run.mask.token_id, step_generator(0, 0))
    scales, results = Scales.of([batch], Objective()), []
    for program in (split, whole):
        plan = plan_for(program, batch, scales)
        rows, *_ = program.results(batch.input_ids, layout=batch.layout, head_rows=batch.head_rows)
        found = losses_of(rows, program, batch, plan, scales, suppress=run.mask.token_id)
        parameters = program.parameters()
        grads = torch.autograd.grad(found.total, list(parameters.values()), allow_unused=True)
        results.append((found, dict(zip(parameters, grads, strict=True))))
    torch.testing.assert_close(results[0][0].total, results[1][0].total)
    assert results[0][1].keys() == results[1][1].keys()
    for name, ours in results[0][1].items():
        theirs = results[1][1][name]
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11, msg=name)


def test_a_frozen_head_has_smaller_chunks_on_a_gpu() -> None:
    """It adds up no gradient, so that nothing is won by many rows at a time."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert (chunk_rows(248_320, cuda, "triton"), chunk_rows(248_320, cuda, "triton", frozen=True)) == (4324, 1081)
    assert chunk_rows(248_320, cuda, "torch") == chunk_rows(248_320, cuda, "triton", frozen=True)
    assert chunk_rows(512, cpu, "torch") == chunk_rows(512, cpu, "torch", frozen=True)
    chosen = adapter_recipe()
    run = small("qwen3_5_text", "vector", chosen=chosen)
    asked: list[bool] = []

    def noted(*_: object, frozen: bool) -> int:
        asked.append(frozen)
        return 8

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "chunk_rows", noted)
        for made in (run.trainer(chosen), small("qwen3_5_text").trainer(recipe("draft"))):
            next(iter(made.feed.micro_batches(made.feed.take(0).batches)))
    assert asked == [True, False]
