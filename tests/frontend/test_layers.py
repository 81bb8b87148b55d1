"""Layers that are traced once: the graph is that of tracing each, and a layer that is not like another is traced."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from flarec.errors import FlarecWarning
from flarec.frontend import export
from flarec.frontend.export import capture
from flarec.frontend.families import family_of
from flarec.frontend.index import Index
from flarec.frontend.layers import SharedLayers
from tests.models import tiny_model


def shared_layers(model: Any) -> SharedLayers:
    return SharedLayers("model.layers", model.model.layers)


def traced(model: Any, shared: SharedLayers | None) -> fx.GraphModule:
    return export._traced(model, family_of(model.config), shared)


def content(graph: fx.Graph) -> list[Any]:
    """All of a graph but for names and the order in which it reads its parameters."""
    nodes = [node for node in graph.nodes if node.op != "get_attr"]
    numbers = {node: number for number, node in enumerate(nodes)}

    def plain(node: fx.Node) -> Any:
        return numbers.get(node, node.target)

    return [
        (node.op, node.target, fx.node.map_arg((node.args, node.kwargs), plain), node.meta) for node in nodes
        if node.op != "placeholder"
    ]


@pytest.mark.parametrize(("family", "repeats"), [("bamba", {2: 0, 3: 1}), ("recurrent_gemma", {1: 0})])
def test_the_graph_is_that_of_tracing_every_layer(family: str, repeats: dict[int, int]) -> None:
    """Operators, arguments, parameters, shapes, modules and source lines."""
    model = tiny_model(family)
    shared = shared_layers(model)
    module = traced(model, shared)
    assert shared.repeats == repeats
    assert content(module.graph) == content(traced(model, None).graph)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target in theirs:
            assert module.get_parameter(node.target) is theirs[node.target]


def test_a_trace_that_fails_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is traced then, and why is said; a model that fails both ways fails."""
    model, whole = tiny_model("llama"), export._traced

    def failing(model: Any, family: Any, shared: SharedLayers | None) -> fx.GraphModule:
        if shared is not None or model.config.pad_token_id == 7:
            raise RuntimeError("no layer\nwithout its index")
        return whole(model, family, None)

    monkeypatch.setattr(export, "_traced", failing)
    family = family_of(model.config)
    with pytest.warns(FlarecWarning, match="every layer of the model is traced.*RuntimeError: no layer$"):
        module = export._export(model, family)
    assert content(module.graph) == content(whole(model, family, None).graph)
    model.config.pad_token_id = 7
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="no layer"):
        warnings.simplefilter("error")
        export._export(model, family)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_many_layers_are_traced_once(device: str) -> None:
    model = tiny_model("llama", num_hidden_layers=6).to(device)
    shared = shared_layers(model)
    traced(model, shared)
    assert shared.repeats == dict.fromkeys(range(1, 6), 0)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize(
    ("family", "kinds"), [("qwen3_5_text", [[0, 1, 2]]), ("nemotron_h", [[0, 4]]), ("zamba2", []), ("gemma2", [])]
)
def test_layers_of_one_kind(family: str, kinds: list[list[int]]) -> None:
    """zamba2 shares a block between layers, gemma2's differ in their windows."""
    assert [kind.members for kind in shared_layers(tiny_model(family)).kinds] == kinds


