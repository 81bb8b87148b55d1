"""The one place that judges a source before its weights are read: from headers, sizes and the configuration.

Whatever `flarec convert` would stumble over in a source is refused here, in one sentence that names file or key and the
cure; `flarec doctor` asks the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UsageError
from .dequantise import PACKED, asking, companions, why_not
from .formats import KEY, Quantised, quantised
from .headers import StoredTensor, read_headers
from .prefixes import TEXT_PREFIXES, mapping_of, renamed, shared_prefix
from .rehearsal import Rehearsal, rehearse
from .ties import TIE, head_differs, untied

ADAPTER_CONFIG = "adapter_config.json"
_UNMERGED = ("lora_A", "lora_B", "lora_embedding", "base_layer.", "modules_to_save.")


@dataclass(frozen=True)
class SourceFacts:
    """What is known of a source that can be opened.

    text       configuration of the text model; a tie that its files contradict is not claimed in it
    wrapper    whether it is the text model of a multimodal one
    mapping    patterns of stored names -> names of the text model's class, as `from_pretrained(key_mapping=...)` takes
    weights    whether there are any; a directory may hold a configuration alone
    notes      one line each: stored tensors that nothing reads, names that were changed, a tie that was given up
    quantised  the format of weights that are dequantised; None for plain ones
    asking     the configuration that makes transformers dequantise
    untied     the files hold a head of its own, against the configuration
    """

    text: Any
    wrapper: bool = False
    mapping: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    quantised: Quantised | None = None
    untied: bool = False
    weights: bool = True
    asking: Any = None

    @property
    def config(self) -> Any:
        """What `from_pretrained` is to be given; None where it reads the same itself."""
        if self.asking is not None:
            return self.asking
        return self.text if self.wrapper or self.untied else None


def examine(
    path: str | Path,
    table: Mapping[str, Any],
    whole: Any,
    text: Any,
    empty: Callable[[Any], Any],
    *,
    dequantize: bool = False,
) -> SourceFacts:
    """Judge a source. Raises `UsageError` for one that cannot be opened as it is.

    path        a directory; a hub id is judged when its files are there
    table       config.json
    whole, text configurations: of a multimodal model and its text model, else twice the same
    empty       makes the text model of a configuration on the meta device
    dequantize  quantised weights are wanted as bfloat16
    """
    directory = Path(path)
    wrapper = whole is not text
    if not directory.is_dir():
        return SourceFacts(text, wrapper, TEXT_PREFIXES if wrapper else {})
    stored = read_headers(directory, getattr(whole, "transformers_weights", None))
    if not stored:
        if (kind := quantised(directory, table, (), ())) is not None:
            _refuse_quantised(path, kind, why_not(kind, table, {}), dequantize)
        return SourceFacts(text, wrapper, TEXT_PREFIXES if wrapper else {}, weights=False)
    if (directory / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"{path} holds an adapter of peft ({ADAPTER_CONFIG}) beside the model's weights, which say nothing of it: "
            f"merge it with --merge-adapter {path}, or move its two files away"
        )
    mapping = TEXT_PREFIXES if wrapper else mapping_of(stored)
    model = empty(text)
    own = dict(stored)
    if wrapper:
        own = {name: tensor for name, tensor in stored.items() if _of_text(renamed(name, mapping), model)}
    names = frozenset(model.state_dict())
    found = rehearse(model, own.values(), mapping)
    _refuse_unmerged(path, own)
    kind = quantised(directory, table, own.values(), found.unread)
    _refuse_quantised(path, kind, why_not(kind, table, own) if kind is not None else "", dequantize)
    if kind is not None:
        plain = {name: tensor for name, tensor in own.items() if name not in companions(own)}
        if not any(name.endswith(PACKED) for name in own):  # else weights have other names and sizes
            _refuse_incomplete(path, rehearse(empty(text), plain.values(), mapping), names, text)
        return SourceFacts(text, wrapper, mapping, quantised=kind, asking=asking(text, table, kind))
    _refuse_incomplete(path, found, names, text)
    _refuse_undescribed(path, found.unread, model)
    differs = head_differs(model, own, mapping)
    if differs:
        _check_untie(path, model)
    notes = tuple(_notes(path, found, {} if wrapper else mapping, differs))
    return SourceFacts(untied(text) if differs else text, wrapper, mapping, notes, untied=differs)


def _of_text(name: str, model: Any) -> bool:
    """Whether a tensor of a multimodal model belongs to the text model: to a part that this has too."""
    base = f"{model.base_model_prefix}."
    inner, top = model.base_model.named_children(), model.named_children()
    parts = [base + part for part, _ in inner] + [part for part, _ in top if part + "." != base]
    return any(name.startswith(f"{part}.") for part in parts)


def _refuse_unmerged(path: str | Path, stored: Mapping[str, StoredTensor]) -> None:
    if name := next((name for name in sorted(stored) if any(mark in name for mark in _UNMERGED)), None):
        raise UsageError(
            f"{path} holds an adapter that is not merged into its model ({name}); merge it (peft's merge_and_unload), "
            "save the model and give that"
        )


def _refuse_quantised(path: str | Path, kind: Quantised | None, why: str, dequantize: bool) -> None:
    """why: they cannot be dequantised."""
    if kind is None:
        if dequantize:
            raise UsageError(f"the weights of {path} are not quantised; leave out --dequantize")
        return
    if not kind.tensors:
        raise UsageError(
            f"{path}: {kind.where} says {kind.method}, and no tensor is quantised; remove {KEY} from config.json"
        )
    what = f"the weights of {path} are quantised ({kind.method}: {kind.where})"
    if why:
        raise UsageError(f"{what}, and cannot be dequantised: {why}; give the model that they were made from")
    if not dequantize:
        raise UsageError(f"{what}; add --dequantize to train them as bfloat16, or give what they were made from")


def _refuse_incomplete(path: str | Path, found: Rehearsal, names: frozenset[str], text: Any) -> None:
    rows = int(getattr(text, "vocab_size", 0) or 0)
    for name, have, want in found.misfits:
        if len(have) == len(want) and have[1:] == want[1:] and want[0] == rows:
            raise UsageError(
                f"{name} of {path} has {have[0]:,} rows, and vocab_size in config.json is {rows:,}; set vocab_size to "
                f"{have[0]} if the tokenizer is the model's own, else copy the model again"
            )
        raise UsageError(
            f"{name} of {path} is {_sizes(have)}, and config.json describes {_sizes(want)}; copy the config.json that "
            "belongs to these weights"
        )
    for name, error in found.errors.items():
        raise UsageError(f"{name} of {path} cannot be put together from its files: {error}; copy the model again")
    if not found.missing:
        return
    prefix = shared_prefix(found.unread, names)
    if prefix:
        raise UsageError(
            f"the tensors of {path} have names that begin with '{prefix}', which transformers does not know; rename "
            f"them ({prefix}{found.missing[0]} to {found.missing[0]})"
        )
    more = f" and {len(found.missing) - 3} more" if len(found.missing) > 3 else ""
    raise UsageError(
        f"{path} holds no weights for {', '.join(found.missing[:3])}{more}; {_cure(found.missing, text)}"
    )


def _refuse_undescribed(path: str | Path, unread: tuple[str, ...], model: Any) -> None:
    """Raise `UsageError` for a stored part of a layer that the model has without it: it would be another model."""
    layers = {name for name, _ in model.named_modules() if name.rpartition(".")[2].isdigit()}
    for name in unread:
        pieces = name.split(".")
        if any(".".join(pieces[:cut]) in layers for cut in range(1, len(pieces))):
            raise UsageError(
                f"{name} is stored in {path}, and the model that config.json describes has no place for it in that "
                "layer; copy the config.json that belongs to these weights"
            )


def _cure(missing: tuple[str, ...], text: Any) -> str:
    if missing == ("lm_head.weight",) and not getattr(text, TIE, False):
        return f"if its head is the embedding, set {TIE} to true in config.json, else copy the model again"
    return "copy the model again"


def _check_untie(path: str | Path, model: Any) -> None:
    """Raise `UsageError` where giving up the tie of the head would give up others: shared blocks."""
    if len(model.all_tied_weights_keys) > 1:
        raise UsageError(
            f"{path} holds a head that is not the embedding, and {TIE} in config.json is true, which this family needs "
            "for the blocks that its layers share; save the model with one head"
        )


def _notes(path: str | Path, found: Rehearsal, mapping: Mapping[str, str], differs: bool) -> list[str]:
    notes = []
    if differs:
        notes.append(
            f"{path} holds a head that is not the embedding, against {TIE} = true in its config.json: the head is "
            f"trained for itself, and {TIE} is written as false"
        )
    if mapping:
        shown = ", ".join(pattern.lstrip("^").replace("\\", "") for pattern in mapping)
        notes.append(f"the names of the tensors in {path} begin with {shown}, which is taken away")
    if found.unread:
        some = ", ".join(found.unread[:3]) + (", ..." if len(found.unread) > 3 else "")
        count = f"{len(found.unread)} stored tensors" if len(found.unread) > 1 else "a stored tensor"
        notes.append(f"the model has no place for {count} of {path} ({some}); the output will not hold them")
    return notes


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
