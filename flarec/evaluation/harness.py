"""The model class of lm-eval (EleutherAI/lm-evaluation-harness, tested with 0.4.13).

`flarec lm-eval --model flarec --model_args path=CKPT,mode=ar-trust ...` registers it and hands over to lm-eval's own
command line; later releases find it through the entry-point group `lm_eval.models`. Log-likelihoods are those of the
clean stream, whatever the mode; texts are generated in the mode.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("lm-eval is not installed; run: pip install 'flarec[lm-eval]'") from error

from .. import api
from ..base.fields import shown, whole_number
from ..base.generation import GenerationOptions, merged
from ..decode.tokenizing import encode_prompt
from ..errors import UsageError
from .scoring import Document, Scores, score

GENERATION = ("do_sample", "until", "max_gen_toks", "temperature", "top_k", "top_p", "seed")
"""What a task may ask of a generation, after lm-eval has put its aliases right."""
OPTIONS = ("mode", "drafts", "threshold", "denoising_steps", "recheck")
DEFAULT_DEVICE = "cuda:0"
"""What lm-eval passes where nobody named a device."""
LOADING = ("dtype", "kernels", "graphs", "compile", "adapter", "mask_token_id", "block_size")


class FlarecLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types here
    """A checkpoint, or a source model, for lm-eval's tasks.

    path        directory or hub id; `pretrained` is accepted for it
    mode, drafts, threshold, denoising_steps, recheck  of `GenerationOptions`
    dtype, kernels, graphs, compile, adapter, mask_token_id, block_size  of `flarec.load`
    device      auto, cpu, cuda ...
    batch_size  prompts, or scored texts, that run together ("auto" is 8)
    max_gen_toks  new tokens where a task does not say
    max_length  context in tokens, at most the model's
    seed        of sampling; every prompt, and every repeat of it, gets one of its own from it
    enable_thinking  given to the chat template; None: the template's own default
    think_end_token  text after which the answer begins: what comes before its last occurrence is dropped

    Unknown arguments are refused with their name, as lm-eval's own models do.
    """

    def __init__(
        self, path: str | None = None, *, pretrained: str | None = None, device: str | None = None,
        batch_size: int | str | None = None, max_batch_size: int | None = None, max_gen_toks: int = 256,
        max_length: int | None = None, seed: int = 0, enable_thinking: bool | None = None,
        think_end_token: str | None = None, **more: Any,
    ) -> None:
        super().__init__()
        path = path if path is not None else pretrained
        if path is None:
            raise UsageError("--model_args names no model; give path=CHECKPOINT")
        unknown = sorted(more.keys() - {*OPTIONS, *LOADING})
        if unknown:
            raise UsageError(f"unknown model argument {unknown[0]}; choose from {', '.join((*OPTIONS, *LOADING))}")
        loading = {name: more[name] for name in LOADING if more.get(name) is not None}
        if device == DEFAULT_DEVICE and not torch.cuda.is_available():  # as lm-eval's own models
            logging.getLogger(__name__).warning("no GPU for --device %s, lm-eval's default: running on the CPU", device)
            device = "cpu"
        self.model = api.load(str(path), device=device or "auto", **loading)
        asked = GenerationOptions(**{name: more[name] for name in OPTIONS if more.get(name) is not None})
        self.options = self.model.complete(asked)
        for name in asked.unread(str(self.options.mode)):
            raise UsageError(f"the model argument {name} does nothing in mode {self.options.mode}; leave it out")
        self.path = str(path)
        self.tokenizer = self.model.tokenizer
        given = None if batch_size == "auto" else batch_size
        self.batch_size = _at_least_one("batch_size", 8 if given is None else given)
        if max_batch_size is not None:
            self.batch_size = min(self.batch_size, _at_least_one("max_batch_size", max_batch_size))
        self.max_gen_toks = _at_least_one("max_gen_toks", max_gen_toks)
        room = self.model.engine.max_positions
        longest = room if max_length is None else whole_number("max_length", max_length, UsageError, low=2)
        self.max_length = min(room, longest)
        self.seed = whole_number("seed", seed, UsageError, low=0)
        self.enable_thinking = enable_thinking
        self.think_end_token = think_end_token
        self.special = {self.tokenizer.convert_ids_to_tokens(i): i for i in self.tokenizer.all_special_ids}
        self.asked: Counter[str] = Counter()  # how often each request has been answered: repeats of it differ
        self.new_tokens = self.forwards = 0

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Of lm-eval's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """None: as flarec's own prompts, but without a second opening token where a chat template wrote one."""
        if add_special_tokens is None and not self._opened(string):
            return encode_prompt(self.tokenizer, string)
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def _opened(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return str(self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt, **thinking,
        ))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        """(sum of the log-probabilities of the continuation, whether it is the greedy one). Contexts lose their start
        where both do not fit."""
        documents: list[Document] = []
        for (context, continuation), before, after in requests:
            if len(after) >= self.max_length + 1:
                raise UsageError(
                    f"a continuation of {len(after)} tokens does not fit the context of {self.max_length}: "
                    f"{shown(continuation)} after {shown(context)}"
                )
            ids = (before + after)[-(self.max_length + 1) :]
            documents.append((ids, [(len(ids) - len(after), len(ids))]))
        found = self._scores(documents)
        results = [(float(item.log_probs.sum()), bool(item.greedy.all())) for item in found]
        for (key, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def _scores(self, documents: Sequence[Document]) -> list[Scores]:
        engine = self.model.engine
        return score(self.model.decode_program, documents, self.batch_size, suppress=engine.suppress)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        results = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            windows = [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            ]
            documents = [([*before, *after], [(len(before), len(before) + len(after))]) for before, after in windows]
            total = sum(float(item.log_probs.sum()) for item in self._scores(documents))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            results.append(total)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [self._generation(*request.args) for request in requests]
        outputs = self.model.generate_ids(
            [prompt for prompt, _ in asked], [options for _, options in asked], batch=self.batch_size
        )
        texts = []
        for request, output in zip(requests, outputs, strict=True):
            self.new_tokens += output.new_tokens
            self.forwards += output.forwards
            text = output.text
            if self.think_end_token and self.think_end_token in text:
                text = text.rsplit(self.think_end_token, 1)[1].lstrip()
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def _generation(self, context: str, asked: Mapping[str, Any]) -> tuple[list[int], GenerationOptions]:
        """Prompt and options of one request. The prompt loses its start where it leaves no room for the answer."""
        values = normalize_gen_kwargs(dict(asked), self.max_gen_toks)
        unknown = sorted(values.keys() - set(GENERATION))
        if unknown:
            _refuse(unknown[0])
        if values["max_gen_toks"] >= self.max_length:
            raise UsageError(
                f"{values['max_gen_toks']} new tokens leave no room for a prompt in a context of {self.max_length}; "
                "give max_gen_toks in --gen_kwargs"
            )
        until = [str(text) for text in values["until"] if text]
        ends = {self.special[text] for text in until if text in self.special}
        options = self.options.filled(eos_ids=self.model.eos_ids | ends)
        sampling = values["do_sample"]
        options = merged(options, {
            "stop": tuple(text for text in until if text not in self.special),
            "max_new_tokens": values["max_gen_toks"],
            "temperature": float(values["temperature"] or 1.0) if sampling else 0.0,
            "top_k": int(values.get("top_k") or 0) if sampling else 0,
            "top_p": float(values.get("top_p") or 1.0) if sampling else 1.0,
            "seed": self._seed(context, asked, values.get("seed", self.seed)),
        })
        prompt = self.tok_encode(context)
        return prompt[-(self.max_length - values["max_gen_toks"]) :], options

    def _seed(self, context: str, asked: Mapping[str, Any], seed: int) -> int:
        """Of one answer: it depends on the request and how often it was asked before, not on the others."""
        key = json.dumps([seed, context, {name: str(value) for name, value in sorted(asked.items())}])
        repeat = self.asked[key]
        self.asked[key] += 1
        return int.from_bytes(hashlib.sha256(f"{key}{repeat}".encode()).digest()[:6])

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        manifest = self.model.manifest
        return {
            "model_num_parameters": sum(tensor.numel() for tensor in self.model.program.parameters().values()),
            "flarec_mode": self.options.mode,
            "flarec_options": {name: getattr(self.options, name) for name in OPTIONS},
            "flarec_source": manifest.source.name if manifest else None,
            "flarec_seed": self.seed,
            "new_tokens": self.new_tokens,
            "forwards": self.forwards,
            "tokens_per_forward": self.new_tokens / self.forwards if self.forwards else None,
        }


def _at_least_one(name: str, value: Any) -> int:
    """lm-eval's command line gives the batch size as text."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    return whole_number(name, number, UsageError, low=1)


def _refuse(name: str) -> NoReturn:
    raise UsageError(
        f"a task asks for the generation argument {name}, which flarec has not; take it out of generation_kwargs or "
        f"--gen_kwargs (known: {', '.join(GENERATION)})"
    )
