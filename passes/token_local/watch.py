"""The walk over a graph: a value for every node, its spec noted, and an error for what is not token-local.

A dead node may do what it likes (models build masks that nothing reads): refused is what the output is made from, and
what is written in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flarec import ops
from flarec.errors import PropertyError
from flarec.ir.program import Program, locate, placeholder_name, source_line
from flarec.ir.spec import CLEAN, HEAD_ROWS, LENGTH, NOISY, ROWS, TensorSpec

from ..adapt_noisy_stream import NoisyRows
from ..duplicate_streams import PositionIds
from ..split_streams import StreamPositions
from . import aten
from .call import MEMO, OpCall, bind, found, results, run_on_meta
from .declared import OPS as DECLARED
from .mixers import ONLY_MIXERS, counted, describe, result_of
from .shapes import known_shapes
from .streams import STREAMS
from .values import Number, Opaque, Refusal, Refused, Tensor, check_one_token_per_element, plain, tensor

REGIONS: dict[str, int] = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Higher-order ops of a capture: position of the region; what follows are its inputs."""
NUMBERS = {operator.add, operator.sub, operator.mul, operator.neg}
"""What may be computed from the number of tokens: a polynomial is what two numbers of tokens say it is."""
KEPT = 50_000
SEMANTIC = "or make it a semantic op (flarec/ops)"
DECLARE = f"declare it with declare_token_local if it treats tokens one by one, {SEMANTIC}"


@dataclass(slots=True)
class _Seen:
    """What a node was when it was looked at last; of a `get_attr` also the tensor, and the module's dict that held it.

    is_call: of an op; the body of a region may have changed while the call stayed
    """

    target: Any
    args: Any
    kwargs: Any
    value: Any
    spec: Any
    held: tuple[dict[str, Any], str, torch.Tensor] | None
    is_call: bool

    def is_still(self, node: fx.Node) -> bool:
        """Whether the node need not be looked at again, if nothing that it reads has changed."""
        if node.target is not self.target or node.args is not self.args or node.kwargs is not self.kwargs:
            return False
        if self.held is not None:
            owner, name, value = self.held
            return owner.get(name) is value
        return self.is_call


class Watch:
    """Call it with a program after every pass: it looks at the nodes that are new, or read something that changed.

    Raises `PropertyError` for a node that mixes tokens, whose shape cannot be inferred, or whose op is not known.
    """

    def __init__(self) -> None:
        self._seen: dict[fx.Node, _Seen] = {}

    def __call__(self, program: Program) -> None:
        spec = program.placeholder("input_ids").meta.get("val")
        if spec is not None and spec.shape != (ROWS, LENGTH):
            raise PropertyError(
                f"input_ids {list(spec.shape)}: the number of rows or the sequence length of the capture is not "
                "symbolic, so streams cannot be told apart"
            )
        inputs = _inputs(program)
        self._walk(program.module, program.graph, lambda node: inputs.get(node.name) or Opaque("input", node.name))
        _check_outputs(program, self._value)

    def _value(self, node: fx.Node) -> Any:
        return self._seen[node].value

    def _walk(self, owner: torch.nn.Module, graph: fx.Graph, given: Callable[[fx.Node], Any]) -> None:
        seen, changed = self._seen, set[fx.Node]()
        for node in graph.nodes:
            if node.op == "output":
                continue
            was = seen.get(node)
            if was is None or not was.is_still(node) or (changed and not changed.isdisjoint(node.all_input_nodes)):
                is_call = node.op == "call_function" and not isinstance(node.target, torch._ops.HigherOrderOperator)
                now = _Seen(node.target, node.args, node.kwargs, None, None, None, is_call)
                now.value = self._evaluate(owner, node, now, given)
                now.spec = _spec_of(now.value)
                if was is None or was.value != now.value:
                    changed.add(node)
                seen[node] = was = now
            noted = node.meta.get("val")
            if noted is not was.spec:
                if noted == was.spec:
                    was.spec = noted
                elif was.spec is None:
                    del node.meta["val"]
                else:
                    node.meta["val"] = was.spec

    def _evaluate(self, owner: torch.nn.Module, node: fx.Node, now: _Seen, given: Callable[[fx.Node], Any]) -> Any:
        if node.op == "placeholder":
            return given(node)
        try:
            if node.op == "get_attr":
                value, now.held = _attribute(owner, str(node.target))
                return value
            if node.op != "call_function":
                raise Refusal("calls into a module", "call functions only: torch.ops.aten, and the model's parameters")
            name = getattr(node.target, "__name__", "")
            if name in REGIONS and isinstance(node.target, torch._ops.HigherOrderOperator):
                return self._region(node, REGIONS[name])
            types: list[type] = []
            args, kwargs = _mapped(node.args, self._seen, types), _mapped(node.kwargs, self._seen, types)
            for refused in found((args, kwargs), Refused):
                raise refused.refusal
            value = _remembered((node.target, args, kwargs, tuple(types), getattr(node.target, "function", None)))
            if _writes(node.target):
                _check_written(node)
            return value
        except Refusal as refusal:
            first = next(found(map(self._value, node.all_input_nodes), Refused), None)
            refused = first or Refused(Refusal(refusal.reason, refusal.cure), node)
            if _writes(node.target):
                raise _error(refused) from None
            return refused

    def _region(self, node: fx.Node, position: int) -> Any:
        """A region of the capture: its body, walked like the graph around it."""
        body = self._value(node.args[position])  # type: ignore[arg-type]
        if not isinstance(body, fx.GraphModule):
            raise Refusal("calls a region that is no graph", "inline it")
        inputs = iter(_mapped(node.args[position + 1 :], self._seen, []))
        self._walk(body, body.graph, lambda _: next(inputs))
        output = next(n for n in reversed(body.graph.nodes) if n.op == "output")
        return _mapped(output.args[0], self._seen, [])


