"""The class of `--scheduler-cls`: vLLM's own scheduler, whose numbers of drafts leave masks out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler
except ImportError as error:
    raise ImportError("vLLM is not installed; run: pip install 'flarec[vllm]'") from error

from .checks import proposal_of


class CountingScheduler(VllmScheduler):  # type: ignore[misc]
    """`vllm:spec_decode_num_draft_tokens` counts tokens that could be accepted, in total and by position.

    A step that only masked counts as one without draft tokens, so that accepted tokens per step plus one stay the
    tokens of a forward.
    """

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._scheduled = scheduler_output.scheduled_spec_decode_tokens
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_spec_decoding_stats(
        self, spec_decoding_stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, request_id: str,
        **options: Any,
    ) -> Any:
        stats = super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, *args, request_id=request_id, **options
        )
        if stats is not None:
            real = self._proposal().real(self._scheduled[request_id])
            stats.num_draft_tokens -= num_draft_tokens - real
            for position in range(real, num_draft_tokens):
                stats.num_draft_tokens_per_pos[position] -= 1
        return stats

    def _proposal(self) -> Any:
        if not hasattr(self, "_layout"):
            self._layout = proposal_of(Path(self.vllm_config.model_config.model))
        return self._layout
