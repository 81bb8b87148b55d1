"""The Python interface: `flarec.load(path).generate(prompt)`.

A loaded model is captured and lowered once; every mode then runs on the same decode program, but for causal decoding
over an adapter, which runs the source's. Models that were not converted decode causally.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack, overload

import torch
from torch import nn

from .base.fields import shown, whole_number
from .base.generation import GenerationKeywords, GenerationOptions, per_prompt, takes_options
from .checkpoint.directory import Checkpoint, context_of, open_checkpoint
from .checkpoint.horizon import horizon_of
from .checkpoint.lowered import lowered, lowered_elastic, lowered_source
from .checkpoint.manifest import Manifest
from .collector import collector_paused
from .decode import DecodeProgram, Engine, Generation, TextStream
from .decode.engine import NO_DENOISING
from .decode.horizon import HorizonProgram
from .decode.request import OnTokens, Origin, Prompts
from .decode.stores import Static
from .decode.text import cut
from .decode.tokenizing import ByteFallback, Prompt, decode_tokens, encode_prompt, is_list
from .device import resolve_compile, resolve_kernels, torch_device, torch_dtype
from .errors import CheckpointError, GenerationError, UsageError
from .frontend.export import capture
from .frontend.opening import Opened, modelling_code_untouched, opening_of
from .ir.compiled import Codes, compiled_by_region, reading_codes, step_codes
from .ir.program import Program
from .passes.adapt_noisy_stream import adapter_parameters
from .passes.embed_mask import PARAMETER
from .passes.plugins import load_plugins
from .threads import settle

COMPILE_AFTER = 1000
"""Steps of an engine after which `compile="auto"` compiles: about what compiling costs."""
OnText = Callable[[int, str], None]
OnOutput = Callable[[int, "Output"], None]


@dataclass(frozen=True)
class Output:
    """What one prompt gave.

    text               new text, without special tokens, cut before a stop string
    token_ids          new tokens; EOS and the tokens of a stop string included
    mode               "causal", "ar-trust", "diffusion-trust" or "elastic"
    forwards           forward passes, the prefill included
    new_tokens         len(token_ids)
    tokens_per_forward new_tokens / forwards
    accepted           accepted[n] = steps that accepted n drafts (ar-trust), committed n tokens (diffusion-trust) or
                       took n drafts (elastic); with a recheck, that kept n tokens of noisy rows
                       (`flarec.decode.Generation`)
    seconds            wall time until this prompt's last token
    stop_reason        "eos", "stop" (a stop string) or "length"
    origins            where each new token comes from: "clean", "accepted", "corrected" or "unverified"
                       (`flarec.decode.request.Origin`)
    taken_back         tokens that a recheck took back, with those that it dropped behind them
    """

    text: str
    token_ids: list[int]
    mode: str
    forwards: int
    new_tokens: int
    tokens_per_forward: float
    accepted: list[int]
    seconds: float
    stop_reason: str
    origins: list[Origin]
    taken_back: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `flarec generate --json` prints them."""
        return asdict(self)


