"""Outlining: a module per unit, the same numbers, the same tensors; what cannot be called is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from flarec.ir.effects import behind
from flarec.ir.outline import outline
from flarec.ir.program import layer_of
from flarec.layout import Block, build_layout
from flarec.passes import lower
from tests.models import captured_float64


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))
        self.shift: Tensor

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.nn.functional.linear(x, self.inner.weight, self.inner.bias)
        b = torch.sin(y)
        c = torch.add(a, self.shift)
        d = torch.mul(c, b)
        return torch.sub(d, c), b


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(Small())


def named(module: fx.GraphModule, **units: str) -> dict[str, str]:
    """Nodes by name to units; every name is one of the graph."""
    assert units.keys() <= {node.name for node in module.graph.nodes}
    return units


def test_before_and_after_of_the_docstring() -> None:
    module = traced()
    table = named(module, linear="one", add="one")
    found = outline(module, lambda node: table.get(node.name))
    assert [node.name for node in found.graph.nodes] == ["x", "y", "sin", "one", "add", "mul", "sub", "output"]
    unit = found.get_submodule("one")
    assert isinstance(unit, fx.GraphModule)
    assert [node.name for node in unit.graph.nodes if node.op == "placeholder"] == ["x"]
    assert unit.get_parameter("inner.weight") is module.get_parameter("inner.weight")
    assert unit.get_buffer("shift") is module.get_buffer("shift")
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for ours, theirs in zip(found(x, y), module(x, y), strict=True):
        assert torch.equal(ours, theirs)
    assert [node.name for node in module.graph.nodes] == [node.name for node in traced().graph.nodes]


def test_a_unit_is_called_once_what_it_reads_is_there() -> None:
    """The node between its own moves in front of it."""
    module = traced()
    table = named(module, add="two", mul="two", sub="two", linear="one")
    found = outline(module, lambda node: table.get(node.name))
    calls = [node.name for node in found.graph.nodes if node.op == "call_module"]
    assert calls == ["one", "two"]
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(found(x, y)[0], module(x, y)[0])


def test_a_value_that_leaves_a_unit_and_comes_back_is_refused() -> None:
    module = traced()
    table = named(module, add="one", sub="one")
    with pytest.raises(ValueError, match="unit 'one'"):
        outline(module, lambda node: table.get(node.name))


def test_no_node_moves_over_a_write_to_what_it_reads() -> None:
    """A buffer is filled through a view of it: a unit that reads it waits, and a write waits for earlier readers."""
    aten, graph = torch.ops.aten, fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(aten.mul.Tensor, (x, 2.0))
    early = graph.call_function(aten.sin.default, (made,))
    view = graph.call_function(aten.slice.Tensor, (made, 0, 0, 1))
    fill = graph.call_function(aten.copy_.default, (view, graph.call_function(aten.cos.default, (view,))))
    late = graph.call_function(aten.exp.default, (made,))
    graph.output((early, late))
    module = fx.GraphModule(nn.Module(), graph)
    assert behind(graph.nodes)[fill] == [early, view, fill.args[1]] and behind(graph.nodes)[late] == [fill]
    values = torch.randn(3)
    expected = module(values)
    for units in ({early: "a", late: "a"}, {late: "a"}, {early: "a", made: "b", late: "c"}, {made: "a", early: "a"}):
        def unit_of(node: fx.Node, units: dict[fx.Node, str] = units) -> str | None:
            return units.get(node)

        if units.get(early) == units.get(late):
            with pytest.raises(ValueError, match="unit 'a'"):
                outline(module, unit_of)
            continue
        for ours, theirs in zip(outline(module, unit_of)(values), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["kimi_linear", "zamba2"])
def test_layers_of_a_program_are_units(family: str) -> None:
    """Bit for bit, and a parameter that layers share is one."""
    program = lower(captured_float64(family), "train")
    found = outline(program.module, lambda node: None if layer_of(node) is None else f"layer_{layer_of(node)}")
    layers = program.config.num_hidden_layers
    assert [node.name for node in found.graph.nodes if node.op == "call_module"] == [
        f"layer_{index}" for index in range(layers)
    ]
    ids = torch.randint(0, 300, (1, 13), generator=torch.Generator().manual_seed(0))
    layout = build_layout([[5, 4]], [[Block(0, 2, 2), Block(1, 3, 2)]])
    given = program.given(ids, layout=layout, head_rows=torch.arange(13))
    values = [given[name] for name in program.inputs]
    for ours, theirs in zip(found(*values), program.module(*values), strict=True):
        assert torch.equal(ours, theirs)
    ours = {id(parameter) for parameter in found.parameters()}
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    every = dict(program.module.named_parameters(remove_duplicate=False))
    theirs = {id(every[name]) for name in read & every.keys()}
    assert ours == theirs
