"""Whether a tokenizer that was rebuilt from a file's vocabulary reaches the words in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import UsageError

# A word behind a space, as SentencePiece and byte-level vocabularies spell it.
_WORD = re.compile(r"[▁Ġ][A-Za-z]{3,}")
_SAMPLE = 64


def check_words(tokenizer: Any, file: Path) -> None:
    """Raise `UsageError` if most words of the vocabulary are not one token: merges or scores were not understood.

    At most 64 words are tried, each with and without a space before it, since some tokenizers put one there. Where
    merges are right nearly all of them are one token. A vocabulary without words has nothing to try.
    """
    words = sorted(token[1:] for token in tokenizer.get_vocab() if _WORD.fullmatch(token))
    sample = words[:: max(1, -(-len(words) // _SAMPLE))]
    cut = [word for word in sample if min(_length(tokenizer, text) for text in (word, f" {word}")) > 1]
    if 2 * len(cut) <= len(sample):
        return
    from transformers import __version__

    raise UsageError(
        f"transformers {__version__} does not rebuild the tokenizer of {file}: {len(cut)} of {len(sample)} words of "
        f"its vocabulary, such as {cut[0]!r}, come out in pieces, which the model was not trained on; "
        "pip install -U transformers, or give the model as safetensors with its tokenizer.json"
    )


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)
