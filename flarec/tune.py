"""Settings of decoding by what they keep: a curve of accuracy at tokens per forward, and the best setting on it.

Every setting is measured on the prompts that choose; causal decoding and the chosen settings on the others too, so that
what is reported chose nothing (`flarec.evaluation.choice`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .api import Model, Output, check_mode
from .base.fields import whole_number
from .base.generation import RECHECKED, GenerationOptions, Mode
from .errors import DataError, GenerationError, UsageError
from .evaluate import Example, answered, check_samples
from .evaluation.choice import HALVES, KEEP, RECHECKS, THRESHOLDS, Half, Setting, best, grid, half_of
from .evaluation.grading import PythonQuestion
from .evaluation.summary import Attempt, compare, summarise

Halves = dict[Half, list[Example]]
NUMBERS = (
    "answers", "correct", "accuracy", "accuracy_interval", "new_tokens", "forwards", "tokens_per_forward", "taken_back",
)
"""Of `flarec.evaluation.summary.summarise`, that a row of a curve has."""


@dataclass(frozen=True)
class Tuning:
    """What is measured. modes: of `RECHECKED`; keep: share of causal decoding's accuracy that a setting has to keep;
    options: of every setting but mode, threshold and recheck; batch, samples, execute: see `flarec.evaluate.evaluate`.
    """

    modes: tuple[Mode, ...]
    thresholds: tuple[float, ...] = THRESHOLDS
    rechecks: tuple[float, ...] = RECHECKS
    keep: float = KEEP
    options: GenerationOptions = field(default_factory=GenerationOptions)
    batch: int = 8
    samples: int = 1
    execute: bool = False

    @property
    def settings(self) -> list[Setting]:
        return grid(self.thresholds, self.rechecks)


def modes_of(model: Model, asked: Sequence[Mode] = ()) -> tuple[Mode, ...]:
    """The modes of a model that have settings, or those that are asked for. Raises `UsageError` and `GenerationError`
    where there are none, or not these."""
    for mode in asked:
        check_mode(mode, model.manifest)
    if asked:
        return tuple(mode for mode in RECHECKED if mode in asked)
    if model.manifest is None:
        check_mode(RECHECKED[0], None)
    found = []
    for mode in RECHECKED:
        try:
            check_mode(mode, model.manifest)
        except GenerationError:
            continue
        found.append(mode)
    if not found:
        raise UsageError(
            "this checkpoint has neither Diffusion-Trust nor elastic decoding, so there is no setting to choose"
        )
    return tuple(found)


def graded(examples: Sequence[Example], room: int, *, execute: bool = False) -> Halves:
    """Examples that can be asked (their prompt leaves room in so many positions) and graded, by half. Raises
    `DataError` where a half has none."""
    halves: Halves = {half: [] for half in HALVES}
    for example in examples:
        runs = execute or not isinstance(example.question, PythonQuestion)
        if example.question is not None and runs and 0 < len(example.prompt) < room:
            halves[half_of(example.prompt)].append(example)
    for half, found in halves.items():
        if not found:
            count = sum(map(len, halves.values()))
            raise DataError(
                f"of {len(examples)} records {count} can be graded, and none of them is in the half for {half}; give "
                'more records with "answer" and "pattern", or with "tests" and --execute'
            )
    return halves


def tune(
    model: Model, halves: Halves, plan: Tuning, on_output: Callable[[], None] = lambda: None
) -> dict[Mode, dict[str, Any]]:
    """Measure all settings of some modes on what `graded` gave. on_output: called as an answer ends; `answers_of` says
    how many there are.

    Returns plain values for each mode: keep, causal (half -> numbers), curve (numbers of every setting on the half that
    chooses), chosen ("threshold" and "recheck") and reported (its numbers on the other half), both None where no
    setting keeps enough. Numbers are those of `evaluate`, equal_texts (answers of the same tokens as causal decoding's)
    and, of what is reported, to_causal (`flarec.evaluation.statistics.Paired`).
    Raises `DataError` where causal decoding has no answer right on the half that chooses.
    """
    check_samples(whole_number("samples", plan.samples, UsageError, low=1), plan.options.temperature)
    whole_number("batch", plan.batch, UsageError, low=1)
    answers = _Answers(model, halves, plan, on_output)
    causal = {half: answers.numbers(half, "causal") for half in HALVES}
    if not causal["choosing"]["correct"]:
        raise DataError(
            f"causal decoding has none of the {causal['choosing']['answers']} answers right that choose, so there is "
            "no accuracy to keep; give easier tasks, or look at their patterns"
        )
    found: dict[Mode, dict[str, Any]] = {}
    for mode in plan.modes:
        seen = {setting: answers.numbers("choosing", mode, setting) for setting in plan.settings}
        chosen = best(seen, causal["choosing"]["accuracy"], plan.keep)
        reported = None
        if chosen is not None:
            reported = answers.numbers("reporting", mode, chosen)
            reported["to_causal"] = answers.beside_causal("reporting", mode, chosen)["paired"]
        found[mode] = {
            "keep": plan.keep, "causal": causal, "curve": [{**s._asdict(), **row} for s, row in seen.items()],
            "chosen": chosen._asdict() if chosen is not None else None, "reported": reported,
        }
    return found


def noted(
    found: Mapping[Mode, Mapping[str, Any]], identity: Mapping[str, Any], plan: Tuning
) -> dict[str, dict[str, Any]]:
    """What `tune` found with what it was measured with, as a record and a manifest have it (`flarec.checkpoint.curve`).
    identity: of `flarec.evaluate.identity`."""
    options = plan.options
    made = {
        "data": dict(identity["data"]), "computed_in": dict(identity["computed_in"]),
        "temperature": options.temperature, "max_new_tokens": options.max_new_tokens, "seed": options.seed,
        "samples": plan.samples,
    }
    return {mode: {**made, **table} for mode, table in found.items()}


def answers_of(plan: Tuning, halves: Halves) -> int:
    """How many answers `tune` lets the model write, if every mode finds a setting."""
    choosing, reporting = (len(halves[half]) for half in HALVES)
    rounds = 1 + len(plan.modes) * len(plan.settings)
    return plan.samples * (rounds * choosing + (1 + len(plan.modes)) * reporting)


class _Answers:
    """Answers of one model: every half is decoded once in every setting."""

    def __init__(self, model: Model, halves: Halves, plan: Tuning, on_output: Callable[[], None]) -> None:
        self.model, self.halves, self.plan = model, halves, plan
        self.on_output = on_output
        self._known: dict[tuple[Half, Mode, Setting | None], list[Attempt]] = {}

    def attempts(self, half: Half, mode: Mode, setting: Setting | None = None) -> list[Attempt]:
        key = half, mode, setting
        if key not in self._known:
            plan = self.plan
            options = replace(plan.options, mode=mode, **(setting._asdict() if setting is not None else {}))

            def ended(index: int, output: Output) -> None:
                self.on_output()

            self._known[key] = answered(
                self.model, self.halves[half], options, batch=plan.batch, samples=plan.samples, execute=plan.execute,
                on_output=ended,
            )
        return self._known[key]

    def numbers(self, half: Half, mode: Mode, setting: Setting | None = None) -> dict[str, Any]:
        """Of one setting on one half."""
        found = summarise(self.attempts(half, mode, setting), self.plan.samples)
        row = {name: found[name] for name in NUMBERS if name in found}
        if mode != "causal":
            row["equal_texts"] = self.beside_causal(half, mode, setting)["equal_texts"]
        return row

    def beside_causal(self, half: Half, mode: Mode, setting: Setting | None) -> dict[str, Any]:
        return compare(self.attempts(half, mode, setting), self.attempts(half, "causal"))
