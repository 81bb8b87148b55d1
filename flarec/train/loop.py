"""Optimizer steps on a lowered training program. Contract of the objective: docs/semantics.md section 3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, TrainingError
from ..ir.program import Program
from ..recipe import Recipe
from .data.document import PackedRow
from .data.packing import RowStream
from .mask_token import MaskToken
from .objective.batch import Batch, build_batches
from .objective.loss import Metrics, loss
from .objective.noise import step_generator
from .router import ExpertLoad
from .state import SavedState

NAMED_ROWS, NAMED_DOCUMENTS = 2, 8
"""How much of a batch an error names."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did; its tensors stay on the device until `read`.

    step      number of the step, from 1
    losses    [micro batches] weighted contributions to the step's loss
    gradient  [] global gradient norm before clipping
    rows      the packed rows, `micro_rows` of them per micro batch
    experts   load of the expert layers, None for a model without them
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
    experts: ExpertLoad | None = None

    def read(self, tokenizer: Any) -> dict[str, Any]:
        """Plain numbers for the log (a host sync). Raises `TrainingError` if the loss or gradient is not finite."""
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

    program: lowered with the "train" pipeline, float32; rows: an endless stream of packed rows.
    """

    def __init__(self, program: Program, recipe: Recipe, mask: MaskToken, rows: RowStream, seed: int) -> None:
        self.program = program
        self.recipe = recipe
        self.mask = mask
        self.rows = rows
        self.seed = seed
        self.step = 0
        self.parameters: dict[str, nn.Parameter] = program.parameters()
        options = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,  # one kernel for all tensors; the CPU and CUDA both have it
        )

    def advance(self) -> Step:
        """One optimizer step, without waiting for the device."""
        options = self.recipe.optimizer
        rows = self.rows.rows(options.batch_rows)
        batches = build_batches(
            rows,
            self.recipe.diffusion,
            self.mask.token_id,
            step_generator(self.seed, self.step),
            micro_rows=options.micro_rows,
        )
        lr = options.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        losses, metrics, experts = self.accumulate(batches)
        parameters = [parameter for parameter in self.parameters.values() if parameter.grad is not None]
        gradient = nn.utils.clip_grad_norm_(parameters, options.clip or math.inf)
        self.optimizer.step()
        self.step += 1
        clean, noisy = sum(batch.clean_tokens for batch in batches), sum(batch.noisy_tokens for batch in batches)
        return Step(self.step, lr, losses, gradient, metrics, rows, options.micro_rows, clean, noisy, experts)

    def accumulate(self, batches: Sequence[Batch]) -> tuple[Tensor, Metrics, ExpertLoad | None]:
        """Gradients of the micro batches of one step, added up: (losses [micro batches], summed metrics and load)."""
        # The totals are counted on the host beforehand: each loss is a mean over the targets of the whole step.
        ar_total = sum(batch.ar_count for batch in batches)
        diffusion_total = sum(batch.diffusion_count for batch in batches)
        weights, device = self.recipe.objective, self.program.device
        losses: list[Tensor] = []
        metrics: Metrics | None = None
        experts: ExpertLoad | None = None
        for host_batch in batches:
            derived = self.program.derive(host_batch.layout)
            batch = host_batch.to(device)
            results = self.program.results(
                batch.input_ids, layout=batch.layout, head_rows=batch.head_rows, derived=derived
            )
            load = ExpertLoad.of(self.program.outputs, results)
            result = loss(
                results[0],
                batch,
                suppress=self.mask.suppress,
                ar_weight=weights.ar_weight,
                diffusion_weight=weights.diffusion_weight,
                ar_total=ar_total,
                diffusion_total=diffusion_total,
            )
            result.total.backward()
            losses.append(result.total.detach())
            metrics = result.metrics if metrics is None else metrics + result.metrics
            experts = load if experts is None or load is None else experts + load
        assert metrics is not None, "a step without rows"
        return torch.stack(losses), metrics, experts

    def state(self, **values: Any) -> SavedState:
        """Everything that the next step depends on; `values` are kept beside it."""
        moments = {
            f"{name}.{kind}": tensor
            for name, parameter in self.parameters.items()
            for kind, tensor in self.optimizer.state.get(parameter, {}).items()
        }
        plain = {"step": self.step, "rows": self.rows.state_dict(), **values}
        return SavedState({name: p.detach() for name, p in self.parameters.items()}, moments, plain)

    @torch.no_grad()
    def load(self, state: SavedState) -> None:
        """Continue from a save, bit for bit. Raises `CheckpointError` if it is not of this model or data."""
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        if shapes != {name: tensor.shape for name, tensor in state.model.items()}:
            raise CheckpointError("the training state belongs to another model; start again with --overwrite")
        self.rows.load_state_dict(state.values["rows"])
        for name, parameter in self.parameters.items():
            parameter.copy_(state.model[name])
        for key, tensor in state.optimizer.items():
            name, _, kind = key.rpartition(".")
            parameter = self.parameters[name]
            self.optimizer.state[parameter][kind] = tensor.to(parameter.device, copy=True)
        self.step = int(state.values["step"])
