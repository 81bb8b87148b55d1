"""Requests that decode together: their cache, their sampling parameters, what their mode keeps, and a step of them.

The number of rows changes between steps only: requests that ended leave (`retire`), requests that were prefilled
elsewhere come in (`join`). What a row computes depends on no other row and on no place in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter as clock
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from flarec.base.flat import sent
from flarec.base.generation import GenerationOptions
from flarec.base.recent import last_used

from .cache import Cache
from .pieces import PieceLayouts
from .plan import DecodeProgram, StepPlan, StepShape
from .request import Request
from .sampling import SamplingRows, choose, near
from .stepper import BlockSpec, Stepper


class Mode(Protocol):
    """A way to decode. It says what a step is and reads its logits; who runs it, and with whom, is not its business.

    `start`, `inputs` and `read` compute with tensors alone, on the device, and keep what they need in `Rows.state`.
    `shape` and `report` are on the host, which knows the requests. blocks: None for steps without noisy blocks.
    """

    @property
    def blocks(self) -> BlockSpec | None: ...

    @property
    def pending(self) -> int:
        """The most clean rows of a step."""
        ...

    @property
    def lasting(self) -> bool:
        """Whether the number of clean rows mostly stays the same from step to step."""
        ...

    def start(self, rows: Rows, clean: Tensor, noisy: Tensor) -> Tensor:
        """After the prompts. clean [rows, 1, V] logits of their last rows, noisy [rows, 1, heads, V] of the block
        behind each (no block: [rows, 0, 0, V]). Returns what `report` is given [rows, n] int64."""
        ...

    def shape(self, rows: Rows) -> StepShape:
        """The next step's shape."""
        ...

    def inputs(self, rows: Rows, shape: StepShape) -> tuple[Tensor, Tensor | None]:
        """Its ids [rows, T] int64, and the anchors of its blocks (`StepPlan.layout`) [rows, blocks] int64."""
        ...

    def read(self, rows: Rows, shape: StepShape, clean: Tensor, noisy: Tensor) -> Tensor:
        """After it: accept clean rows (`Rows.accept`) and choose. clean [rows, heads, V], noisy [rows, blocks,
        block_heads, V] logits. Returns what `report` is given [rows, n] int64."""
        ...

    def report(self, request: Request, values: list[int]) -> None:
        """What `start` or `read` returned for this request."""
        ...

    def timed(self, shape: StepShape, seconds: float) -> None:
        """How long a step of this shape took, with all that belongs to it."""
        ...


