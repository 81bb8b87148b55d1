"""The class of `--scheduler-cls`: vLLM's own scheduler, whose numbers of drafts leave masks out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from vllm.logger import init_logger
    from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler
    from vllm.v1.request import RequestStatus
except ImportError as error:
    raise ImportError("vLLM is not installed; run: pip install 'flarec[vllm]'") from error

from .checks import is_hybrid, proposal_of

logger = init_logger(__name__)


class CountingScheduler(VllmScheduler):  # type: ignore[misc]
    """`vllm:spec_decode_num_draft_tokens` counts tokens that could be accepted, in total and by position.

    A step that only masked counts as one without draft tokens, so that accepted tokens per step plus one stay the
    tokens of a forward.

    On a CPU vLLM 0.32 computes layers with a state wrongly for a request whose steps have different numbers of drafts.
    There requests end where the context would cut their drafts, and one whose drafts are cut for another reason, as by
    a grammar, ends with an error.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        directory = Path(self.vllm_config.model_config.model)
        self._proposal = proposal_of(directory)
        self._width = self.vllm_config.speculative_config.num_speculative_tokens
        self._constant = self.vllm_config.device_config.device_type == "cpu" and is_hybrid(directory)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._scheduled = scheduler_output.scheduled_spec_decode_tokens
        self._rows = scheduler_output.num_scheduled_tokens
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_spec_decoding_stats(
        self, spec_decoding_stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, request_id: str,
        **options: Any,
    ) -> Any:
        stats = super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, *args, request_id=request_id, **options
        )
        if stats is not None:
            real = self._proposal.real(self._scheduled[request_id])
            stats.num_draft_tokens -= num_draft_tokens - real
            for position in range(real, num_draft_tokens):
                stats.num_draft_tokens_per_pos[position] -= 1
        return stats

    def _update_request_with_output(self, request: Any, *arguments: Any, **options: Any) -> tuple[list[int], bool]:
        begun = request.num_output_tokens > 0
        tokens, stopped = super()._update_request_with_output(request, *arguments, **options)
        if self._constant:
            name = request.request_id
            count = len(self._scheduled.get(name, ()))
            # of a prompt that is read, for the first time or again, there are more rows than one without a draft
            if begun and count < self._width and self._rows[name] == count + 1:
                logger.warning("%s ends: a grammar or a limit cut its %d drafts to %d", name, self._width, count)
                request.status, stopped = RequestStatus.FINISHED_ERROR, True
            elif not stopped and request.num_tokens > self.max_model_len - 1 - self._width:
                request.status, stopped = RequestStatus.FINISHED_LENGTH_CAPPED, True
        return tokens, stopped
