"""What an engine counts: forwards, tokens, graphs, and the time that they took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DecodeStats:
    """Since the engine was made.

    steps, step_seconds        forwards of running requests, and the wall time with all that belongs to them
    prefills, prefill_seconds  forwards that read prompts
    prompt_tokens, known_tokens  of prompts that were read, and how many of them a prefix cache knew
    tokens                     new tokens
    taken_back                 tokens that rechecks took back
    replays                    steps that were replays of a graph
    graphs                     graphs that were captured
    eager                      why steps are not replayed, if graphs were asked for; empty otherwise
    """

    steps: int = 0
    step_seconds: float = 0.0
    prefills: int = 0
    prefill_seconds: float = 0.0
    prompt_tokens: int = 0
    known_tokens: int = 0
    tokens: int = 0
    taken_back: int = 0
    replays: int = 0
    graphs: int = 0
    eager: str = ""

    @property
    def seconds(self) -> float:
        return self.step_seconds + self.prefill_seconds

    def lines(self) -> list[str]:
        """For people."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        per_step = 1e3 * self.step_seconds / self.steps if self.steps else 0.0
        lines = [
            f"{rate:.1f} tokens/s, {per_step:.2f} ms per forward, {self.steps} forwards, {self.prefills} of prompts "
            f"({self.prefill_seconds:.2f} s)"
        ]
        if self.known_tokens:
            lines.append(f"prompts: {self.known_tokens} of {self.prompt_tokens} tokens were read before")
        if self.taken_back:
            lines.append(f"recheck: {self.taken_back} tokens taken back")
        if self.eager:
            lines.append(f"graphs: none, {self.eager}")
        elif self.replays:
            lines.append(f"graphs: {self.replays} of {self.steps} forwards replayed, {self.graphs} captured")
        return lines