class Counts(nn.Module):
    """Remembers on the module how often it was called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.inner(x) * self.calls


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module, index: int, read: Callable[[int], Any]) -> None:
        super().__init__()
        self.inner, self.index, self.read = inner, index, read

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) * self.read(self.index)


def reads(read: Callable[[int], Any]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for index, layer in enumerate(model.model.layers):
            layer.mlp = Scaled(layer.mlp, index, read)

    return change


def sets(path: str, value: Any) -> Callable[[Any], None]:
    """One attribute of layer 1 is another."""

    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.model.layers[1].get_submodule(owner), name, value)

    return change


def ties(model: Any) -> None:
    first, second, *_ = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight


def hooks(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 0.5)


def counts(model: Any) -> None:
    counted = Counts(model.model.layers[0].mlp)
    for layer in model.model.layers:
        layer.mlp = Counts(layer.mlp) if layer is not model.model.layers[0] else counted


def lists(model: Any) -> None:
    notes: list[float] = [0.5]
    for layer in model.model.layers:
        layer.mlp.notes = notes


def own_forward(model: Any) -> None:
    layer = model.model.layers[1]
    layer.mlp.forward = functools.partial(lambda inner, x: inner(x) * 2, layer.mlp.forward)


class Note:
    """An object of both layers: what the first one leaves, the others read."""

    first: Tensor | None = None


class Notes(nn.Module):
    def __init__(self, inner: nn.Module, note: Note) -> None:
        super().__init__()
        self.inner, self.note = inner, note

    def forward(self, x: Tensor) -> Any:
        if self.note.first is None:
            self.note.first = x
        return self.inner(self.note.first)


def behind_the_back(model: Any) -> None:
    note = Note()
    for layer in model.model.layers:
        layer.mlp = Notes(layer.mlp, note)
    model.register_forward_pre_hook(lambda *_: setattr(note, "first", None))


APART: dict[str, Callable[[Any], None]] = {
    "an attribute": sets("self_attn.scaling", 0.1),
    "a setting of a norm": sets("input_layernorm.variance_epsilon", 0.1),
    "another module": sets("mlp.act_fn", nn.Tanh()),
    "a shared parameter": ties,
    "an object of both": behind_the_back,
    "a list of both": lists,
}
DIFFERENT: dict[str, Callable[[Any], None]] = {
    "the index is a subscript": reads(lambda index: [1.0, 0.5][index]),
    "the index is given to torch": reads(lambda index: torch.arange(1.0, 4.0).select(0, index)),
    "a hook": hooks,
    "a call before": counts,
    "a forward of its own": own_forward,
    "an object of both": behind_the_back,
}


@pytest.mark.parametrize("what", APART)
def test_layers_that_are_not_of_one_kind(what: str) -> None:
    model = tiny_model("llama")
    assert [kind.members for kind in shared_layers(model).kinds] == [[0, 1]]
    APART[what](model)
    assert not shared_layers(model).kinds


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_layer_that_differs_computes_what_it_computes_in_the_model(what: str) -> None:
    model = tiny_model("llama")
    ids, positions = torch.arange(3, 17).reshape(2, 7), torch.arange(7).expand(2, 7).contiguous()
    DIFFERENT[what](model)
    program = capture(model)
    for module in model.modules():
        if isinstance(module, Counts):
            module.calls = 0
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    found = program(ids, position_ids=positions)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "==": lambda n: n == 2, "!=": lambda n: n != 2, "<": lambda n: n < 2, "bool": lambda n: bool(n),
    "hash": lambda n: {3: 1}[n], "in": lambda n: n in (1, 2, 3), "subscript": lambda n: "abcd"[n],
    "int": lambda n: int(n), "float": lambda n: float(n), "range": lambda n: list(range(n)),
    "+": lambda n: n + 1, "reversed -": lambda n: 1 - n, "//": lambda n: n // 2, "**": lambda n: n**2,
    "%": lambda n: n % 2, "reversed %": lambda n: 7 % n, "-": lambda n: -n, "&": lambda n: n & 1, "~": lambda n: ~n,
    "str": str, "repr": repr, "format": lambda n: f"{n:03d}", "isinstance": lambda n: isinstance(n, int),
    "bit_length": lambda n: n.bit_length(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_index_notes_every_question(name: str) -> None:
    index = Index(3)
    assert OPERATIONS[name](index) == OPERATIONS[name](3)
    assert index.read


def test_handing_an_index_on_is_no_question() -> None:
    index = Index(3)
    assert [index][0] is not None and {"layer_idx": index}["layer_idx"] is index
    assert not index.read
