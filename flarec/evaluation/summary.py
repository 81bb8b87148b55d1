"""From single answers to numbers: rates per prompt, tokens per forward, and two models on the same prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..decode.request import Origin
from .loops import loops
from .statistics import interval, paired, pass_at

LETTERS: dict[Origin, str] = {"clean": "c", "accepted": "a", "corrected": "x", "unverified": "u"}
"""Where a token comes from, in a record: a letter per token."""


@dataclass(frozen=True)
class Attempt:
    """One generated answer.

    index        of the example; sample counts the answers to the same prompt
    seed         that it was sampled with
    correct      None where nothing says what is right
    The others are those of `flarec.api.Output`.
    """

    index: int
    sample: int
    seed: int
    text: str
    token_ids: tuple[int, ...]
    forwards: int
    stop_reason: str
    seconds: float
    correct: bool | None
    origins: tuple[Origin, ...] = ()
    taken_back: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Without text and ids."""
        return {
            "index": self.index, "sample": self.sample, "seed": self.seed, "new_tokens": len(self.token_ids),
            "forwards": self.forwards, "stop_reason": self.stop_reason, "correct": self.correct,
            "loops": loops(self.token_ids), "origins": "".join(LETTERS[origin] for origin in self.origins),
            **({"taken_back": self.taken_back} if self.taken_back else {}),
        }


def rates(attempts: Iterable[Attempt]) -> dict[int, float]:
    """Index of each graded example -> share of right answers."""
    found: dict[int, list[bool]] = {}
    for attempt in attempts:
        if attempt.correct is not None:
            found.setdefault(attempt.index, []).append(attempt.correct)
    return {index: sum(values) / len(values) for index, values in sorted(found.items())}


def summarise(attempts: Sequence[Attempt], samples: int) -> dict[str, Any]:
    """The numbers of `flarec.evaluate.evaluate` that come from generated answers."""
    free = [attempt for attempt in attempts if not loops(attempt.token_ids)]
    return {
        "generated": len(attempts),
        **_speed(attempts),
        "stop_reasons": dict(sorted(Counter(attempt.stop_reason for attempt in attempts).items())),
        "seconds": max((attempt.seconds for attempt in attempts), default=0.0),
        **_accuracy(attempts, samples),
        "loop_free": {"generated": len(free), **_speed(free)},
        **({"taken_back": back} if (back := sum(attempt.taken_back for attempt in attempts)) else {}),
    }


def _speed(attempts: Sequence[Attempt]) -> dict[str, Any]:
    new = sum(len(attempt.token_ids) for attempt in attempts)
    forwards = sum(attempt.forwards for attempt in attempts)
    return {"new_tokens": new, "forwards": forwards, "tokens_per_forward": new / forwards if forwards else None}


def _accuracy(attempts: Sequence[Attempt], samples: int) -> dict[str, Any]:
    by_prompt = rates(attempts)
    graded = [attempt.correct for attempt in attempts if attempt.correct is not None]
    if not graded:
        return {"answers": 0, "correct": 0, "accuracy": None, "accuracy_interval": None, "pass_at": {}}
    right = [round(rate * samples) for rate in by_prompt.values()]
    powers = [2**power for power in range(samples.bit_length()) if 2**power < samples]
    return {
        "answers": len(graded),
        "correct": sum(graded),
        "accuracy": sum(graded) / len(graded),
        "accuracy_interval": list(interval(list(by_prompt.values()), samples)),
        "pass_at": {str(k): sum(pass_at(k, samples, each) for each in right) / len(right) for k in (*powers, samples)},
    }


def compare(attempts: Sequence[Attempt], others: Sequence[Attempt]) -> dict[str, Any]:
    """A model's answers beside another's to the same prompts, sample by sample.

    equal_texts  answers of the same tokens; accuracy ... of the other; difference, low, high, better, worse, p_value
    (`statistics.Paired`, over prompts) of the first minus the other, None where nothing is graded; loop_free = speed of
    the first where the other's answer runs in no circles, a subset that the first does not choose
    """
    place = {(other.index, other.sample): other for other in others}
    pairs = [
        (attempt, place[attempt.index, attempt.sample])
        for attempt in attempts
        if (attempt.index, attempt.sample) in place
    ]
    own, theirs = rates(first for first, _ in pairs), rates(second for _, second in pairs)
    both = sorted(own.keys() & theirs.keys())
    result: dict[str, Any] = {
        "answers": len(pairs),
        "equal_texts": sum(first.token_ids == second.token_ids for first, second in pairs),
        **{f"other_{name}": value for name, value in _speed([second for _, second in pairs]).items()},
        "other_accuracy": sum(theirs[index] for index in both) / len(both) if both else None,
        "paired": None,
        "loop_free": _speed([first for first, second in pairs if not loops(second.token_ids)]),
    }
    if both:
        result["paired"] = asdict(paired([own[index] for index in both], [theirs[index] for index in both]))
    return result
