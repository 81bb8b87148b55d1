"""Checkpoints on disk: opening one, or a plain source model.

A checkpoint is a directory that unmodified transformers opens with `AutoModelForCausalLM`. Beside the Hugging Face
files it holds `flarec.json` (`flarec.checkpoint.manifest`), `flarec.safetensors` for parameters that the model class
has no place for, a model card, and `custom_generate/generate.py`, which brings the decode modes to `model.generate`.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..base.files import why_no_file
from ..base.hashes import sha256_of
from ..errors import CheckpointError, FlarecWarning, UsageError, first_line
from ..frontend.loading import is_wrapper, judge_source, load_model, read_config
from ..frontend.trust import opened
from .adapter import FOLDER, check_source, open_adapter, read_adapter, refuse_bare_adapter
from .card import licence_of
from .carried import Carried
from .ends import stated_ends
from .horizon import horizon_of, read_horizon
from .location import resolve
from .manifest import NAME as MANIFEST
from .manifest import Manifest, Source
from .stated import stated, states_all
from .weights import EXTRA, weight_files

SCRIPT = "custom_generate/generate.py"
DEQUANTIZED = "dequantized"
"""In the manifest's `data`: the weights beside an adapter are quantised, and are opened as plain ones."""
NO_LIMIT = 1 << 20
"""Context of a model that states none."""
_TOKENIZER_WITHOUT_LIMIT = 10**9  # such tokenizers state a huge number
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tiktoken.model")


