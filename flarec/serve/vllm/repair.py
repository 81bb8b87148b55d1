"""vLLM 0.32.0 on a CPU: temperature, top-k and top-p of a step with drafts are numbers that nobody wrote.

`expand_batch_to_tokens` repeats a request's value for each of its drafts. Its form for CPUs fills an int64 copy of what
it should fill, so that values of other types stay as they were allocated (vllm/utils/cpu_triton_utils.py). Every method
of speculative decoding is concerned (findings/vllm-cpu-drafts-lose-the-temperature.sh).
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """Repeat the value of each request for its tokens.

    x: [requests], any type. cu_num_tokens: [requests], tokens of it and of those before it. num_tokens: of all. A value
    of `replace_from` becomes `replace_to`. Returns [num_tokens] of the type of `x`.
    """
    counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
    repeated = torch.repeat_interleave(x, counts, output_size=num_tokens)
    return torch.where(repeated == replace_from, torch.full_like(repeated, replace_to), repeated)


def repair_sampling() -> bool:
    """Put `expand` in the place of vLLM's function, where that is wrong; whether it was."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if current_platform.device_type != "cpu" or _is_right(rejection_sampler.expand_batch_to_tokens):
        return False
    rejection_sampler.expand_batch_to_tokens = expand
    return True


def _is_right(function: object) -> bool:
    counts = torch.tensor([2, 3], dtype=torch.int32)
    values = (torch.tensor([0.5, 2.0]), torch.tensor([5, 7], dtype=torch.int32))
    return all(
        torch.equal(function(value, counts, 3), torch.repeat_interleave(value, torch.tensor([2, 1])))  # type: ignore[operator]
        for value in values
    )
