"""What is put before vLLM's model runner (`vllm/v1/worker/gpu_model_runner.py`; the one for CPUs is its subclass).

It knows all that a proposer is not told: whose rows are whose, which drafts a forward had, and what it said of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MaskedModelRunner:
    """Methods over those of a runner. The mask token has no logit, and the proposer sees the best token of each row.

    Every rank of a tensor-parallel group has all logits and draws the same tokens, so each computes the same drafts.
    """

    drafter: Any
    input_batch: Any
    model: Any

    def load_model(self, *args: Any, **options: Any) -> None:
        super().load_model(*args, **options)  # type: ignore[misc]
        hide_mask(self.model, self.drafter.proposal.mask)
        if self.drafter.adapter is not None:
            self.drafter.adapter.attach(self)

    def set_active_loras(
        self, input_batch: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any = None, *kind: Any
    ) -> None:
        if self.drafter.adapter is not None:
            self.drafter.adapter.choose(self, input_batch, num_scheduled_tokens, num_sampled_tokens)
        else:
            super().set_active_loras(  # type: ignore[misc]
                input_batch, num_scheduled_tokens, num_sampled_tokens, *kind
            )

    def _sample(self, logits: Tensor, spec_decode_metadata: Any) -> Any:
        self._best = logits.argmax(dim=-1)  # before sampling, which may change logits in place
        return super()._sample(logits, spec_decode_metadata)  # type: ignore[misc]

    def propose_draft_token_ids(self, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        self.drafter.see([scheduled.get(name, ()) for name in self.input_batch.req_ids], self._best.tolist())
        return super().propose_draft_token_ids(scheduler_output, *args, **options)  # type: ignore[misc]


def hide_mask(model: Any, mask: int) -> None:
    """Give the mask token the logit minus infinity: it is never sampled, accepted or counted in a probability."""
    compute = model.compute_logits

    def compute_logits(*args: Any, **options: Any) -> Tensor | None:
        logits: Tensor | None = compute(*args, **options)
        if logits is not None:  # with tensor parallelism a rank may have none
            logits[:, mask] = -torch.inf
        return logits

    model.compute_logits = compute_logits


def put_before(runner: Any) -> None:
    """Give a runner that vLLM made the methods of `MaskedModelRunner`. vLLM names its class in the middle of a function
    that also starts the device, so there is no class to hand in."""
    kind = type(runner)
    runner.__class__ = type(f"Masked{kind.__name__}", (MaskedModelRunner, kind), {})