class Rows(Stepper):
    """Requests in one mode. Row b of every tensor belongs to `requests[b]`.

    state     what the mode keeps, by name: tensors with a row per request
    sampling  parameters of each row
    suppress  [V] bool ids that are never chosen, or None
    plans     shared between the rows of a scheduler, of which `most_plans` are kept (None: all of them): requests that
    end one by one make as many shapes as they are
    layouts   of pieces of prompts, shared likewise
    constants of `constant`, as many
    active    [rows] bool: rows of a request; None: all of them
    overwrites   whether steps may put new states in the place of the old ones
    bare      runs steps without noisy rows in the place of the program; None: the program does
    timed     whether the mode is told how long steps take; no: they are no measure for those to come
    logprobs  alternatives per token whose log-probabilities all of its requests want; None: they want none
    notes     what `note` gave for the tokens of the last step, by place in the step
    """

    most_plans: ClassVar[int | None] = 16
    active: Tensor | None = None
    overwrites: bool = False
    bare: DecodeProgram | None = None
    timed: bool = True
    logprobs: int | None = None
    notes: Tensor | None = None

    def __init__(
        self,
        program: DecodeProgram,
        mode: Mode,
        requests: Sequence[Request],
        options: Sequence[GenerationOptions],
        suppress: Tensor | None,
        plans: dict[StepShape, StepPlan] | None = None,
        layouts: PieceLayouts | None = None,
    ) -> None:
        self.requests = list(requests)
        cache = Cache.allocate(program.cache_slots, len(requests), self.longest() + 1, program.device)
        super().__init__(program, cache, mode.blocks, layouts)
        self.mode = mode
        self.logprobs = requests[0].logprobs
        self.sampling = SamplingRows.build(options, self.device)
        self.suppress = suppress
        self.state: dict[str, Tensor] = {}
        self.plans = plans if plans is not None else {}
        self.constants: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    @property
    def width(self) -> int:
        """Rows that a step computes."""
        return len(self.requests)

    @property
    def seeds(self) -> Tensor:
        return self.sampling.seed

    def longest(self) -> int:
        return max(request.length for request in self.requests)

    def choose(
        self, logits: Tensor, first: Tensor, *, confidence: bool = False, source: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A token and its probability (0 without `confidence`): [rows, n] each, for logits [rows, n, V] of positions
        that follow one another from first [rows] on. source [rows * n]: rows of the logits [any, n, V] to choose from.
        """
        n, vocab = logits.shape[1:]
        token, probability = choose(
            logits.reshape(-1, vocab), self.sampling, first, self.suppress, confidence=confidence, per=n, source=source
        )
        return token.view(-1, n), probability.view(-1, n)

    def near(self, logits: Tensor, tokens: Tensor, choice: Tensor, share: float, first: Tensor) -> Tensor:
        """[rows, n] bool: whether tokens [rows, n] are the choice [rows, n] of logits [rows, n, V], or nearly as good
        (`flarec.kernels.sampling.near`); positions as in `choose`."""
        n, vocab = logits.shape[1:]
        given = (tokens.reshape(-1), choice.reshape(-1), share)
        return near(logits.reshape(-1, vocab), *given, self.sampling, first, self.suppress, per=n).view(-1, n)

    def note(self, logits: Tensor, tokens: Tensor) -> Tensor | None:
        """How likely tokens [rows, n] are by logits [rows, n, V], if that is wanted: [rows, n, 1 + 2 k] float64, their
        log-probabilities, then the k most likely ids and theirs (`TokenLogprob`). Becomes `notes`."""
        if self.logprobs is None:
            return None
        scores = logits.float()
        if self.suppress is not None:
            scores = scores.masked_fill(self.suppress, -torch.inf)
        known = scores.log_softmax(-1).double()
        values, ids = known.topk(min(self.logprobs, known.shape[-1]), dim=-1)
        chosen = known.gather(-1, tokens.clamp_min(0)[..., None])
        self.notes = torch.cat([chosen, ids.double(), values], dim=-1)
        return self.notes

    def constant(self, value: int, *sizes: int) -> Tensor:
        """int64 of one value, made once: nobody writes into it."""
        def make() -> Tensor:
            return torch.full(sizes, value, dtype=torch.int64, device=self.device)

        return last_used(self.constants, (value, sizes), make, self.most_plans)

    def accept(self, rows: Tensor) -> None:
        """Keep the first `rows[b]` clean rows of the step that just ran."""
        kept = rows.clone() if self.active is None else rows * self.active
        self.cache.keep(kept, self.cache.length + kept)

    def start(self, clean: Tensor, noisy: Tensor) -> None:
        """The prompts are read: see `Mode.start`."""
        self._report(self.mode.start(self, clean, noisy).tolist())

    def step(self) -> None:
        """One forward of every request, and what follows from it."""
        shape = self.mode.shape(self)
        known, start = shape in self.plans, clock()
        self.cache.reserve(self.longest() + shape.clean)
        self._report(self.compute(shape).tolist())
        if known and self.timed:  # a first one may compile
            self.mode.timed(shape, clock() - start)

    def compute(self, shape: StepShape) -> Tensor:
        """The part of a step that is a function of tensors; returns what `Mode.report` is given [rows, n] int64."""
        plan = last_used(self.plans, shape, lambda: StepPlan(shape, self.device), self.most_plans)
        ids, anchors = self.mode.inputs(self, shape)
        layout = plan.layout(self.cache.length, anchors)
        if self.overwrites:
            layout.overwriting()
        ids = self.noised(ids, layout)
        program = self.program if shape.blocks or self.bare is None else self.bare
        clean, noisy = plan.split(program.step(ids, layout, plan.head_rows, self.cache))
        return self.mode.read(self, shape, clean, noisy)

    def _report(self, values: list[list[int]]) -> None:
        """Tell the mode. A request whose report fails ends; the others go on."""
        notes = self.notes.tolist() if self.notes is not None else None
        for index, (request, row) in enumerate(zip(self.requests, values, strict=True)):
            if request.finished:
                continue
            request.forwards += 1
            request.notes = notes[index] if notes is not None else []
            try:
                self.mode.report(request, row)
            except Exception as error:
                request.fail(error)

    def retire(self) -> None:
        """Let finished requests go; somebody must be left."""
        stay = [row for row, request in enumerate(self.requests) if not request.finished]
        if len(stay) == len(self.requests):
            return
        rows = sent(torch.tensor(stay, dtype=torch.int64), self.device)
        self.requests = [self.requests[row] for row in stay]
        self.cache.select(rows, self.longest() + 1)
        self.sampling = self.sampling.take(rows)
        self.state = {name: tensor.index_select(0, rows) for name, tensor in self.state.items()}

    def join(self, other: Rows) -> None:
        """Take over the requests of `other`, in the same mode and as far as at least one step."""
        self.requests += other.requests
        self.cache.join(other.cache)
        self.sampling = self.sampling.join(other.sampling)
        self.state = {name: torch.cat([tensor, other.state[name]]) for name, tensor in self.state.items()}