@dataclass(frozen=True)
class Checkpoint:
    """A directory that was checked.

    manifest  None for a model that was not converted
    foreign   the manifest stands for values of config.json or of the user: another program made this checkpoint. One of
              flarec's own that lost its manifest is not foreign
    dequantize  the weights are quantised, and opened as plain ones
    adapter   the folder with the adapter's files: here or of another directory; None without an adapter
    """

    path: Path
    manifest: Manifest | None
    foreign: bool = False
    adapter: Path | None = None
    dequantize: bool = False

    @property
    def home(self) -> Path:
        """The directory of the manifest: `path`, or that of an adapter which was given with the model."""
        return self.path if self.adapter is None else self.adapter.parent

    @property
    def has_tokenizer(self) -> bool:
        return any((self.path / name).is_file() for name in TOKENIZER_FILES)

    def load_tokenizer(self) -> Any:
        """The transformers tokenizer. Raises `CheckpointError` if the directory has none that can be read."""
        from transformers import AutoTokenizer

        if not self.has_tokenizer:
            raise CheckpointError(f"{self.path} has no tokenizer (tokenizer.json); save the model's tokenizer there")
        try:
            tokenizer = opened(AutoTokenizer, self.path)
        except UsageError as error:
            raise CheckpointError(str(error)) from error
        except Exception as error:  # the Rust library raises bare exceptions
            try:
                read_config(self.path)  # which transformers reads to find the tokenizer's class
            except UsageError as reason:
                raise CheckpointError(str(reason)) from error
            raise CheckpointError(f"the tokenizer in {self.path} cannot be read: {first_line(error)}") from error
        self._check_spare(tokenizer)
        return tokenizer

    def _check_spare(self, tokenizer: Any) -> None:
        """Raise `CheckpointError` if the mask token is a word. Other programs add a token of its own for it."""
        mask = self.manifest.mask if self.manifest is not None and not self.foreign else None
        if mask is None or mask.token_id in getattr(tokenizer, "added_tokens_decoder", {}):
            return
        word = tokenizer.convert_ids_to_tokens(mask.token_id) if mask.token_id < len(tokenizer) else None
        if word is not None:
            raise CheckpointError(
                f"the mask token {mask.token_id} is {word!r} of the tokenizer in {self.path}; copy the checkpoint again"
            )

    def load_config(self) -> Any:
        """The transformers configuration; of a multimodal checkpoint the whole one."""
        try:
            return read_config(self.path)
        except UsageError as error:
            raise CheckpointError(str(error)) from error

    def check_weights(self) -> None:
        """Raises `CheckpointError` for weights that cannot be opened, told from headers and sizes; reads none."""
        try:
            judge_source(self.path, dequantize=self.dequantize)
        except UsageError as error:
            raise CheckpointError(str(error)) from error

    def load_model(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
        """The transformers model in `dtype` (default: as stored), in eval mode; the text model of a multimodal one."""
        try:
            model = load_model(self.path, dtype, device, dequantize=self.dequantize).eval()
        except UsageError as error:
            raise CheckpointError(str(error)) from error
        except (SafetensorError, RuntimeError) as error:  # damaged weights, shapes that do not fit
            raise CheckpointError(f"the weights in {self.path} cannot be loaded: {first_line(error)}") from error
        self.check_mask(int(model.get_input_embeddings().weight.shape[0]))
        return model

    def check_mask(self, rows: int) -> None:
        """Raise `CheckpointError` for a mask token that is none of the embedding's rows."""
        mask = self.manifest.mask if self.manifest is not None else None
        if mask is not None and mask.ids and mask.ids[-1][1] > rows:
            raise CheckpointError(
                f"random ids of {self.path} go up to {mask.ids[-1][1] - 1}, and it has {rows} rows; copy it again"
            )
        if mask is not None and mask.kind in ("vector", "random") and mask.token_id != rows:
            raise CheckpointError(
                f"the mask token {mask.token_id} of {self.path} is not the id behind its {rows} rows; copy it again"
            )
        if mask is not None and mask.kind == "row" and mask.token_id >= rows:
            raise CheckpointError(
                f"the mask token {mask.token_id} is no row of the vocabulary in {self.path}, which has {rows}; "
                "give the right mask_token_id"
            )

    def carried(self, model: nn.Module) -> Carried | None:
        """What surrounds `model`, the text model loaded from here; None if this is no multimodal checkpoint."""
        if not is_wrapper(self.load_config()):
            return None
        return Carried.of(self.path, weight_files(self.path), model.state_dict())

    def left_out(self, model: nn.Module) -> tuple[str, ...]:
        """Stored tensors that transformers passes over in silence when it opens `model` from here, and that therefore
        are in no checkpoint written from it: layers for multi-token prediction. Raises `CheckpointError`."""
        patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        own, stored = set(model.state_dict()), []
        for file in weight_files(self.path):
            try:
                with safe_open(file, framework="pt") as opened:
                    stored += opened.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read: {first_line(error)}; copy the model again") from error
        return tuple(name for name in stored if name not in own and any(re.search(p, name) for p in patterns))

    def load_extra(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, nn.Parameter]:
        """Parameters without a place in the transformers model (mask vector, adapter, horizon head), by name; often
        none."""
        horizon = read_horizon(self.home, self.manifest, dtype, device)
        if self.adapter is not None:
            found = read_adapter(self.adapter, dtype, device) | horizon
            return {name: nn.Parameter(tensor) for name, tensor in found.items()}
        path = self.path / EXTRA
        if not path.is_file():
            return {name: nn.Parameter(tensor) for name, tensor in horizon.items()}
        try:
            tensors = load_file(path, device=str(device))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}; copy the checkpoint again") from error
        found = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()} | horizon
        return {name: nn.Parameter(tensor) for name, tensor in found.items()}

    @property
    def has_horizon(self) -> bool:
        """Whether it has a head for elastic decoding."""
        return horizon_of(self.manifest) is not None

    def eos_ids(self, config: Any, tokenizer: Any) -> frozenset[int]:
        """Ids that end a text: all that the configurations and the tokenizer call so (`flarec.checkpoint.ends`)."""
        return stated_ends(self.path, config, tokenizer)


def context_of(config: Any, tokenizer: Any) -> int:
    """Positions that a model has; what the tokenizer says where the configuration says nothing."""
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None)
    if stated is None:
        limit = getattr(tokenizer, "model_max_length", None)
        stated = limit if limit is not None and limit < _TOKENIZER_WITHOUT_LIMIT else NO_LIMIT
    return max(int(stated), _stretched(getattr(text, "rope_parameters", None) or {}))


def _stretched(rope: dict[str, Any]) -> int:
    """Positions of a model whose frequencies YaRN stretched, whatever else its configuration states; else 0."""
    if rope.get("rope_type") != "yarn":
        return 0
    return int((rope.get("original_max_position_embeddings") or 0) * (rope.get("factor") or 1))


