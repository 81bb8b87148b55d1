"""Capture: a Hugging Face causal LM becomes a `Program` with one semantic op per token mixer and per expert layer.

`torch.export` traces the model with dynamic batch and length while the adapter table's hooks stand in for its mixers.
The result is checked: every decoder layer must hold a mixer op, and parameters keep their Hugging Face names. The
tracer's objects stay behind: nodes keep plain metadata (see `flarec.ir.program`), and mixers take operands by name.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .. import ops
from ..errors import CaptureError, FlarecWarning, PropertyError
from ..ir.module import graph_module, modules_compiled_late
from ..ir.program import LAYER_LISTS, Program, Record, layer_of
from ..ir.spec import spec_of, symbol_names
from ..ir.wellformed import check_captured
from . import cache as program_cache
from .custom_backward import refuse_custom_functions
from .families import check_exchangeable, family_of, hooked
from .family import Family
from .layers import NotShared, SharedLayers
from .loading import check_rotary as check_rotary
from .loading import load_model as load_model
from .loading import text_model_of
from .traces import traces_of_forwards

EXAMPLE_ROWS = 2
EXAMPLE_LENGTH = 24


def capture(
    model_or_path: nn.Module | str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    cache: bool = False,
) -> Program:
    """Capture a causal LM as a program.

    model_or_path: a transformers model (used as it is; of a multimodal one its text model), a local directory, or a hub
    id. With `device="meta"` a path is opened from its configuration alone, without weights. dtype: run dtype of the
    weights, the checkpoint's own by default (an fp32 capture bakes casts to fp32 in: capture in the dtype that runs).
    Raises `CaptureError` for a layer whose mixer was not recognised and for whatever else a program could not keep,
    `UsageError` for a path that holds no model.

    cache: take the graph from the user's program cache if the same model was captured before, else put it there
    (`flarec.frontend.cache`). Either way the result passes the same checks.
    """
    if isinstance(model_or_path, nn.Module):
        model: Any = text_model_of(model_or_path)
    else:
        model = load_model(model_or_path, dtype, device)
    family = family_of(model.config)
    start = time.perf_counter()
    entry = program_cache.entry_of(model, family.model_type) if cache else None
    restored = entry.restore(model) if entry is not None else None
    if restored is not None:
        try:
            return _program(restored, model, family, "capture(cached=True)", start)
        except (CaptureError, PropertyError):
            pass  # what was stored is not a capture of this model: capture it
    program = _program(_export(model, family), model, family, "capture()", start)
    if entry is not None:
        entry.store(program.module, model)
    return program


def _program(module: fx.GraphModule, model: nn.Module, family: Family, step: str, start: float) -> Program:
    """The captured graph with its contract, checked."""
    program = Program(
        module=module, config=model.config, family=family.model_type, dtype=next(model.parameters()).dtype
    )
    _check_layers(program, model, family)
    return _captured(program, step, start)


def program_of(module: fx.GraphModule, config: Any, dtype: torch.dtype, layers: int) -> Program:
    """The program of a stored graph without its model, which had that many decoder layers; checked like any other.

    Raises `CaptureError` or `PropertyError` for a graph that cannot be a capture of such a model.
    """
    start = time.perf_counter()
    family = family_of(config)
    program = Program(module=module, config=config, family=family.model_type, dtype=dtype)
    if bare := _without_mixer(program, layers, family):
        raise CaptureError(f"the stored graph has no token mixer in layers {bare}; remove it from the program cache")
    return _captured(program, "capture(cached=True)", start)


def _captured(program: Program, step: str, start: float) -> Program:
    """With the property that every captured graph has, checked."""
    check_captured(program)
    delta = dict(sorted(program.op_counts().items()))
    program.history = (Record(step, (), delta, time.perf_counter() - start, ("captured",)),)
    program.properties = frozenset({"captured"})
    return program


def _export(model: nn.Module, family: Family) -> fx.GraphModule:
    """The captured graph. Layers that repeat others are traced, too, if there is anything about them that is not."""
    shared = next((SharedLayers(name, layers) for name, layers in _lists_of_layers(model)), None)
    if shared is not None and shared.kinds:
        try:
            return _traced(model, family, shared)
        except NotShared:
            return _traced(model, family, None)
        except Exception as error:  # a layer that cannot do without its index, or what is wrong with the model
            traced = _traced(model, family, None)
            said = (str(error).strip().splitlines() or [""])[0][:200]
            warnings.warn(
                f"every layer of the model is traced, which takes longer: {type(error).__name__}: {said}",
                FlarecWarning, stacklevel=2,
            )
            return traced
    return _traced(model, family, None)


def _traced(model: nn.Module, family: Family, shared: SharedLayers | None) -> fx.GraphModule:
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    length = torch.export.Dim("length", min=2, max=1 << 24)
    ids = torch.zeros(EXAMPLE_ROWS, EXAMPLE_LENGTH, dtype=torch.int64, device=device)
    positions = torch.arange(EXAMPLE_LENGTH, device=device).expand(EXAMPLE_ROWS, -1).contiguous()
    shapes = {"input_ids": {0: rows, 1: length}, "position_ids": {0: rows, 1: length}}
    try:
        with (
            hooked(model, family),
            warnings.catch_warnings(),
            refuse_custom_functions(model),
            modules_compiled_late(),
            traces_of_forwards(),
            _no_memory_of_fake_results(),
            shared.tracing() if shared is not None else contextlib.nullcontext(),
        ):
            warnings.simplefilter("ignore")
            if family.positions and "position_ids" not in inspect.signature(model.forward).parameters:
                raise CaptureError(
                    f"{type(model).__name__} (family '{family.model_type}') takes no position_ids, so the positions of "
                    "noisy tokens cannot be given to it; such a model cannot be converted"
                )
            check_exchangeable(model, family)
            _check_rotary_type(model)
            inputs = {"input_ids": ids, **({"position_ids": positions} if family.positions else {})}
            exported = torch.export.export(
                model, (), inputs, dynamic_shapes={name: shapes[name] for name in inputs}, strict=False
            )
            module = exported.module(check_guards=False)
    except CaptureError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CaptureError(
            f"{type(model).__name__} (family '{family.model_type}') could not be exported: "
            f"{reason[0] if reason else type(error).__name__}; run with --debug for the full trace"
        ) from error
    finally:
        model.train(training)
    assert isinstance(module, fx.GraphModule)
    _plain_signature(module)
    _plain_metadata(module)
    if shared is not None:
        shared.expand(module, model)
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            ops.name_operands(part.graph)
    return graph_module(module, module.graph)  # without what else export hangs on to it


@contextlib.contextmanager
def _no_memory_of_fake_results() -> Iterator[None]:
    """Where sizes are symbols, torch's cache of fake results takes a sixth longer than computing them again."""
    import torch._dynamo.config as settings  # the compiler comes along, which opening a stored graph does not need

    with settings.patch(fake_tensor_cache_enabled=False):
        yield


