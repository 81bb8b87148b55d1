"""The Python interface: `flarec.load(path).generate(prompt)`.

A loaded model is captured and lowered once; every mode then runs on the same decode program. Models that were not
converted decode causally.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from .checkpoint.directory import Checkpoint, context_of, open_checkpoint
from .checkpoint.lowered import lowered
from .collector import collector_paused
from .decode import Engine, Generation, SamplingParams, StopStrings
from .decode.streaming import ShownText, cut
from .device import resolve_kernels, torch_device, torch_dtype
from .errors import CheckpointError, GenerationError
from .frontend.export import capture
from .passes.embed_mask import PARAMETER
from .passes.plugins import load_plugins

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Messages
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Output:
    """What one prompt gave.

    text               new text, without special tokens, cut before a stop string
    token_ids          new tokens; EOS and the tokens of a stop string included
    mode               "causal", "ar-trust" or "diffusion-trust"
    forwards           forward passes, the prefill included
    new_tokens         len(token_ids)
    tokens_per_forward new_tokens / forwards
    accepted           accepted[n] = steps that accepted n drafts (ar-trust) or committed n tokens (diffusion-trust)
    seconds            wall time until this prompt's last token
    stop_reason        "eos", "stop" (a stop string) or "length"
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `flarec generate --json` prints them."""
        return asdict(self)


class Model:
    """A model that is ready to generate.

    hf_model, tokenizer  transformers objects; the program computes with hf_model's own parameters
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
    ) -> None:
        """The model of a checkpoint, loaded. `cache`: see `flarec.capture`; for a model as it came from its files."""
        manifest = checkpoint.manifest
        vector = manifest is not None and manifest.mask.kind == "vector"
        if vector and PARAMETER not in (extra or {}):
            raise CheckpointError(
                f"the checkpoint has no mask vector ({PARAMETER} in flarec.safetensors); copy the checkpoint again"
            )
        self.hf_model = hf_model
        self.tokenizer = tokenizer
        self.manifest = manifest
        self.program = capture(hf_model, cache=cache)
        self.program.extra.update(extra or {})
        self.kernels = resolve_kernels(kernels, self.program.device)
        self.decode_program = lowered(
            checkpoint, self.program, "decode", kernels=self.kernels, foreign=passes, plugins=plugins
        )
        self.eos_ids = checkpoint.eos_ids(hf_model.config, tokenizer)
        self.engine = self._engine()

    def _engine(self) -> Engine:
        manifest = self.manifest
        suppress = [manifest.mask.token_id] if manifest and manifest.mask.kind == "row" else []
        return Engine(
            self.decode_program,
            mask_token_id=manifest.mask.token_id if manifest else None,
            block_size=manifest.decode.block_size if manifest else None,
            readouts=manifest.decode.readouts if manifest else {},
            eos_ids=self.eos_ids,
            max_positions=context_of(self.program.config, self.tokenizer),
            suppress=suppress,
        )

    @property
    def converted(self) -> bool:
        return self.manifest is not None

    @overload
    def generate(self, prompt: str, **options: Any) -> Output: ...
    @overload
    def generate(self, prompt: Sequence[Any], **options: Any) -> Any: ...

    def generate(self, prompt: str | Sequence[Any], *, chat: bool = False, **options: Any) -> Any:
        """Generate for one prompt, or for several as one batch (a list gives a list, in the same order).

        prompt   text, or a list of texts. A list of messages ({"role", "content"}) is one conversation; a batch may
                 hold such lists too. Conversations always go through the chat template.
        chat     put each text into the chat template as the user's message; else text is continued as it is
        options  see `generate_ids`

        Raises `GenerationError` for a request that cannot be served.
        """
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))
        prompts: Sequence[Prompt] = [prompt] if single else prompt
        outputs = self.generate_ids([self.encode(item, chat=chat) for item in prompts], **options)
        return outputs[0] if single else outputs

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        mode: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        threshold: float | None = None,
        denoising_steps: int | None = None,
        stop: str | Sequence[str] = (),
        drafts: str | None = None,
        on_text: OnText | None = None,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> list[Output]:
        """Generate for prompts given as token ids.

        mode             "causal", "ar-trust" (default of a converted model) or "diffusion-trust"
        max_new_tokens   per prompt; the context length limits it too
        temperature, top_k, top_p, seed  sampling; temperature 0 is greedy, top_k 0 and top_p 1 keep everything
        threshold        diffusion-trust: confidence at which a position is committed (default: the checkpoint's)
        denoising_steps  diffusion-trust: most steps per block (default: the checkpoint's)
        stop             texts that end a prompt's generation
        drafts           ar-trust: "branches" or "single" (default: the checkpoint's)
        on_text          called with (prompt index, new text) as text becomes final
        on_tokens        called with (prompt index, new token ids) as tokens become final
        """
        mode = mode or ("ar-trust" if self.converted else "causal")
        if mode in ("ar-trust", "diffusion-trust") and self.manifest is None:
            raise GenerationError(
                f"this model is not converted, so it cannot decode in mode {mode}; run `flarec convert`, use mode "
                "causal, or give mask_token_id and block_size of a dual-mode checkpoint that another program wrote"
            )
        defaults = self.manifest.decode if self.manifest else None
        if denoising_steps is None and defaults is not None:
            denoising_steps = defaults.denoising_steps or None
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        shown = [ShownText(self.decode, stops) for _ in prompts] if on_text else []

        def tell(index: int, tokens: list[int]) -> None:
            if on_tokens is not None:
                on_tokens(index, tokens)
            if on_text is not None and (piece := shown[index].push(tokens)):
                on_text(index, piece)

        generations = self.engine.generate(
            prompts,
            mode,
            SamplingParams(temperature, top_k, top_p, seed),
            max_new_tokens,
            drafts=drafts or (defaults.drafts if defaults else "branches"),
            threshold=threshold if threshold is not None else (defaults.confidence_threshold if defaults else 0.9),
            denoising_steps=denoising_steps,
            stop_check=StopStrings(self.decode, stops) if stops else None,
            on_tokens=tell if on_text or on_tokens else None,
        )
        if on_text is not None:
            for index, stream in enumerate(shown):
                if piece := stream.finish():
                    on_text(index, piece)
        return [self._output(generation, stops) for generation in generations]

    def encode(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """Token ids of a text, or of a conversation up to the turn that the model writes. Raises `GenerationError`."""
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise GenerationError("the prompt holds bytes that are not UTF-8 text; give UTF-8") from None
            if not chat:
                return self._encode_text(prompt)
            prompt = [{"role": "user", "content": prompt}]
        if not getattr(self.tokenizer, "chat_template", None):
            raise GenerationError("the tokenizer has no chat template; give plain text instead (without --chat)")
        try:
            encoded = self.tokenizer.apply_chat_template(
                [dict(message) for message in prompt], add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # whatever a template raises for messages it does not like
            raise GenerationError(f"the chat template rejects the messages: {error}") from error
        return list(encoded["input_ids"])

    def _encode_text(self, text: str) -> list[int]:
        """With the tokenizer's own opening tokens; a closing EOS would end the text before it goes on."""
        ids = list(self.tokenizer(text)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if ids and ids[-1] == eos and not text.endswith(self.tokenizer.eos_token):
            ids.pop()
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [int(self.tokenizer.bos_token_id)]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of new tokens, without special ones."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

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

    Raises `CheckpointError` for a directory that cannot be used, `UsageError` for the other arguments.
    """
    place = torch_device(device)
    wanted = torch_dtype(dtype) or (torch.float32 if place.type == "cpu" else None)
    checkpoint = open_checkpoint(path, mask_token_id=mask_token_id, block_size=block_size)
    with collector_paused():
        load_plugins(plugins)  # before the capture: they may declare ops
        tokenizer = checkpoint.load_tokenizer()
        hf_model = checkpoint.load_model(wanted, place)
        extra = checkpoint.load_extra(next(hf_model.parameters()).dtype, place)
        return Model(
            hf_model, tokenizer, checkpoint, extra, kernels=kernels, cache=True, passes=passes, plugins=plugins
        )
