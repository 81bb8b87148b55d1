"""Rotary frequencies of every type: those that depend on the token's own position, and those that do not."""

from __future__ import annotations

from typing import Any

import pytest

from flarec.errors import CaptureError
from flarec.frontend.export import capture
from flarec.passes import lower
from flarec.verify import Subject, clean_logits, split_is_whole
from tests.models import tiny_model

from .shared import BLOCK_SIZE, MASK_ID, eager


def with_positions(kind: str, **values: Any) -> Any:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 16, **values}
    return eager(tiny_model("llama", num_hidden_layers=1, rope_parameters=parameters))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("linear", {"factor": 2.0}),
        ("yarn", {"factor": 2.0}),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ],
)
def test_scaled_positions(kind: str, values: dict[str, Any]) -> None:
    source = with_positions(kind, **values)
    captured = capture(source)
    train, decode = (lower(captured, target, debug=True) for target in ("train", "decode"))
    subject = Subject(train, decode, source, MASK_ID, block_size=BLOCK_SIZE)
    for check in (clean_logits, split_is_whole):
        result = check(subject, cases=2)
        assert result.passed, result


@pytest.mark.parametrize(
    ("kind", "values"),
    [("dynamic", {"factor": 2.0}), ("longrope", {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0})],
)
def test_frequencies_that_depend_on_the_batch_are_refused(kind: str, values: dict[str, Any]) -> None:
    """They change for all tokens when one position passes a limit: no layout could say who reads whom."""
    with pytest.raises(CaptureError, match=rf"rotary_emb .*longest position of the batch \(rope_type '{kind}'\)"):
        capture(with_positions(kind, **values))
