"""Optimizer steps on a lowered training program. Contract of the objective: docs/semantics.md section 3."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..ir.compiled import Codes, compiled_by_region
from ..ir.program import Program
from ..passes.outline_regions import OUTLINED
from ..recipe import Recipe
from .adapter import choose_trained
from .data.document import PackedRow
from .data.packing import RowStream
from .feed import Feed, MicroBatch, moved
from .gathering import PARAMETERS, GatheredWeights, by_layer, layers_of
from .mask_token import MaskToken
from .moments import make_optimizer, names_in_codes
from .objective.batch import Batch
from .objective.head_loss import losses_of
from .objective.kinds import LOSSES
from .objective.loss import Metrics
from .precision import Weights
from .quantized_base import held_once
from .ranks.group import Ranks
from .ranks.sums import over_ranks
from .recompute import recomputed
from .router import ExpertLoad
from .saves import SavedState, check_tensors
from .sharding import ShardedWeights

NAMED_ROWS, NAMED_DOCUMENTS = 2, 8
"""How much of a batch an error names."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. On a GPU its tensors are on their way to the host: `read` waits for this step alone,
    not for those that were queued after it.

    step      number of the step, from 1
    losses    [micro batches] weighted contributions to the step's loss
    gradient  [] global gradient norm before clipping
    rows      the packed rows, `micro_rows` of them per micro batch
    learned   names of the losses that its noisy blocks had
    experts   load of the expert layers, None for a model without them
    done      CUDA event behind the step's copies, None on a CPU
    """

    step: int
    lr: float
    losses: Tensor
    gradient: Tensor
    metrics: Metrics
    rows: Sequence[PackedRow]
    micro_rows: int
    clean_tokens: int
    noisy_tokens: int
    learned: Sequence[str] = ()
    experts: ExpertLoad | None = None
    done: Any = None

    def read(self, tokenizer: Any) -> dict[str, Any]:
        """Plain numbers for the log, once the step is done. Raises `TrainingError` if one of them is not finite."""
        if self.done is not None:
            self.done.synchronize()
        losses, gradient = self.losses.tolist(), float(self.gradient)
        bad = [index for index, value in enumerate(losses) if not math.isfinite(value)]
        if bad or not math.isfinite(gradient):
            what = "loss" if bad else "gradient"
            raise TrainingError(
                f"the {what} of step {self.step} is not finite ({'; '.join(self._describe(bad, tokenizer))}); look at "
                "these documents, or start again with a lower optimizer.lr"
            )
        return {
            "step": self.step,
            "loss": sum(losses),
            **self.metrics.summary(),
            "gradient_norm": gradient,
            "lr": self.lr,
            "clean_tokens": self.clean_tokens,
            "noisy_tokens": self.noisy_tokens,
            "diffusion_losses": list(self.learned),
            **({"router": self.experts.summary()} if self.experts is not None else {}),
        }

    def _describe(self, bad: Sequence[int], tokenizer: Any) -> list[str]:
        """The rows of these micro batches (of all, if none is named) by number and by how their documents begin."""
        named = [self.micro_rows * micro + offset for micro in bad for offset in range(self.micro_rows)]
        texts = []
        for index in (named or list(range(len(self.rows))))[:NAMED_ROWS]:
            documents = self.rows[index].documents
            begins = [repr(tokenizer.decode(document.ids[:16].tolist())[:48]) for document in documents]
            more = f" and {len(begins) - NAMED_DOCUMENTS} more" if len(begins) > NAMED_DOCUMENTS else ""
            begins = begins[:NAMED_DOCUMENTS]
            texts.append(f"row {index} of {len(self.rows)}, documents that begin {', '.join(begins)}{more}")
        return texts


class Trainer:
    """Takes optimizer steps. Everything random is a function of (seed, step) and of the position in `rows`.

    program: lowered with the "train" pipeline, in float32 or bfloat16; with `recipe.adapter` its model is frozen. With
    marked regions (`outline-regions`) these are compiled. recipe: with `train.memory` = recompute decoder layers are
    computed again in the backward pass, else all is kept; with `train.shard` = parameters these are cut over the ranks
    (`flarec.train.memory` decides what "auto" is). rows: an
    endless stream of packed rows. exact: float32 values of parameters that a bfloat16 program holds rounded, where they
    are known (`Weights`). ranks: those that share each step's micro batches, and call every method together; what a
    step returns is the whole step's on all of them. codes: of the regions, instead of compiled ones.
    """

    def __init__(
        self,
        program: Program,
        recipe: Recipe,
        mask: MaskToken,
        rows: RowStream,
        seed: int,
        exact: Mapping[str, Tensor] | None = None,
        ranks: Ranks | None = None,
        codes: Codes | None = None,
    ) -> None:
        self.ranks = ranks or Ranks(str(program.device))
        trained, layers, every = choose_trained(program, recipe), layers_of(program), program.parameters()
        codes = (codes or Codes()) if OUTLINED in program.properties else None
        again, cut = recipe.train.memory == "recompute", recipe.train.shard == PARAMETERS
        if cut:
            program = by_layer(program, again, codes)
        elif again:
            program = recomputed(program, codes)
        elif codes is not None:
            program = compiled_by_region(program, codes)
        self.program = program
        self.recipe = recipe
        self.mask = mask
        self.rows = rows
        self.feed = Feed(program, recipe, mask, rows, seed, ranks=self.ranks)
        self.step = 0
        in_codes = names_in_codes(recipe, trained)
        self.weights: Weights
        if cut:
            assert isinstance(program.run, nn.Module)
            self.weights = GatheredWeights(trained, exact, self.ranks, layers, every, program.run, in_codes)
        elif self.ranks.size > 1:
            self.weights = ShardedWeights(trained, exact, self.ranks, layers, in_codes)
        else:
            self.weights = Weights(trained, exact, in_codes)
        self.optimizer = make_optimizer(recipe, self.weights.optimized, self.weights.optimized_in_codes)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, as the program computes with it; the optimizer changes `weights.masters`."""
        return self.weights.parameters

    @property
    def weight_bytes(self) -> int:
        """Of parameters, trained or not, the codes of some, masters, gradients and AdamW's two moments."""
        counted = {id(value) for value in (*self.parameters.values(), *self.weights.frozen.values())}
        rest = [value for value in self.program.parameters().values() if id(value) not in counted]
        codes = sum(held.nbytes for held in held_once(self.program))
        return self.weights.bytes + codes + sum(value.nbytes for value in rest)

    def advance(self) -> Step:
        """One optimizer step, without waiting for the device."""
        options = self.recipe.optimizer
        given = self.feed.take(self.step)
        lr = options.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.weights.forget()
        micro_batches = given.micro_batches or self.feed.micro_batches(given.batches)
        losses, metrics, experts = self._accumulate(micro_batches)
        gradient = self.weights.clip(options.clip or math.inf)
        self.optimizer.step()
        self.weights.round()
        self.step += 1
        done, found = None, (losses, gradient, metrics, experts)
        if self.program.device.type == "cuda":
            losses, gradient, metrics, experts = moved(found, torch.device("cpu"))
            done = torch.cuda.current_stream(self.program.device).record_event()
        clean, noisy = (sum(getattr(x, name) for x in given.batches) for name in ("clean_tokens", "noisy_tokens"))
        learned = [name for name in LOSSES if any(name in batch.losses for batch in given.batches)]
        return Step(
            self.step, lr, losses, gradient, metrics, given.rows, self.feed.micro_rows, clean, noisy, learned, experts,
            done,
        )

    def accumulate(self, batches: Sequence[Batch]) -> tuple[Tensor, Metrics, ExpertLoad | None]:
        """Gradients of the micro batches (on the host) of one step, added up: (losses [micro batches], summed metrics
        and load). Of several ranks each computes its share of them."""
        return self._accumulate(self.feed.micro_batches(batches))

    def _accumulate(self, given: Iterable[MicroBatch]) -> tuple[Tensor, Metrics, ExpertLoad | None]:
        losses: list[Tensor] = []
        metrics: Metrics | None = None
        experts: ExpertLoad | None = None
        for micro in given:
            batch = micro.batch
            results = self.program.results(
                batch.input_ids, layout=batch.layout, head_rows=batch.head_rows, derived=micro.derived
            )
            load = ExpertLoad.of(self.program.outputs, results)
            result = losses_of(results[0], self.program, batch, micro.plan, micro.scales, suppress=self.mask.suppress)
            self.weights.backward(result.total)
            losses.append(result.total.detach())
            metrics = result.metrics if metrics is None else metrics + result.metrics
            experts = load if experts is None or load is None else experts + load
        assert metrics is not None, "a step without rows"
        return over_ranks(self.ranks, torch.stack(losses), metrics, experts)

    def gather(self) -> None:
        """Of several ranks all of them call before the first one reads parameters outside of a step (`whole`)."""
        self.weights.gather()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within the context all parameters of the program are whole (of several ranks on the first), to be read."""
        self.gather()
        try:
            yield
        finally:
            self.weights.release()

    def widen(self) -> None:
        """Put the masters in the place of the program's parameters (of several ranks on the first), to be written."""
        self.weights.widen()

    def state(self, **values: Any) -> SavedState:
        """Everything that the next step depends on; `values` are kept beside it. Of several ranks the first one has the
        tensors, and all of them call."""
        model, moments = self.weights.saved(self.optimizer)
        return SavedState(model, moments, {"step": self.step, "rows": self.feed.position, **values})

    def load(self, state: SavedState | None) -> None:
        """Continue from a save, bit for bit. Of several ranks the first one has read it, and all of them call. Raises
        `CheckpointError` if it is not of this model or data."""
        given = state or SavedState({}, {}, {})
        if self.ranks.first:
            check_tensors(given, self.weights.kinds, self.weights.coded)
        values = self.ranks.from_first(lambda: given.values)
        self.feed.seek(values["rows"])
        self.weights.load(given, self.optimizer)
        self.step = int(values["step"])


def out_of_memory(done: int) -> TrainingError:
    """What to say of the step after `done` steps."""
    return TrainingError(
        f"out of memory in step {done + 1}; set train.memory=recompute, or lower optimizer.micro_rows or --max-length, "
        "and start again with --overwrite"
    )
