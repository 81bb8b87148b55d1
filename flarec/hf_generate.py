"""`model.generate(..., custom_generate=DIR)` of transformers, served by flarec: same arguments, same returned tensor.

What flarec cannot honour is an error, never dropped: a search or penalty that was asked for would change the text.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .api import Model, Output
from .base.generation import GenerationOptions
from .checkpoint.directory import open_checkpoint
from .errors import GenerationError

# generation_config fields that flarec has no counterpart for, with the values that ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None, []),
    "guidance_scale": (None, 1.0),
    "sequence_bias": (None, {}),
    "prompt_lookup_num_tokens": (None,),
    "max_time": (None,),
    "watermarking_config": (None,),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
# arguments of `generate` that flarec has no counterpart for; unset ones arrive as None
_UNSERVED = (
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model", "negative_prompt_ids",
    "negative_prompt_attention_mask", "inputs_embeds", "past_key_values",
)
# arguments of flarec that transformers has not, or not under this meaning
_OWN = ("mode", "seed", "threshold", "denoising_steps", "recheck", "drafts")
_CACHED = "_flarec_model"
_PREPARING = threading.Lock()  # two first calls must not capture the model at the same time, nor copy weights into it


def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    stop_strings: str | Sequence[str] | None = None,
    synced_gpus: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Continue prompts with a converted checkpoint that transformers opened. Threads may share the model.

    model                transformers model; its directory is `model.name_or_path`, its weights are used as they are
    inputs or input_ids  [B, L] int64, padded on either side where attention_mask [B, L] is 0
    generation_config, kwargs   lengths, do_sample, temperature, top_k, top_p, EOS, pad and suppressed ids as in
                         transformers
    mode, threshold, denoising_steps, recheck, drafts   among kwargs: see `flarec.GenerationOptions`
    seed                 names the sampling noise (default: drawn from torch's generator, so `set_seed` decides)
    adapter              among kwargs: a directory with an adapter for the model (`flarec.load`)
    streamer             of transformers; for one prompt

    Returns [B, longest] int64: prompts as given and the new tokens, padded on the right with the pad id (or an object
    with `sequences` if `return_dict_in_generate`). Raises `GenerationError` for arguments that cannot be honoured.
    """
    ids = inputs if inputs is not None else input_ids
    if ids is None or ids.dim() != 2:
        raise GenerationError("generate needs input_ids of shape [batch, length]; pass the tokenizer's input_ids")
    if streamer is not None and ids.shape[0] > 1:
        raise GenerationError("a streamer shows one prompt; generate without it for a batch")
    own = {name: kwargs.pop(name) for name in _OWN if name in kwargs}
    adapter = kwargs.pop("adapter", None)
    config, has_length = _served_config(model, generation_config, kwargs)
    prompts = _prompts(ids, attention_mask)
    longest = max(len(prompt) for prompt in prompts)
    stop = stop_strings or config.stop_strings
    options = _options(config, own, max_new_tokens=_new_tokens(config, longest, has_length), stop=stop)
    runner = _runner(model, tokenizer, adapter, options.mode)
    if streamer is not None:
        streamer.put(ids.cpu())
    outputs = runner.generate_ids(
        prompts,
        options,
        on_tokens=(lambda _, tokens: streamer.put(torch.tensor(tokens))) if streamer is not None else None,
    )
    if streamer is not None:
        streamer.end()
    sequences = _sequences(ids, outputs, config.pad_token_id, runner)
    if config.return_dict_in_generate:
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences)
    return sequences