def refuse_converted(location: str | Path, manifest: Manifest | None) -> None:
    """Raise `CheckpointError` for what flarec converted: it is no source. manifest: of that directory."""
    if manifest is not None:
        raise CheckpointError(
            f"{location} is a converted checkpoint already; convert its source model ({manifest.source.name})"
        )


def open_checkpoint(
    path: str | Path,
    *,
    mask_token_id: int | None = None,
    block_size: int | None = None,
    adapter: str | Path | None = None,
    whole: bool = False,
    dequantize: bool = False,
) -> Checkpoint:
    """Check a checkpoint, or a source model, before anything is loaded from it.

    path: a directory or a hub id. mask_token_id, block_size: for a dual-mode checkpoint that another program wrote and
    whose config.json does not state them (`flarec.checkpoint.stated`). adapter: a directory that `flarec convert` wrote
    with an adapter for the model in `path`, which is opened with it. whole: compare all files with their hashes,
    weights of any size too. dequantize: the weights are quantised, and wanted plain; a checkpoint says so itself.

    Raises `CheckpointError` if there is no such directory, if it holds no model, and for a checkpoint with a manifest
    that is foreign, damaged or of a newer format, or with a missing or changed file; `UsageError` for the numbers.
    """
    directory = resolve(path)
    _check_entries(directory)
    if not (directory / "config.json").exists():
        refuse_bare_adapter(directory)
        raise CheckpointError(
            f"{directory} is not a model directory (no config.json); give a checkpoint or a Hugging Face model"
        )
    manifest = Manifest.read(directory)
    if adapter is not None:
        if mask_token_id is not None or block_size is not None:
            raise UsageError(f"{adapter} states the mask token and the block size; leave them out")
        if manifest is not None:
            raise CheckpointError(f"{directory} is a converted checkpoint, which takes no adapter; give its source")
        manifest = open_adapter(Path(adapter), whole=whole)
        if whole:
            manifest.check_files(Path(adapter), whole=True)
        check_source(directory, manifest, Path(adapter))
        return Checkpoint(directory, manifest, adapter=Path(adapter) / FOLDER, dequantize=_is_quantised(manifest))
    if manifest is None:
        if whole:
            raise CheckpointError(f"{directory} has no {MANIFEST}, which says what its files were: nothing to check")
        manifest = stated(directory, mask_token_id, block_size)
        own = states_all(directory)
        if own or (manifest is None and _was_converted(directory)):
            how = "as its config.json says, and nobody checks its files" if own else "causally only"
            warnings.warn(
                f"{directory} was converted by flarec but has no {MANIFEST}: it decodes {how}; copy it again",
                FlarecWarning,
                stacklevel=3,
            )
        return Checkpoint(directory, manifest, foreign=manifest is not None and not own, dequantize=dequantize)
    if mask_token_id is not None or block_size is not None:
        raise UsageError(f"{directory / MANIFEST} states the mask token and the block size; leave them out")
    manifest.check_files(directory, whole=whole)
    folder = directory / FOLDER if manifest.adapter is not None else None
    return Checkpoint(directory, manifest, adapter=folder, dequantize=_is_quantised(manifest))


def _is_quantised(manifest: Manifest) -> bool:
    """Whether an adapter was trained over the plain form of quantised weights, which stayed as they were."""
    return bool(manifest.data.get(DEQUANTIZED))


def _check_entries(directory: Path) -> None:
    """Raise `CheckpointError` for an entry whose opening could wait without end."""
    try:
        for path in sorted(directory.iterdir()):
            if reason := why_no_file(path):
                raise CheckpointError(f"{path} {reason}; copy the model again")
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({error.strerror})") from error


def _was_converted(directory: Path) -> bool:
    """Whether a directory without a manifest has other files that only a conversion writes."""
    try:
        script = (directory / SCRIPT).read_bytes() if (directory / SCRIPT).is_file() else b""
    except OSError:
        script = b""
    return b"flarec" in script or (directory / EXTRA).is_file()


def describe_source(path: str | Path) -> Source:
    """Name (never a machine's path), weight hash and licence of a source model, for the manifest."""
    directory = resolve(path)
    name = directory.resolve().name if Path(path).is_dir() else str(path)
    weights = weight_files(directory)
    return Source(name, sha256_of(*weights) if weights else None, licence_of(directory))


