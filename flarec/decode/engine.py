"""The engine: prompts in, generations out, in one of three modes on one lowered decode program."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Unpack

import torch

from flarec.base.fields import shown, whole_number
from flarec.base.generation import (
    MODES,
    GenerationKeywords,
    GenerationOptions,
    Mode,
    per_prompt,
    takes_options,
    token_ids,
)
from flarec.errors import GenerationError
from flarec.layout import READOUTS

from .batch import RequestBatch
from .modes.ar_trust import decode_ar_trust
from .modes.causal import decode_causal
from .modes.diffusion_trust import decode_diffusion_trust
from .plan import DecodeProgram
from .request import Generation, OnTokens, Prompts, Request, StopCheck, Stopping
from .stepper import BlockSpec

PREFILL_CHUNK = 512  # clean rows of one prefill forward
OF_A_BATCH = ("mode", "drafts", "threshold", "denoising_steps", "suppress")


class Engine:
    """Generation on a lowered decode program. Calls keep no state in it: threads may share one.

    program        runs forwards (`DecodeProgram`)
    mask_token_id  input id of a masked position; None for a model that was not converted
    block_size     noisy positions per block; None for a model that was not converted (causal mode only)
    readouts       mode -> "causal" or "block_end", from the checkpoint
    eos_ids        ids that end a request, unless its options name others
    max_positions  context length: prompt and new tokens together
    suppress       ids that are never generated (the mask token), besides those of a request
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
        if block_size is not None:
            block_size = whole_number("block_size", block_size, GenerationError, low=1, high=max_positions)
        if mask_token_id is not None:  # a mask vector has the id after the last one
            mask_token_id = whole_number(
                "mask_token_id", mask_token_id, GenerationError, low=0, high=program.vocab_size
            )
        unknown = {mode: readout for mode, readout in readouts.items() if mode not in MODES or readout not in READOUTS}
        if unknown:
            raise GenerationError(
                f"cannot use readouts {unknown}; modes are {', '.join(MODES)}, readouts are {', '.join(READOUTS)}"
            )
        self.program = program
        self.mask_token_id = mask_token_id
        self.block_size = block_size
        self.readouts = dict(readouts)
        self.eos_ids = frozenset(token_ids(eos_ids, "eos_ids"))
        self.max_positions = max_positions
        self.suppress: Collection[int] = frozenset(token_ids(suppress, "suppress"))
        self._suppressed(())

    @takes_options
    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        *,
        stop_check: StopCheck | Sequence[StopCheck | None] | None = None,
        on_tokens: OnTokens | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        **keywords: Unpack[GenerationKeywords],
    ) -> list[Generation]:
        """Generate for all prompts as one batch; the result of a prompt does not depend on the others.

        prompts            token ids, at least one each: lists, arrays or tensors
        options, keywords  one `GenerationOptions` for all or one per prompt; keywords are put over them. Those of one
                           batch agree in mode, drafts, threshold, denoising_steps and suppress. Where one is None:
                           causal, branches, 0.9, a step per position of a block, and the engine's `eos_ids`
        stop_check         see `Stopping`; one for all or one per prompt (`TextStream.stop_check` finds text)
        on_tokens          called with (prompt index, new token ids) as tokens become final
        prefill_chunk      clean rows of one prefill forward

        Raises `GenerationError` for arguments that cannot be served.
        """
        rows = len(prompts)
        each = [self._filled(item) for item in per_prompt(options, keywords, rows)]
        if not rows:
            return []
        shared = _shared(each)
        checks = list(stop_check) if isinstance(stop_check, Sequence) else [stop_check] * rows
        if len(checks) != rows:
            raise GenerationError(f"{rows} prompts came with {len(checks)} stop checks; give one for all or one each")
        chunk = whole_number("prefill_chunk", prefill_chunk, GenerationError, low=1)
        assert shared.mode is not None
        blocks, suppress = self._blocks(shared.mode), self._suppressed(shared.suppress)
        requests = [
            self._request(index, prompt, item, check, on_tokens)
            for index, (prompt, item, check) in enumerate(zip(prompts, each, checks, strict=True))
        ]
        batch = RequestBatch(self.program, requests, each, suppress, blocks)
        _decode(batch, chunk, shared)
        return [request.generation(shared.mode) for request in requests]

    def _filled(self, options: GenerationOptions) -> GenerationOptions:
        steps = self.block_size or 1
        filled = options.filled(mode="causal", drafts="branches", threshold=0.9, denoising_steps=steps)
        return filled.filled(eos_ids=self.eos_ids)

    def _blocks(self, mode: Mode) -> BlockSpec | None:
        """The noisy blocks of a mode; None for causal decoding."""
        if mode == "causal":
            return None
        if self.block_size is None or self.mask_token_id is None:
            raise GenerationError(f"this model is not converted and cannot decode in mode {mode!r}: run flarec convert")
        if mode not in self.readouts:
            raise GenerationError(f"the checkpoint names no readout for mode {mode!r}: convert it again")
        # the last row of a denoised block would choose the next block's first token, which a clean row chooses
        heads = self.block_size if mode == "ar-trust" else self.block_size - 1
        return BlockSpec(self.block_size, heads, self.readouts[mode], self.mask_token_id)

    def _suppressed(self, more: Collection[int]) -> list[int]:
        """The ids that are never generated, of the engine and of a call."""
        ids, vocab = sorted({*self.suppress, *more}), self.program.vocab_size
        outside = [token for token in ids if not 0 <= token < vocab]
        if outside:
            raise GenerationError(f"suppressed ids {shown(outside)} are outside the vocabulary of {vocab}")
        if len(ids) == vocab:
            raise GenerationError(f"all {vocab} ids of the vocabulary are suppressed; leave some to generate")
        return ids

    def _request(
        self, index: int, prompt: Any, options: GenerationOptions, check: StopCheck | None, on_tokens: OnTokens | None
    ) -> Request:
        if options.stop and check is None:
            raise GenerationError("text to stop at needs a tokenizer; use Model.generate, or give a stop_check")
        if isinstance(prompt, str) or not isinstance(prompt, Iterable) or getattr(prompt, "ndim", 1) == 0:
            raise GenerationError(f"prompt {index} is {shown(prompt)}; give a list of token ids per prompt")
        tokens = token_ids(prompt, f"prompt {index}")
        vocab = self.program.vocab_size
        if not tokens:
            raise GenerationError(f"prompt {index} is empty; give at least one token (for example BOS)")
        if len(tokens) >= self.max_positions:
            raise GenerationError(
                f"prompt {index} has {len(tokens)} tokens, which leaves no room for new ones in a context of "
                f"{self.max_positions}; shorten it"
            )
        outside = next((token for token in tokens if not 0 <= token < vocab), None)
        if outside is not None:
            raise GenerationError(f"prompt {index} contains id {shown(outside)}, outside the vocabulary of {vocab}")
        limit = min(options.max_new_tokens, self.max_positions - len(tokens))
        assert options.eos_ids is not None
        return Request(index, tokens, limit, Stopping(options.eos_ids, check, on_tokens))


def _shared(options: Sequence[GenerationOptions]) -> GenerationOptions:
    """The first of a batch's options, for what they must agree in."""
    first = options[0]
    for name in OF_A_BATCH:
        values = {getattr(item, name) for item in options}
        if len(values) > 1:
            raise GenerationError(f"prompts of one batch differ in {name}; generate them in batches of their own")
    return first


def _decode(batch: RequestBatch, chunk: int, options: GenerationOptions) -> None:
    """Run every request of the batch to its end."""
    assert options.drafts is not None and options.threshold is not None and options.denoising_steps is not None
    if options.mode == "causal":
        decode_causal(batch, chunk)
    elif options.mode == "ar-trust":
        decode_ar_trust(batch, chunk, options.drafts)
    else:
        decode_diffusion_trust(batch, chunk, options.threshold, options.denoising_steps)
