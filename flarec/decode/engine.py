"""The engine: prompts in, generations out, in one of three modes on one lowered decode program."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch

from flarec.errors import GenerationError
from flarec.layout import READOUTS

from .batch import Batch, BlockSpec
from .modes.ar_trust import DRAFTS, decode_ar_trust
from .modes.causal import decode_causal
from .modes.diffusion_trust import decode_diffusion_trust
from .plan import DecodeProgram
from .request import Generation, OnTokens, Request, StopCheck, Stopping
from .sampling import SamplingParams

MODES = ("causal", "ar-trust", "diffusion-trust")
PREFILL_CHUNK = 512  # clean rows of one prefill forward


class Engine:
    """Generation on a lowered decode program.

    program        runs forwards (`DecodeProgram`)
    mask_token_id  input id of a masked position; None for a model that was not converted
    block_size     noisy positions per block; None for a model that was not converted (causal mode only)
    readouts       mode -> "causal" or "block_end", from the checkpoint
    eos_ids        ids that end a request
    max_positions  context length: prompt and new tokens together
    suppress       ids that are never generated (the mask token)
    """

    def __init__(
        self,
        program: DecodeProgram,
        *,
        mask_token_id: int | None,
        block_size: int | None,
        readouts: Mapping[str, str],
        eos_ids: Collection[int],
        max_positions: int,
        suppress: Collection[int] = (),
    ) -> None:
        if block_size is not None and block_size < 1:
            raise GenerationError(f"block size is {block_size}; it must be at least 1")
        unknown = {mode: readout for mode, readout in readouts.items() if mode not in MODES or readout not in READOUTS}
        if unknown:
            raise GenerationError(
                f"cannot use readouts {unknown}; modes are {', '.join(MODES)}, readouts are {', '.join(READOUTS)}"
            )
        outside = sorted(token for token in suppress if not 0 <= token < program.vocab_size)
        if outside:
            raise GenerationError(f"suppressed ids {outside} are outside the vocabulary of {program.vocab_size}")
        self.program = program
        self.mask_token_id = mask_token_id
        self.block_size = block_size
        self.readouts = dict(readouts)
        self.eos_ids = frozenset(eos_ids)
        self.max_positions = max_positions
        self.suppress = tuple(sorted(suppress))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        mode: str = "causal",
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        max_new_tokens: int | Sequence[int] = 128,
        *,
        drafts: str = "branches",
        threshold: float = 0.9,
        denoising_steps: int | None = None,
        stop_check: StopCheck | None = None,
        on_tokens: OnTokens | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> list[Generation]:
        """Generate for all prompts as one batch; the result of a prompt does not depend on the others.

        prompts          token ids, at least one each
        params           sampling, one for all or one per prompt (default: greedy)
        max_new_tokens   one for all or one per prompt; the context length limits it too
        drafts           ar-trust: "branches" or "single"
        threshold        diffusion-trust: confidence in [0, 1] at which a position is committed
        denoising_steps  diffusion-trust: steps per block (default: the block size); the last one commits all
        stop_check       see `Stopping`; `StopStrings` makes one from text
        on_tokens        called with (prompt index, new token ids) as tokens become final
        prefill_chunk    clean rows of one prefill forward

        Raises `GenerationError` for arguments that cannot be served.
        """
        if not prompts:
            return []
        rows = len(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * rows
        if isinstance(max_new_tokens, int):
            max_new_tokens = [max_new_tokens] * rows
        if len(params) != rows or len(max_new_tokens) != rows:
            raise GenerationError(
                f"{rows} prompts came with {len(params)} sampling parameters and {len(max_new_tokens)} length limits; "
                "give one for all or one per prompt"
            )
        if prefill_chunk < 1:
            raise GenerationError(f"prefill chunk is {prefill_chunk}; it must be at least 1")
        blocks = self._blocks(mode)
        steps = denoising_steps if denoising_steps is not None else (self.block_size or 1)
        _check_mode_options(drafts, threshold, steps)
        stopping = Stopping(self.eos_ids, stop_check, on_tokens)
        requests = [
            Request(index, list(prompt), self._limit(index, prompt, new), stopping)
            for index, (prompt, new) in enumerate(zip(prompts, max_new_tokens, strict=True))
        ]
        batch = Batch(self.program, requests, params, self.suppress, blocks)
        if mode == "causal":
            decode_causal(batch, prefill_chunk)
        elif mode == "ar-trust":
            decode_ar_trust(batch, prefill_chunk, drafts)
        else:
            decode_diffusion_trust(batch, prefill_chunk, threshold, steps)
        return [request.generation(mode) for request in requests]

    def _blocks(self, mode: str) -> BlockSpec | None:
        """The noisy blocks of a mode; None for causal decoding."""
        if mode not in MODES:
            raise GenerationError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
        if mode == "causal":
            return None
        if self.block_size is None or self.mask_token_id is None:
            raise GenerationError(f"this model is not converted and cannot decode in mode {mode!r}: run flarec convert")
        if mode not in self.readouts:
            raise GenerationError(f"the checkpoint names no readout for mode {mode!r}: convert it again")
        # the last row of a denoised block would choose the next block's first token, which a clean row chooses
        heads = self.block_size if mode == "ar-trust" else self.block_size - 1
        return BlockSpec(self.block_size, heads, self.readouts[mode], self.mask_token_id)

    def _limit(self, index: int, prompt: Sequence[int], max_new_tokens: int) -> int:
        """How many new tokens a request may have."""
        if not prompt:
            raise GenerationError(f"prompt {index} is empty; give at least one token (for example BOS)")
        if len(prompt) >= self.max_positions:
            raise GenerationError(
                f"prompt {index} has {len(prompt)} tokens, which leaves no room for new ones in a context of "
                f"{self.max_positions}; shorten it"
            )
        vocab = self.program.vocab_size
        outside = next((token for token in prompt if not 0 <= token < vocab), None)
        if outside is not None:
            raise GenerationError(f"prompt {index} contains id {outside}, outside the vocabulary of {vocab}")
        if max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens is {max_new_tokens} for prompt {index}; it must be at least 1")
        return min(max_new_tokens, self.max_positions - len(prompt))


def _check_mode_options(drafts: str, threshold: float, steps: int) -> None:
    if drafts not in DRAFTS:
        raise GenerationError(f"unknown drafts {drafts!r}; choose one of {', '.join(DRAFTS)}")
    if not (math.isfinite(threshold) and 0 <= threshold <= 1):
        raise GenerationError(f"threshold is {threshold}; it must be a probability in [0, 1]")
    if steps < 1:
        raise GenerationError(f"denoising_steps is {steps}; it must be at least 1")