def _served_config(model: Any, generation_config: Any, kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """The generation config of a call, and whether the caller gave a length. Refuses what flarec has no counterpart of.
    """
    for name in _UNSERVED:
        value = kwargs.pop(name, None)
        if value is not None and not (isinstance(value, list) and not value):  # transformers passes empty lists
            raise GenerationError(f"{name} cannot be used together with custom_generate; leave it out")
    has_length = generation_config is not None or any(kwargs.get(name) for name in ("max_length", "max_new_tokens"))
    config, unknown = model._prepare_generation_config(generation_config, **kwargs)
    unknown = {name for name, value in unknown.items() if value is not None}
    if unknown:
        raise GenerationError(f"unknown arguments for generate: {', '.join(sorted(unknown))}; leave them out")
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise GenerationError(f"{name} = {value!r} cannot be combined with flarec's decode modes; leave it out")
    return config, has_length


def _options(config: Any, own: dict[str, Any], **more: Any) -> GenerationOptions:
    """What a generation config of transformers asks for, in flarec's options. `own`: arguments by their flarec name."""
    sampling: dict[str, Any] = {}
    if config.do_sample:
        temperature = 1.0 if config.temperature is None else config.temperature
        sampling = {"temperature": temperature, "top_k": config.top_k, "top_p": config.top_p}
    if own.get("seed") is None:
        own = {**own, "seed": int(torch.randint(2**62, ()))}
    return GenerationOptions(
        **{"mode": "ar-trust", **own}, **sampling, **more,
        eos_ids=config.eos_token_id, suppress=config.suppress_tokens,
    )


def _runner(model: Any, tokenizer: Any, adapter: str | Path | None, mode: str | None) -> Model:
    """The lowered model, made on the first call and kept with the transformers model.

    On the CPU everything is computed in float32, where AR-Trust is exact: a model in another dtype is copied, and the
    copy gets the current weights on each call.
    """
    with _PREPARING:
        return _prepared(model, tokenizer, adapter, mode)


def _prepared(model: Any, tokenizer: Any, adapter: str | Path | None, mode: str | None) -> Model:
    dtype, device = model.dtype, model.device
    copied = device.type == "cpu" and dtype != torch.float32
    kept: tuple[Model, torch.device, torch.dtype, str] | None = model.__dict__.get(_CACHED)
    if kept is not None and kept[1:] == (device, dtype, str(adapter)):
        runner = kept[0]
        if copied:
            with torch.no_grad():
                for own, live in zip(runner.hf_model.parameters(), model.parameters(), strict=True):
                    own.copy_(live)
        return runner
    checkpoint = open_checkpoint(model.name_or_path, adapter=adapter)
    if checkpoint.manifest is None and mode not in (None, "causal"):
        raise GenerationError(
            f"{model.name_or_path} is not converted, so it cannot decode in mode {mode}; open a converted checkpoint, "
            "give adapter=DIR with what `flarec convert --adapter-only` wrote for this model, or use mode causal"
        )
    work = model
    if copied:
        work = copy.deepcopy(model).float()
        work.config.dtype = torch.float32  # so that its graph is the one of a model that was opened in float32
    extra = checkpoint.load_extra(work.dtype, device)
    # a program cache knows a model that is not as its class makes it, and then keeps nothing
    runner = Model(work, tokenizer or checkpoint.load_tokenizer(), checkpoint, extra, cache=True)
    model.__dict__[_CACHED] = (runner, device, dtype, str(adapter))
    return runner


def _prompts(ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    rows: list[list[int]] = ids.tolist()
    if attention_mask is None:
        return rows
    if attention_mask.shape != ids.shape:
        raise GenerationError(
            f"attention_mask has shape {list(attention_mask.shape)}, input_ids {list(ids.shape)}; give one per token"
        )
    pairs = zip(rows, attention_mask.bool().tolist(), strict=True)
    return [[token for token, real in zip(row, mask, strict=True) if real] for row, mask in pairs]


def _new_tokens(config: Any, prompt: int, has_length: bool) -> int | None:
    """The limit on new tokens, None for flarec's; `max_length` counts the longest prompt too, as in transformers."""
    if config.max_new_tokens is not None:
        limit: int = config.max_new_tokens
        return limit
    if has_length and config.max_length is not None:
        if config.max_length <= prompt:
            raise GenerationError(
                f"max_length = {config.max_length}, but the prompt has {prompt} tokens; set max_new_tokens"
            )
        return int(config.max_length) - prompt
    return None


def _sequences(ids: Tensor, outputs: Sequence[Output], pad: int | None, runner: Model) -> Tensor:
    length = max(output.new_tokens for output in outputs)
    if pad is None:
        pad = runner.tokenizer.pad_token_id
    if pad is None:
        pad = min(runner.eos_ids, default=0)
    new = torch.full((ids.shape[0], length), pad, dtype=ids.dtype)
    for row, output in enumerate(outputs):
        new[row, : output.new_tokens] = torch.tensor(output.token_ids, dtype=ids.dtype)
    return torch.cat([ids, new.to(ids.device)], dim=1)
