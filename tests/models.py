"""Small models of every family in the adapter table, a tokenizer and checkpoints that fit them: made in milliseconds.

    model = tiny_model("bamba")                     # float32, weights large enough for logits that are not flat
    program = captured("bamba")                     # its capture, made once per session (clone before changing it)
    path = tiny_checkpoint(tmp_path, "bamba")       # a directory that `AutoModelForCausalLM.from_pretrained` opens

The tokenizer has fewer tokens than the model has rows, so ids in `[TOKENS, VOCABULARY)` are spare rows.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import fx
from transformers import GenerationConfig, PreTrainedTokenizerFast

from flarec.frontend import families as adapters
from flarec.frontend.export import capture
from flarec.frontend.tiny import END_ID as END_ID
from flarec.frontend.tiny import PAD_ID as PAD_ID
from flarec.frontend.tiny import START_ID as START_ID
from flarec.frontend.tiny import VOCABULARY as VOCABULARY
from flarec.frontend.tiny import available, build_tiny
from flarec.frontend.tiny import tiny_config as tiny_config
from flarec.ir.program import Program
from flarec.ir.spec import TensorSpec

FAMILIES = ("qwen3_5_text", "kimi_linear", "bamba")
"""Three families that between them have every kind of gate; the tests of the parts use these."""
ALL_FAMILIES = tuple(family for family in adapters.FAMILIES if available(family))
PLAIN_FAMILIES = tuple(family for family in adapters.PLAIN if available(family))
FEW_LAYERS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "kimi_linear": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "falcon_h1": {"num_hidden_layers": 1},
}
"""For tests whose time goes with the layers (compilers, Triton's interpreter): one layer of each kind. Families without
an entry have as many as that takes."""
TOKENS = 300
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A small Hugging Face model in float32, in eval mode."""
    return build_tiny(family, seed, **overrides)


def tiny_tokenizer(size: int = TOKENS) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with pad (0), message start (1), EOS (2), all bytes, and a few merges."""
    specials = [PAD, START, END]
    vocabulary = {token: index for index, token in enumerate(specials)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    if size < len(vocabulary):
        raise ValueError(f"a byte-level tokenizer has at least {len(vocabulary)} tokens, got size {size}")
    merges: list[tuple[str, str]] = []
    pairs = ((left, right) for left in "Ġaeioustnr" for right in "aeioustnrlhd")
    while len(vocabulary) < size:
        left, right = next(pairs)
        vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def tiny_checkpoint(directory: Path, family: str, seed: int = 0, *, tokens: int = TOKENS, **overrides: Any) -> Path:
    """Save model, tokenizer and generation config under `directory / family`; returns that path."""
    path = Path(directory) / family
    model = tiny_model(family, seed, **overrides)
    model.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=False)
    model.save_pretrained(path)
    tiny_tokenizer(tokens).save_pretrained(path)
    return path


def few_checkpoint(directory: Path, family: str, seed: int = 0, *, tokens: int = TOKENS, **overrides: Any) -> Path:
    """As `tiny_checkpoint`, with `FEW_LAYERS`: for what commands, files and runs do, whatever the model is."""
    return tiny_checkpoint(directory, family, seed, tokens=tokens, **FEW_LAYERS.get(family, {}), **overrides)


@functools.cache
def shared_model(family: str) -> Any:
    """The model behind `captured`: do not change its parameters."""
    return tiny_model(family)


@functools.cache
def captured(family: str) -> Program:
    """The captured program of `shared_model(family)`, once per process. Passes change what they get: clone first.

    The graph is traced once in a run: it lies in the program cache of its tests, where other workers and commands that
    open a checkpoint of the family find it. `tests/frontend` traces every family itself.
    """
    return capture(shared_model(family), cache=True)


@functools.cache
def captured_few(family: str) -> Program:
    """As `captured`, of a model with `FEW_LAYERS`."""
    return capture(tiny_model(family, **FEW_LAYERS.get(family, {})), cache=True)


@functools.cache
def captured_few_float64(family: str) -> Program:
    return widened(captured_few(family))


@functools.cache
def captured_float64(family: str) -> Program:
    """As `captured`, in float64 throughout: differences that are left are errors, not rounding.

    The models cast to float32 inside (norms, gates, softmax); these casts are widened in the captured graph.
    """
    return widened(captured(family))


def widened(captured: Program) -> Program:
    """A program in float64 throughout: its parameters, and the casts to float32 that models have inside."""
    clone = captured.clone()
    clone.module = fx.GraphModule(copy.deepcopy(captured.module).double(), clone.graph)
    clone.dtype = torch.float64
    for inner in clone.module.modules():  # graphs of higher-order operators
        if isinstance(inner, fx.GraphModule) and inner is not clone.module:
            _widen_casts(inner.graph)
            inner.recompile()
    _widen_casts(clone.graph)
    for node in clone.graph.nodes:
        spec = node.meta.get("val")
        if isinstance(spec, TensorSpec) and spec.dtype == torch.float32:
            node.meta["val"] = TensorSpec(spec.shape, torch.float64)
    clone.finish()
    return clone


def _widen_casts(graph: fx.Graph) -> None:
    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, _widen)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _widen)


def _widen(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument
