"""The class that vLLM loads as `custom_class` (`vllm/v1/spec_decode/custom_class_proposer.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flarec.errors import UsageError

from .adapter import MaskRowAdapter
from .checks import adapter_of, proposal_of

WORKER = "flarec.serve.vllm.worker.Worker"
SCHEDULER = "flarec.serve.vllm.scheduler.CountingScheduler"
PROPOSER = "flarec.serve.vllm.proposer.Proposer"


class Proposer:
    """Drafts for all requests of a batch, from what the runner (`flarec.serve.vllm.runner`) saw of their last forward.

    vllm_config: of vLLM. Raises `CheckpointError` for a checkpoint that cannot draft, `UsageError` without our worker.
    """

    def __init__(self, vllm_config: Any) -> None:
        speculative = vllm_config.speculative_config
        directory = Path(vllm_config.model_config.model)
        block = proposal_of(directory).block
        self.proposal = proposal_of(directory, speculative.num_speculative_tokens - block)
        if vllm_config.parallel_config.worker_cls != WORKER:
            raise UsageError(f"{PROPOSER} needs --worker-cls {WORKER}; `flarec serve --engine vllm` sets both")
        folder = adapter_of(directory)
        self.adapter = None if folder is None else MaskRowAdapter(folder, self.proposal.mask)
        self._scheduled: Sequence[Sequence[int]] = ()
        self._best: Sequence[int] = ()

    def load_model(self, model: Any) -> None:
        """vLLM gives the target model; nothing else is to be loaded."""

    def see(self, scheduled: Sequence[Sequence[int]], best: Sequence[int]) -> None:
        """What the forward had behind the pending token of each request, and the likeliest token of each row."""
        self._scheduled, self._best = scheduled, best

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """The drafts of each request; vLLM gives what came of their last forward."""
        proposals, start = [], 0
        for scheduled, sampled in zip(self._scheduled, sampled_token_ids, strict=True):
            stop = start + len(scheduled) + 1
            proposals.append(self.proposal.next(scheduled, sampled, self._best[start:stop]))
            start = stop
        return proposals
