"""Regions: how a graph is cut, that equal ones share code, and that running by them changes nothing but rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from flarec import ops
from flarec.errors import FlarecWarning, PropertyError
from flarec.ir.compiled import Codes, Region, compiled_by_region
from flarec.ir.module import compile_now
from flarec.ir.program import Program
from flarec.ir.regions import MARK, VIEWS, is_plain, leaking, mark, regions
from flarec.layout import Block, build_layout
from flarec.passes import lower
from flarec.passes.outline_regions import check_outlined
from tests.ir.test_compiled import LAYOUT, arguments, assert_equal, trained
from tests.models import ALL_FAMILIES, captured, captured_float64

ATEN = torch.ops.aten
FAMILIES = ("qwen3_5_text", "kimi_linear", "bamba")


class Layers(nn.Module):
    """Two equal layers around reads of a table, in ATEN calls; `width` may differ between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))
        self.norms = nn.ParameterList(torch.randn(4) for _ in widths)
        self.weights = nn.ParameterList(torch.randn(4, 4) for _ in widths)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = ATEN.embedding.default(self.table, ids)
        for norm, weight in zip(self.norms, self.weights, strict=True):
            scale = ATEN.add.Tensor(norm, 1.0)  # of parameters alone: computed where it is read
            y = ATEN.mul.Tensor(ATEN.linear.default(x, weight), scale)
            gate = ATEN.sigmoid.default(y)
            picked = ATEN.embedding.default(self.table, ids)  # what no region takes
            mixed = ATEN.mul.Tensor(ATEN.index_select.default(y, 0, ids), picked)
            x = ATEN.add.Tensor(ATEN.mul.Tensor(mixed, gate), x)
            x = ATEN.transpose.int(ATEN.neg.default(x), 0, 1)  # a view at the end
            x = ATEN.transpose.int(x, 0, 1)
        return (x,)


