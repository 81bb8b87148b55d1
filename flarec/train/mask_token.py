"""The mask token: a spare row of a padded vocabulary, a learned vector of its own, or any token at random.

Contract: docs/semantics.md section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.manifest import MaskToken
from ..errors import RecipeError, UsageError
from ..ir.program import Program
from ..passes.embed_mask import PARAMETER

__all__ = ["MaskToken", "choose_mask_token", "initialise_mask_token", "regular_ids", "used_rows"]


def choose_mask_token(choice: str, config: Any, tokenizer: Any) -> MaskToken:
    """The mask token for `Recipe.mask_token` ("auto", "row", "vector" or "random").

    A spare row is an id that the tokenizer cannot produce and that the configuration gives no meaning to. Raises
    `RecipeError` if a row is asked for and the model has none, or random ids where no token is a regular one;
    `UsageError` if the tokenizer is larger than the model.
    """
    rows, used = int(config.get_text_config().vocab_size), used_rows(tokenizer)
    if used > rows:
        raise UsageError(
            f"the tokenizer has {used} tokens, but the model embeds only {rows}; give the model's own tokenizer"
        )
    reserved = set(_reserved_ids(config.to_dict()))
    if choice == "random":
        regular = regular_ids(tokenizer, reserved)
        if not regular:
            raise RecipeError(
                'mask_token = "random", but every token of the tokenizer is a special one; set mask_token = "vector"'
            )
        return MaskToken("random", rows, regular)
    spare = next((index for index in range(used, rows) if index not in reserved), None)
    if choice == "row" and spare is None:
        raise RecipeError(
            f'mask_token = "row", but all {rows} rows of the vocabulary are used; set mask_token = "vector" or "auto"'
        )
    if spare is None or choice == "vector":
        return MaskToken("vector", rows)
    return MaskToken("row", spare)


def used_rows(tokenizer: Any) -> int:
    """One more than the largest id that the tokenizer can produce (a vocabulary may have holes)."""
    ids: list[int] = [len(tokenizer) - 1, *tokenizer.get_vocab().values()]
    return max(ids) + 1


def regular_ids(tokenizer: Any, reserved: Collection[int]) -> tuple[tuple[int, int], ...]:
    """The ranges [first, end) of ids of tokens that are not special and not `reserved`."""
    added = {number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    ids = sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids} - added - {*reserved})
    ranges: list[tuple[int, int]] = []
    for i in ids:
        first = ranges.pop()[0] if ranges and ranges[-1][1] == i else i
        ranges.append((first, i + 1))
    return tuple(ranges)


def _reserved_ids(config: Mapping[Any, Any]) -> Iterator[int]:
    """Ids that the configuration names (`eos_token_id`, `image_token_id`, ...), nested configurations included."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _reserved_ids(value)
        elif str(key).endswith(("token_id", "token_ids")):
            yield from (item for item in _items(value) if isinstance(item, int))


def _items(value: Any) -> Collection[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


@torch.no_grad()
def initialise_mask_token(
    mask: MaskToken, model: Any, program: Program, tokenizer: Any, exact: Mapping[str, Tensor] | None = None
) -> None:
    """Start the mask token at the mean of the used embedding rows: in the model, or as a new parameter of `program`.
    Random ids need none.

    `program` is the captured program: what it holds in `extra` is shared by everything that is lowered from it. exact:
    float32 values of rounded parameters by name; those of the embedding get the mask token, too.
    """
    if mask.kind == "random":
        return
    weight: nn.Parameter = model.get_input_embeddings().weight
    names = [name for name, value in model.named_parameters(remove_duplicate=False) if value is weight]
    wide = next((exact[name] for name in names if name in exact), weight) if exact else weight
    mean = wide[: used_rows(tokenizer)].float().mean(0)
    if mask.kind == "row":
        weight[mask.token_id] = mean.to(weight.dtype)
        wide[mask.token_id] = mean.to(wide.dtype)
    else:
        program.extra[PARAMETER] = nn.Parameter(mean.to(weight.dtype))
