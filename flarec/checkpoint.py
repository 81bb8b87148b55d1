"""Checkpoints on disk: opening one (or a plain source model), and writing one that is there whole or not at all.

A checkpoint is a directory that unmodified transformers opens with `AutoModelForCausalLM`. Beside the Hugging Face
files it holds `flarec.json` (`flarec.manifest`), `flarec.safetensors` for parameters that the model class has no place
for, a model card, and `custom_generate/generate.py`, which brings the decode modes to `model.generate`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import __version__
from .carried import Carried
from .errors import CheckpointError, UsageError
from .loading import is_wrapper, load_model, read_config, text_name
from .manifest import NAME as MANIFEST
from .manifest import FileEntry, Manifest, Source, sha256_of
from .model_card import licence_of, model_card

EXTRA = "flarec.safetensors"
GENERATION_CONFIG = "generation_config.json"
NO_LIMIT = 1 << 20
"""Context of a model that states none."""
MAX_SHARD_SIZE = "50GB"
"""As transformers has it."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_WITHOUT_LIMIT = 10**9  # such tokenizers state a huge number
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tiktoken.model")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """A directory that was checked.

    manifest  None for a model that was not converted
    foreign   the manifest stands for values of config.json or of the user: another program made this checkpoint
    """

    path: Path
    manifest: Manifest | None
    foreign: bool = False

    def load_tokenizer(self) -> Any:
        """The transformers tokenizer. Raises `CheckpointError` if the directory has none that can be read."""
        from transformers import AutoTokenizer

        if not any((self.path / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(f"{self.path} has no tokenizer (tokenizer.json); save the model's tokenizer there")
        try:
            return AutoTokenizer.from_pretrained(str(self.path))
        except Exception as error:  # the Rust library raises bare exceptions
            raise CheckpointError(f"the tokenizer in {self.path} cannot be read: {_first_line(error)}") from error

    def load_config(self) -> Any:
        """The transformers configuration; of a multimodal checkpoint the whole one."""
        try:
            return read_config(self.path)
        except UsageError as error:
            raise CheckpointError(str(error)) from error

    def load_model(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
        """The transformers model in `dtype` (default: as stored), in eval mode; the text model of a multimodal one."""
        try:
            model = load_model(self.path, dtype, device).eval()
        except UsageError as error:
            raise CheckpointError(str(error)) from error
        except (SafetensorError, RuntimeError) as error:  # damaged weights, shapes that do not fit
            raise CheckpointError(f"the weights in {self.path} cannot be loaded: {_first_line(error)}") from error
        mask = self.manifest.mask if self.manifest is not None else None
        rows = int(model.get_input_embeddings().weight.shape[0])
        if mask is not None and mask.kind == "row" and mask.token_id >= rows:
            raise CheckpointError(
                f"the mask token {mask.token_id} is no row of the vocabulary in {self.path}, which has {rows}; "
                "give the right mask_token_id"
            )
        return model

    def carried(self, model: nn.Module) -> Carried | None:
        """What surrounds `model`, the text model loaded from here; None if this is no multimodal checkpoint."""
        if not is_wrapper(self.load_config()):
            return None
        return Carried.of(self.path, _weight_files(self.path), model.state_dict())

    def left_out(self, model: nn.Module) -> tuple[str, ...]:
        """Stored tensors that transformers passes over in silence when it opens `model` from here, and that therefore
        are in no checkpoint written from it: layers for multi-token prediction. Raises `CheckpointError`."""
        patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        own, stored = set(model.state_dict()), []
        for file in _weight_files(self.path):
            try:
                with safe_open(file, framework="pt") as opened:
                    stored += opened.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read: {_first_line(error)}; copy the model again") from error
        return tuple(name for name in stored if name not in own and any(re.search(p, name) for p in patterns))

    def load_extra(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, nn.Parameter]:
        """Parameters without a place in the transformers model, by name (the mask vector); empty if there are none."""
        path = self.path / EXTRA
        if not path.is_file():
            return {}
        try:
            tensors = load_file(path, device=str(device))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {_first_line(error)}; copy the checkpoint again") from error
        return {name: nn.Parameter(tensor.to(dtype or tensor.dtype)) for name, tensor in tensors.items()}

    def eos_ids(self, config: Any, tokenizer: Any) -> frozenset[int]:
        """Ids that end a text: those of the generation config (else of the configuration) and the tokenizer's own."""
        path = self.path / GENERATION_CONFIG
        stated = getattr(config.get_text_config(), "eos_token_id", None)
        if path.is_file():
            try:
                stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (OSError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{path} cannot be read: {_first_line(error)}; copy the model again") from error
        ids = {*stated} if isinstance(stated, (list, tuple)) else {stated}
        ids.add(getattr(tokenizer, "eos_token_id", None))
        return frozenset(int(token) for token in ids if token is not None)


def context_of(config: Any, tokenizer: Any) -> int:
    """Positions that a model has; what the tokenizer says where the configuration says nothing."""
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    if stated is None:
        limit = getattr(tokenizer, "model_max_length", None)
        stated = limit if limit is not None and limit < _TOKENIZER_WITHOUT_LIMIT else NO_LIMIT
    return int(stated)


def open_checkpoint(path: str | Path, *, mask_token_id: int | None = None, block_size: int | None = None) -> Checkpoint:
    """Check a checkpoint, or a source model, before anything is loaded from it.

    path: a directory or a hub id. mask_token_id, block_size: for a dual-mode checkpoint that another program wrote and
    whose config.json does not state them (`Manifest.stated`).

    Raises `CheckpointError` if there is no such directory, if it holds no model, and for a checkpoint with a manifest
    that is foreign, damaged or of a newer format, or with a missing or changed file; `UsageError` for the numbers.
    """
    directory = resolve(path)
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is not a model directory (no config.json); give a checkpoint or a Hugging Face model"
        )
    manifest = Manifest.read(directory)
    if manifest is None:
        stated = Manifest.stated(directory, mask_token_id, block_size)
        return Checkpoint(directory, stated, foreign=stated is not None)
    if mask_token_id is not None or block_size is not None:
        raise UsageError(f"{directory / MANIFEST} states the mask token and the block size; leave them out")
    manifest.check_files(directory)
    return Checkpoint(directory, manifest)