def graph_of(module: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(module)


def by_number(module: fx.GraphModule) -> list[list[str]]:
    """The targets of every region, in its order."""
    return [[str(node.target).removeprefix("aten.") for node in region] for region in regions(module.graph)]


def test_regions_lie_between_what_they_do_not_take() -> None:
    found = by_number(graph_of(Layers(1, 1)))
    first, middle, last = found
    assert first == ["add.Tensor", "linear.default", "mul.Tensor"]
    assert middle[:2] == ["sigmoid.default", "mul.Tensor"] or "sigmoid.default" in middle  # the gate is read here
    assert middle[-3:] == ["add.Tensor", "linear.default", "mul.Tensor"], "the next layer up to its read by number"
    assert last[-1] == "neg.default", "views at the end stay outside"
    assert not any("embedding" in name or "index" in name for region in found for name in region)


@pytest.mark.parametrize("layers", [3, 6])
def test_equal_regions_share_code_however_many_layers_there_are(layers: int) -> None:
    module = graph_of(Layers(*range(layers)))
    mark(module.graph)
    codes = Codes("eager")
    found = codes.by_region(module)
    called = [unit for unit in found.modules() if isinstance(unit, Region)]
    assert len(called) == layers + 1 and len(codes.known) == 3
    ids = torch.arange(4)
    assert torch.equal(found(ids)[0], module(ids)[0])


class Writing(nn.Module):
    """What is read before a write may not be computed behind it."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        a = ATEN.exp.default(ATEN.neg.default(x))
        before = ATEN.index_select.default(a, 0, ids) if self.early else ids
        ATEN.mul_.Tensor(a, 2.0)
        after = ATEN.index_select.default(a, 0, ids)
        return ATEN.add.Tensor(ATEN.sin.default(before), after), a


@pytest.mark.parametrize("early", [False, True])
def test_writes_stay_inside_of_a_region_or_there_is_none(early: bool) -> None:
    module = graph_of(Writing(early))
    found = mark(module.graph)
    assert bool(found) is not early
    x, ids = torch.randn(5), torch.tensor([1, 3])
    ours = Codes("aot_eager").by_region(module)(x, ids)
    for mine, theirs in zip(ours, module(x, ids), strict=True):
        torch.testing.assert_close(mine, theirs)
    if early:
        writer = next(node for node in module.graph.nodes if node.target is ATEN.mul_.Tensor)
        assert leaking(module.graph, [[writer]]) is writer


class Routing(nn.Module):
    """Scores that are scaled in place, beside the choice that they came with, which others read."""

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        scores, chosen = ATEN.topk.default(ATEN.softmax.int(x, -1), 2)
        first, second = ATEN.split.Tensor(ATEN.sin.default(x), 2, -1)
        scores = ATEN.div_.Tensor(scores, ATEN.sum.dim_IntList(scores, [-1], True))
        rows = ATEN.index_select.default(table, 0, ATEN.reshape.default(chosen, [-1]))
        return scores, rows, ATEN.exp.default(first), second


def test_results_of_one_call_are_apart() -> None:
    module = graph_of(Routing())
    assert mark(module.graph)
    found = Codes("aot_eager").by_region(module)
    for unit in found.modules():
        if isinstance(unit, Region):
            assert not {ATEN.topk.default, ATEN.split.Tensor} & {
                node.target for node in unit.code.module.graph.find_nodes(op="output")[0].all_input_nodes
            }, "a region returns tensors"
    x, table = torch.randn(3, 4), torch.randn(4, 5)
    for mine, theirs in zip(found(x, table), module(x, table), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ALL_FAMILIES])
def test_every_family_has_regions(family: str) -> None:
    for target in ("train", "decode"):
        program = lower(captured(family), target, regions=True, fast=True)
        assert program.history[-1].sites
        Codes("eager").by_region(program.module)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_computes_between_mixers_is_in_a_region(family: str) -> None:
    """But for single operations; and mixers are in none."""
    for target in ("train", "decode"):
        program = lower(captured_float64(family), target, regions=True, fast=True)
        assert program.history[-1].step == "outline-regions()"
        alone = [
            node for node in program.graph.nodes
            if is_plain(node) and MARK not in node.meta and node.target not in VIEWS
        ]
        assert all(not any(source in alone for source in node.all_input_nodes) for node in alone)
        assert len(alone) <= 1  # the head of a decode step
        assert not any(MARK in node.meta for node, _ in ops.sites(program.graph))
        copied = [node.meta.get(MARK) for node in program.clone().graph.nodes]
        assert copied == [node.meta.get(MARK) for node in program.graph.nodes]


def test_a_region_that_cannot_be_called_is_no_region() -> None:
    program = lower(captured_float64("bamba"), "train", regions=True)
    mixer = next(node for node, _ in ops.sites(program.graph))
    first, last = (next(n for n in nodes if MARK in n.meta) for nodes in
                   (program.graph.nodes, reversed(program.graph.nodes)))
    kept, last.meta[MARK] = last.meta[MARK], first.meta[MARK]
    with pytest.raises(PropertyError, match="comes back into it"):
        check_outlined(program)
    last.meta[MARK] = kept
    check_outlined(program)
    mixer.meta[MARK] = kept
    with pytest.raises(PropertyError, match="region of plain nodes"):
        check_outlined(program)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_graph(family: str) -> None:
    """In float64, parameters as operands, one code for several layers."""
    program = lower(captured_float64(family), "train", regions=True)
    ids, given = arguments(program, LAYOUT)
    codes = Codes("aot_eager")
    fast = compiled_by_region(program, codes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlarecWarning)  # what is not compiled would say so
        ours = trained(fast, program.module, ids, given)
    assert_equal(ours, trained(program, program.module, ids, given))
    assert len(codes.known) < sum(isinstance(unit, Region) for unit in fast.run.modules())  # type: ignore[union-attr]


def counting(compiled: list[int]) -> Callable[[fx.GraphModule, list[Any]], Any]:
    """A backend that notes every graph that it is given."""

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(len(module.graph.nodes))
        return module

    return backend


def lengths(program: Program, counts: list[int]) -> Any:
    for count in counts:
        layout = build_layout([[count]], [[Block(0, 2, 3)]])
        ids, given = arguments(program, layout)
        yield ids, given


def test_other_lengths_are_compiled_once_more_and_never_again() -> None:
    program = lower(captured_float64("bamba"), "train", regions=True)
    compiled: list[int] = []
    codes = Codes(counting(compiled))
    fast = compiled_by_region(program, codes)
    seen = []
    with torch.no_grad():
        for ids, given in lengths(program, [9, 9, 12, 7, 31, 9]):
            assert_equal([fast(ids, **given)], [program(ids, **given)])
            seen.append(len(compiled))
    assert seen[:2] == [len(codes.known)] * 2 and seen[2:] == [2 * len(codes.known)] * 4


def test_the_first_sizes_are_compiled_for_themselves() -> None:
    """Two of them here: their graphs hold numbers. Others share one for any size, which is the first one's at first."""
    program = lower(captured_float64("bamba"), "train", regions=True)
    symbols: list[bool] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        symbols.append(any(isinstance(size, torch.SymInt) for x in inputs for size in getattr(x, "shape", (x,))))
        return module

    codes = Codes(backend, exact=2)
    fast = compiled_by_region(program, codes)
    seen = []
    with torch.no_grad():
        for ids, given in lengths(program, [9, 12, 9, 7, 31, 12]):
            assert_equal([fast(ids, **given)], [program(ids, **given)])
            seen.append(len(symbols))
    count = len(codes.known)
    assert seen == [count, 2 * count, 2 * count, 3 * count, 4 * count, 4 * count]
    assert not any(symbols[: 2 * count]) and any(symbols[3 * count :])


def test_kernels_of_steps_are_chosen_by_rules_and_others_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch takes the host longer than a decode step's reduction takes a device, so that timing tells nothing."""
    given: list[dict[str, Any] | None] = []

    def compile(function: Any, **options: Any) -> Any:
        given.append(options["options"])
        return function

    monkeypatch.setattr(torch, "compile", compile)
    program = lower(captured_float64("bamba"), "decode", regions=True)
    for codes in (Codes(exact=1, timing=False), Codes(), Codes("eager", timing=False)):
        compiled_by_region(program, codes)
        count = len(codes.known)
        assert given == [{"deterministic": True} if codes.backend == "inductor" and not codes.timing else None] * count
        given.clear()


def test_reads_of_rows_are_in_the_regions_of_a_decode_step_alone() -> None:
    for target, inside in (("decode", True), ("train", False)):
        program = lower(captured_float64("bamba"), target, regions=True)
        reads = program.calls(ATEN.embedding.default, ATEN.index_select.default)
        assert len(reads) == 2 and all((MARK in node.meta) is inside for node in reads)


@torch._dynamo.config.patch(recompile_limit=1)
def test_too_many_sizes_run_as_they_are_and_say_so() -> None:
    program = lower(captured_float64("bamba"), "train", regions=True)
    fast = compiled_by_region(program, Codes("eager"))
    with torch.no_grad(), pytest.warns(FlarecWarning, match="compiled for too many sizes") as said:
        for ids, given in lengths(program, [9, 12, 7]):
            assert_equal([fast(ids, **given)], [program(ids, **given)])
    assert len(said) == 1


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so() -> None:
    def refusing(module: fx.GraphModule, inputs: list[Any]) -> Any:
        raise RuntimeError("there is no compiler here")

    program = lower(captured_float64("bamba"), "train", regions=True)
    ids, given = arguments(program, LAYOUT)
    codes = Codes(refusing)
    fast = compiled_by_region(program, codes)
    with pytest.warns(FlarecWarning, match="no compiler here; it runs as it is") as said:
        ours = [trained(fast, program.module, ids, given) for _ in range(2)]
    assert len(said) == 1, "once for each reason"
    for one in ours:
        assert_equal(one, trained(program, program.module, ids, given))


def test_a_program_without_regions_says_so() -> None:
    program = lower(captured_float64("bamba"), "train")
    ids, given = arguments(program, LAYOUT)
    with pytest.warns(FlarecWarning, match="its graph has no regions"):
        fast = compiled_by_region(program, Codes("eager"))
    with torch.no_grad():
        assert_equal([fast(ids, **given)], [program(ids, **given)])


def witness(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with every conversion to a smaller float dtype widened to float64."""

    def widen(argument: Any) -> Any:
        return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument

    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, widen)
        node.kwargs = fx.node.map_aggregate(node.kwargs, widen)
    wide = fx.GraphModule(module, graph)
    compile_now(wide)
    return wide


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("qwen3_5_text", torch.bfloat16), ("mamba2", torch.float32)])
def test_inductor_is_as_near_to_float64_as_eager(family: str, dtype: torch.dtype) -> None:
    """Every code of a model, forward and backward: chains that inductor computes in float32 are rounded less often.

    The compiled error is at most 1.1 of eager's, over all results of a code, and half a unit in the last place of what
    is exact in both.
    """
    from flarec.frontend.export import capture
    from tests.models import FEW_LAYERS, tiny_model

    model = tiny_model(family, **FEW_LAYERS[family])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    program = lower(capture(model, cache=True), "train", regions=True)
    codes = Codes("inductor")
    fast = compiled_by_region(program, codes)
    taken: dict[str, tuple[Any, ...]] = {}
    for text, code in codes.known.items():
        code.compiled = lambda *given, text=text, code=code: taken.setdefault(text, given) and code.module(*given)
    ids, given = arguments(program, LAYOUT)
    fast(ids, **given)
    assert taken.keys() == codes.known.keys()
    for text, operands in taken.items():
        module = codes.known[text].module
        results = [
            both(run, operands, wide) for run, wide in
            ((torch.compile(module, fullgraph=True), False), (module, False), (witness(module), True))
        ]
        errors = [distance(one, results[-1]) for one in results[:2]]
        assert errors[0] <= 1.1 * errors[1] + torch.finfo(dtype).eps / 2, text.splitlines()[0]


def both(run: Callable[..., Any], operands: tuple[Any, ...], wide: bool) -> list[Tensor]:
    """Results, and gradients of fixed weights of them."""
    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(torch.float64 if wide else value.dtype).requires_grad_()

    leaves = [leaf(value) for value in operands]
    results = [x for x in run(*leaves) if isinstance(x, Tensor)]
    taught = [result for result in results if result.requires_grad]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().to(x.dtype) for x in taught]
    wanted = [value for value in leaves if isinstance(value, Tensor) and value.requires_grad]
    gradients = torch.autograd.grad(taught, wanted, weights, allow_unused=True) if taught else ()
    return [x.detach().double() for x in results] + [x.double() for x in gradients if x is not None]


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """Of all tensors together, each relative to its size."""
    parts = [(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in zip(found, exact, strict=True)]
    return float(torch.stack(parts).norm() / len(parts) ** 0.5)
