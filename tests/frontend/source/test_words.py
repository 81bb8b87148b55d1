"""Tokenizers that were rebuilt from a vocabulary: those that reach its words pass, those that cut them are refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from flarec.errors import UsageError
from flarec.frontend.source.words import check_words

WORDS = [f"▁{''.join(letters)}" for letters in itertools.product("abc", "de", "fgh", "abd")]
PARTS = sorted({word[:length] for word in WORDS for length in range(1, len(word))} | set("abcdefgh") | {"<unk>"})
VOCABULARY = {token: number for number, token in enumerate([*PARTS, *WORDS])}
MERGES = [(token[:-1], token[-1]) for token in sorted(VOCABULARY, key=len) if len(token) > 1 and token != "<unk>"]


def tokenizer(model: Any, prefix: bool = False) -> PreTrainedTokenizerFast:
    made = Tokenizer(model)
    steps = [normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def ranked(sign: int) -> models.Unigram:
    """Scores as SentencePiece writes them for merges (-1: the rank of each, descending), or better the longer (1)."""
    scores = [float(len(token)) ** 2 if sign > 0 else -float(10 * number) for token, number in VOCABULARY.items()]
    return models.Unigram(list(zip(VOCABULARY, scores, strict=True)), unk_id=VOCABULARY["<unk>"])


@pytest.mark.parametrize("prefix", [False, True])
def test_words_that_are_reached(prefix: bool) -> None:
    check_words(tokenizer(models.BPE(VOCABULARY, MERGES), prefix), Path("a.gguf"))


def test_unigrams_of_log_probabilities() -> None:
    check_words(tokenizer(ranked(1)), Path("a.gguf"))


@pytest.mark.parametrize("model", [models.BPE(VOCABULARY, []), models.BPE(VOCABULARY, MERGES[:9]), ranked(-1)])
def test_words_in_pieces(model: Any) -> None:
    with pytest.raises(UsageError, match=r"transformers 5\.\S+ does not rebuild the tokenizer of a\.gguf: \d\d of 36"):
        check_words(tokenizer(model), Path("a.gguf"))


def test_a_vocabulary_of_characters_has_no_words() -> None:
    check_words(tokenizer(models.BPE({token: number for number, token in enumerate("▁abc")}, [])), Path("a.gguf"))
