"""Held-out measurements during training: what training accuracy does not predict (docs/objectives.md).

Tokens per forward come from decoding; loss, all-masked slot accuracy and 1 - TV from one forward pass in which every
block of every response is fully masked and read as AR-Trust reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..decode import Engine
from ..decode.break_even import verdict
from ..ir.program import Program
from ..recipe import Recipe
from ..recipe.diffusion import Diffusion
from .data.document import Document, PackedRow
from .mask_token import MaskToken
from .objective.batch import build_batches
from .objective.head_loss import losses_of, plan_for
from .objective.loss import Metrics, Scales
from .objective.noise import step_generator

Tick = Callable[[int, int], None]
STEPS = (2, 8)
"""New tokens of one prompt whose steps are timed: first some that do not count, then those that do."""


@dataclass(frozen=True)
class HeldOut:
    """Measures the model on `documents`. `train` and `decode` are lowered from one captured program.

    eos_ids: ids that end a generation; context: positions that the model has; causal: gives the program that decodes
    causally once the checkpoint is open, if that is not `decode`.
    """

    documents: Sequence[Document]
    train: Program
    decode: Program
    recipe: Recipe
    mask: MaskToken
    eos_ids: Collection[int]
    context: int
    causal: Callable[[], Program] | None = None

    @torch.no_grad()
    def measure(self, tick: Tick = lambda done, total: None) -> dict[str, Any]:
        """`ar_loss`, `all_masked_accuracy` and `one_minus_tv` (per slot, None where no target is), `expected_accepted`
        length of a block (None without a whole one) and `tokens_per_forward` of greedy AR-Trust over all documents.

        tick: called after every forward with (done, total) in documents, each of which is scored and then decoded; what
        it raises ends the measurement.
        """
        metrics = self._probe(tick).summary()
        names = ("ar_loss", "all_masked_accuracy", "one_minus_tv", "expected_accepted")
        named = {name: metrics[name] for name in names}
        return {**named, "tokens_per_forward": self._tokens_per_forward(tick)}

    def _probe(self, tick: Tick) -> Metrics:
        recipe, readout = self.recipe, self.recipe.readouts()["ar-trust"]
        masked = Diffusion(
            block_size=recipe.diffusion.block_size, mask="all", views=1, supervise="masked-input", readout=readout,
            loss="ce",
        )
        rows = [PackedRow((document,)) for document in self.documents]
        generator = step_generator(0, 0)  # fully masked: nothing is left to chance, but random ids
        total: Metrics | None = None
        scored = 0
        for host_batch in build_batches(
            rows, masked, self.mask.token_id, generator, micro_rows=recipe.optimizer.micro_rows,
            noise_ids=self.mask.ids,
        ):
            scales = Scales.of([host_batch], recipe.objective)
            plan, device = plan_for(self.train, host_batch, scales), self.train.device
            plan, batch = plan if plan is None else plan.to(device), host_batch.to(device)
            results, *_ = self.train.results(batch.input_ids, layout=batch.layout, head_rows=batch.head_rows)
            metrics = losses_of(results, self.train, batch, plan, scales, suppress=self.mask.suppress).metrics
            total = metrics if total is None else total + metrics
            scored += len(batch.input_ids)
            tick(scored, 2 * len(rows))
        assert total is not None, "no held-out documents"
        return total

    def engine(self) -> Engine:
        """Decodes with the program as it is now."""
        recipe = self.recipe
        return Engine(
            self.decode,
            mask_token_id=self.mask.token_id,
            noise_ids=self.mask.ids,
            block_size=recipe.diffusion.block_size,
            readouts=recipe.readouts(),
            eos_ids=self.eos_ids,
            max_positions=self.context,
            suppress=[] if self.mask.suppress is None else [self.mask.suppress],
            causal=self.causal,
        )

    @torch.no_grad()
    def pays(self, tokens_per_forward: float) -> str | None:
        """A sentence on whether AR-Trust pays at what was measured: its step against a causal one, of one prompt at a
        time. None where no step fits behind the shortest prompt."""
        prompt, engine, costs = min(map(prompt_of, self.documents), key=len), self.engine(), {}
        for mode, drafts in (("ar-trust", self.recipe.decode.drafts), ("causal", None)):
            for count in STEPS:
                steps, seconds = engine.stats.steps, engine.stats.step_seconds
                engine.generate([prompt], mode=mode, drafts=drafts, max_new_tokens=count, eos_ids=frozenset())
            if engine.stats.steps == steps:
                return None
            costs[mode] = (engine.stats.step_seconds - seconds) / (engine.stats.steps - steps)
        size = self.recipe.diffusion.block_size
        return verdict(costs["ar-trust"], costs["causal"], block_size=size, tokens_per_forward=tokens_per_forward)

    def _tokens_per_forward(self, tick: Tick) -> float:
        recipe = self.recipe
        count, ended = len(self.documents), list[int]()
        results = self.engine().generate(
            [prompt_of(document) for document in self.documents],
            mode="ar-trust",
            max_new_tokens=recipe.evaluation.max_new_tokens,
            drafts=recipe.decode.drafts,
            on_tokens=lambda index, tokens: tick(count + len(ended), 2 * count),
            on_end=lambda index, generation: ended.append(index),
        )
        return sum(result.new_tokens for result in results) / sum(result.forwards for result in results)


def prompt_of(document: Document) -> list[int]:
    """The tokens before the first response; the first half of a document that is all response (plain text)."""
    start = document.responses[0][0]
    ids = document.ids[: start if start > 1 else max(1, len(document) // 2)]
    return [int(token) for token in ids]
