"""The table of semantic ops: every row is whole, costs nothing unused, and a stranger's op is one more row."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import fx

from flarec import ops
from flarec.ir.program import target_name
from flarec.ops import table
from flarec.ops.mixer import Function, load

MIXERS = [pytest.param(mixer, id=mixer.name) for mixer in ops.mixers()]


def schema(mixer: ops.Mixer) -> list[str]:
    return [argument.name for argument in mixer.op._schema.arguments]


def takes(function: Function, names: set[str]) -> bool:
    """Whether a function can be called with just these keywords; Triton's entry points too."""
    try:
        inspect.signature(load(function)).bind(**dict.fromkeys(names))
    except TypeError:
        return False
    return True


def typical(mixer: ops.Mixer, *, step: bool = False) -> ops.Site:
    """A site whose tensors have four axes of 16 and whose options are the schema's defaults, or 1."""
    spec = torch.empty(16, 16, 16, 16, device="meta")
    operands = {
        a.name: a.default_value if a.has_default_value() else spec if "Tensor" in str(a.type) else 1
        for a in mixer.op._schema.arguments
    }
    return ops.Site(operands, step)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_functions_of_a_row_take_its_operands_by_name(mixer: ops.Mixer) -> None:
    names = set(schema(mixer))
    slots = tuple(mixer.slots(typical(mixer)))
    decode = names | {slot.operand for slot in slots} | ({"accepted"} if any(not s.in_place for s in slots) else set())
    if mixer.mixing != "none":
        assert mixer.streams is not None and takes(mixer.streams, names | {"layout"})
        assert mixer.cached is not None and takes(mixer.cached, decode | {"layout"})
        assert slots and len({slot.operand for slot in slots}) == len(slots)
    for name, form in mixer.forms.items():
        if name == "triton":
            pytest.importorskip("triton")
        for function, given, step in ((form.train, names, False), (form.step, decode, True)):
            if function is None:
                continue
            derivation = form.derivation(typical(mixer, step=step))
            read = set() if derivation is None else {derivation.operand}
            extra = read | ({"layout"} if step else set())
            assert takes(function, (given | extra) - set(mixer.call(name, step).omits)), f"{name}: {function}"


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_row_has_a_torch_form_for_both_uses(mixer: ops.Mixer) -> None:
    form = mixer.forms["torch"]
    assert mixer.mixing == "none" or form.step is not None
    assert mixer.implementation("no such kernels", step=False) == "torch"


def test_kernels_are_named_and_not_imported() -> None:
    """A fresh process that knows every op has loaded their definitions only."""
    code = """
import sys, flarec.ops
fast = [n for n in sys.modules if n.startswith("flarec.kernels.") and "torch_" in n or ".panels" in n or "tiles" in n]
print(sorted(fast), "triton" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] False"


def test_names_of_calls() -> None:
    conv = ops.SHORT_CONV
    graph = fx.Graph()
    nodes = [
        graph.call_function(target)
        for target in (
            conv.op,
            conv.call("reference"),
            conv.call("reference", step=True),
            conv.call("torch", step=True),
        )
    ]
    assert [target_name(node) for node in nodes] == [
        "flarec.short_conv", "stream_ops.two_stream_short_conv", "stream_ops.cached_short_conv",
        "lowered.short_conv_step",
    ]
    assert [node.name for node in nodes][1:] == ["two_stream_short_conv", "cached_short_conv", "short_conv_step"]
    assert {ops.mixer_of(node.target) for node in nodes} == {conv}
    assert conv.call("torch") == conv.call("torch") != conv.call("torch", step=True)
    assert ops.mixer_of(torch.relu) is None and ops.mixer_of("x") is None


def test_operands_get_their_names_and_defaults() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    node = graph.call_function(ops.SHORT_CONV.op, (x,), {"weight": weight})
    other = graph.call_function(torch.ops.aten.relu.default, (x,))
    ops.name_operands(graph)
    assert (node.args, dict(node.kwargs)) == ((), {"x": x, "weight": weight, "bias": None, "activation": None})
    assert other.args == (x,)


def test_a_name_has_one_row() -> None:
    with pytest.raises(ValueError, match="'short_conv' is declared twice"):
        ops.register(replace(ops.SHORT_CONV))


def test_a_new_row_is_known_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_MIXERS", dict(table._MIXERS))
    mixer = ops.Mixer(
        name="test_doubling",
        captured=_doubled,
        fake=lambda x: x.new_empty(x.shape),
        mixing="none",
        axes={"x": "N"},
        output="N",
        sees="token by token",
        forms={"torch": ops.Form(train=_doubled)},
    )
    assert ops.mixer_of(mixer.op) is None
    assert ops.register(mixer) is mixer
    assert ops.mixer_of(mixer.op) is mixer and mixer in ops.mixers()
    x = torch.randn(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x).sum(), x)
    assert torch.equal(mixer.call("torch")(x=x), 2 * x) and torch.equal(gradient, torch.full((3,), 2.0))


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
