"""When drafting pays: a step of AR-Trust costs more than a causal one, and has to give more tokens for it."""

from __future__ import annotations


def break_even(trusted: float, causal: float) -> float:
    """Tokens per forward from which on AR-Trust is as fast as causal decoding. trusted, causal: seconds of a step."""
    return trusted / causal


def verdict(trusted: float, causal: float, *, block_size: int, tokens_per_forward: float | None = None) -> str:
    """A sentence for people: from where on AR-Trust pays, and whether it did or can.

    trusted, causal: seconds of a step; block_size: a step gives at most one token more than that; tokens_per_forward:
    what was measured, if it was.
    """
    needed = break_even(trusted, causal)
    costs = f"a step of AR-Trust takes {1e3 * trusted:.1f} ms, a causal one {1e3 * causal:.1f} ms"
    if needed > block_size + 1:
        return (
            f"{costs}: AR-Trust is slower than causal decoding on this machine whatever is accepted (it would need "
            f"{needed:.2f} tokens per forward, and gives at most {block_size + 1})"
        )
    text = f"{costs}: AR-Trust is faster from {needed:.2f} tokens per forward on"
    if tokens_per_forward is None:
        return text
    slower = tokens_per_forward < needed
    return f"{text}; with {tokens_per_forward:.2f} it is {'slower' if slower else 'faster'} than causal decoding here"