def _remembered(key: tuple[Any, ...]) -> Any:
    """The value of a call: the layers of a model repeat one another's, and passes come back to them."""
    try:
        value = MEMO.get(key, MEMO)
    except TypeError:
        raise Refusal(
            "has an operand that is neither a node nor a plain value", "pass numbers, text and nodes"
        ) from None
    if value is MEMO:
        if len(MEMO) >= KEPT:
            MEMO.clear()
        value = MEMO[key] = _call(key[0], key[1], dict(key[2]))
    if isinstance(value, Refusal):
        raise Refusal(value.reason, value.cure)
    return value


def _call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of a call, or why it is refused."""
    try:
        value = _known(target, args, kwargs)
        for result in found((value,), Tensor):
            check_one_token_per_element(result.axes)
        return value
    except Refusal as refusal:
        return Refusal(refusal.reason, refusal.cure)  # without the frames behind it


def _known(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if target is operator.getitem and isinstance(args[0], tuple) and type(args[1]) is int:
        return args[0][args[1]]
    if target in NUMBERS and not kwargs and all(isinstance(arg, (Number, int)) for arg in args):
        return _number(*(target(*(_at(arg, hint) for arg in args)) for hint in (0, 1)))
    mixer = ops.mixer_of(target)
    if mixer is not None:
        return result_of(target, mixer, args, kwargs)
    if target in STREAMS:
        return STREAMS[target](*args, **dict(kwargs))
    if target is ops.count_experts:
        return counted(args, kwargs)
    if not isinstance(target, torch._ops.OpOverload):
        raise Refusal(
            f"calls {getattr(target, '__name__', target)}, whose effect on tokens is not known",
            f"call an ATen overload (torch.ops.aten) or a custom op that is declared, {SEMANTIC}",
        )
    if target.name() in aten.GUARDS:
        return None
    operands = bind(target, args, kwargs)
    if target.name() == "aten::sym_size.int" and isinstance(operands["self"], Tensor):
        dim = operands["self"].on_meta(0).shape[operands["dim"]], operands["self"].on_meta(1).shape[operands["dim"]]
        return _number(*dim)
    declared = DECLARED.get(target)
    rule = declared.axes if declared is not None else aten.rule_of(target)
    if rule is None:
        cure = f"write it with ops that are, {SEMANTIC}" if target.name().startswith("aten::") else DECLARE
        raise Refusal(f"uses {target}, which is not known to be token-local", cure)
    _check_operands(target, operands)
    shapes, dtypes, kind = known_shapes(target, operands) or run_on_meta(target, operands)
    try:
        axes = rule(OpCall(target, operands, shapes))
    except IndexError as error:
        raise Refusal("has no shape that can be inferred: too few dimensions") from error
    made = results(axes if isinstance(axes, list) else [axes], shapes, dtypes)
    return made if kind is not None else made[0]


def _check_operands(target: Any, operands: dict[str, Any]) -> None:
    for name, operand in operands.items():
        for opaque in found((operand,), Opaque):
            if not (target.name() == "aten::index_select" and name == "index"):
                raise Refusal(f"reads {describe(opaque)}", ONLY_MIXERS)
        may_count = name in aten.SIZES or target.name().startswith("aten::arange")
        if not may_count and any(True for _ in found((operand,), Number)):
            raise Refusal(
                "computes with the number of tokens, so a token would depend on how many others there are",
                "use a constant, or position_ids",
            )


def _number(first: Any, second: Any) -> Any:
    return first if first == second else Number((first, second))


def _at(value: Any, hint: int) -> Any:
    return value.at[hint] if isinstance(value, Number) else value


def _mapped(value: Any, seen: dict[fx.Node, _Seen], types: list[type]) -> Any:
    """Arguments with values for nodes and tuples for lists and dicts; `types` tells 1 from True and 1.0."""
    if isinstance(value, fx.Node):
        if value not in seen:
            raise Refusal("reads a node that comes behind it", "insert it behind what it reads")
        return seen[value].value
    if isinstance(value, (tuple, list)):
        return tuple(_mapped(item, seen, types) for item in value)
    if isinstance(value, dict):
        return tuple((name, _mapped(item, seen, types)) for name, item in value.items())
    if isinstance(value, (torch.Tensor, slice)):
        raise Refusal("has an operand that is no node of the graph", "read a parameter or buffer instead (get_attr)")
    types.append(type(value))
    return value


def _attribute(module: Any, target: str) -> tuple[Any, tuple[dict[str, Any], str, torch.Tensor] | None]:
    """A parameter or buffer, and where it is held; or the graph of a region."""
    *path, name = target.split(".")
    for part in path:
        module = getattr(module, part, None)
    found = getattr(module, name, None)
    if isinstance(found, torch.Tensor):
        held = next((d for d in (module._parameters, module._buffers) if name in d), None)
        return tensor(map(plain, found.shape), found.dtype), None if held is None else (held, name, found)
    if isinstance(found, fx.GraphModule):
        return found, None
    raise Refusal(f"reads '{target}', which the program does not have", "register the parameter first")


def _spec_of(value: Any) -> Any:
    if isinstance(value, (Tensor, Opaque)):
        return value.spec
    return tuple(map(_spec_of, value)) if isinstance(value, tuple) else None


def _inputs(program: Program) -> dict[str, Any]:
    """The inputs of a program by name."""
    ids = tensor(((ROWS,), (LENGTH,)), torch.int64)
    known: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": ids,
        "layout": Opaque("layout", "layout"),
        "head_rows": Opaque("head rows", "head_rows", None, TensorSpec((HEAD_ROWS,), torch.int64)),
        "accepted": Opaque("accepted", "accepted", None, TensorSpec((ROWS,), torch.int64)),
    }
    for name, derivation in program.derivations.items():
        if type(derivation) is NoisyRows:
            known[name] = tensor(((ROWS,), (LENGTH,), ()), torch.bool)
        elif type(derivation) is StreamPositions:
            stream = CLEAN if derivation.stream == CLEAN else NOISY
            known[name] = tensor(((ROWS,), (stream,)), torch.int64)
        elif name != "position_ids" or type(derivation) is not PositionIds:
            known[name] = Opaque("derived", name, derivation)
    for slot in program.cache_slots:
        shape = tuple(ROWS if size == "batch" else size for size in slot.shape)
        known[placeholder_name(slot.name)] = Opaque("cache", slot.name, slot, TensorSpec(shape, slot.dtype))
    return known


def _writes(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _check_written(node: fx.Node) -> None:
    """What an op writes to must be a tensor that the graph made, whose elements are all in places of their own."""
    base = node.args[0]
    while isinstance(base, fx.Node) and base.op == "call_function":
        name = base.target.name() if isinstance(base.target, torch._ops.OpOverload) else ""
        if name in aten.SHARED:
            raise Refusal("writes in place to an expanded tensor, whose tokens share memory", "clone it first")
        if name not in aten.ALIASING and base.target is not operator.getitem:
            return
        base = base.args[0]
    raise Refusal("writes in place to an input or a parameter", "clone it first")


def _check_outputs(program: Program, value_of: Callable[[fx.Node], Any]) -> None:
    slots = {slot.name for slot in program.cache_slots}
    returned = program.output_node().args[0]
    for name, node in zip(program.outputs, returned, strict=False):  # type: ignore[arg-type]
        value = value_of(node)
        if isinstance(value, Refused):
            raise _error(value)
        if name in slots and not (isinstance(value, Opaque) and value.kind == "next cache" and value.name == name):
            refusal = Refusal(f"becomes the cache '{name}', which only its token mixer may write", ONLY_MIXERS)
            raise _error(Refused(refusal, node))


def _error(refused: Refused) -> PropertyError:
    node, refusal = refused.where, refused.refusal
    place = locate(node)
    if not source_line(node):
        for word, near in (("behind", lambda n: n.all_input_nodes), ("in front of", lambda n: list(n.users))):
            known = _nearest(node, near)
            if known is not None:
                place += f", {word} {locate(known)},"
                break
    return PropertyError(f"{place} {refusal.reason}; a noisy token could reach a clean one: {refusal.cure}")


def _nearest(node: fx.Node, near: Callable[[fx.Node], list[fx.Node]]) -> fx.Node | None:
    """The closest node in a direction that knows its line in the model's code."""
    level, met = [node], {node}
    while level:
        level = [other for one in level for other in near(one) if other not in met]
        met.update(level)
        for known in level:
            if source_line(known):
                return known
    return None