def resolve(path: str | Path) -> Path:
    """A local directory as it is; a hub id becomes the directory of its downloaded snapshot."""
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise CheckpointError(f"{directory} is a file, not a model directory; give the directory that holds it")
    if not HUB_ID.fullmatch(str(path)):
        raise CheckpointError(f"{path} does not exist; give a checkpoint or model directory, or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx"]))
    except (OSError, ValueError) as error:  # hub errors are one or the other
        raise CheckpointError(
            f"{path} is no local directory and could not be fetched from the hub: {_first_line(error)}"
        ) from error


def describe_source(path: str | Path) -> Source:
    """Name (never a machine's path), weight hash and licence of a source model, for the manifest."""
    directory = resolve(path)
    name = directory.resolve().name if Path(path).is_dir() else str(path)
    weights = _weight_files(directory)
    return Source(name, sha256_of(*weights) if weights else None, licence_of(directory))


def stored_dtypes(path: str | Path, model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype in which the files of a model directory hold each of the model's parameters and buffers, by name.

    Models often keep a few tensors (decay rates, norms) wider than the rest. Names are matched exactly (of text models
    inside wrappers without the prefix), then from the layer index on; tensors without a counterpart get the dtype that
    holds most elements.
    """
    found: dict[str, torch.dtype] = {}
    similar: dict[str, torch.dtype] = {}
    elements: Counter[torch.dtype] = Counter()
    for file in _weight_files(resolve(path)):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                piece = opened.get_slice(name)
                dtype = _DTYPES.get(piece.get_dtype())
                if dtype is not None:
                    found[text_name(name)] = dtype
                    similar.setdefault(_from_layer(name), dtype)
                    elements[dtype] += torch.Size(piece.get_shape()).numel()
    floating = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if not found:  # weights in another format: nothing better is known than what was loaded
        return {name: tensor.dtype for name, tensor in floating.items()}
    usual = elements.most_common(1)[0][0]
    return {name: found.get(name, similar.get(_from_layer(name), usual)) for name in floating}


def versions() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    import transformers

    return {
        "flarec": __version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "python": platform.python_version(),
    }


def check_destination(out: Path, overwrite: bool) -> None:
    """Raises `CheckpointError` if a checkpoint cannot be written to `out`; writes nothing."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out} exists and is not a directory; choose another output directory")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"{out} is not empty; choose another output directory or replace it with --overwrite")


def check_shard_size(size: str) -> None:
    """Raises `UsageError` for a size of weight files that transformers would not understand."""
    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B", size.strip().upper()):
        raise UsageError(f"shard size '{size}' is unknown; give a size such as 5GB or 500MB")


