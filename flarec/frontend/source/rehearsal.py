"""What transformers would make of stored tensors: its own loading, on tensors without numbers.

It renames, merges and splits as for a real model, so whatever it does not read or misses in a file is known from the
headers alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import first_line
from .headers import FLOATS, StoredTensor

_DTYPES = {
    **FLOATS, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Rehearsal:
    """What loading would give.

    missing  tensors of the model that no stored one becomes; transformers would draw random numbers
    unread   stored tensors without a place in the model, by the names that transformers gives them
    misfits  (name, stored shape, the model's shape)
    errors   what transformers cannot put together: name -> why
    """

    missing: tuple[str, ...]
    unread: tuple[str, ...]
    misfits: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    errors: Mapping[str, str]


def rehearse(model: Any, stored: Collection[StoredTensor], mapping: Mapping[str, str] | None = None) -> Rehearsal:
    """Load `stored` into `model`, a transformers model on the meta device, which has no use afterwards.

    mapping  patterns of names, as `from_pretrained(key_mapping=...)` takes them
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    meta = torch.device("meta")
    tensors = {
        tensor.name: torch.empty(tensor.shape, dtype=_DTYPES.get(tensor.dtype, torch.uint8), device=meta)
        for tensor in stored
    }
    names = get_model_conversion_mapping(model, dict(mapping) if mapping else None)
    how = LoadStateDictConfig(
        device_map={"": meta}, dtype=model.dtype, weight_mapping=names, ignore_mismatched_sizes=True
    )
    with quiet():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, how, None)
    tied = _ties_met(model, info.missing_keys)
    model._adjust_missing_and_unexpected_keys(info)
    return Rehearsal(
        tuple(sorted(info.missing_keys - tied)),
        tuple(sorted(info.unexpected_keys)),
        tuple(sorted((name, tuple(have), tuple(want)) for name, have, want in info.mismatched_keys)),
        {name: first_line(ValueError(str(error))) for name, error in dict(info.conversion_errors).items()},
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _ties_met(model: Any, missing: Collection[str]) -> set[str]:
    """Missing tensors that are another one's by a tie of the model, which is there."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[str, set[str]] = {}
    for target, source in ties.items():
        groups.setdefault(source, {source}).add(target)
    return {name for group in groups.values() if group - set(missing) for name in group}
