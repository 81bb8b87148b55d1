"""From how many tokens per forward on AR-Trust is faster than causal decoding."""

from __future__ import annotations

from flarec.base.generation import MODES
from flarec.decode.break_even import NAMES, break_even, verdict


def test_what_is_said() -> None:
    assert break_even(0.03, 0.02) == 1.5
    assert verdict(0.03, 0.02, block_size=3).endswith("AR-Trust is faster from 1.50 tokens per forward on")
    assert verdict(0.03, 0.02, block_size=3, tokens_per_forward=1.35).endswith(
        "with 1.35 it is slower than causal decoding here"
    )
    assert verdict(0.03, 0.02, block_size=3, tokens_per_forward=1.6).endswith("it is faster than causal decoding here")
    hopeless = verdict(0.09, 0.02, block_size=3, tokens_per_forward=1.6)
    assert "whatever is accepted (it would need 4.50 tokens per forward, and gives at most 4)" in hopeless


def test_every_mode_with_blocks_has_a_name_and_its_most_tokens() -> None:
    assert set(NAMES) == set(MODES) - {"causal"}
    for mode, name in NAMES.items():
        text = verdict(0.03, 0.02, block_size=3, tokens_per_forward=1.6, mode=mode)
        assert text.startswith(f"a step of {name} takes 30.0 ms") and f"ms: {name} is faster from 1.50" in text
    dear = {mode: verdict(0.07, 0.02, block_size=3, mode=mode) for mode in NAMES}
    assert "gives at most 3)" in dear["diffusion-trust"] and "at most" not in dear["ar-trust"] + dear["elastic"]