def _check_rotary_type(model: nn.Module) -> None:
    """Refuse rotary frequencies that one token's position changes for all tokens of the batch."""
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None) or ""
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if "dynamic" in str(kind) or kind == "longrope":
                raise CaptureError(
                    f"{name} ({type(module).__name__}) chooses its frequencies by the longest position of the batch "
                    f"(rope_type '{kind}'), so tokens would depend on others than those that they read; such a model "
                    "cannot be converted"
                )


def _plain_signature(module: fx.GraphModule) -> None:
    """Drop export's pytree calling convention: positional tensors in, a tuple with the logits out."""
    module._forward_pre_hooks.clear()  # they check the old convention
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    for node in graph.nodes:
        if node.op == "placeholder":
            wanted = "input_ids" if "input_ids" in str(node.target) else "position_ids"
            node.target = node.name = wanted
        if node.op == "output":
            flat = [value for value in node.args[0] if isinstance(value, fx.Node)]
            if len(flat) != 1:
                raise CaptureError(
                    f"the model returns {len(flat)} tensors, expected the logits alone; check its config"
                )
            node.args = ((flat[0],),)
    module.recompile()


def _plain_metadata(module: fx.GraphModule) -> None:
    """Replace what the tracer noted at each node by what a program keeps."""
    traced = next((node.meta.get("val") for node in module.graph.nodes if node.name == "input_ids"), None)
    names = symbol_names(traced) if isinstance(traced, torch.Tensor) else {}
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.meta = dict(_metadata(node, names))


def _metadata(node: fx.Node, names: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        yield "val", spec_of(value, names)
    stack = (node.meta.get("nn_module_stack") or {}).values()
    if stack:
        yield "modules", tuple((str(path), _class_name(cls)) for path, cls in stack)
    lines = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace") or ""))
    if lines:
        path, number = lines[-1]
        yield "source", f"{Path(path).name}:{number}"


def _class_name(cls: Any) -> str:
    return str(cls if isinstance(cls, str) else getattr(cls, "__name__", cls)).rsplit(".", 1)[-1]


def _check_layers(program: Program, model: nn.Module, family: Family) -> None:
    """Every decoder layer must have a token mixer, but for the layers that the family's row declares to have none."""
    layers = layers_of(model)
    if layers is None:
        raise CaptureError(
            f"{type(model).__name__} (family '{family.model_type}') has no list of decoder layers named "
            f"{' or '.join(LAYER_LISTS)}; its structure is not known"
        )
    missing = "" if family.functions or family.methods else " (there is no such row yet: see CONTRIBUTING.md)"
    for index in _without_mixer(program, len(layers), family):
        layer = layers[index]
        children = ", ".join(f"{name}: {type(child).__name__}" for name, child in layer.named_children())
        raise CaptureError(
            f"layer {index} ({type(layer).__name__}: {children}) has no recognised token mixer; add the function "
            f"it calls to the row '{program.family}' in flarec/frontend/families.py{missing}"
        )


def layers_of(model: nn.Module) -> nn.ModuleList | None:
    """The list of decoder layers."""
    return next((layers for _, layers in _lists_of_layers(model)), None)


def _lists_of_layers(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LAYER_LISTS and isinstance(module, nn.ModuleList):
            yield name, module


def _without_mixer(program: Program, layers: int, family: Family) -> list[int]:
    """The decoder layers that have no mixer in the graph, but for those that the family's row declares to have none."""
    found = {layer_of(node) for node, mixer in ops.sites(program.graph) if mixer.mixing != "none"}
    config = program.config
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None) or ()
    mixerless = {index for index, kind in enumerate(kinds) if kind in family.mixerless}
    return [index for index in range(layers) if index not in found | mixerless]
