"""When drafting pays: a step with blocks costs more than a causal one, and has to give more tokens for it."""

from __future__ import annotations

NAMES = {"ar-trust": "AR-Trust", "diffusion-trust": "Diffusion-Trust", "elastic": "elastic decoding"}


def break_even(trusted: float, causal: float) -> float:
    """Tokens per forward from which on a mode is as fast as causal decoding. trusted, causal: seconds of a step."""
    return trusted / causal


def verdict(
    trusted: float, causal: float, *, block_size: int, tokens_per_forward: float | None = None, mode: str = "ar-trust"
) -> str:
    """A sentence for people: from where on a mode pays, and whether it did or can.

    trusted, causal: seconds of a step; block_size: a step gives at most that many tokens, and one more where a clean
    row has the last word; tokens_per_forward: what was measured, if it was.
    """
    needed, name, most = break_even(trusted, causal), NAMES[mode], block_size + (mode != "diffusion-trust")
    costs = f"a step of {name} takes {1e3 * trusted:.1f} ms, a causal one {1e3 * causal:.1f} ms"
    if needed > most:
        return (
            f"{costs}: {name} is slower than causal decoding on this machine whatever is accepted (it would need "
            f"{needed:.2f} tokens per forward, and gives at most {most})"
        )
    text = f"{costs}: {name} is faster from {needed:.2f} tokens per forward on"
    if tokens_per_forward is None:
        return text
    slower = tokens_per_forward < needed
    return f"{text}; with {tokens_per_forward:.2f} it is {'slower' if slower else 'faster'} than causal decoding here"
