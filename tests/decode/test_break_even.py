"""From how many tokens per forward on AR-Trust is faster than causal decoding."""

from __future__ import annotations

from flarec.decode.break_even import break_even, verdict


def test_what_is_said() -> None:
    assert break_even(0.03, 0.02) == 1.5
    assert verdict(0.03, 0.02, block_size=3).endswith("AR-Trust is faster from 1.50 tokens per forward on")
    assert verdict(0.03, 0.02, block_size=3, tokens_per_forward=1.35).endswith(
        "with 1.35 it is slower than causal decoding here"
    )
    assert verdict(0.03, 0.02, block_size=3, tokens_per_forward=1.6).endswith("it is faster than causal decoding here")
    hopeless = verdict(0.09, 0.02, block_size=3, tokens_per_forward=1.6)
    assert "whatever is accepted (it would need 4.50 tokens per forward, and gives at most 4)" in hopeless
