"""An adapter of peft merged into its model, and checked: the merged model computes what the adapted one did.

The check is what finds the cases in which a merge is none: blocks that several layers share (Zamba, Zamba2) would get
the change of every place at once, and a projection whose weight the model reads without calling it (Jamba's `dt_proj`)
never saw its adapter.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError, UsageError, first_line
from .adapter import CONFIG, WEIGHTS, refuse_noisy_adapter

LENGTH = 16
"""Tokens of the two rows on which both models are compared."""
TOLERANCE = 1e-3
"""Of the largest logit, in float32: rounding of a merge is 1e-6 of it, a wrong one moves it visibly."""


def merged(model: Any, adapter: Path) -> Any:
    """`model`, in float32, with the weights of an adapter merged into its own. Changes it.

    Raises `UsageError` without peft, `CheckpointError` for files that are no adapter for this model, and for an adapter
    that cannot be merged.
    """
    config, tensors = check_mergeable(adapter)
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    try:
        adapted = get_peft_model(model, PeftConfig.from_peft_type(**config))
        result = set_peft_model_state_dict(adapted, tensors)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        what = f"{adapter} is no adapter for this model: {first_line(error)}"
        raise CheckpointError(f"{what}; give its own model") from error
    if strange := sorted(result.unexpected_keys):
        raise CheckpointError(f"{adapter} is no adapter for this model, which has no {strange[0]}; give its own model")
    adapted.eval()
    before = _logits(adapted)
    try:
        plain = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{adapter} cannot be merged: {first_line(error)}; give a merged model") from error
    difference = float((_logits(plain) - before).abs().max() / before.abs().max())
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{adapter} cannot be merged: the merged model's logits are {difference:.1%} from those of the adapted "
            "one, as happens where layers share a block (Zamba) or read a weight directly (Jamba's dt_proj); leave "
            "these modules out of the adapter"
        )
    return plain


def check_mergeable(adapter: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of an adapter. Raises as `merged`, before any model is opened."""
    found = _read(adapter)
    if importlib.util.find_spec("peft") is None:
        raise UsageError("--merge-adapter needs peft, which is not installed; pip install peft")
    return found


def _read(adapter: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    refuse_noisy_adapter(adapter)
    try:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(adapter / WEIGHTS)
    except FileNotFoundError as error:
        name = CONFIG if not (adapter / CONFIG).is_file() else WEIGHTS
        raise CheckpointError(
            f"{adapter} holds no {name}; give a directory that peft's save_pretrained wrote (safetensors, not a pickle)"
        ) from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"the adapter in {adapter} cannot be read: {first_line(error)}; copy it again") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise CheckpointError(f"{adapter / CONFIG} states no peft_type; give a directory that peft wrote")
    if config.get("auto_mapping"):
        config["auto_mapping"] = None
    return {**config, "inference_mode": True}, tensors


def _logits(model: Any) -> Tensor:
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result
