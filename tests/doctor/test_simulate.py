"""Running without numbers: live bytes, work and shapes are those of a real run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flarec.doctor.simulate import BATCHED, GATHER, MATMUL, MEMORY, Cell, Simulation, Work, with_fake_weights
from flarec.errors import CaptureError
from flarec.layout import Block, build_layout
from flarec.passes import lower
from tests.models import captured

ATEN = torch.ops.aten


def flops(work: Work, kind: str) -> int:
    return sum(value for cell, value in work.flops.items() if cell.kind == kind)


def test_live_and_peak_bytes() -> None:
    with Simulation() as simulation:
        a = torch.zeros(1000)
        assert (simulation.live, simulation.peak) == (4000, 4000)
        b = a + 1
        view = b[:10]
        del b
        assert simulation.live == 8000, "a view keeps its storage"
        del view
        assert (simulation.live, simulation.peak) == (4000, 8000)
        simulation.forget_peak()
        a.add_(1)
        assert simulation.peak == 4000


def test_autograd_keeps_what_it_saves() -> None:
    with Simulation() as simulation:
        x = torch.zeros(1000, requires_grad=True)
        y = (x * 2.0).exp().sum()  # exp saves its result; the product is not saved
        assert simulation.live == 4000 + 4000 + 4
        y.backward()
        assert x.grad is not None
        del y
        assert simulation.live == 8000


def test_numbers_are_not_there_and_indices_are() -> None:
    with Simulation() as simulation:
        x = torch.randn(8, 4)
        index = torch.arange(6)
        assert simulation.is_fake(x) and not simulation.is_fake(index)
        assert (index * 2).tolist() == [0, 2, 4, 6, 8, 10]
        assert index.gt(3).nonzero().flatten().tolist() == [4, 5]
        assert simulation.is_fake(x[index])
        assert simulation.is_fake(torch.arange(1 << 23)), "a large one would cost memory"
        with pytest.raises(CaptureError, match="without weights"):
            x.sum().item()


def test_routed_tokens_are_shared_equally() -> None:
    with Simulation():
        chosen = torch.randn(10, 3).argmax(1)
        assert torch.bincount(chosen, minlength=3).tolist() == [4, 3, 3]


def test_work_of_an_operation() -> None:
    with Simulation() as simulation:
        a, b = torch.zeros(16, 32), torch.zeros(32, 8)
        start = simulation.work.copy()
        a @ b
        assert simulation.work - start == work(MATMUL, 2 * 16 * 32 * 8, 4 * (16 * 32 + 32 * 8 + 16 * 8))
        for operation, expected in (
            (lambda: a + a, work(MEMORY, 0, 3 * 4 * 512)),
            (lambda: a.add_(a), work(MEMORY, 0, 3 * 4 * 512)),
            (lambda: a[:1].expand(64, 32) + a[0], work(MEMORY, 0, 4 * (32 + 32 + 64 * 32), views=3)),
            (lambda: a.index_select(0, torch.tensor([1, 2])), work(GATHER, 0, 2 * 4 * 64)),
            (lambda: a.t(), work(MEMORY, 0, 0)),
        ):
            start = simulation.work.copy()
            operation()
            done = simulation.work - start
            assert (done.flops, done.bytes) == (expected.flops, expected.bytes)
        assert (simulation.work - simulation.work) == Work()
        twice = (simulation.work - start).times(2)
        assert sum(twice.calls.values()) == 2 * sum((simulation.work - start).calls.values())


def work(kind: str, flops: int, moved: int, views: int = 0) -> Work:
    done = Work()
    done.add(kind, flops, moved)
    for _ in range(views):
        done.add(MEMORY, 0, 0)
    done.bytes, done.flops = +done.bytes, +done.flops  # as differences are: no zeros
    return done


def test_cells_name_powers_of_two() -> None:
    done = Work()
    done.add(MATMUL, 5, 1024)
    assert list(done.calls) == [Cell(MATMUL, 11, 3)]


@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba"])
def test_arithmetic_is_that_of_a_real_run(family: str) -> None:
    """The oracle is torch's own counter on the program with its numbers."""
    program = lower(captured(family), "train")
    layout = build_layout([[9], [9]], [[Block(0, 3, 3), Block(0, 6, 3)]] * 2)
    rows, ids = torch.arange(2 * layout.length), torch.zeros(2, layout.length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        program(ids, layout=layout, head_rows=rows)
    counts = counter.get_flop_counts()["Global"]
    with Simulation() as simulation:
        fake = with_fake_weights(program, simulation, torch.device("cpu"))
        start = simulation.work.copy()
        fake(ids, layout=layout, head_rows=rows)
        done = simulation.work - start
    assert flops(done, MATMUL) == sum(counts.get(op, 0) for op in (ATEN.mm, ATEN.addmm)) > 0
    solves = sum(value for cell, value in done.flops.items() if cell.kind == BATCHED) - counts[ATEN.bmm]
    assert (solves > 0) == (family == "qwen3_5_text"), "torch counts no triangular solves"


def test_the_given_program_keeps_its_weights() -> None:
    program = captured("bamba")
    before = {name: id(value) for name, value in program.parameters().items()}
    with Simulation() as simulation:
        fake = with_fake_weights(program, simulation, torch.device("cpu"))
        sizes = {id(p): p.numel() * 4 for p in fake.parameters().values()}
        assert simulation.live >= sum(sizes.values())
        assert all(simulation.is_fake(p) and p.requires_grad for p in fake.parameters().values())
    assert {name: id(value) for name, value in program.parameters().items()} == before
