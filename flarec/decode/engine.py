"""The engine: prompts in, generations out, in one of its modes on one lowered decode program."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, Unpack

import torch

from flarec.base.fields import LARGEST, shown, whole_number
from flarec.base.generation import (
    MODES,
    GenerationKeywords,
    GenerationOptions,
    merged,
    per_prompt,
    takes_options,
    token_ids,
)
from flarec.base.recent import last_used
from flarec.errors import GenerationError
from flarec.layout import READOUTS

from .ends import PLACED
from .graphs import CudaReplays, PlainReplays
from .modes.ar_trust import ARTrustMode
from .modes.causal import CausalMode
from .modes.diffusion_trust import DiffusionTrustMode
from .modes.elastic import ElasticMode
from .modes.placed_trust import PlacedTrustMode
from .modes.rechecked_elastic import RecheckedElasticMode
from .modes.rechecked_trust import RecheckedTrustMode
from .noise_ids import NoiseIds, Ranges, pool_of
from .plan import DecodeProgram
from .policy import DraftPolicy, choices_of
from .prefix import PrefixCache
from .recheck import Recheck
from .request import MOST_LOGPROBS, Generation, OnTokens, Prompts, Request, StopCheck, Stopping
from .rows import Mode
from .scheduler import PREFILL_ROWS, Lane, Scheduler
from .stats import DecodeStats
from .stepper import BlockSpec
from .stores import Shelf, Static

PREFILL_CHUNK = {"cuda": 2048, "cpu": 512}
"""Clean rows per request of one prefill forward beside running requests, by device: beside a GPU a forward takes the
host as long whatever it reads."""
PREFILL_ALONE = {"cuda": PREFILL_ROWS}
"""Clean rows of one prefill forward, all requests together, while nothing runs; elsewhere as beside running ones."""
SLOTS = 64
OF_A_LANE: dict[str, tuple[str, ...]] = {
    "causal": (),
    "ar-trust": ("drafts",),
    "diffusion-trust": ("threshold", "denoising_steps", "recheck"),
    "elastic": ("threshold", "recheck"),
}
"""What requests of a mode that share a forward agree in, besides `suppress`: what the mode reads. With a recheck of
whole blocks also in `eos_ids`."""
MOST_POLICIES = 64
"""Kinds of lanes of which is remembered how much drafting pays: those that were used last."""
GRAPHS = ("auto", "off")
NO_DENOISING = (
    "the noise of this checkpoint is random ids, which do not say what positions of a block are still masked, and mode "
    "'diffusion-trust' needs that; use ar-trust, or convert with mask_token = \"vector\""
)
OnEnd = Callable[[int, Generation], None]


class Engine:
    """Generation on a lowered decode program.

    `generate` serves a list of prompts and keeps no state: threads may share an engine. `add`, `step` and `cancel`
    serve requests that come and go, from one thread.

    program        runs forwards (`DecodeProgram`)
    mask_token_id  input id of a masked position; None for a model that was not converted
    noise_ids      ranges [first, end) of the ids that masked positions show, drawn at random, in the place of that one
                   (docs/semantics.md section 3); none: they show it
    block_size     noisy positions per block; None for a model that was not converted (causal mode only)
    readouts       mode -> "causal" or "block_end", from the checkpoint
    eos_ids        ids that end a request, unless its options name others
    max_positions  context length: prompt and new tokens together
    suppress       ids that are never generated (the mask token), besides those of a request
    slots          requests that run at the same time
    graphs         "auto": steps on a CUDA device are replayed as graphs (`flarec.decode.graphs`); "off": never
    causal         gives the program of causal decoding where that is another one, which does less for clean rows and
                   gives their logits bit for bit; asked when it is needed. Of `drafts="auto"` it runs the steps that
                   draft nothing
    static         what runs the steps of running requests, whose shapes are few, in the place of the program: one that
                   is compiled for them, and what reads prompts after many of them; None: the program itself
    horizon        gives the program of elastic decoding (`flarec.decode.horizon`); None: the checkpoint has no head
                   that says how many drafts are safe
    prefix_cache   bytes for prompts that were read before (`flarec.decode.prefix`); 0: every prompt is read anew
    stats          what it has done so far
    """

    def __init__(
        self,
        program: DecodeProgram,
        *,
        mask_token_id: int | None,
        noise_ids: Ranges = (),
        block_size: int | None,
        readouts: Mapping[str, str],
        eos_ids: Collection[int],
        max_positions: int,
        suppress: Collection[int] = (),
        slots: int = SLOTS,
        graphs: str = "auto",
        causal: Callable[[], DecodeProgram] | None = None,
        static: Static | None = None,
        horizon: Callable[[], DecodeProgram] | None = None,
        prefix_cache: int = 0,
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
        self._causal = causal if causal is not None else lambda: program
        self._horizon = horizon
        self.mask_token_id = mask_token_id
        self.noise = NoiseIds(pool_of(noise_ids, program.device)) if noise_ids else None
        self.block_size = block_size
        self.readouts = dict(readouts)
        self.eos_ids = frozenset(token_ids(eos_ids, "eos_ids"))
        self.max_positions = max_positions
        self.suppress: Collection[int] = frozenset(token_ids(suppress, "suppress"))
        self.slots = whole_number("slots", slots, GenerationError, low=1)
        self._suppressed(())
        if graphs not in GRAPHS:
            raise GenerationError(f"unknown graphs {shown(graphs)}; choose {' or '.join(GRAPHS)}")
        self.stats = DecodeStats()
        self.prefixes: PrefixCache | None = None
        self.keep_prefixes(prefix_cache)
        self.shelf: Shelf | None = None
        if graphs == "auto" and program.device.type == "cuda":
            self.shelf = Shelf(lambda: CudaReplays(program.device), static)
        elif static is not None:
            self.shelf = Shelf(PlainReplays, static)
        self._policies: dict[Hashable, DraftPolicy] = {}
        self._choosing = threading.Lock()
        self.prefill_chunk = chunk_on(program.device)
        self._serving = self._scheduler(self.slots)
        self._added = 0

    def keep_prefixes(self, limit: int) -> None:
        """Remember what was read of prompts, in at most `limit` bytes on the program's device; 0 forgets all of it."""
        limit = whole_number("prefix_cache", limit, GenerationError, low=0, high=LARGEST)
        self.prefixes = PrefixCache(limit) if limit else None

    @takes_options
    def generate(
        self,
        prompts: Prompts,
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        *,
        stop_check: StopCheck | Sequence[StopCheck | None] | None = None,
        on_tokens: OnTokens | None = None,
        on_end: OnEnd | None = None,
        batch: int | None = None,
        prefill_chunk: int | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> list[Generation]:
        """Generate for all prompts; the result of a prompt does not depend on the others.

        prompts            token ids, at least one each: lists, arrays or tensors
        options, keywords  one `GenerationOptions` for all or one per prompt; keywords are put over them. Where one is
                           None: causal, branches, 0.9, a step per position of a block, no recheck, and the engine's
                           `eos_ids`
        stop_check         see `Stopping`; one for all or one per prompt (`TextStream.stop_check` finds text)
        on_tokens          called with (prompt index, new token ids) as tokens become final
        on_end             called with (prompt index, generation) when a prompt has ended
        batch              prompts that run at the same time (default: the engine's slots); more wait, the longest come
                           first
        prefill_chunk      clean rows per prompt of one prefill forward (default: `PREFILL_CHUNK` of the device, and
                           `PREFILL_ALONE` while no request runs); with a prefix cache its whole pages, at least one

        Raises `GenerationError` for arguments that cannot be served.
        """
        rows = len(prompts)
        each = [self._filled(item) for item in per_prompt(options, keywords, rows)]
        checks = list(stop_check) if isinstance(stop_check, Sequence) else [stop_check] * rows
        if len(checks) != rows:
            raise GenerationError(f"{rows} prompts came with {len(checks)} stop checks; give one for all or one each")
        if prefill_chunk is not None:
            prefill_chunk = whole_number("prefill_chunk", prefill_chunk, GenerationError, low=1)
        slots = self.slots if batch is None else whole_number("batch", batch, GenerationError, low=1)
        requests = [
            self._request(index, prompt, item, check, on_tokens)
            for index, (prompt, item, check) in enumerate(zip(prompts, each, checks, strict=True))
        ]
        scheduler = self._scheduler(slots, prefill_chunk)
        for request in _in_order(requests, slots):
            scheduler.add(request)
        try:
            while scheduler.busy:
                for request in scheduler.step():
                    generation = request.generation()
                    if on_end is not None:
                        on_end(request.index, generation)
        finally:
            scheduler.close()
        return [request.generation() for request in requests]

    def add(
        self,
        prompt: Any,
        options: GenerationOptions | None = None,
        *,
        stop_check: StopCheck | None = None,
        on_tokens: OnTokens | None = None,
        logprobs: int | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Request:
        """Take a request; it runs in the following steps, beside those that run already. Arguments as in `generate`;
        on_tokens is told the `index` of the request, which counts them.

        logprobs: keep how likely each new token was, and this many alternatives (0: none), in `Request.chosen`; such
        requests step beside those that want as many, and never as CUDA graphs.
        """
        filled = self._filled(merged(options, keywords))
        if logprobs is not None:
            logprobs = whole_number("logprobs", logprobs, GenerationError, low=0, high=MOST_LOGPROBS)
        request = self._request(self._added, prompt, filled, stop_check, on_tokens, "the prompt")
        request.logprobs = logprobs
        self._added += 1
        self._serving.add(request)
        return request

    def step(self) -> list[Request]:
        """One forward of everything that runs, and a chunk of a prompt. Returns the requests that ended
        (`Request.generation` is what they produced); an empty list if there is nothing to do."""
        return self._serving.step()

    def cancel(self, request: Request) -> None:
        """End a request where it is; its `generation` holds what it produced so far."""
        if not request.finished:
            request.end("cancelled")

    def reset(self) -> None:
        """Give up everything that was added: after a step that raised, nobody knows what the requests hold."""
        self._serving.close()

    @property
    def busy(self) -> bool:
        """Whether any request that was added waits or runs."""
        return self._serving.busy

    def _scheduler(self, slots: int, chunk: int | None = None) -> Scheduler:
        """chunk: of prefills, whatever runs; None: as the device has it best."""
        alone = 0 if chunk is not None else PREFILL_ALONE.get(self.program.device.type, 0)
        size = self.prefill_chunk if chunk is None else chunk

        def key(request: Request) -> Hashable:
            options = request.options
            assert options.mode is not None
            ends = options.eos_ids if options.mode == "diffusion-trust" and options.recheck else None
            read = tuple(getattr(options, name) for name in OF_A_LANE[options.mode])
            return options.mode, *read, options.suppress, ends, request.logprobs

        def lane(request: Request, key: Hashable) -> Lane:
            mode, suppress = self._mode(request.options, key), self._suppressed(request.options.suppress)
            stores = self.shelf.of(key) if self.shelf is not None and request.logprobs is None else None
            program = self._program(request.options)
            undrafted = (request.options.mode, request.options.drafts) == ("ar-trust", "auto")
            bare = self._causal() if undrafted else None
            return Lane(
                program, mode, suppress, slots, size, self.stats, stores, self.prefixes, self._reader, alone, bare
            )

        return Scheduler(lane, key)

    def _reader(self, program: DecodeProgram) -> DecodeProgram:
        """What reads the next prompts of a program."""
        return program if self.shelf is None else self.shelf.reader(program, self.stats.prompt_tokens)

    def _program(self, options: GenerationOptions) -> DecodeProgram:
        """What runs a request."""
        if options.mode == "elastic" or (options.mode == "ar-trust" and options.drafts == "horizon"):
            assert self._horizon is not None, "the request was refused"
            return self._horizon()
        return self._causal() if options.mode == "causal" else self.program

    def _mode(self, options: GenerationOptions, key: Hashable = None) -> Mode:
        """What decodes a request whose options are complete. key: of its lane; None: for nobody that runs."""
        assert options.drafts is not None and options.threshold is not None and options.denoising_steps is not None
        recheck = Recheck(options.recheck) if options.recheck else None
        blocks = self._blocks_of(options)
        if blocks is None:
            return CausalMode()
        if options.mode == "ar-trust":
            if options.drafts == "horizon":
                return PlacedTrustMode(blocks, self._policy(key, PLACED), self.program.vocab_size)
            policy = self._policy(key) if options.drafts == "auto" else None
            return ARTrustMode(blocks, branches=options.drafts != "single", policy=policy)
        if options.mode == "diffusion-trust":
            given = blocks, options.threshold, options.denoising_steps
            if recheck is None:
                return DiffusionTrustMode(*given)
            return RecheckedTrustMode(*given, recheck, options.eos_ids or (), self.program.device)
        told = blocks, options.threshold, self.program.vocab_size
        return ElasticMode(*told) if recheck is None else RecheckedElasticMode(*told, recheck)

    def _policy(self, key: Hashable, placed: Sequence[int] = ()) -> DraftPolicy:
        """How much the steps of a lane draft. What one call learns about this model here serves the next one, and lanes
        that take turns learn from steps of their own alone. placed: see `choices_of`."""
        blocks = self._blocks("ar-trust")

        def make() -> DraftPolicy:
            return DraftPolicy(choices_of(blocks.size, blocks.readout, placed))

        if key is None:
            return make()
        with self._choosing:
            return last_used(self._policies, key, make, MOST_POLICIES)

    def _filled(self, options: GenerationOptions) -> GenerationOptions:
        steps = self.block_size or 1
        filled = options.filled(mode="causal", drafts="branches", threshold=0.9, denoising_steps=steps, recheck=0.0)
        return filled.filled(eos_ids=self.eos_ids)

    def _blocks_of(self, options: GenerationOptions) -> BlockSpec | None:
        """The noisy blocks of a request whose options are complete; None: it has none. Raises `GenerationError` where
        this model cannot decode so; on the device nothing is made."""
        if options.mode == "elastic":
            return self._told_blocks("mode 'elastic'")
        if options.mode == "ar-trust" and options.drafts == "horizon":
            return self._told_blocks("drafts 'horizon'")
        return None if options.mode in (None, "causal") else self._blocks(options.mode)

    def _blocks(self, mode: str) -> BlockSpec:
        """The noisy blocks of a mode that has some."""
        if self.block_size is None or self.mask_token_id is None:
            raise GenerationError(f"this model is not converted and cannot decode in mode {mode!r}: run flarec convert")
        if mode == "diffusion-trust" and self.noise is not None:
            raise GenerationError(NO_DENOISING)
        if mode not in self.readouts:
            raise GenerationError(f"the checkpoint names no readout for mode {mode!r}: convert it again")
        # the last row of a denoised block would choose the next block's first token, which a clean row chooses
        heads = self.block_size if mode == "ar-trust" else self.block_size - 1
        return BlockSpec(self.block_size, heads, self.readouts[mode], self.mask_token_id, self.noise)

    def _told_blocks(self, what: str) -> BlockSpec:
        """The drafts of AR-Trust, where a part of them stands alone, and a head says how many are safe."""
        blocks = self._blocks("ar-trust")
        if blocks.readout != "causal":
            raise GenerationError(
                f"this checkpoint's drafts read their whole block ({blocks.readout}), so that no part of them stands "
                f"alone, and {what} needs causal ones: convert with the recipe fluid, adapter or draft"
            )
        if self._horizon is None:
            raise GenerationError(
                f"this checkpoint has no head that says how many drafts are safe, which {what} needs: train one with "
                "flarec train-head"
            )
        return blocks

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
        self, index: int, prompt: Any, options: GenerationOptions, check: StopCheck | None, on_tokens: OnTokens | None,
        name: str | None = None,
    ) -> Request:
        if options.stop and check is None:
            raise GenerationError("text to stop at needs a tokenizer; use Model.generate, or give a stop_check")
        tokens = self.read_prompt(prompt, name or f"prompt {index}")
        limit = min(options.max_new_tokens, self.max_positions - len(tokens))
        assert options.eos_ids is not None
        self._blocks_of(options)
        self._suppressed(options.suppress)
        return Request(index, tokens, limit, Stopping(options.eos_ids, check, on_tokens), options)

    def read_prompt(self, prompt: Any, name: str = "the prompt") -> list[int]:
        """The token ids of a prompt that can be served. Raises `GenerationError` that calls it by `name`."""
        if isinstance(prompt, str) or not isinstance(prompt, Iterable) or getattr(prompt, "ndim", 1) == 0:
            raise GenerationError(f"{name} is {shown(prompt)}; give a list of token ids per prompt")
        tokens = token_ids(prompt, name)
        vocab = self.program.vocab_size
        if not tokens:
            raise GenerationError(f"{name} is empty; give at least one token (for example BOS)")
        if len(tokens) >= self.max_positions:
            raise GenerationError(
                f"{name} has {len(tokens)} tokens, which leaves no room for new ones in a context of "
                f"{self.max_positions}; shorten it"
            )
        outside = next((token for token in tokens if not 0 <= token < vocab), None)
        if outside is not None:
            raise GenerationError(f"{name} contains id {shown(outside)}, outside the vocabulary of {vocab}")
        return tokens


def chunk_on(device: torch.device) -> int:
    """`PREFILL_CHUNK` of a device."""
    return PREFILL_CHUNK.get(device.type, PREFILL_CHUNK["cpu"])


def longest_piece(device: torch.device, requests: int = 1) -> int:
    """Clean rows per request of the longest prefill forward of so many long prompts."""
    rows = PREFILL_ALONE.get(device.type, chunk_on(device) * requests)
    return max(1, min(rows, PREFILL_ROWS) // requests)


def _in_order(requests: Sequence[Request], slots: int) -> list[Request]:
    """The longest prompts first if some must wait: those that run together have about the same length."""
    if len(requests) <= slots:
        return list(requests)
    return sorted(requests, key=lambda request: -len(request.prompt))
