"""A captured graph as JSON and back.

Only what a captured graph holds can be written: calls of PyTorch's and flarec's ops (and of arithmetic in `operator`,
`math` and `torch.sym_*`) on nodes and plain values, the model's own parameters and buffers, grad-mode regions, and the
metadata of `flarec.ir.program`. Anything else is `Unstorable`. Reading makes no other kinds of calls either, and every
word that fx puts into the code of a graph is a name, so a file cannot name arbitrary code.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .module import bind, graph_module
from .spec import Size, TensorSpec

Json = Any
_TORCH_VALUES = (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format))
_MODULES = {"_operator": operator, "math": math}
_ARITHMETIC = {
    "_operator": {
        "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "invert", "le", "lt", "mod", "mul", "ne", "neg",
        "not_", "or_", "pos", "pow", "sub", "truediv", "xor",
    },
    "math": {"ceil", "floor", "log2", "sqrt", "trunc"},
}
"""Functions of these modules that may be called: others (`operator.call`, `attrgetter`) reach everything."""
_NAMESPACES = ("aten", "flarec")
_GRAD_REGION = "wrap_with_set_grad_enabled"
_HIGHER_ORDER = "torch._higher_order_ops"
"""Importing this package registers the ops of `torch.ops.higher_order`."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_SIZE = re.compile(r"[\w*/+\-(), ]+")


class Unstorable(Exception):
    """A graph holds something that has no place in the format, or a file something that no graph holds."""


def graph_to_json(module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> Json:
    """The nodes of a graph whose `get_attr` targets are `tensors` (by name, the same objects) or regions."""
    regions: dict[str, Json] = {}
    nodes = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            value = _attribute(module, name)
            if isinstance(value, fx.GraphModule):
                regions[name] = graph_to_json(value, tensors)
            elif value is None or value is not tensors.get(name):
                raise Unstorable(f"'{name}' is no tensor of the model")
        target = _target_to_json(node.target) if node.op == "call_function" else str(node.target)
        nodes.append([node.op, node.name, target, _to_json(node.args), _to_json(node.kwargs), _meta_to_json(node)])
    return {"nodes": nodes, "regions": regions}


def graph_from_json(table: Json, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The inverse of `graph_to_json`. Raises `Unstorable`, or what Python raises for tables of another shape."""
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    root = nn.Module()
    regions = {name: graph_from_json(region, tensors) for name, region in table["regions"].items()}
    for op, name, target, args, kwargs, meta in table["nodes"]:
        if op not in ("placeholder", "get_attr", "call_function", "output"):
            raise Unstorable(f"node '{name}' is a {op}")
        _check_words(op, name, target, kwargs)
        if op == "get_attr":
            bind(root, target, regions[target] if target in regions else tensors[target])
        called = _target_from_json(target) if op == "call_function" else target
        node = graph.create_node(op, called, _from_json(args, known), _from_json(kwargs, known), name=name)
        if node.name != name or name in known:
            raise Unstorable(f"the name of node '{name}' is taken")
        node.meta = _meta_from_json(meta)
        known[name] = node
    graph.lint()
    return graph_module(root, graph)


def _check_words(op: str, name: Json, target: Json, kwargs: Json) -> None:
    """fx writes these into the Python code of the graph as they are."""
    words = [name, *(kwargs["dict"] if kwargs else ()), *([target] if op == "placeholder" else ())]
    for word in words:
        if not _NAME.fullmatch(word):
            raise Unstorable(f"{word!r} is no name")
    if op == "get_attr" and not _PATH.fullmatch(target):
        raise Unstorable(f"{target!r} is no path of an attribute")


def _attribute(module: nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _target_to_json(target: Any) -> str:
    if isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        text = str(target) if isinstance(target, torch._ops.OpOverload) else f"higher_order.{target.name()}"
    else:
        text = f"{getattr(target, '__module__', None)}:{getattr(target, '__name__', None)}"
    if _target_from_json(text) is not target:
        raise Unstorable(f"calls of {target}")
    return text


def _target_from_json(text: str) -> Callable[..., Any]:
    module, colon, name = text.partition(":")
    found: Any = None
    if colon and name in _ARITHMETIC.get(module, ()):
        found = getattr(_MODULES[module], name)
    elif colon and module.split(".")[0] == "torch" and name.startswith("sym_"):
        found = getattr(torch, name, None)
    elif text == f"higher_order.{_GRAD_REGION}":
        importlib.import_module(_HIGHER_ORDER)
        found = getattr(torch.ops.higher_order, _GRAD_REGION)
    elif not colon and text.split(".")[0] in _NAMESPACES:
        found = torch.ops
        for part in text.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, torch._ops.OpOverload) or _touches_files(found):
            found = None
    if not callable(found):
        raise Unstorable(f"unknown target {text}")
    return found  # type: ignore[no-any-return]


def _touches_files(op: torch._ops.OpOverload) -> bool:
    return any(argument.name == "filename" for argument in op._schema.arguments)


def _to_json(value: Any) -> Json:
    """Arguments of a node: plain values as they are, everything else as {kind: contents}."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_to_json(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _to_json(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_to_json(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, cls in _TORCH_VALUES:
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise Unstorable(f"an argument of type {type(value).__name__}")


def _from_json(value: Json, known: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return known[content]
    if kind == "tuple":
        return tuple(_from_json(item, known) for item in content)
    if kind == "dict":
        return {key: _from_json(item, known) for key, item in content.items()}
    if kind == "slice":
        return slice(*(_from_json(item, known) for item in content))
    if kind == "device":
        return torch.device(content)
    return _torch_value(kind, content)


def _torch_value(kind: str, name: str) -> Any:
    cls: type = dict[str, type](_TORCH_VALUES)[kind]
    value = getattr(torch, name)
    if not isinstance(value, cls):
        raise Unstorable(f"{name} is no {kind}")
    return value


def _meta_to_json(node: fx.Node) -> Json:
    table: dict[str, Json] = dict(node.meta)
    if "val" in table:
        spec: TensorSpec = table["val"]
        table["val"] = [list(spec.shape), str(spec.dtype).removeprefix("torch.")]
    return table


def _meta_from_json(table: Json) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    if "val" in table:
        shape, dtype = table["val"]
        meta["val"] = TensorSpec(tuple(map(_size, shape)), _torch_value("dtype", dtype))
    if "modules" in table:
        meta["modules"] = tuple((str(path), str(cls)) for path, cls in table["modules"])
    if "source" in table:
        meta["source"] = str(table["source"])
    return meta


def _size(size: Json) -> Size:
    if type(size) is int or (isinstance(size, str) and _SIZE.fullmatch(size)):
        return size
    raise Unstorable(f"{size!r} is no size")
