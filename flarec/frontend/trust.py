"""What a source may do when it is opened: nothing. Its files are data; none of them is ever executed, nobody is asked.

transformers runs Python files of a model directory when `trust_remote_code` is true, and asks on the terminal when it
is left out; a configuration can also name attention code for it to fetch, and weights in pickle files. Everything that
is opened with transformers goes through `opened` and `made`, which leave no choice (SECURITY.md).
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError

CODE_KEY = "auto_map"
"""In configurations: transformers' names for classes in Python files that a directory brings, or another repository."""
INDEX = "model.safetensors.index.json"
PICKLE = re.compile(r"(pytorch_model|model|consolidated).*\.(bin|pt|pth|ckpt|pkl)")
"""Names of weight files that are pickles."""
_KINDS = {"AutoConfig": "family", "AutoTokenizer": "tokenizer class"}


def opened(auto: Any, path: str | Path, **options: Any) -> Any:
    """`auto.from_pretrained(path)` for a class of transformers: nothing of the source is executed.

    Raises `UsageError` for what only its own code could open, otherwise what transformers raises.
    """
    with _refusing(auto, str(path)):
        return auto.from_pretrained(str(path), trust_remote_code=False, **options)


def made(auto: Any, config: Any, **options: Any) -> Any:
    """`auto.from_config(config)` for a class of transformers, as `opened`."""
    with _refusing(auto, str(config.name_or_path)):
        return auto.from_config(config, trust_remote_code=False, **options)


def config_table(path: str | Path) -> dict[str, Any]:
    """The values of the config.json of a directory or hub id. Raises what transformers raises."""
    from transformers import PreTrainedConfig

    return dict(PreTrainedConfig.get_config_dict(str(path), trust_remote_code=False)[0])


def check_config(path: str | Path, table: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a configuration that only code of the source could open, or that names code to fetch."""
    from transformers import CONFIG_MAPPING

    family = table.get("model_type")
    if CODE_KEY in table and family not in CONFIG_MAPPING:
        raise UsageError(_refusal(str(path), f"the family '{family}' is"))
    for key, value in _named_code(table):
        raise UsageError(
            f"{path}: {key} = '{value}' in config.json names code of a repository, which is never fetched or run; "
            f"remove {key.rpartition('.')[2]}"
        )


def check_weights(path: str | Path, config: Any) -> None:
    """Raise `UsageError` if the weights of a directory are pickle files, which can hold code: they are not opened."""
    directory = Path(path)
    if not directory.is_dir():  # a hub id: `use_safetensors` of transformers decides
        return
    index, named = directory / INDEX, getattr(config, "transformers_weights", None)
    names = [str(named)] if named else []
    if not named and not (directory / "model.safetensors").is_file():
        if index.is_file():
            names = _shards(index)
        else:
            names = sorted(path.name for path in directory.iterdir() if PICKLE.fullmatch(path.name))
    bad = [name for name in names if not name.endswith((".safetensors", ".safetensors.index.json"))]
    if bad:
        code = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({str(path)!r}, trust_remote_code=False).save_pretrained({str(path)!r})"
        )
        raise UsageError(
            f"{directory / bad[0]} is a pickle file, which can hold code and is not opened; if you trust it, write its "
            f"weights as safetensors with: python -c {shlex.quote(code)}"
        )


def _shards(index: Path) -> list[str]:
    """Files that an index names; a damaged one is left to those who read it."""
    try:
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _named_code(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, value) of implementations that are names of repositories: `owner/name`."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _named_code(value, f"{prefix}{key}.")
        if key.lstrip("_").removesuffix("_internal") in ("attn_implementation", "experts_implementation"):
            for name in value.values() if isinstance(value, Mapping) else (value,):
                if "/" in str(name):
                    yield prefix + key, str(name)


@contextlib.contextmanager
def _refusing(auto: Any, path: str) -> Iterator[None]:
    """transformers' demand for `trust_remote_code=True` as our refusal; any other error as it is."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UsageError(_refusal(path, f"its {_KINDS.get(auto.__name__, 'model class')} is")) from error


def _refusal(path: str, what: str) -> str:
    import transformers

    return (
        f"{path} cannot be opened: {what} not known to transformers {transformers.__version__}, and custom code that a "
        "source brings is not run; upgrade transformers or give a model of a family that it knows"
    )
