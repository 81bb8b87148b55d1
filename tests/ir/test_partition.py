"""What compiled regions keep, counted without compiling them: that of the compiler itself, on a device and in a
simulation; and the numbers are those of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from flarec.doctor.regions import HalfPlan, base_of, counted_codes
from flarec.doctor.simulate import MATMUL, MEMORY, Simulation, with_fake_weights
from flarec.ir.compiled import Backend, Codes
from flarec.ir.module import graph_module
from flarec.ir.partition import PartitionedCode, PartitionedCodes, computed, halves_of
from flarec.train.loop import Trainer
from flarec.train.memory import Kept
from tests.train.small_run import Small, recipe, small
from tests.train.test_compiled import outlined

ATEN = torch.ops.aten
CHOSEN = recipe("flare", "train.memory=keep", "optimizer.batch_rows=1", "data.max_length=64")


def mlp() -> fx.GraphModule:
    """(silu(x w) * (x u)) v, and a mask that has no gradient. x [T, D], w, u [D, F], v [F, D]."""
    graph = fx.Graph()
    x, w, u, v = (graph.placeholder(name) for name in "xwuv")
    gate, up = (graph.call_function(ATEN.mm.default, (x, weight)) for weight in (w, u))
    act = graph.call_function(ATEN.mul.Tensor, (graph.call_function(ATEN.silu.default, (gate,)), up))
    graph.output((graph.call_function(ATEN.mm.default, (act, v)), graph.call_function(ATEN.gt.Scalar, (gate, 0.0))))
    return graph_module(nn.Module(), graph)


def operands(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(6, 4), (4, 8), (4, 8), (8, 4)]
    return [torch.randn(size, dtype=dtype, generator=generator).requires_grad_() for size in sizes]


def test_halves_compute_what_the_region_does() -> None:
    given = operands()
    code = PartitionedCode(mlp(), computed)
    out, mask = code(*given)
    theirs, other = mlp()(*given)
    assert torch.equal(mask, other) and not mask.requires_grad
    torch.testing.assert_close(out, theirs)
    ours = torch.autograd.grad(out.square().sum(), given)
    torch.testing.assert_close(ours, torch.autograd.grad(theirs.square().sum(), given))
    with torch.no_grad():
        assert len(code.known) == 1 and torch.equal(code(*given)[0], theirs), "without autograd as it is"


def test_a_half_is_products_and_what_lies_between_them() -> None:
    """Gate, up and their product (turned) are kept, silu(gate) is not; a kernel makes the product, one the mask."""
    halves = halves_of(mlp(), operands(torch.float32))
    assert halves is not None and halves.learning == (0,)
    kept = [tuple(node.meta["val"].shape) for node in halves.kept if "primals" not in base_of(node).name]
    assert kept == [(6, 8), (6, 8), (8, 6)]
    plan = HalfPlan.of(halves.forward)
    calls, moved = {MATMUL: 0, MEMORY: 0}, dict[str, int]()
    for cell, count in plan.work.calls.items():
        calls[cell.kind] += count
        moved[cell.kind] = moved.get(cell.kind, 0) + plan.work.bytes[cell]
    assert calls == {MATMUL: 3, MEMORY: 2}
    assert moved[MEMORY] == 4 * (2 * 48 + 48) + 4 * 48 + 48, "gate, up, their product; gate again and a mask of bytes"
    assert sum(plan.work.flops.values()) == 3 * 2 * 6 * 4 * 8
    assert plan.meanwhile == 0, "all that it makes is kept"


def kept_by(run: Small, codes: Callable[[], Codes]) -> tuple[int, Tensor]:
    for name, value in run.program.parameters().items():
        value.data, value.grad = run.start[name].clone(), None
    trainer = Trainer(run.program, CHOSEN, run.mask, run.trainer(CHOSEN).rows, seed=0, codes=codes())
    with Kept(trainer.program) as kept:
        losses, _, _ = trainer.accumulate(trainer.feed.take(0).batches)
    return kept.bytes, losses


def kept_in_simulation(run: Small) -> int:
    """As `Kept`, of tensors that have no memory."""
    storages: dict[int, tuple[object, int]] = {}
    batches = run.trainer(CHOSEN).feed.take(0).batches
    with Simulation() as simulation:
        program = with_fake_weights(run.program, simulation, torch.device("cpu"))
        weights = {value.untyped_storage()._cdata for value in program.parameters().values()}
        rows = run.trainer(CHOSEN).rows
        trainer = Trainer(program, CHOSEN, run.mask, rows, seed=0, codes=counted_codes(simulation))

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights and (simulation.is_fake(tensor) or not isinstance(tensor, FakeTensor)):
                storages[storage._cdata] = (storage, storage.nbytes())
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            trainer.accumulate(batches)
    return sum(size for _, size in storages.values())


def without_kernels(module: fx.GraphModule, inputs: list[Any]) -> Any:
    """Inductor's decompositions, passes and partition, which decide what is kept; the halves run as they are."""

    def graphs(half: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        return make_boxed_func(half.forward)

    return compile_fx(module, inputs, inner_compile=graphs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "backend"),
    [("qwen3_5_text", without_kernels), *((name, "aot_eager_decomp_partition") for name in ("bamba", "kimi_linear"))],
)
def test_what_is_kept_is_what_compiled_regions_keep(family: str, backend: Backend) -> None:
    plain = small(family)
    run = outlined(plain)
    ours, losses = kept_by(run, PartitionedCodes)
    assert kept_in_simulation(run) == pytest.approx(ours, rel=0.02)
    eager, exact = kept_by(plain, Codes)  # without regions
    torch.testing.assert_close(losses, exact, rtol=1e-5, atol=0)
    assert ours < 0.95 * eager, "what is between products is not kept"
    compiled, _ = kept_by(run, lambda: Codes(backend))
    assert ours == pytest.approx(compiled, rel=0.02)