class Model:
    """A model that is ready to generate.

    hf_model, tokenizer  transformers objects; the program computes with hf_model's own parameters. A model that was
                         opened before is built when somebody asks for it (`flarec.frontend.opening`)
    manifest             of a converted checkpoint, None for a source model
    program              the captured program; `decode_program` is what runs
    kernels              implementation of the token mixers: "triton", "torch" or "reference"
    engine               generates token ids (`flarec.decode.Engine`)
    """

    def __init__(
        self,
        hf_model: Any,
        tokenizer: Any,
        checkpoint: Checkpoint,
        extra: Mapping[str, nn.Parameter] | None = None,
        *,
        kernels: str = "auto",
        cache: bool = False,
        passes: Sequence[str] = (),
        plugins: Sequence[str | Path] = (),
        opened: Opened | None = None,
        graphs: str = "auto",
        compile: str = "auto",
    ) -> None:
        """The model of a checkpoint, loaded. `cache`: see `flarec.capture`; for a model as it came from its files.

        opened: its program and tensors; hf_model is then a function that gives the transformers model with these.
        """
        manifest = checkpoint.manifest
        vector = manifest is not None and manifest.mask.kind == "vector"
        if vector and PARAMETER not in (extra or {}):
            raise CheckpointError(
                f"the checkpoint has no mask vector ({PARAMETER} in a file flarec.safetensors); copy it again"
            )
        self._hf_model = hf_model if opened is None else None
        self._build = hf_model
        self.tokenizer = tokenizer
        self.manifest = manifest
        self.program = opened.program if opened is not None else capture(hf_model, cache=cache)
        self.program.extra.update(extra or {})
        self.kernels = resolve_kernels(kernels, self.program.device)
        settle(sum(parameter.numel() for parameter in self.program.parameters().values()))
        self._checkpoint, self._foreign = checkpoint, bool(passes)
        self._passes, self._plugins = tuple(passes), tuple(plugins)
        self._plain: Program | None = None
        self._elastic: HorizonProgram | None = None
        self._lowering = threading.Lock()
        if compile == "auto" and graphs == "off":  # for debugging: steps are run as they are
            compile = "off"
        self.compiles = resolve_compile(compile, self.program.device)
        self.decode_program = lowered(
            checkpoint, self.program, "decode", kernels=self.kernels, fast=self.compiles, regions=self.compiles,
            foreign=passes, plugins=plugins,
        )
        self.eos_ids = checkpoint.eos_ids(self.program.config, tokenizer)
        self.engine = self._engine(graphs, COMPILE_AFTER if compile == "auto" else 0)

    def _engine(self, graphs: str, after: int = 0) -> Engine:
        manifest = self.manifest
        suppress = [manifest.mask.token_id] if manifest and manifest.mask.kind == "row" else []
        return Engine(
            self.decode_program,
            mask_token_id=manifest.mask.token_id if manifest else None,
            noise_ids=manifest.mask.ids if manifest else (),
            block_size=manifest.decode.block_size if manifest else None,
            readouts=manifest.decode.readouts if manifest else {},
            eos_ids=self.eos_ids,
            max_positions=context_of(self.program.config, self.tokenizer),
            suppress=suppress,
            graphs=graphs,
            static=Static(self._static, after, self._reader) if self.compiles else None,
            causal=self._causal if adapter_parameters(self.program) and not self._foreign else None,
            horizon=self._horizon if self._checkpoint.has_horizon else None,
        )

    def _causal(self) -> Program:
        """What runs causal decoding over an adapter: the source's own program."""
        with self._lowering:
            if self._plain is None:
                plain = lowered_source(
                    self._checkpoint, self.program, kernels=self.kernels, regions=self.compiles
                )
                self._plain = plain if plain is not None else self.decode_program
        return self._plain

    def _static(self, program: DecodeProgram) -> DecodeProgram:
        """What runs steps of one of its programs, compiled; elastic decoding runs its own as it is."""
        return self._compiled(program, self._codes)

    def _reader(self, program: DecodeProgram) -> DecodeProgram:
        """What reads prompts for one of its programs, compiled for pieces of any size."""
        return self._compiled(program, self._reading_codes)

    def _compiled(self, program: DecodeProgram, codes: Codes) -> DecodeProgram:
        if isinstance(program, HorizonProgram):
            return program
        assert isinstance(program, Program)
        return compiled_by_region(program, codes)

    @cached_property
    def _codes(self) -> Codes:
        return step_codes()

    @cached_property
    def _reading_codes(self) -> Codes:
        return reading_codes()

    def _horizon(self) -> HorizonProgram:
        """What runs elastic decoding."""
        with self._lowering:
            if self._elastic is None:
                self._elastic = HorizonProgram(lowered_elastic(
                    self._checkpoint, self.program, kernels=self.kernels, foreign=self._passes, plugins=self._plugins
                ))
        return self._elastic

    @property
    def hf_model(self) -> Any:
        if self._hf_model is None:
            self._hf_model = self._build()
        return self._hf_model

    @property
    def converted(self) -> bool:
        return self.manifest is not None

    @overload
    def generate(
        self,
        prompt: str,
        options: GenerationOptions | None = None,
        *,
        chat: bool = False,
        on_text: OnText | None = None,
        on_tokens: OnTokens | None = None,
        on_output: OnOutput | None = None,
        batch: int | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Output: ...
    @overload
    def generate(
        self,
        prompt: Sequence[Any],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        *,
        chat: bool = False,
        on_text: OnText | None = None,
        on_tokens: OnTokens | None = None,
        on_output: OnOutput | None = None,
        batch: int | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Any: ...

    @takes_options
    def generate(
        self,
        prompt: str | Sequence[Any],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        *,
        chat: bool = False,
        on_text: OnText | None = None,
        on_tokens: OnTokens | None = None,
        on_output: OnOutput | None = None,
        batch: int | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Any:
        """Generate for one prompt, or for several (a list gives a list, in the same order).

        prompt   text, or a list of texts. A list of messages ({"role", "content"}) is one conversation; a list may
                 hold such lists too. Conversations always go through the chat template.
        chat     put each text into the chat template as the user's message; else text is continued as it is
        The rest is that of `generate_ids`.

        Raises `GenerationError` for a request that cannot be served.
        """
        single = isinstance(prompt, str) or (is_list(prompt) and len(prompt) > 0 and isinstance(prompt[0], Mapping))
        if not single and not is_list(prompt):
            raise GenerationError(f"the prompt is {shown(prompt)}; give text, a list of messages, or a list of these")
        encoded = [self.encode(item, chat=chat) for item in ([prompt] if single else prompt)]
        outputs = self.generate_ids(
            encoded, options, on_text=on_text, on_tokens=on_tokens, on_output=on_output, batch=batch, **keywords
        )
        return outputs[0] if single else outputs

    @takes_options
    def generate_ids(
        self,
        prompts: Prompts,
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        *,
        on_text: OnText | None = None,
        on_tokens: OnTokens | None = None,
        on_output: OnOutput | None = None,
        batch: int | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> list[Output]:
        """Generate for prompts given as token ids: lists, arrays or tensors.

        options, keywords  see `GenerationOptions`: an object, one for all or one per prompt, and keywords put over it
        on_text            called with (prompt index, new text) as text becomes final
        on_tokens          called with (prompt index, new token ids) as tokens become final
        on_output          called with (prompt index, output) as prompts end
        batch              prompts that run at the same time (default: 64); the others wait, the longest come first

        Raises `GenerationError` for a request that cannot be served.
        """
        each = [self.complete(item) for item in per_prompt(options, keywords, len(prompts))]
        stopping = any(item.stop for item in each)
        settled = ByteFallback(self.tokenizer).settled if stopping or on_text else None
        texts = [TextStream(self.decode, item.stop, settled) for item in each]

        def tell(index: int, tokens: list[int]) -> None:
            if on_tokens is not None:
                on_tokens(index, tokens)
            if on_text is not None and (piece := texts[index].push(tokens)):
                on_text(index, piece)

        def end(index: int, generation: Generation) -> None:
            if on_output is not None:
                on_output(index, self._output(generation, each[index].stop))

        generations = self.engine.generate(
            prompts,
            each,
            stop_check=[text.stop_check for text in texts] if stopping else None,
            on_tokens=tell if on_text or on_tokens else None,
            on_end=end if on_output else None,
            batch=batch,
        )
        if on_text is not None:
            for index, text in enumerate(texts):
                if piece := text.finish():
                    on_text(index, piece)
        return [self._output(generation, item.stop) for generation, item in zip(generations, each, strict=True)]

    def complete(self, options: GenerationOptions) -> GenerationOptions:
        """With the checkpoint's defaults where an option is None. Raises `GenerationError` for a mode without them."""
        check_mode(options.mode, self.manifest)
        if self.manifest is None:
            return options.filled(mode="causal")
        defaults = self.manifest.decode
        mode = options.mode or "ar-trust"
        return options.filled(
            mode=mode, drafts=defaults.drafts, denoising_steps=defaults.denoising_steps or None,
            **defaults.settings(mode),
        )

    def encode(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """Token ids of a text, or of a conversation up to the turn that the model writes. Raises `GenerationError`."""
        return encode_prompt(self.tokenizer, prompt, chat=chat)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of new tokens, without special ones."""
        return decode_tokens(self.tokenizer, tokens)

    def _output(self, generation: Generation, stops: Sequence[str]) -> Output:
        return Output(
            text=cut(self.decode(generation.token_ids), stops),
            token_ids=generation.token_ids,
            mode=generation.mode,
            forwards=generation.forwards,
            new_tokens=generation.new_tokens,
            tokens_per_forward=generation.tokens_per_forward,
            accepted=generation.accepted,
            seconds=generation.seconds,
            stop_reason=generation.stop_reason,
            origins=generation.origins,
            taken_back=generation.taken_back,
        )


def check_mode(mode: str | None, manifest: Manifest | None) -> None:
    """Raise `GenerationError` for a mode that a model without a manifest does not have."""
    if manifest is None and mode not in (None, "causal"):
        raise GenerationError(
            f"this model is not converted, so it cannot decode in mode {mode}; run `flarec convert`, use mode causal, "
            "or give mask_token_id and block_size of a dual-mode checkpoint that another program wrote"
        )
    if mode == "diffusion-trust" and manifest is not None and manifest.mask.kind == "random":
        raise GenerationError(NO_DENOISING)
    if mode == "elastic" and manifest is not None and horizon_of(manifest) is None:
        raise GenerationError(
            "this checkpoint has no head that says how many drafts are safe, which mode 'elastic' needs: train one "
            "with flarec train-head"
        )


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    kernels: str = "auto",
    mask_token_id: int | None = None,
    block_size: int | None = None,
    passes: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    graphs: str = "auto",
    compile: str = "auto",
    adapter: str | Path | None = None,
) -> Model:
    """Open a checkpoint, or a source model, for generation.

    path     directory or hub id
    dtype    what is computed in: a torch dtype or its name. Default: float32 on the CPU (AR-Trust is exact there), else
             as stored
    device   "cpu", "cuda", ... or "auto" (a GPU if there is one)
    kernels  implementation of the token mixers: "triton", "torch" or "reference"; "auto" is triton on a GPU, else torch
    mask_token_id, block_size  of a dual-mode checkpoint that another program wrote: vocabulary row of the mask token
             and positions per block, where its config.json does not state them under these names
    passes   of plugins, as `name(option=value)`, beside those of the checkpoint's own pipeline
    plugins  Python files that define passes, beside the installed plugins; their code runs
    graphs   "auto": on a CUDA device steps are captured as CUDA graphs and replayed; "off": they are run
    compile  "on": what lies between token mixers is compiled for the steps of running requests, with merged projections
             and folded constants; "auto": that on a CUDA device, once 1000 steps were made; "off": never
    adapter  directory that `flarec convert` wrote with an adapter for the model in `path`; another model is refused

    Raises `CheckpointError` for a directory that cannot be used, `UsageError` for the other arguments.
    """
    if mask_token_id is not None:
        mask_token_id = whole_number("mask_token_id", mask_token_id, UsageError)
    if block_size is not None:
        block_size = whole_number("block_size", block_size, UsageError)
    place = torch_device(device)
    wanted = torch_dtype(dtype) or (torch.float32 if place.type == "cpu" else None)
    checkpoint = open_checkpoint(path, mask_token_id=mask_token_id, block_size=block_size, adapter=adapter)
    with collector_paused():
        load_plugins(plugins)  # before the capture: they may declare ops
        # a plugin's code may have a say in what the model becomes: no note covers it
        opening = opening_of(checkpoint.path, wanted, place) if not plugins and modelling_code_untouched() else None
        tokenizer = checkpoint.load_tokenizer()
        opened = opening.restore() if opening is not None else None
        if opened is not None:
            checkpoint.check_mask(opened.rows)

            def build() -> Any:
                model = checkpoint.load_model(wanted, place)
                opened.give_to(model)
                return model

            extra = checkpoint.load_extra(opened.program.dtype, place)
            return Model(
                build, tokenizer, checkpoint, extra, kernels=kernels, opened=opened, passes=passes, graphs=graphs,
                compile=compile,
            )
        hf_model = checkpoint.load_model(wanted, place)
        extra = checkpoint.load_extra(next(hf_model.parameters()).dtype, place)
        model = Model(
            hf_model, tokenizer, checkpoint, extra, kernels=kernels, cache=True, passes=passes, plugins=plugins,
            graphs=graphs, compile=compile,
        )
        if opening is not None:
            opening.store(hf_model)
        return model
