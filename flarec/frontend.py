"""Capture: a Hugging Face causal LM becomes a `Program` with one semantic op per token mixer and per expert layer.

`torch.export` traces the model with dynamic batch and length while the adapter table's hooks stand in for its mixers.
The result is checked: every decoder layer must hold a mixer op, and parameters keep their Hugging Face names.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from . import ops
from .adapters import Family, family_of, hooked
from .errors import CaptureError, UsageError
from .program import Program, Record, layer_of

EXAMPLE_ROWS = 2
EXAMPLE_LENGTH = 24


def capture(
    model_or_path: nn.Module | str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Program:
    """Capture a causal LM as a program.

    model_or_path: a transformers model (used as it is), a local directory, or a hub id. With `device="meta"` a path is
    opened from its configuration alone, without weights. dtype: run dtype of the weights, the checkpoint's own by
    default (an fp32 capture bakes casts to fp32 in, so capture in the dtype that runs). Raises `CaptureError` for a
    family without an adapter row or a layer whose mixer was not recognised, `UsageError` for a path that holds no
    model.
    """
    model = model_or_path if isinstance(model_or_path, nn.Module) else load_model(model_or_path, dtype, device)
    family = family_of(model.config)
    start = time.perf_counter()
    module = _export(model, family)
    program = Program(
        module=module, config=model.config, family=family.model_type, dtype=next(model.parameters()).dtype
    )
    _check_layers(program, model)
    delta = dict(sorted(program.op_counts().items()))
    record = Record("capture()", (), delta, time.perf_counter() - start, ("captured",))
    program.history = (record,)
    program.properties = frozenset({"captured"})
    return program


def load_model(path: str | Path, dtype: torch.dtype | None, device: torch.device | str) -> Any:
    """Open a model from a directory or hub id; never with remote code. On "meta" only the configuration is read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name = str(path)
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise UsageError(
            f"{name} is not a model directory (no config.json); give a Hugging Face model directory or hub id"
        )
    try:
        config = AutoConfig.from_pretrained(name)
        family_of(config)
        if torch.device(device).type == "meta":
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
    except CaptureError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{name} cannot be opened as a causal language model: {reason}") from error
    check_rotary(model)
    return model.to(device)


def check_rotary(model: nn.Module) -> None:
    """Rotary frequencies made on the meta device can come out as zeros; the model would then ignore positions."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.device.type != "meta" and not bool((buffer != 0).all()):
            raise CaptureError(f"rotary buffer {name} holds zeros; load the model with from_pretrained, not from meta")


def _export(model: nn.Module, family: Family) -> fx.GraphModule:
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    length = torch.export.Dim("length", min=2, max=1 << 24)
    ids = torch.zeros(EXAMPLE_ROWS, EXAMPLE_LENGTH, dtype=torch.int64, device=device)
    positions = torch.arange(EXAMPLE_LENGTH, device=device).expand(EXAMPLE_ROWS, -1).contiguous()
    shapes = {"input_ids": {0: rows, 1: length}, "position_ids": {0: rows, 1: length}}
    try:
        with hooked(model, family), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                model, (), {"input_ids": ids, "position_ids": positions}, dynamic_shapes=shapes, strict=False
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
    return module


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


def _check_layers(program: Program, model: nn.Module) -> None:
    """Every decoder layer must have at least one token mixer; a layer without one has a mixer we did not recognise."""
    found = {layer_of(node) for node in program.calls(*ops.TOKEN_MIXERS)}
    layers = next(
        (m for name, m in model.named_modules() if name.endswith("layers") and isinstance(m, nn.ModuleList)), None
    )
    if layers is None:
        raise CaptureError(
            f"{type(model).__name__} has no decoder layer list named 'layers'; its structure is not known"
        )
    for index, layer in enumerate(layers):
        if index not in found:
            children = ", ".join(f"{name}: {type(child).__name__}" for name, child in layer.named_children())
            raise CaptureError(
                f"layer {index} ({type(layer).__name__}: {children}) has no recognised token mixer; add the function "
                f"it calls to the row '{program.family}' in flarec/adapters.py"
            )