def write_checkpoint(
    out: str | Path,
    model: Any,
    tokenizer: Any,
    manifest: Manifest,
    extra: Mapping[str, nn.Parameter] | None = None,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    carried: Carried | None = None,
    attachments: Mapping[str, Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint to the directory `out`: it appears complete, or the disk is as it was before.

    model           transformers model; not changed, whatever its dtype
    tokenizer       transformers tokenizer, saved with its chat template
    manifest        `files`, and `versions` if empty, are filled in here
    extra           parameters without a place in the model (`Program.extra`)
    dtype           dtype on disk: one, or one per tensor name (`stored_dtypes` of the source); default: the live ones
    max_shard_size  of a weight file, in bytes or as "5GB": more weights are split into several files and an index
    carried         the multimodal checkpoint that `model` was loaded from (`Checkpoint.carried`): it is written with
                    `model` as its text model, in the source's own files and dtypes
    attachments     further files to copy: name in the checkpoint -> file
    overwrite       replace a directory that is not empty, after everything has been written

    Returns `out`. Raises `CheckpointError` if `out` is in the way or cannot be written.
    """
    out = Path(out)
    check_destination(out, overwrite)
    # a sibling, so that the rename stays on one file system
    partial = out.parent / f".{out.name}.writing-{os.getpid()}"
    try:
        with _disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            tokenizer.save_pretrained(str(partial))
            if carried is None:
                _save_model(partial, model, dtype, max_shard_size)
            else:
                _save_text_model(partial, model, carried)
            _suppress_mask(partial, manifest)
            if extra:
                _save_extra(partial, extra, dtype)
            for name, path in (attachments or {}).items():
                shutil.copyfile(path, partial / name)
            (partial / "custom_generate").mkdir()
            template = files("flarec").joinpath("templates", "generate.py").read_bytes()
            (partial / "custom_generate" / "generate.py").write_bytes(template)
            manifest = replace(manifest, versions=manifest.versions or versions())
            card = model_card(manifest, out.name, carried.describe() if carried else None)
            (partial / "README.md").write_text(card, encoding="utf-8")
            names = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
            entries = {name: FileEntry.of(partial / name) for name in names}
            (partial / MANIFEST).write_text(replace(manifest, files=entries).to_json(), encoding="utf-8")
            for name in names:  # safetensors writes files that nobody else may read
                (partial / name).chmod((partial / MANIFEST).stat().st_mode)
            _sync(partial)
            _move_into_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _save_model(
    directory: Path, model: Any, dtype: torch.dtype | Mapping[str, torch.dtype] | None, max_shard_size: str | int
) -> None:
    """Weights and configurations. transformers notes the live dtype in the configuration; the stored one counts."""
    config = model.config
    before = (config.dtype, config.architectures)
    state = _cast(model.state_dict(), dtype)
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    try:
        model.save_pretrained(str(directory), state_dict=state, max_shard_size=max_shard_size)
    finally:
        config.dtype, config.architectures = before
    stored = str(sizes.most_common(1)[0][0]).removeprefix("torch.")
    _edit_json(directory / "config.json", {"dtype": stored})


def _save_text_model(directory: Path, model: Any, carried: Carried) -> None:
    """The source's files with the weights of `model` in them, which are saved on their own for a moment."""
    saved = directory / "text"
    saved.mkdir()
    _save_model(saved, model, None, MAX_SHARD_SIZE)
    carried.write(directory, saved, model.state_dict())
    shutil.rmtree(saved)


def _suppress_mask(directory: Path, manifest: Manifest) -> None:
    """Plain transformers does not generate the mask token either."""
    if manifest.mask.kind == "row":
        path = directory / GENERATION_CONFIG
        known = json.loads(path.read_text(encoding="utf-8")).get("suppress_tokens") if path.is_file() else None
        _edit_json(path, {"suppress_tokens": sorted({*(known or []), manifest.mask.token_id})})


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype | Mapping[str, torch.dtype] | None) -> dict[str, Tensor]:
    """The tensors in their dtype on disk. Tied weights stay one tensor: transformers finds ties by their storage."""
    made: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        wanted = dtype.get(name) if isinstance(dtype, Mapping) else dtype
        if wanted is None or not tensor.is_floating_point():
            wanted = tensor.dtype
        key = (tensor.data_ptr(), tensor.shape, wanted)
        if key not in made:
            made[key] = tensor.detach().to(device="cpu", dtype=wanted)
        result[name] = made[key]
    return result


def _save_extra(
    directory: Path, extra: Mapping[str, nn.Parameter], dtype: torch.dtype | Mapping[str, torch.dtype] | None
) -> None:
    state = {name: parameter.detach() for name, parameter in extra.items()}
    usual = Counter(dtype.values()).most_common(1)[0][0] if isinstance(dtype, Mapping) and dtype else dtype
    one = usual if isinstance(usual, torch.dtype) else None
    save_file({name: tensor.contiguous() for name, tensor in _cast(state, one).items()}, directory / EXTRA)


def _edit_json(path: Path, values: Mapping[str, Any]) -> None:
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**table, **values}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(directory: Path) -> None:
    """Everything reaches the disk before the rename does; else a power cut could leave a name without contents."""
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move_into_place(partial: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.replaced-{os.getpid()}"
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(partial, out)
    except OSError:
        if old.exists():
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):  # some file systems cannot sync a directory
        handle = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Failures of the file system as `CheckpointError`. The Rust writers raise classes of their own."""
    try:
        yield
    except Exception as error:
        text = _first_line(error)
        full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or f"os error {errno.ENOSPC}" in text
        if full:
            raise CheckpointError(
                f"the disk is full: {out} was not written (nothing is left behind); free some space and run again"
            ) from error
        if isinstance(error, OSError) or "os error" in text:
            raise CheckpointError(f"{out} cannot be written ({text}); nothing is left behind") from error
        raise


def _weight_files(directory: Path) -> list[Path]:
    """The files that transformers loads; some directories hold the weights a second time under other names."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        return []
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({_first_line(error)}); copy the model again") from error
    return [directory / name for name in sorted(names) if (directory / name).is_file()]


def _from_layer(name: str) -> str:
    match = re.search(r"(?:^|\.)(layers\.\d+\..*)", name)
    return match[1] if match else name


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
