"""Logits of a text, compared within what its float32 allows; a failure says which text and token, and how far both
ways to compute are from float64."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .subject import Comparison, Subject


def compare_with_source(comparison: Comparison, subject: Subject, tokens: list[int], ours: Tensor) -> None:
    """Logits [T, V] of a text with those of the model in transformers, in float64."""
    exact = subject.witness.see(tokens).exact
    where = _place(subject, tokens, "flarec is {:.1e} from float64")
    comparison.add(exact.float(), ours.float(), slack=subject.slack(tokens), where=where)


def compare_texts(comparison: Comparison, subject: Subject, tokens: list[int], a: Tensor, b: Tensor) -> None:
    """Logits [T, V] of a text that flarec computed in two ways."""
    where = _place(subject, tokens, "the two ways differ by {:.1e}")
    comparison.add(a, b, slack=subject.slack(tokens), where=where)


def _place(subject: Subject, tokens: list[int], what: str) -> Callable[[int, float], str]:
    def where(row: int, difference: float) -> str:
        own = subject.witness.see(tokens).own[row]
        return (
            f"text {subject.shown(tokens)}, row {row}: {what.format(difference)}, transformers' own float32 is "
            f"{float(own):.1e} from float64"
        )

    return where
