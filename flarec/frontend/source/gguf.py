"""GGUF files: what transformers makes of one, dequantised: configuration, model and tokenizer."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import UsageError, first_line
from ..trust import opened
from .rehearsal import quiet
from .words import check_words

_NEEDED = ("gguf", "accelerate")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf")
_PASSED_OVER = ("rope_freqs", "rope_factors")


def gguf_file(source: str | Path, name: str | None) -> Path | None:
    """The file that SOURCE and `--gguf NAME` name: SOURCE itself, or NAME in it; None if none is named.

    Raises `UsageError` for one that is not there, and without the packages that read it.
    """
    path = Path(source)
    if name is None:
        if path.suffix.lower() != ".gguf" or not path.is_file():
            return None
        file = path
    else:
        file = path / name if (path / name).is_file() or not Path(name).is_file() else Path(name)
    if not file.is_file():
        raise UsageError(f"{file} does not exist; give the GGUF file that holds the model")
    absent = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if absent:
        raise UsageError(f"{file} is read with {' and '.join(_NEEDED)}; pip install {' '.join(absent)}")
    with file.open("rb") as content:
        if content.read(4) != b"GGUF":
            raise UsageError(f"{file} is no GGUF file; copy it again")
    if _PART.search(file.name):
        raise UsageError(f"{file} is one of several parts; put them together with llama-gguf-split --merge")
    return file


def gguf_config(file: Path) -> Any:
    """The configuration. Raises `UsageError` for an architecture that transformers does not read."""
    from transformers import AutoConfig

    with _reading(file):
        config = opened(AutoConfig, file.parent, gguf_file=file.name)
    config.architectures = None
    return config


@contextmanager
def without_gguf(source: str, name: str | None) -> Iterator[str]:
    """A directory with the configuration of the GGUF file that `gguf_file` finds; without one the source as it is."""
    file = gguf_file(source, name)
    if file is None:
        yield source
        return
    config = gguf_config(file)
    config.dtype = _dtype(file)
    with tempfile.TemporaryDirectory(prefix="flarec-") as folder:
        config.save_pretrained(folder)
        yield folder


def gguf_model(file: Path) -> Any:
    """The model with plain weights in the file's own float type; of quantised files in bfloat16.

    Raises `UsageError` for a file that is damaged or does not hold the whole model.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    with _reading(file), quiet():
        model, info = opened(
            AutoModelForCausalLM, file.parent, gguf_file=file.name, dtype=_dtype(file), output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True), ignore_mismatched_sizes=True,
        )
    for name, have, want in sorted(info["mismatched_keys"]):
        raise UsageError(
            f"{name} of {file} is {list(have)}, and transformers makes {list(want)} of its metadata, which it does not "
            "read whole for this architecture; give the model as safetensors"
        )
    if missing := sorted(info["missing_keys"]):
        raise UsageError(f"{file} holds no weights for {', '.join(missing[:3])}; copy it again")
    model._weight_conversions = None
    return model


def gguf_tokenizer(file: Path) -> Any:
    """The tokenizer with the file's chat template.

    Raises `UsageError`, also for one that transformers makes without a word and that does not reach its own vocabulary
    (5.17 takes the ranks of Gemma's merges for log probabilities).
    """
    from transformers import AutoTokenizer

    with _reading(file):
        tokenizer = opened(AutoTokenizer, file.parent, gguf_file=file.name)
        check_words(tokenizer, file)
    return tokenizer


def _dtype(file: Path) -> torch.dtype:
    """The file's own float type. Raises `UsageError` for tensors that transformers passes over in silence."""
    from gguf import GGMLQuantizationType, GGUFReader

    with _reading(file):
        tensors = GGUFReader(str(file)).tensors
    if name := next((tensor.name for tensor in tensors if tensor.name.startswith(_PASSED_OVER)), None):
        raise UsageError(
            f"{file} holds {name}, scaled rotary frequencies, which transformers does not read from GGUF: positions "
            "would be others; give the model as safetensors"
        )
    kinds = {tensor.tensor_type for tensor in tensors}
    if kinds <= {GGMLQuantizationType.F32}:
        return torch.float32
    if kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16}:
        return torch.float16
    return torch.bfloat16


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # the readers raise what their formats lead to
        raise UsageError(f"{file} cannot be read by transformers: {first_line(error)}") from error
