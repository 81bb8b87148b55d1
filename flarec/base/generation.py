"""What a generation is asked for, declared once: Python, `custom_generate` and the command line share it.

No import of torch: the command line builds its options from the fields.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import Any, Literal, TypedDict, get_args, get_origin

from ..errors import GenerationError
from .fields import LARGEST, allowed_values, field_types, is_number, key, plain, shown, shows_fields, whole_number

Mode = Literal["causal", "ar-trust", "diffusion-trust", "elastic"]
Drafts = Literal["branches", "single", "auto", "horizon"]
MODES: tuple[Mode, ...] = get_args(Mode)
RECHECKED: tuple[Mode, ...] = ("diffusion-trust", "elastic")
"""Those that read `recheck`."""
DRAFTS: tuple[Drafts, ...] = get_args(Drafts)
HEADLESS: tuple[Drafts, ...] = ("branches", "single", "auto")
"""Those for which a checkpoint needs no horizon head."""

HOTTEST = 10**6
"""Highest temperature. Beyond it float32 scores (logits plus temperature times noise) tell no logits apart."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How new tokens are chosen, and when to stop. Contract: docs/semantics.md section 4.

    None stands for the default. Numbers may be Python's, numpy's or tensors with one element; ids also come as lists,
    arrays or tensors. Raises `GenerationError` with the option, its value and what it takes.
    """

    mode: Mode | None = key(None, "Default: ar-trust, or causal for a model that is not converted.")
    max_new_tokens: int = key(
        256, "New tokens per prompt; the context length limits them too.", low=1, high=LARGEST, metavar="N"
    )
    temperature: float = key(0.0, "0 is greedy.", low=0, high=HOTTEST, metavar="T")
    top_k: int = key(0, "0 keeps the whole vocabulary.", low=0, high=LARGEST, metavar="K")
    top_p: float = key(1.0, "1 keeps everything.", above=0, high=1, metavar="P")
    seed: int = key(0, "Equal seeds give equal texts.", low=0, high=LARGEST, metavar="N")
    stop: tuple[str, ...] = key((), "Stop before this text (repeatable).", metavar="TEXT")
    drafts: Drafts | None = key(
        None, "ar-trust: a draft block per possible accepted length, one block, what is fastest here, or that with one "
        "or two blocks where a horizon head says. Default: the checkpoint's.",
    )
    threshold: float | None = key(
        None, "diffusion-trust, elastic: commit every position, or take drafts, this confident. Default: the "
        "checkpoint's.",
        low=0, high=1, metavar="P",
    )
    denoising_steps: int | None = key(
        None, "diffusion-trust: most steps per block; the last one commits all. Default: the checkpoint's.",
        low=1, high=LARGEST, metavar="N",
    )
    recheck: float | None = key(
        None, "diffusion-trust, elastic: the clean stream takes back tokens that it finds less likely than this share "
        "of its own choice; 1 gives the text of causal decoding, 0 looks at none. Default: the checkpoint's.",
        low=0, high=1, metavar="F",
    )
    eos_ids: frozenset[int] | None = key(None, "Token ids that end the text. Default: the model's.")
    suppress: frozenset[int] = key(frozenset(), "Token ids that are never generated, besides the mask token.")

    def __post_init__(self) -> None:
        for item in fields(self):
            value = _read(item.name, getattr(self, item.name), field_type(item.name), item.metadata, item.default)
            object.__setattr__(self, item.name, value)

    def filled(self, **defaults: Any) -> GenerationOptions:
        """With these values where an option is None."""
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **missing) if missing else self

    def unread(self, mode: str) -> list[str]:
        """Names of the options that are given and that decoding in `mode` does not read: another mode's."""
        found = []
        for item in fields(self):
            readers = set(str(item.metadata["doc"]).partition(":")[0].split(", "))
            if getattr(self, item.name) is not None and readers <= {*MODES} and mode not in readers:
                found.append(item.name)
        return found


class GenerationKeywords(TypedDict, total=False):
    """The fields of `GenerationOptions` as keyword arguments, for type checkers (a test compares the two)."""

    mode: Mode | str | None
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: str | Iterable[str] | None
    drafts: Drafts | str | None
    threshold: float | None
    denoising_steps: int | None
    recheck: float | None
    eos_ids: int | Collection[int] | None
    suppress: int | Collection[int] | None


def merged(options: GenerationOptions | None, keywords: GenerationKeywords) -> GenerationOptions:
    """The options with the keywords of a call put over them."""
    changes: dict[str, Any] = {**keywords}
    return replace(options or GenerationOptions(), **changes)


takes_options = shows_fields(GenerationOptions)
"""Shows every option in the signature of a function that ends in `**keywords: Unpack[GenerationKeywords]`."""


def field_type(name: str) -> Any:
    """The type of an option without its None."""
    hint = field_types(GenerationOptions)[name]
    return next(iter(set(get_args(hint)) - {NoneType})) if NoneType in get_args(hint) else hint


def _read(name: str, value: Any, hint: Any, metadata: Any, default: Any) -> Any:
    """A value of a caller as the field's type."""
    if value is None:
        return default
    if hint == frozenset[int]:
        return frozenset(token_ids(value, name))
    if hint == tuple[str, ...]:
        return _texts(name, value)
    if hint not in (int, float):
        if isinstance(value, str) and value in get_args(hint):
            return str(value)
        raise GenerationError(f"unknown {name} {shown(value)}; choose {allowed_values(hint, metadata)}")
    number = plain(value)
    if not is_number(number, hint, metadata):
        raise GenerationError(f"{name} is {shown(value)}; give {allowed_values(hint, metadata)}")
    return hint(number)


def _items(value: Any) -> list[Any]:
    """What a list, an array or a tensor holds; a value alone counts as a list of one."""
    if callable(getattr(value, "tolist", None)):
        try:
            value = value.tolist()
        except RuntimeError:  # a tensor without values (on the meta device)
            return [value]
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else [value]


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = _items(value)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise GenerationError(f"{name} holds {shown(wrong[0])}; give text, or a list of texts")
    if not all(texts):
        raise GenerationError("stop strings must not be empty; leave the option out to have none")
    return tuple(str(text) for text in texts)


def token_ids(value: Any, name: str) -> list[int]:
    """Token ids from a number, a list, an array or a tensor. Raises `GenerationError` for other than whole numbers."""
    items = _items(value)
    if all(type(item) is int for item in items):
        return items
    return [whole_number(f"a token id of {name}", item, GenerationError, high=LARGEST) for item in items]


def per_prompt(
    options: GenerationOptions | Sequence[GenerationOptions] | None, keywords: GenerationKeywords, prompts: int
) -> list[GenerationOptions]:
    """One for all prompts or one per prompt, with the keywords of a call put over them."""
    if options is None or isinstance(options, GenerationOptions):
        return [merged(options, keywords)] * prompts
    if len(options) != prompts:
        raise GenerationError(
            f"{prompts} prompts came with {len(options)} generation options; give one for all or one per prompt"
        )
    return [merged(item, keywords) for item in options]


def _documentation() -> str:
    """The fields as a table: name, meaning, what is allowed."""
    rows = []
    for item in fields(GenerationOptions):
        hint = field_type(item.name)
        bounded = hint in (int, float) or get_origin(hint) is Literal
        allowed = f" [{allowed_values(hint, item.metadata)}]" if bounded else ""
        rows.append(f"{item.name:<16}{item.metadata['doc']}{allowed}")
    return "\n".join(rows)


GenerationOptions.__doc__ = f"{inspect.getdoc(GenerationOptions)}\n\n{_documentation()}"
