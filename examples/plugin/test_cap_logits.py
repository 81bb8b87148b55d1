"""What a plugin's own tests look like: python -m pytest examples/plugin"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flarec.frontend.export import capture
from flarec.frontend.tiny import build_tiny
from flarec.layout import Block, build_layout
from flarec.passes import lower, pipeline
from flarec.plugin import PassError

PLUGIN = Path(__file__).with_name("cap_logits.py")


def test_logits_stay_below_the_limit_and_keep_their_order() -> None:
    captured = capture(build_tiny("llama"))
    layout = build_layout([[6]], [[Block(document=0, anchor=3, length=3)]])
    ids, rows = torch.arange(9)[None], torch.arange(9)
    plain = lower(captured, "train")(ids, layout=layout, head_rows=rows)
    steps = pipeline("train", foreign=["cap-logits(limit=0.1)"], plugins=[PLUGIN])
    capped = lower(captured, "train", steps=steps)(ids, layout=layout, head_rows=rows)
    assert plain.abs().max() > 0.1 >= capped.abs().max()
    torch.testing.assert_close(capped, 0.1 * torch.tanh(plain / 0.1))


def test_a_limit_of_zero_is_refused() -> None:
    captured = capture(build_tiny("llama"))
    steps = pipeline("train", foreign=["cap-logits(limit=0.0)"], plugins=[PLUGIN])
    with pytest.raises(PassError, match=r"limit 0\.0 is not above 0; give a positive limit"):
        lower(captured, "train", steps=steps)
