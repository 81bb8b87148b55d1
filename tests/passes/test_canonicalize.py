"""canonicalize: guards, regions, device constants, no-op slices and dead code go; the logits stay bit for bit."""

from __future__ import annotations

import pytest
import torch

from flarec.ir.program import Program
from flarec.passes.canonicalize import Canonicalize
from tests.models import FAMILIES, captured
from tests.passes.snippets import before_and_after, count, plain

ATEN = torch.ops.aten


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_bit_for_bit(family: str) -> None:
    before, after = before_and_after("canonicalize", family)
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain(before, ids), plain(after, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_export_leaves_is_gone(family: str) -> None:
    before, after = before_and_after("canonicalize", family)
    assert count(before, "_assert_tensor_metadata") > 0
    for name in ("_assert_tensor_metadata", "wrap_with_set_grad_enabled", "alias", "view", "cumsum", "diff"):
        assert count(after, name) == 0, name
    assert not after.calls(ATEN.to.device)
    assert not [node for node in after.graph.nodes if node.op == "call_module"]


def test_before_and_after_of_the_docstring() -> None:
    """slice(all), to.device and view become to.dtype and reshape."""
    program = captured("bamba").clone()
    hidden = program.calls(ATEN.linear.default)[0]
    users = list(hidden.users)
    graph = program.graph
    with graph.inserting_after(hidden):
        sliced = graph.call_function(ATEN.slice.Tensor, (hidden, 1, 0, 9223372036854775807))
    with graph.inserting_after(sliced):
        moved = graph.call_function(ATEN.to.device, (sliced, torch.device("cpu"), torch.float32))
    with graph.inserting_before(moved.next):
        ids = program.placeholder("input_ids")
        rows, length = (graph.call_function(ATEN.sym_size.int, (ids, dim)) for dim in (0, 1))
        viewed = graph.call_function(ATEN.view.default, (moved, [rows, length, hidden.meta["val"].shape[-1]]))
    for node in (sliced, moved, viewed):
        node.meta = dict(hidden.meta)
    for user in users:
        user.replace_input_with(hidden, viewed)
    program.finish()

    from flarec.ir.pipeline import run_pipeline
    from flarec.passes import pipeline
    from flarec.passes.properties import CHECKS

    after = run_pipeline(program, pipeline("train")[:1], CHECKS)
    hidden = after.calls(ATEN.linear.default)[0]
    (cast,) = hidden.users
    assert cast.target is ATEN.to.dtype
    assert cast.args == (hidden, torch.float32)
    (reshaped,) = cast.users
    assert reshaped.target is ATEN.reshape.default
    example = torch.randint(0, 300, (2, 17))
    assert torch.equal(plain(after, example), plain(captured("bamba"), example))


def test_a_view_that_is_written_through_stays_a_view() -> None:
    """`copy_` into a slice must reach the tensor (partial rotary embeddings are built like this)."""
    _, after = before_and_after("canonicalize", "qwen3_5_text")
    for node in after.calls(ATEN.copy_.default):
        assert node.args[0].target is not ATEN.reshape.default  # type: ignore[union-attr]


class StopsGradients(torch.nn.Module):
    """Three ways to write a scaled row: through both factors, with the second detached, and made without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.stopped, self.frozen = (torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.frozen(x).sigmoid()
        constant = torch.ones(4).detach()
        return self.kept(x) * self.stopped(x).detach() * scale * constant


def test_a_stopped_gradient_stays_stopped() -> None:
    model, x = StopsGradients(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    module = torch.export.export(model, (x,), strict=False).module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    program = Program(module=module, config=None, family="test", dtype=torch.float32)
    Canonicalize().apply(program)
    program.finish()
    assert count(program, "wrap_with_set_grad_enabled") == 0
    assert len(program.calls(ATEN.detach.default)) == 2  # not the constant's
    model(x).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    program.module(x).sum().backward()
    for name, parameter in program.parameters().items():
        wanted = expected[name]
        if wanted is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, wanted)
    assert {name for name, grad in expected.items() if grad is not None} == {"kept.weight", "kept.bias"}


class Angles(torch.nn.Module):
    """Rotary angles as some models write them, beside products that are none of one number."""

    def forward(self, frequencies: torch.Tensor, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        angles = frequencies[None, :, None].expand(2, -1, 1) @ positions[:, None, :]
        return angles.transpose(1, 2) @ x + (x.sum(-1) @ frequencies)[:, None, None]


class Learned(torch.nn.Module):
    """Products over one number that stay: of a parameter, and one whose order in memory a write relies on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(1, 8))

    def forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        product = a.transpose(0, 1) @ b.transpose(0, 1)
        product.view(-1).add_(1)
        return x @ self.weight, product


def test_products_of_parameters_and_those_that_are_written_stay() -> None:
    model = Learned()
    given = torch.randn(3, 1), torch.randn(4, 3, 6, 1), torch.randn(4, 3, 1, 5)
    module = torch.export.export(model, given, strict=False).module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    program = Program(module=module, config=None, family="test", dtype=torch.float32)
    Canonicalize().apply(program)
    program.finish()
    assert count(program, "matmul") == 2
    for found, wanted in zip(program.module(*given), model(*given), strict=True):
        assert torch.equal(found, wanted)


def test_a_product_over_one_number_is_a_multiplication() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        sizes = (8,), (2, 5), (2, 8, 8)
        given = tuple(torch.randn(*size, generator=generator).to(dtype) for size in sizes)
        module = torch.export.export(Angles(), given, strict=False).module(check_guards=False)
        assert isinstance(module, torch.fx.GraphModule)
        program = Program(module=module, config=None, family="test", dtype=dtype)
        products = count(program, "matmul")
        Canonicalize().apply(program)
        program.finish()
        assert count(program, "matmul") == products - 1
        assert torch.equal(program.module(*given), Angles()(*given))
